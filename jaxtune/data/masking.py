"""Training on the assistant's answers only, found in the tokens themselves: the way for text that was rendered before
it came here. `train_on_responses_only` is what users call, `mask_to_responses` what it does.

A turn's opening ("<|im_start|>assistant\\n") is searched for as tokens, and the tokens at its edges depend on the text
around it: its last newline may be one token with the newline that the answer starts with. So a part is tokenised in
many surroundings: what is the same in all of them is searched for, and what is left on either side belongs to the
opening wherever it is there. (Searching the decoded text instead would need tokens that decode one by one, which not
every tokenizer has, and would still have to decide about a token that spans the border.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.data import encoding
from jaxtune.data.sample import IGNORED, Sample
from jaxtune.data.templates import template_of
from jaxtune.errors import ChatTemplateError, DatasetError
from jaxtune.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = get_logger(__name__)

# What may stand before and after a turn's opening; the first of each is the commonest.
_BEFORE = ("\n", "", "\n\n", ". ", ".", "x")
_AFTER = ("Hi", "hi", "1", " ", "\n")


@dataclass(frozen=True)
class Marker:
    """The tokens of a turn's opening: `core` always, `before` and `after` where they did not merge with the text."""

    core: tuple[int, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def spans(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Where it occurs: the first token of the opening, and the first after it."""
        spans = []
        for start in np.flatnonzero(ids == self.core[0]).tolist():
            end = start + len(self.core)
            if tuple(ids[start:end].tolist()) != self.core:
                continue
            earlier = tuple(ids[max(0, start - len(self.before)) : start].tolist())
            later = tuple(ids[end : end + len(self.after)].tolist())
            lead = len(_common_start(earlier[::-1], self.before[::-1]))
            spans.append((start - lead, end + len(_common_start(later, self.after))))
        return spans


def train_on_responses_only(
    trainer: Any, instruction_part: str | None = None, response_part: str | None = None
) -> Any:
    """Makes the trainer train on the assistant's answers only (and evaluate on them), and returns the trainer.

    Args:
        trainer: an SFTTrainer, or anything with `samples`, `eval_samples` and `processing_class`.
        instruction_part: what opens a user's turn, as it stands in the text; None takes it from the chat template.
        response_part: what opens the assistant's turn, likewise.
    """
    tokenizer = trainer.processing_class
    if instruction_part is None or response_part is None:
        found = find_parts(tokenizer)
        instruction_part, response_part = instruction_part or found[0], response_part or found[1]
    instruction, response = find_marker(tokenizer, instruction_part), find_marker(tokenizer, response_part)
    masked = {}
    for name, samples in (("samples", trainer.samples), ("eval_samples", trainer.eval_samples)):
        if samples is not None:
            kept = [
                sample for sample in mask_to_responses(samples, instruction, response) if sample.num_trained
            ]
            if not kept:
                raise _no_response(tokenizer, samples[0], name, instruction_part, response_part)
            if len(kept) < len(samples):
                log.warning(
                    "dropped %d of %d %s: no answer in them", len(samples) - len(kept), len(samples), name
                )
            masked[name] = kept
    for name, samples in masked.items():  # not before all of it is known to work
        setattr(trainer, name, samples)
    return trainer


def mask_to_responses(samples: Sequence[Sample], instruction: Marker, response: Marker) -> list[Sample]:
    """The samples with -100 for every label outside the answers. An answer goes from after a response marker to before
    the next instruction marker (or to the end), so the token that ends the assistant's turn is trained on."""
    return [Sample(sample.input_ids, _only_responses(sample, instruction, response)) for sample in samples]


def _only_responses(sample: Sample, instruction: Marker, response: Marker) -> np.ndarray:
    ids = sample.input_ids.tolist()
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
    tokens, *others = (
        _tokens_inside(tokenizer, before, part, after) for before, after in product(befores, afters)
    )
    size = len(tokens)
    windows = ((start, start + length) for length in range(size, 0, -1) for start in range(size - length + 1))
    shared = (w for w in windows if all(_contains(other, tokens[slice(*w)]) for other in others))
    start, end = next(shared, (0, 0))
    core = tokens[start:end]
    if 2 * len(_letters(tokenizer.decode(core))) < len(_letters(part)) or not core:
        raise ChatTemplateError(
            f"the tokens of {part!r} depend on the text around it: only {tokenizer.decode(core)!r} is always there.",
            expected="an instruction_part and a response_part that the tokenizer keeps apart from other text.",
            fix="Give a longer part, up to a line break or a special token.",
        )
    return Marker(core, before=tokens[:start], after=tokens[end:])


def find_parts(tokenizer: "Tokenizer") -> tuple[str, str]:
    """`(instruction_part, response_part)`: those of our named template, or read off a conversation that the
    tokenizer's own template renders, and then tried out on it."""
    named = template_of(tokenizer)
    if named is not None:
        return named.instruction_part, named.response_part
    encoding.require_chat_template(tokenizer)
    turns = ["first question", "first answer", "second question", "second answer"]
    chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    whole, asked, prompted = (
        encoding.render_chat(tokenizer, messages, what="a test conversation", add_generation_prompt=prompt)
        for messages, prompt in ((chat, False), (chat[:3], False), (chat[:3], True))
    )
    places = [whole.find(text) for text in turns]
    if -1 in places or places != sorted(places):
        raise _no_parts("a test conversation does not appear in what it renders", whole)
    ends = [start + len(text) for start, text in zip(places, turns, strict=True)]
    to_answer, to_question, to_last_answer = (whole[ends[n] : places[n + 1]] for n in range(3))
    closing = whole[ends[3] :]

    # What follows an answer both before a question and at the end closes the answer; the rest opens the question.
    instruction = to_question[_shared_tokens(tokenizer, to_question, closing) :]
    # Some templates write more before the last answer than before others (an empty reasoning block).
    common = _common_start(to_answer, to_last_answer)
    response = _from_prompt(common, prompted.removeprefix(asked) if prompted.startswith(asked) else "")
    if (
        not instruction.strip()
        or not response.strip()
        or not _separates(tokenizer, whole, turns, instruction, response)
    ):
        raise _no_parts(f"{instruction!r} and {response!r} do not part questions from answers", whole)
    return instruction, response


def _from_prompt(opening: str, generation_prompt: str) -> str:
    """`opening` without what closes the user's turn: from where the generation prompt begins in it, or all of it.
    They overlap without being equal where either goes on: `<think>` in the prompt, a channel in the opening."""
    if generation_prompt and generation_prompt in opening:
        return opening[opening.index(generation_prompt) :]
    overlaps = (opening[at:] for at in range(len(opening)) if generation_prompt.startswith(opening[at:]))
    return next(overlaps, opening)


def _separates(tokenizer: "Tokenizer", whole: str, turns: list[str], instruction: str, response: str) -> bool:
    ids, offsets = _with_offsets(tokenizer, whole)
    sample = Sample(np.asarray(ids, dtype=np.int32), np.asarray(ids, dtype=np.int32))
    markers = find_marker(tokenizer, instruction), find_marker(tokenizer, response)
    labels = _only_responses(sample, *markers)
    for number, text in enumerate(turns):
        first = whole.index(text)
        inside = [start < first + len(text) and end > first for start, end in offsets]
        if any(trained != (number % 2 == 1) for trained in (labels[inside] != IGNORED).tolist()):
            return False
    return True


def _shared_tokens(tokenizer: "Tokenizer", text: str, other: str) -> int:
    """How many characters of `text` are in the tokens that `other` starts with too. By tokens: `<|end|>` and `<|user|>`
    share two characters that mean nothing."""
    ids, offsets = _with_offsets(tokenizer, text)
    shared = len(_common_start(ids, _with_offsets(tokenizer, other)[0]))
    return offsets[shared - 1][1] if shared else 0


def _tokens_inside(tokenizer: "Tokenizer", before: str, part: str, after: str) -> tuple[int, ...]:
    ids, offsets = _with_offsets(tokenizer, before + part + after)
    first, last = len(before), len(before) + len(part)
    return tuple(i for i, (start, end) in zip(ids, offsets, strict=True) if first <= start < end <= last)


def _with_offsets(tokenizer: "Tokenizer", text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise ChatTemplateError(
            f"{type(tokenizer).__name__} does not say which characters its tokens come from.",
            expected="a tokenizer of the `tokenizers` library (`tokenizer.is_fast`).",
            fix="Load it with AutoTokenizer from a folder with tokenizer.json.",
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _common_start[S: (str, list[int], tuple[int, ...])](a: S, b: S) -> S:
    return a[: next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _contains(tokens: tuple[int, ...], window: tuple[int, ...]) -> bool:
    return any(tokens[at : at + len(window)] == window for at in range(len(tokens) - len(window) + 1))


def _letters(text: str) -> str:
    return "".join(text.split())


def _no_parts(why: str, rendered: str) -> ChatTemplateError:
    return ChatTemplateError(
        f"instruction_part and response_part cannot be read off the tokenizer's chat template: {why}.",
        expected=f"a template that opens turns visibly; this one rendered {rendered!r}.",
        fix="Pass both: `train_on_responses_only(trainer, instruction_part=..., response_part=...)`.",
    )


def _no_response(
    tokenizer: "Tokenizer", sample: Sample, name: str, instruction_part: str, response_part: str
) -> DatasetError:
    return DatasetError(
        f"no {name} has anything to train on after {response_part!r} (and before {instruction_part!r}).",
        expected=f"these parts as the texts have them; the first begins {tokenizer.decode(sample.input_ids[:64])!r}.",
        fix="Pass instruction_part and response_part as they stand in the texts, line breaks included; or raise "
        "max_length if the prompts alone fill it.",
    )
