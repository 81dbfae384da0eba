"""ChatML and the formats that differ from it in little: LFM 2 and 2.5, Phi-4."""

from jaxtune.data.chat_templates.template import ChatTemplate, leading_system, turns, without_tools

_CHATML = (
    without_tools("chatml")
    + r"""
{%- for message in messages %}
    {%- set content = message['content'] + '' %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ content + '<|im_end|>' }}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)

# Tools are listed in the system turn; LFM 2 has no published form for the calls of earlier turns.
_LFM_2 = (
    r"""
{{- bos_token }}
{%- for message in messages if message['tool_calls'] %}
    {{- raise_exception('lfm-2 has no form for tool calls') }}
{%- endfor %}"""
    + leading_system()
    + r"""
{%- if tools %}
    {%- set listed %}
        {%- for tool in tools %}{{ tool if tool is string else tool | tojson }}{{ '' if loop.last else ', ' }}
        {%- endfor %}
    {%- endset %}
    {%- set system_text = system_text + ('\n' if system_text else '') %}
    {%- set system_text = system_text + 'List of tools: <|tool_list_start|>[' + listed + ']<|tool_list_end|>' %}
{%- endif %}
{%- if system_text %}{{ '<|im_start|>system\n' + system_text + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}{% generation %}
        {{- message['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- elif message['role'] == 'tool' %}
        {%- set result = message['content'] if message['content'] is string else message['content'] | tojson %}
        {{- '<|tool_response_start|>' + result + '<|tool_response_end|><|im_end|>' }}
    {%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)

# Of reasoning, only that of the last answer stays, unless `keep_past_thinking` says otherwise.
_LFM_2_5 = (
    without_tools("lfm-2.5")
    + r"""
{{- bos_token }}"""
    + leading_system()
    + r"""
{%- if system_text %}{{ '<|im_start|>system\n' + system_text + '<|im_end|>\n' }}{% endif %}
{%- set last = namespace(answer=-1) %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}{% set last.answer = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message['content'] + '' %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- if '</think>' in content and loop.index0 < last.answer and not keep_past_thinking %}
            {%- set content = content.split('</think>')[-1] | trim %}
        {%- endif %}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ content + '<|im_end|>' }}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)

_PHI_4 = without_tools("phi-4") + turns(
    "phi-4",
    system="'<|im_start|>system<|im_sep|>' + content + '<|im_end|>'",
    user="'<|im_start|>user<|im_sep|>' + content + '<|im_end|>'",
    opening="'<|im_start|>assistant<|im_sep|>'",
    answer="content + '<|im_end|>'",
)

_PARTS = ("<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n")

# Yi's format is ChatML, and so is the one that Gemmas are given under these names: their tokenizers add the bos token.
_CHATML_NAMES = ("gemma_chatml", "gemma2_chatml", "yi-chat")

TEMPLATES = (
    ChatTemplate("chatml", _CHATML_NAMES, _CHATML, *_PARTS),
    ChatTemplate("lfm-2", (), _LFM_2, *_PARTS),
    ChatTemplate("lfm-2.5", (), _LFM_2_5, *_PARTS),
    ChatTemplate(
        "phi-4",
        (),
        _PHI_4,
        "<|im_end|>",
        "<|im_start|>user<|im_sep|>",
        "<|im_start|>assistant<|im_sep|>",
    ),
)
