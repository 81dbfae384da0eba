"""gpt-oss: every message names its channel; what a system message says becomes the developer's instructions."""

from jaxtune.data.chat_templates.template import ChatTemplate, turns, without_tools

# Options of the published format, all optional: model_identity, reasoning_effort; and current_date, for those who need
# the same text every day.
_HEAD = r"""
{{- '<|start|>system<|message|>' }}
{{- model_identity | default('You are ChatGPT, a large language model trained by OpenAI.') + '\n' }}
{{- 'Knowledge cutoff: 2024-06\nCurrent date: ' }}
{{- current_date if current_date is defined else strftime_now('%Y-%m-%d') }}
{{- '\n\nReasoning: ' + reasoning_effort | default('medium') + '\n\n' }}
{{- '# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' }}
{%- if messages[0]['role'] in ('system', 'developer') %}
    {%- if messages[0]['content'] + '' %}
        {{- '<|start|>developer<|message|># Instructions\n\n' + messages[0]['content'] + '\n\n<|end|>' }}
    {%- endif %}
    {%- set messages = messages[1:] %}
{%- endif %}"""

# The last answer ends with the token that ends a generation, earlier ones as other messages do; only the last keeps
# what was thought before it.
_CONTENT = r"""
    {%- set content = message['content'] + '' %}
    {%- for channel in ('analysis', 'final') if '<|channel|>' + channel + '<|message|>' in content %}
        {{- raise_exception('what gpt-oss thought belongs into the key thinking, without channel tags') }}
    {%- endfor %}
    {%- set is_last = loop.last and not add_generation_prompt %}
    {%- set thought = '' %}
    {%- if is_last and 'thinking' in message %}
        {%- set thought = '<|channel|>analysis<|message|>' + message['thinking'] + '<|end|><|start|>assistant' %}
    {%- endif %}"""

_GPT_OSS = (
    without_tools("gpt-oss")
    + "{%- if builtin_tools %}{{ raise_exception('gpt-oss has no form here for builtin_tools') }}{% endif %}"
    + _HEAD
    + turns(
        "gpt-oss",
        user="'<|start|>user<|message|>' + content + '<|end|>'",
        opening="'<|start|>assistant'",
        answer="thought + '<|channel|>final<|message|>' + content + ('<|return|>' if is_last else '<|end|>')",
        content=_CONTENT,
    )
)

TEMPLATES = (
    ChatTemplate(
        "gpt-oss",
        ("gptoss",),
        _GPT_OSS,
        "<|return|>",
        "<|start|>user<|message|>",
        "<|start|>assistant",
    ),
)
