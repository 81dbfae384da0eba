"""Turns found in token ids: `find_marker` says which tokens open a turn, `mask_to_responses` keeps the labels of what
lies between the opening of an answer and that of the next question.

A turn's opening ("<|im_start|>assistant\\n") is searched for as tokens, and the tokens at its edges depend on the text
around it: its last newline may be one token with the newline that the answer starts with. So a part is tokenised in
many surroundings: what is the same in all of them is searched for, and what is left on either side belongs to the
opening wherever it is there. (Searching the decoded text instead would need tokens that decode one by one, which not
every tokenizer has, and would still have to decide about a token that spans the border.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np

from jaxtune.data.encoding import encode_with_offsets
from jaxtune.data.sample import IGNORED, Sample
from jaxtune.errors import ChatTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# What may stand before and after a turn's opening; the first of each is the commonest.
_BEFORE = ("\n", "", "\n\n", ". ", ".", "x")
_AFTER = ("Hi", "hi", "1", " ", "\n")


@dataclass(frozen=True)
class Marker:
    """The tokens of a turn's opening: always `core`; on either side of it one of the ways in which the rest of the
    opening was seen to tokenise, the longest that is there (or nothing: it has merged with the text)."""

    core: tuple[int, ...]
    before: tuple[tuple[int, ...], ...] = ()
    after: tuple[tuple[int, ...], ...] = ()

    def spans(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Where it occurs: the first token of the opening, and the first after it."""
        spans = []
        for start in np.flatnonzero(ids == self.core[0]).tolist():
            end = start + len(self.core)
            if tuple(ids[start:end].tolist()) == self.core:
                lead = [
                    len(t) for t in self.before if tuple(ids[max(0, start - len(t)) : start].tolist()) == t
                ]
                tail = [len(t) for t in self.after if tuple(ids[end : end + len(t)].tolist()) == t]
                spans.append((start - max(lead, default=0), end + max(tail, default=0)))
        return spans


def mask_to_responses(samples: Sequence[Sample], instruction: Marker, response: Marker) -> list[Sample]:
    """The samples with -100 for every label outside the answers. An answer goes from after a response marker to before
    the next instruction marker (or to the end), so the token that ends the assistant's turn is trained on."""
    return [Sample(sample.input_ids, _only_responses(sample, instruction, response)) for sample in samples]


def _only_responses(sample: Sample, instruction: Marker, response: Marker) -> np.ndarray:
    ids = sample.input_ids
    openings = [(*span, False) for span in instruction.spans(ids)] + [
        (*span, True) for span in response.spans(ids)
    ]
    answered = np.zeros(len(ids), dtype=bool)
    answer_from = None
    for start, end, is_response in sorted(openings):
        if answer_from is not None:
            answered[answer_from:start] = True
        answer_from = end if is_response else None
    if answer_from is not None:
        answered[answer_from:] = True
    return np.where(answered, sample.labels, np.int32(IGNORED))


def find_marker(tokenizer: "Tokenizer", part: str) -> Marker:
    """The marker of a part such as "### Response:\\n", from its tokens in many surroundings."""
    # Where the part begins or ends with a letter, a letter next to it would make another word.
    befores = [text for text in _BEFORE if not (part[:1].isalnum() and text[-1:].isalnum())]
    afters = [text for text in _AFTER if not (part[-1:].isalnum() and text[:1].isalnum())]
    seen = [_tokens_inside(tokenizer, before, part, after) for before, after in product(befores, afters)]
    whole = max(seen, key=lambda tokens: len(tokenizer.decode(tokens)))
    windows = (
        whole[start:end] for start, end in sorted(combinations(range(len(whole) + 1), 2), key=_by_length)
    )
    core = next((window for window in windows if all(_find(tokens, window) >= 0 for tokens in seen)), ())
    if not core or 2 * len(_letters(tokenizer.decode(core))) < len(_letters(part)):
        raise ChatTemplateError(
            f"the tokens of {part!r} depend on the text around it: only {tokenizer.decode(core)!r} is always there.",
            expected="an instruction_part and a response_part that the tokenizer keeps apart from other text.",
            fix="Give a longer part, up to a line break or a special token.",
        )
    starts = [_find(tokens, core) for tokens in seen]
    return Marker(
        core,
        before=tuple(sorted({tokens[:start] for tokens, start in zip(seen, starts, strict=True)})),
        after=tuple(
            sorted({tokens[start + len(core) :] for tokens, start in zip(seen, starts, strict=True)})
        ),
    )


def _tokens_inside(tokenizer: "Tokenizer", before: str, part: str, after: str) -> tuple[int, ...]:
    ids, offsets = encode_with_offsets(tokenizer, [before + part + after])[0]
    first, last = len(before), len(before) + len(part)
    return tuple(i for i, (start, end) in zip(ids, offsets, strict=True) if first <= start < end <= last)


def _find(tokens: tuple[int, ...], window: tuple[int, ...]) -> int:
    """Where `window` begins in `tokens`, -1 if nowhere."""
    return next(
        (at for at in range(len(tokens) - len(window) + 1) if tokens[at : at + len(window)] == window), -1
    )


def _by_length(span: tuple[int, int]) -> int:
    return span[0] - span[1]


def _letters(text: str) -> str:
    return "".join(text.split())
