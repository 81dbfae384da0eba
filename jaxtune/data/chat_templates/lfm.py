"""LFM 2 and 2.5: ChatML after a bos token, with tools listed in the system turn."""

from jaxtune.data.chat_templates.template import ChatTemplate, filled, leading_system

# The published formats have none for the calls of earlier turns.
_HEAD = (
    r"""
{{- bos_token }}
{%- for message in messages if message['tool_calls'] %}
    {{- raise_exception('@name@ has no form for tool calls') }}
{%- endfor %}"""
    + leading_system()
    + r"""
{%- if tools %}
    {%- set listed %}
        {%- for tool in tools %}{{ tool if tool is string else tool | tojson }}{{ '' if loop.last else ', ' }}
        {%- endfor %}
    {%- endset %}
    {%- set system_text = system_text + ('\n' if system_text else '') %}
    {%- set system_text = system_text + 'List of tools: @list_begins@' + listed + '@list_ends@' %}
{%- endif %}
{%- if system_text %}{{ '<|im_start|>system\n' + system_text + '<|im_end|>\n' }}{% endif %}"""
)

_LAST_ANSWER = r"""
{%- set last = namespace(answer=-1) %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}{% set last.answer = loop.index0 %}{% endif %}
{%- endfor %}"""

# Of reasoning, only that of the last answer stays, unless `keep_past_thinking` says otherwise.
_WITHOUT_PAST_THOUGHTS = r"""
    {%- if message['role'] == 'assistant' and loop.index0 < last.answer and not keep_past_thinking %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] | trim %}{% endif %}
    {%- endif %}"""

_TURNS = r"""
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'tool' and content is not string %}{% set content = content | tojson %}{% endif %}
    {%- set content = content + '' %}@thoughts@
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}
    {%- elif message['role'] == 'tool' %}{{ '@result_begins@' + content + '@result_ends@<|im_end|>' }}
    {%- else %}{{ content + '<|im_end|>' }}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_LFM_2 = filled(
    _HEAD + _TURNS,
    name="lfm-2",
    list_begins="<|tool_list_start|>[",
    list_ends="]<|tool_list_end|>",
    result_begins="<|tool_response_start|>",
    result_ends="<|tool_response_end|>",
    thoughts="",
)
_LFM_2_5 = filled(
    _HEAD + _LAST_ANSWER + _TURNS,
    name="lfm-2.5",
    list_begins="[",
    list_ends="]",
    result_begins="",
    result_ends="",
    thoughts=_WITHOUT_PAST_THOUGHTS,
)

_PARTS = ("<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n")

TEMPLATES = (ChatTemplate("lfm-2", (), _LFM_2, *_PARTS), ChatTemplate("lfm-2.5", (), _LFM_2_5, *_PARTS))
