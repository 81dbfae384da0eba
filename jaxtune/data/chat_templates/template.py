"""What a named conversation format is, and the Jinja that many of them share.

Every template is written once, with `{% generation %}` around what the assistant writes: the words that the model has
to produce after the prompt, with the token that ends its turn.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

OWN_EOS = "eos_token"
"""As a stop token: the format has none of its own and ends turns with the tokenizer's."""

OWN_BOS = "{bos_token}"
"""In an instruction part: the tokenizer's own bos token, where a format begins every exchange with one."""


@dataclass(frozen=True)
class ChatTemplate:
    """One published conversation format."""

    name: str
    aliases: tuple[str, ...]
    marked_jinja: str  # with {% generation %} markers
    stop_token: str  # ends every turn of the assistant; what generation stops at
    instruction_part: str  # what opens a user's turn
    response_part: str  # what opens the assistant's turn
    has_system: bool = True  # False: the published format refuses system messages

    @property
    def jinja(self) -> str:
        return self.marked_jinja.replace("{% generation %}", "").replace("{% endgeneration %}", "")

    def stop_token_of(self, tokenizer: "Tokenizer") -> str | None:
        return tokenizer.eos_token if self.stop_token == OWN_EOS else self.stop_token

    def parts_of(self, tokenizer: "Tokenizer") -> tuple[str, str]:
        """`(instruction_part, response_part)`, as they stand in what this tokenizer renders."""
        return self.instruction_part.replace(OWN_BOS, tokenizer.bos_token or ""), self.response_part


def filled(jinja: str, **parts: str) -> str:
    """The text with its parts in place of their names, which stand in it as `@name@`: braces are Jinja's."""
    return re.sub(r"@(\w+)@", lambda found: parts[found[1]], jinja)


_WITHOUT_TOOLS = """
{%- if tools %}{{ raise_exception('@name@ has no form for tools') }}{% endif %}
{%- for message in messages if message['tool_calls'] %}
    {{- raise_exception('@name@ has no form for tool calls') }}
{%- endfor %}"""

_LEADING_SYSTEM = """
{%- set system_text = @default@ %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_text = messages[0]['content'] + '' %}
    {%- set messages = messages[1:] %}
{%- endif %}"""

_ALTERNATING = """
{%- for message in messages %}
    {%- if message['role'] == 'system' and loop.first %}
        {{- raise_exception('@name@ has no system role: begin the first user message with these words') }}
    {%- endif %}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('@name@ wants user and assistant in turn, the user first') }}
    {%- endif %}
{%- endfor %}"""

# `+ ''` makes a message without content an error instead of an empty turn.
_WHOLE_CONTENT = """
    {%- set content = message['content'] + '' %}"""

_SYSTEM_TURN = """
    {%- elif message['role'] in @roles@ %}{{ @system@ }}"""

_TURNS = """
{%- for message in messages %}@content@
    {%- if message['role'] == 'user' %}{{ @user@ }}
    {%- elif message['role'] == 'assistant' %}
        {{- @opening@ }}{% generation %}{{ @answer@ }}{% endgeneration %}{{ @closing@ }}@system_turn@
    {%- else %}{{ raise_exception('@name@ has no form here for the role ' + message['role']) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ @prompt@ }}{% else %}{{ @ending@ }}{% endif %}"""


def without_tools(name: str) -> str:
    """Refuses tools, which a format without a form for them would drop silently."""
    return filled(_WITHOUT_TOOLS, name=name)


def leading_system(default: str = "''") -> str:
    """Takes a leading system message out of `messages`: `system_text` is what it says, or the default expression."""
    return filled(_LEADING_SYSTEM, default=default)


def alternating(name: str) -> str:
    """Refuses what is not user and assistant in turn, as the published templates of such formats do."""
    return filled(_ALTERNATING, name=name)


def turns(
    name: str,
    *,
    user: str,
    opening: str,
    answer: str,
    closing: str = "''",
    system: str | None = None,
    system_roles: tuple[str, ...] = ("system",),
    content: str = _WHOLE_CONTENT,
    prompt: str | None = None,
    ending: str = "''",
) -> str:
    """The turns of a format, from what each role's looks like. All but `name`, `system_roles` and `content` (Jinja that
    sets `content`) are Jinja expressions.

    Args:
        user: a user's turn, whole.
        opening: what stands before an answer, and asks for one.
        answer: what the assistant writes, with the token that ends it.
        closing: what follows an answer without being its own.
        system: a system turn; None where there is none at this place.
        prompt: asks for an answer, where that is more than `opening`.
        ending: ends a conversation in which no answer is asked for.
    """
    roles = str(list(system_roles))
    return filled(
        _TURNS,
        name=name,
        content=content,
        user=user,
        opening=opening,
        answer=answer,
        closing=closing,
        system_turn=filled(_SYSTEM_TURN, roles=roles, system=system) if system else "",
        prompt=prompt or opening,
        ending=ending,
    )
