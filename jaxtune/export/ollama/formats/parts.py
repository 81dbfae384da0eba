"""What a named chat template is to Ollama, and the Go that many of them share.

Ollama's template is executed once, over all messages. It knows the roles system, user, assistant and tool, and merges
neighbours of one role, tools apart. The bos token is not part of it: the runtime adds that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtune.data.chat_templates.template import filled


@dataclass(frozen=True)
class Format:
    """How Ollama prompts in one named chat template, and where it stops."""

    go: str
    """Go's text/template; `$bos` and `$eos` are the tokenizer's tokens."""
    stops: tuple[str, ...]
    """What opens or ends a turn. The tokenizer's eos token comes on top."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What the maker of the format's models recommends, by Ollama's names: in their generation configs, for gpt-oss and
    LFM on their model cards."""


# `slice` gives the messages from one on: a single one left is the last.
EACH = "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"

# Called with a text: `{{ template "trimmed" .Content }}`. It takes off one character at a time, which for Go is a byte;
# a text without its first is as long as a text without its last.
TRIMMED = filled(
    '{{ define "trimmed" }}{{ if . }}{{ $end := len (slice . 1) }}'
    '{{ if eq (slice . 0 1) @spaces@ }}{{ template "trimmed" (slice . 1) }}'
    '{{ else if eq (slice . $end) @spaces@ }}{{ template "trimmed" (slice . 0 $end) }}'
    "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}",
    spaces=r'" " "\n" "\t" "\r" "\f" "\u000b"',
)
TRIMMED_CONTENT = '{{ template "trimmed" .Content }}'

_TURNS = (
    EACH
    + '@before@{{ if eq .Role "assistant" }}@opening@@answer@{{ if not $last }}@ending@{{ end }}'
    + "@system_turn@{{ else }}@user@{{ end }}@asking@{{ end }}"
)
_SYSTEM_TURN = '{{ else if eq .Role "system" }}@system@'
_ASKING = '{{ if and $last (ne .Role "assistant") }}@prompt@{{ end }}'


def turns(
    *,
    user: str,
    opening: str,
    ending: str,
    system: str | None = None,
    answer: str = "{{ .Content }}",
    prompt: str | None = None,
    before: str = "",
) -> str:
    """The turns of a format. A last answer is left open, so that the model goes on with it; otherwise one is asked for.

    Args:
        user: a user's turn, whole.
        opening: what stands before an answer, and asks for one.
        ending: what stands after an answer.
        system: a system turn; None where it is like a user's, which then names its role.
        answer: what the assistant says.
        prompt: asks for an answer, where that is more than `opening`.
        before: stands before every turn.
    """
    prompt = prompt or opening
    return filled(
        _TURNS,
        before=before,
        opening=opening,
        answer=answer,
        ending=ending,
        system_turn="" if system is None else filled(_SYSTEM_TURN, system=system),
        user=user,
        asking=filled(_ASKING, prompt=prompt) if prompt else "",
    )
