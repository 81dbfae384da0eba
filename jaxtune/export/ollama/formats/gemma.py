"""Gemma 1 to 4. The first Gemmas' chat template refuses system messages: here they open the user's next turn, as its
error advises. Of thoughts that stand within what Gemma 4 said, Go cannot leave out any."""

from jaxtune.export.ollama.formats.parts import TRIMMED, TRIMMED_CONTENT, Format, turns


def _gemma(user: str) -> str:
    """A system message is held until the user's next turn, whose words are `user`."""
    return (
        TRIMMED
        + '{{ $system := "" }}'
        + turns(
            system=r'{{ $system = printf "%s\n\n" .Content }}',
            user="<start_of_turn>user\n" + user + '{{ $system = "" }}<end_of_turn>\n',
            opening="<start_of_turn>model\n",
            answer=TRIMMED_CONTENT,
            ending="<end_of_turn>\n",
        )
    )


_GEMMA = _gemma('{{ template "trimmed" (printf "%s%s" $system .Content) }}')
_GEMMA_3 = _gemma("{{ $system }}" + TRIMMED_CONTENT)


def _gemma_4(prompt: str) -> str:
    """Thinking is asked for at the top of the system turn."""
    return TRIMMED + turns(
        before='{{ if and $.Think (eq $i 0) (ne .Role "system") }}<|turn>system\n<|think|>\n<turn|>\n{{ end }}',
        system="<|turn>system\n{{ if and $.Think (eq $i 0) }}<|think|>\n{{ end }}"
        + TRIMMED_CONTENT
        + "<turn|>\n",
        user="<|turn>user\n" + TRIMMED_CONTENT + "<turn|>\n",
        opening="<|turn>model\n",
        answer=TRIMMED_CONTENT,
        ending="<turn|>\n",
        prompt=prompt,
    )


_UNLESS_THINKING = "<|turn>model\n{{ if not $.Think }}<|channel>thought\n<channel|>{{ end }}"

_GOOGLES = {"temperature": 1.0, "top_p": 0.95, "top_k": 64}

FORMATS = {
    "gemma": Format(_GEMMA, ("<end_of_turn>",)),
    "gemma-3": Format(_GEMMA_3, ("<end_of_turn>",), _GOOGLES),
    "gemma-4": Format(_gemma_4("<|turn>model\n"), ("<turn|>",), _GOOGLES),
    "gemma-4-thinking": Format(_gemma_4(_UNLESS_THINKING), ("<turn|>",), _GOOGLES),
}
