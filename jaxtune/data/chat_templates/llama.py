"""Llama 2 to 3.3, and Mistral's format, which is Llama 2's without system messages."""

from jaxtune.data.chat_templates.template import (
    OWN_BOS,
    OWN_EOS,
    ChatTemplate,
    alternating,
    leading_system,
    turns,
    without_tools,
)

# Every exchange begins with a bos token; a system message stands in the first.
_LLAMA = (
    without_tools("llama")
    + leading_system("none")
    + alternating("llama")
    + r"""
{%- set first_words = '' %}
{%- if system_text is not none %}
    {%- set first_words = '<<SYS>>\n' + system_text + '\n<</SYS>>\n\n' %}
{%- endif %}"""
    + turns(
        "llama",
        user="bos_token + '[INST] ' + ((first_words if loop.first else '') + content) | trim + ' [/INST]'",
        opening="''",
        answer="' ' + content | trim + ' ' + eos_token",
    )
)

_MISTRAL = (
    without_tools("mistral")
    + alternating("mistral")
    + "{{- bos_token }}"
    + turns("mistral", user="'[INST] ' + content + ' [/INST]'", opening="''", answer="content + eos_token")
)

_LLAMA_3 = r"""
{%- if tools %}{{ raise_exception('llama-3 has no form for tools; llama-3.1 has') }}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['tool_calls'] %}{{ raise_exception('llama-3 has no form for tool calls') }}{% endif %}
    {%- set content = (message['content'] + '') | trim %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['role'] == 'assistant' %}{% generation %}{{ content + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{ content + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# Options of the published format, all optional: date_string, custom_tools (instead of tools), builtin_tools,
# tools_in_user_message. There is always a system turn, for the dates.
_LLAMA_3_1 = r"""
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if tools is not defined %}{% set tools = none %}{% endif %}
{%- set in_user_turn = tools_in_user_message | default(true) %}
{%- set how_to_call %}
    {{- 'Respond in the format {"name": function name, ' }}
    {{- '"parameters": dictionary of argument name and its value}.Do not use variables.\n\n' }}
    {%- for tool in tools or [] %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
{%- endset %}
{%- set system_text = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_text = (messages[0]['content'] + '') | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none or builtin_tools is defined %}{{ 'Environment: ipython\n' }}{% endif %}
{%- if builtin_tools is defined %}
    {{- 'Tools: ' + builtin_tools | reject('equalto', 'code_interpreter') | join(', ') + '\n\n' }}
{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date_string | default('26 Jul 2024') + '\n\n' }}
{%- if tools is not none and not in_user_turn %}
    {{- 'You have access to the following functions. ' }}
    {{- 'To call a function, please respond with JSON for a function call.' + how_to_call }}
{%- endif %}
{{- system_text + '<|eot_id|>' }}
{%- if tools is not none and in_user_turn %}
    {%- if not messages %}{{ raise_exception('tools go into the first user turn, and there is none') }}{% endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
    {{- 'Given the following functions, please respond with a JSON for a function call ' }}
    {{- 'with its proper arguments that best answers the given prompt.\n\n' + how_to_call }}
    {{- (messages[0]['content'] + '') | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message['tool_calls'] | length != 1 %}
            {{- raise_exception('llama-3.1 makes one tool call in a turn') }}
        {%- endif %}
        {%- set call = message['tool_calls'][0]['function'] %}
        {%- if builtin_tools is defined and call['name'] in builtin_tools %}
            {%- set text %}<|python_tag|>{{ call['name'] }}.call({% for name, value in call['arguments'] | items %}
                {{- name + '="' + value + '"' }}{% if not loop.last %}, {% endif %}{% endfor %}){% endset %}
        {%- else %}
            {%- set text = '{"name": "' + call['name'] + '", "parameters": ' + call['arguments'] | tojson + '}' %}
        {%- endif %}
        {%- set text = text + ('<|eom_id|>' if builtin_tools is defined else '<|eot_id|>') %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}{{ text }}{% endgeneration %}
    {%- elif message['role'] in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message['content'] | tojson + '<|eot_id|>' }}
    {%- else %}
        {%- set content = (message['content'] + '') | trim %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {%- if message['role'] == 'assistant' %}{% generation %}{{ content + '<|eot_id|>' }}{% endgeneration %}
        {%- else %}{{ content + '<|eot_id|>' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

_LLAMA_3_PARTS = (
    "<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
_LLAMA_3_1_NAMES = ("llama-31", "llama-3.2", "llama-3.3", "llama-32", "llama-33")

TEMPLATES = (
    ChatTemplate("llama", (), _LLAMA, OWN_EOS, OWN_BOS + "[INST] ", " [/INST]"),
    ChatTemplate("llama-3", ("llama3",), _LLAMA_3, *_LLAMA_3_PARTS),
    ChatTemplate("llama-3.1", _LLAMA_3_1_NAMES, _LLAMA_3_1, *_LLAMA_3_PARTS),
    ChatTemplate("mistral", (), _MISTRAL, OWN_EOS, "[INST] ", " [/INST]", has_system=False),
)
