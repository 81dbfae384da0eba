"""A chat template out of an example: two turns, written down as the model is to see them, with `{SYSTEM}`, `{INPUT}`
and `{OUTPUT}` where their texts belong.

Two turns say all there is to say. What stands between the first answer and the second question is the end of an answer
and the opening of a question; what stands after the second answer is the end of an answer alone. So the one is taken
off the other, and any number of turns can be put together from the parts.

The template that a tokenizer gets begins with a comment that holds these parts. It is saved with the tokenizer, and
whoever needs more than the text (a mask of the answers, a Modelfile) reads it there.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from jaxtune.errors import ChatTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_FIELD = re.compile(r"\{(SYSTEM|INPUT|OUTPUT)\}")
_TWO_TURNS = ["INPUT", "OUTPUT", "INPUT", "OUTPUT"]
_COMMENT = re.compile(r"\{# parts of the example: (\{.*?\}) #\}")

_SYSTEM = r"""
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '' %}{% set messages = messages[1:] %}
{%- else %}
    {%- set system = <default_system> %}
{%- endif %}
{{- <opening> + system }}"""

_TURNS = r"""
{%- if tools %}{{ raise_exception('the example of this template has no form for tools') }}{% endif %}
{%- for message in messages %}
    {%- set asks = loop.index0 % 2 == 0 %}
    {%- if message['role'] != ('user' if asks else 'assistant') or message['tool_calls'] %}
        {{- raise_exception(<only_turns>) }}
    {%- endif %}
    {%- set content = message['content'] + '' %}
    {%- if asks %}{{ (<first_question> if loop.first else <question_start>) + content + <question_end> }}
    {%- else %}{{ <answer_start> }}{% generation %}{{ content + <answer_end> }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ <answer_start> }}{% endif %}"""

# Each `if` stands alone: they exclude one another.
_GO = (
    '{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}<system>{{ if eq .Role "user" }}'
    "{{ if eq $i <first> }}<first_question>{{ end }}{{ if ne $i <first> }}<question_start>{{ end }}{{ .Content }}"
    '<question_end>{{ if $last }}<answer_start>{{ end }}{{ end }}{{ if eq .Role "assistant" }}<answer_start>'
    "{{ .Content }}{{ if not $last }}<answer_end>{{ end }}{{ end }}{{ end }}"
)
_GO_SYSTEM = '{{ if eq .Role "system" }}<opening>{{ .Content }}{{ end }}'


@dataclass(frozen=True)
class ExampleTemplate:
    """The parts of an example. A conversation is `opening`, the system message and `first_question` (the latter alone
    if there is no `{SYSTEM}`), a question, `question_end`, `answer_start`, an answer, `answer_end`; then, for a further
    turn, `question_start` and so on."""

    opening: str | None
    """What stands before the system message; None where the example has none."""
    default_system: str
    first_question: str
    question_start: str
    question_end: str
    answer_start: str
    answer_end: str
    writes_bos: bool
    """The tokenizer's bos token comes first, by its name: `go` goes without, because Ollama adds it."""

    @property
    def marked_jinja(self) -> str:
        """With {% generation %} markers around the answers and what ends them."""
        parts = {**asdict(self), "only_turns": "questions and answers come in turns, after a system message"}
        if self.opening is None:
            parts["only_turns"] = "questions and answers come in turns; the example has no {SYSTEM}"
        # JSON's escapes are also Jinja's, so any text survives.
        written = {name: json.dumps(part, ensure_ascii=False) for name, part in parts.items()}
        # ASCII, and no #: nothing in it ends the comment.
        comment = json.dumps(asdict(self)).replace("#", "\\u0023")
        bos = "{{- bos_token }}" if self.writes_bos else ""
        body = _fill(_TURNS if self.opening is None else _SYSTEM + _TURNS, written)
        return f"{{# parts of the example: {comment} #}}{bos}{body}"

    @property
    def jinja(self) -> str:
        """What the tokenizer gets: several engines refuse the markers."""
        turns = self.marked_jinja
        return turns.replace("{% generation %}", "").replace("{% endgeneration %}", "")

    @property
    def go(self) -> str | None:
        """The same for Ollama, without bos, which it adds. None where Go's templates have no form for the texts."""
        parts = {name: part for name, part in asdict(self).items() if isinstance(part, str)}
        if any("{{" in part or '"""' in part for part in parts.values()):
            return None
        has_system = self.opening is not None
        system = _fill(_GO_SYSTEM, parts) if has_system else ""
        return _fill(_GO, {**parts, "system": system, "first": str(int(has_system))})


def derive(example: str, *, default_system: str, stops: Sequence[str], eos: str, bos: str) -> ExampleTemplate:
    """The parts of an example.

    Args:
        example: its text.
        default_system: the system message of conversations that have none.
        stops: tokens that may end an answer. Where none of them does, `eos` is put after the answers.
        eos: the tokenizer's.
        bos: what the tokenizer puts before every text, and so the template has to, whether the example does or not.
            An empty string if that is nothing.
    """
    fields = _FIELD.findall(example)
    if fields not in (_TWO_TURNS, ["SYSTEM", *_TWO_TURNS]):
        found = ", ".join(f"{{{field}}}" for field in fields) or "no fields"
        raise ChatTemplateError(
            f"the example of the chat template has {found}.",
            expected="{SYSTEM} (or not), {INPUT}, {OUTPUT}, {INPUT}, {OUTPUT}, in this order: two turns.",
            fix="Write the turn a second time, as it follows on the first, to say what stands between turns.",
        )
    *before, to_answer, to_question, to_second_answer, end = _FIELD.split(example)[::2]
    if to_answer != to_second_answer or not to_answer:
        raise ChatTemplateError(
            f"between question and answer, the example has {to_answer!r} and then {to_second_answer!r}.",
            expected="the same text in both turns, and some.",
            fix="Write both turns alike.",
        )
    ended = [any(stop in text for stop in stops) for text in (to_question, end)]
    if not any(ended):
        to_question, end = eos + to_question, eos + end
    if not to_question.startswith(end) or len(set(ended)) > 1:
        raise ChatTemplateError(
            f"after the first answer, the example has {to_question!r}; after the second, {end!r}.",
            expected="what ends an answer after both, and after the first then the opening of the next question.",
            fix="Write the example to its last character as it is meant: a line break at its end counts.",
        )
    before[0] = before[0].removeprefix(bos)
    # What ends an answer often ends a question too, and is then written as soon as there is one.
    question_end = end if to_answer.startswith(end) and to_answer != end else ""
    return ExampleTemplate(
        opening=before[0] if len(before) == 2 else None,
        default_system=default_system,
        first_question=before[-1],
        question_start=to_question.removeprefix(end),
        question_end=question_end,
        answer_start=to_answer.removeprefix(question_end),
        answer_end=end,
        writes_bos=bool(bos),
    )


def example_of(tokenizer: "Tokenizer") -> ExampleTemplate | None:
    """The example that the tokenizer's chat template was derived from, also after it was saved and loaded again."""
    jinja = tokenizer.chat_template
    comment = _COMMENT.match(jinja) if isinstance(jinja, str) else None
    if comment is None:
        return None
    try:
        example = ExampleTemplate(**json.loads(comment[1]))
    except (ValueError, TypeError):  # someone changed it
        return None
    return example if example.jinja == jinja else None


def _fill(template: str, parts: dict[str, str]) -> str:
    return re.sub(r"<(\w+)>", lambda field: parts[field[1]], template)
