"""Gemma 1 to 4, as text: user and model in turn, without white space at the ends of what they say."""

from jaxtune.data.chat_templates.template import ChatTemplate, alternating, filled, turns, without_tools


def _gemma_turns(name: str, *, user: str, content: str) -> str:
    return turns(
        name,
        user=rf"'<start_of_turn>user\n' + {user} + '<end_of_turn>\n'",
        opening=r"'<start_of_turn>model\n'",
        answer="content + '<end_of_turn>'",
        closing=r"'\n'",
        content=content,
    )


_TRIMMED = """
    {%- set content = (message['content'] + '') | trim %}"""

_GEMMA = (
    without_tools("gemma")
    + alternating("gemma")
    + "{{- bos_token }}"
    + _gemma_turns("gemma", user="content", content=_TRIMMED)
)

# What is said may also be a list of parts; this is the text model, so all of them are texts.
_TEXT_PARTS = """
    {%- set content = message['content'] %}
    {%- if content is not string %}
        {%- set content %}
            {%- for part in message['content'] + [] %}
                {%- if part['type'] != 'text' %}
                    {{- raise_exception('@name@ has no form here for a part of the type ' + part['type']) }}
                {%- endif %}
                {{- part['text'] | trim }}
            {%- endfor %}
        {%- endset %}
    {%- endif %}
    {%- set content = content | trim %}"""

# A system message opens the first user's turn.
_GEMMA_3 = (
    without_tools("gemma-3")
    + r"""
{%- set system_text = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_text = messages[0]['content'] %}
    {%- if system_text is not string %}{% set system_text = system_text[0]['text'] %}{% endif %}
    {%- set system_text = system_text + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}"""
    + alternating("gemma-3")
    + "{{- bos_token }}"
    + _gemma_turns(
        "gemma-3",
        user="(system_text if loop.first else '') + content",
        content=filled(_TEXT_PARTS, name="gemma-3"),
    )
)

# Thoughts of the model are left out of what it said.
_SPOKEN = (
    filled(_TEXT_PARTS, name="gemma-4")
    + """
    {%- if message['role'] == 'assistant' %}
        {%- set spoken %}
            {%- for piece in content.split('<channel|>') %}{{ piece.split('<|channel>')[0] }}{% endfor %}
        {%- endset %}
        {%- set content = spoken | trim %}
    {%- endif %}"""
)


# Thinking is asked for at the top of the system turn.
_THINK = r"""
{%- if enable_thinking and messages[0]['role'] not in ('system', 'developer') %}
    {{- '<|turn>system\n<|think|>\n<turn|>\n' }}
{%- endif %}"""


def _gemma_4(name: str, prompt: str) -> str:
    return (
        without_tools(name)
        + "{{- bos_token }}"
        + _THINK
        + turns(
            name,
            system=r"'<|turn>system\n' + ('<|think|>\n' if enable_thinking and loop.first else '')"
            r" + content + '<turn|>\n'",
            system_roles=("system", "developer"),
            user=r"'<|turn>user\n' + content + '<turn|>\n'",
            opening=r"'<|turn>model\n'",
            answer="content + '<turn|>'",
            closing=r"'\n'",
            content=_SPOKEN,
            prompt=prompt,
        )
    )


# The models that can think are asked not to by a thought that is over before it began.
_UNLESS_THINKING = r"'<|turn>model\n' + ('' if enable_thinking else '<|channel>thought\n<channel|>')"

_GEMMA_PARTS = ("<end_of_turn>", "<start_of_turn>user\n", "<start_of_turn>model\n")
_GEMMA_4_PARTS = ("<turn|>", "<|turn>user\n", "<|turn>model\n")

TEMPLATES = (
    ChatTemplate("gemma", ("gemma2",), _GEMMA, *_GEMMA_PARTS, has_system=False),
    ChatTemplate("gemma-3", ("gemma3", "gemma-3n", "gemma3n"), _GEMMA_3, *_GEMMA_PARTS),
    ChatTemplate("gemma-4", ("gemma4",), _gemma_4("gemma-4", r"'<|turn>model\n'"), *_GEMMA_4_PARTS),
    ChatTemplate(
        "gemma-4-thinking",
        ("gemma4-thinking",),
        _gemma_4("gemma-4-thinking", _UNLESS_THINKING),
        *_GEMMA_4_PARTS,
    ),
)
