"""`preview`: one sample as a text in which every token can be told from its neighbours, and what is trained on from
what is only context. In colours for a terminal; elsewhere with marks."""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from jaxtune.data.sample import IGNORED, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_RESET = "\x1b[0m"
_TRAINED, _CONTEXT = ("\x1b[30;42m", "\x1b[30;102m"), ("\x1b[37m", "\x1b[90m")
"""ANSI colours, two of each, which neighbouring tokens have in turn: black on greens, and greys."""
_OPEN, _CLOSE, _BETWEEN = "⟦", "⟧", "¦"

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes, each of which may be a token


class Piece(NamedTuple):
    """What a token says; or several, where they are a character only together."""

    text: str
    trained: bool


def preview(sample: Sample, tokenizer: "Tokenizer", colour: bool | None = None) -> str:
    """The sample's text, token by token, beneath a line that says how to read it.

    Args:
        sample: token ids and labels.
        tokenizer: that made them.
        colour: whether to use colours; None uses them if standard output is a terminal and NO_COLOR is not set.
    """
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    count = f"{len(sample.input_ids)} tokens, {sample.num_trained} trained on"
    if colour:
        legend = f"{_TRAINED[0]}trained on{_RESET}, {_CONTEXT[0]}context{_RESET}"
        return f"{count}: {legend}; shades tell tokens apart\n{_coloured(pieces(sample, tokenizer))}"
    legend = f"{_OPEN}trained on{_CLOSE}, context; {_BETWEEN} between tokens"
    return f"{count}: {legend}\n{_marked(pieces(sample, tokenizer))}"


def pieces(sample: Sample, tokenizer: "Tokenizer") -> Iterator[Piece]:
    """The text in pieces that join to the whole, but for a character of which only a part is trained on. Each token is
    decoded after the one before it: alone, some tokenizers' lose the space that they begin with."""
    ids = sample.input_ids.tolist()
    trained = (sample.labels != IGNORED).tolist()
    trained[:1] = [False]  # nothing stands before it to predict it from
    before, start = 0, 0
    for end in range(1, len(ids) + 1):
        known, text = _decode(tokenizer, ids[before:start]), _decode(tokenizer, ids[before:end])
        unfinished = text.endswith(_INCOMPLETE) and end - start < _LONGEST_CHARACTER
        if unfinished and end < len(ids) and trained[end] == trained[start]:
            continue
        if not text.startswith(known):  # that ended within a character, which this piece completes
            known = known.rstrip(_INCOMPLETE)
        yield Piece(text.removeprefix(known), trained[start])
        before, start = start, end


def _decode(tokenizer: "Tokenizer", ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _coloured(each: Iterator[Piece]) -> str:
    text = ""
    for number, piece in enumerate(each):
        shade = (_TRAINED if piece.trained else _CONTEXT)[number % 2]
        # A background goes on to the end of the line unless it is switched off before it.
        text += f"{shade}{_visible(piece.text)}{_RESET}".replace("\n", f"{_RESET}\n{shade}")
    return text


def _marked(each: Iterator[Piece]) -> str:
    text, trained, at_border = "", False, True
    for piece in each:
        if piece.trained != trained:
            text += _OPEN if piece.trained else _CLOSE
        elif not at_border:
            text += _BETWEEN
        text += _visible(piece.text)
        trained, at_border = piece.trained, False
    return text + (_CLOSE if trained else "")


def _visible(text: str) -> str:
    """Line breaks are shown and made; other characters that do not print (a terminal would obey some) are escaped."""
    return "".join(
        "↵\n" if character == "\n" else character if character.isprintable() else ascii(character)[1:-1]
        for character in text
    )
