"""ChatML, and Phi-4's format, which has other white space."""

from jaxtune.data.chat_templates.template import ChatTemplate, turns, without_tools

# `+ ''` makes a message without content an error instead of an empty turn.
_CHATML = r"""
{%- if tools %}{{ raise_exception('chatml has no form for tools') }}{% endif %}
{%- for message in messages %}
    {%- if message['tool_calls'] %}{{ raise_exception('chatml has no form for tool calls') }}{% endif %}
    {%- set content = message['content'] + '' %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ content + '<|im_end|>' }}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

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
    ChatTemplate(
        "phi-4",
        (),
        _PHI_4,
        "<|im_end|>",
        "<|im_start|>user<|im_sep|>",
        "<|im_start|>assistant<|im_sep|>",
    ),
)
