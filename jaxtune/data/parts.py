"""What opens a user's turn and what opens an answer, read off a tokenizer's chat template: of our named templates it is
written down, from any other it is derived by rendering a conversation, and then tried out on it."""

from typing import TYPE_CHECKING

import numpy as np

from jaxtune.data import encoding
from jaxtune.data.markers import Marker, find_marker, mask_to_responses
from jaxtune.data.sample import IGNORED, Sample
from jaxtune.data.templates import template_of
from jaxtune.errors import ChatTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def find_parts(tokenizer: "Tokenizer") -> tuple[str, str]:
    """`(instruction_part, response_part)`, as they stand in rendered text."""
    named = template_of(tokenizer)
    if named is not None:
        return named.parts_of(tokenizer)
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
    response = _from_prompt(common, prompted[_shared_tokens(tokenizer, prompted, asked) :])
    if (
        not instruction.strip()
        or not response.strip()
        or not _separates(tokenizer, whole, turns, instruction, response)
    ):
        raise _no_parts(f"{instruction!r} and {response!r} do not part questions from answers", whole)
    return instruction, response


def response_marker(tokenizer: "Tokenizer") -> Marker | None:
    """The tokens that open an answer; None where the tokenizer has no chat template that shows them."""
    try:
        return find_marker(tokenizer, find_parts(tokenizer)[1])
    except ChatTemplateError:
        return None


def _from_prompt(opening: str, generation_prompt: str) -> str:
    """`opening` without what closes the user's turn: from where the generation prompt begins in it, or all of it.
    They overlap without being equal where either goes on: `<think>` in the prompt, a channel in the opening."""
    if generation_prompt and generation_prompt in opening:
        return opening[opening.index(generation_prompt) :]
    overlaps = (opening[at:] for at in range(len(opening)) if generation_prompt.startswith(opening[at:]))
    return next(overlaps, opening)


def _separates(tokenizer: "Tokenizer", whole: str, turns: list[str], instruction: str, response: str) -> bool:
    ids, offsets = encoding.encode_with_offsets(tokenizer, [whole])[0]
    sample = Sample(np.asarray(ids, dtype=np.int32), np.asarray(ids, dtype=np.int32))
    markers = find_marker(tokenizer, instruction), find_marker(tokenizer, response)
    labels = mask_to_responses([sample], *markers)[0].labels
    for number, text in enumerate(turns):
        first = whole.index(text)
        inside = (offsets[:, 0] < first + len(text)) & (offsets[:, 1] > first)
        if ((labels[inside] != IGNORED) != (number % 2 == 1)).any():  # the second and the fourth are answers
            return False
    return True


def _shared_tokens(tokenizer: "Tokenizer", text: str, other: str) -> int:
    """How many characters of `text` are in the tokens that `other` starts with too. By tokens: `<|end|>` and `<|user|>`
    share two characters that mean nothing."""
    (ids, offsets), (other_ids, _) = encoding.encode_with_offsets(tokenizer, [text, other])
    shared = len(_common_start(ids, other_ids))
    return int(offsets[shared - 1, 1]) if shared else 0


def _common_start[S: (str, list[int])](a: S, b: S) -> S:
    return a[: next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _no_parts(why: str, rendered: str) -> ChatTemplateError:
    return ChatTemplateError(
        f"instruction_part and response_part cannot be read off the tokenizer's chat template: {why}.",
        expected=f"a template that opens turns visibly; this one rendered {rendered!r}.",
        fix="Pass both: `train_on_responses_only(trainer, instruction_part=..., response_part=...)`.",
    )
