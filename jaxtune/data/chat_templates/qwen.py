"""Qwen 2.5 and 3: ChatML with tools, and with thoughts that only the newest answers keep."""

from jaxtune.data.chat_templates.template import ChatTemplate, filled, leading_system

_HEAD = r"""
{%- if tools or system_text is not none %}
    {{- '<|im_start|>system\n' + (system_text or '') }}
    {%- if tools %}
        {{- '\n\n' if system_text is not none else '' }}
        {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
        {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
        {%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
        {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
        {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
        {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}"""

# The last question that a person asked: results of tools come back in the user's turns.
_LAST_QUESTION = r"""
{%- set last = namespace(question=messages | length) %}
{%- for message in messages %}
    {%- set content = message['content'] or '' %}
    {%- if message['role'] == 'user' %}
        {%- if not (content.startswith('<tool_response>') and content.endswith('</tool_response>')) %}
            {%- set last.question = loop.index0 %}
        {%- endif %}
    {%- endif %}
{%- endfor %}"""

_THOUGHT = r"""
        {%- set thought = '' %}
        {%- if 'reasoning_content' in message and message['reasoning_content'] is not none %}
            {%- set thought = message['reasoning_content'] %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- set said = content %}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {%- set said = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') %}
        {%- endif %}"""

_NO_THOUGHT = """
        {%- set said = content %}"""

_TURNS = r"""
{%- for message in messages %}
    {%- set content = message['content'] or '' if message['tool_calls'] else message['content'] + '' %}
    {%- if message['role'] == 'assistant' %}@said@
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ said }}
        {%- for call in message['tool_calls'] or [] %}
            {{- '\n' if content or not loop.first else '' }}
            {%- set call = call['function'] if call['function'] else call %}
            {{- '<tool_call>\n{"name": "' + call['name'] + '", "arguments": ' }}
            {{- @arguments@ }}{{ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1]['role'] != 'tool' else '' }}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1]['role'] != 'tool' else '' }}
    {%- elif message['role'] in ('user', 'system') %}
        {{- '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}
    {%- else %}{{ raise_exception('Qwen has no form for the role ' + message['role']) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}@prompt@{% endif %}"""


def _qwen(*, default_system: str = "none", thinks: bool, arguments: str, prompt: str = "") -> str:
    """`default_system` and `arguments` (of a call) are Jinja expressions, `prompt` is Jinja."""
    loop = filled(_TURNS, said=_THOUGHT if thinks else _NO_THOUGHT, arguments=arguments, prompt=prompt)
    return leading_system(default_system) + _HEAD + (_LAST_QUESTION if thinks else "") + loop


_DEFAULT = "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'"
_AS_JSON = "call['arguments'] | tojson"
_AS_THEY_ARE = "call['arguments'] if call['arguments'] is string else call['arguments'] | tojson"
_NO_THINKING = r"""
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"""

_QWEN_2_5 = _qwen(default_system=_DEFAULT, thinks=False, arguments=_AS_JSON)
_QWEN_3 = _qwen(thinks=True, arguments=_AS_THEY_ARE, prompt=_NO_THINKING)
_INSTRUCT = _qwen(thinks=False, arguments=_AS_THEY_ARE)
_THINKING = _qwen(thinks=True, arguments=_AS_THEY_ARE, prompt=r"{{ '<think>\n' }}")

_PARTS = ("<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n")

_QWEN_2_5_NAMES = (
    *("qwen-25", "qwen25", "qwen2.5"),
    *("qwen-2.5-coder", "qwen-25-coder", "qwen2.5-coder", "qwen25-coder"),
)

TEMPLATES = (
    ChatTemplate("qwen-2.5", _QWEN_2_5_NAMES, _QWEN_2_5, *_PARTS),
    ChatTemplate("qwen-3", ("qwen3",), _QWEN_3, *_PARTS),
    ChatTemplate("qwen3-instruct", (), _INSTRUCT, *_PARTS),
    ChatTemplate("qwen3-thinking", (), _THINKING, *_PARTS),
)
