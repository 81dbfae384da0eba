"""One reader for each form of dataset row that TRL knows: from a chunk of rows to token ids and labels.

A chunk, because a tokenizer is many times faster on many texts at once than on one after the other.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxtune.data import encoding
from jaxtune.data.rows import (
    Row,
    bad_row,
    formatted_texts,
    integers_field,
    messages_field,
    template_options,
    text_field,
)
from jaxtune.data.sample import IGNORED
from jaxtune.data.sharegpt import with_standard_keys
from jaxtune.data.templates import masking_template
from jaxtune.errors import ChatTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

USUAL_ROLES = ("system", "user", "assistant", "tool", "developer", "ipython")

type Chunk = Sequence[tuple[int, Row]]  # rows with their index in the dataset, which messages name


class Encoded(NamedTuple):
    """Token ids and labels, int32, of one sample that is not truncated yet; empty where the row holds nothing."""

    ids: np.ndarray
    labels: np.ndarray
    row: int
    border_moved: bool = False  # the tokens of prompt + completion do not begin with those of the prompt
    odd_role: str = ""  # one that the chat template writes without knowing it


@dataclass(frozen=True)
class Reading:
    """What the readers need besides the rows. The fields mean what they mean in `prepare`."""

    tokenizer: "Tokenizer"
    text_field: str
    formatting_func: Callable[[Row], str | list[str]] | None
    completion_only_loss: bool | None
    assistant_only_loss: bool
    add_special_tokens: bool
    vocab_size: int


def read_tokenised(chunk: Chunk, reading: Reading) -> Iterator[Encoded]:
    """`input_ids`, with `labels` (taken as they are) or masks (combined), or trained on whole."""
    vocabulary = reading.vocab_size
    needed = {"completion_mask": reading.completion_only_loss, "assistant_masks": reading.assistant_only_loss}
    for index, row in chunk:
        ids = integers_field(row, index, "input_ids")
        if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
            # An embedding lookup in jax clamps such an id without a word: this is where it can still be noticed.
            found = f"has token ids from {ids.min()} to {ids.max()}"
            fix = "Tokenise the dataset with this model's tokenizer."
            raise bad_row(index, found, f"ids from 0 to {vocabulary - 1}, the vocabulary's size", fix)
        if "labels" in row:
            yield Encoded(ids, integers_field(row, index, "labels", len(ids)), index)
            continue
        if missing := [column for column, need in needed.items() if need and column not in row]:
            raise bad_row(
                index,
                f"has neither {missing[0]!r} nor 'labels'",
                "a mask, as completion_only_loss or assistant_only_loss asks for a part of the tokens",
                "Add the column, or switch that option off.",
            )
        trained = np.ones(len(ids), dtype=bool)
        for column in needed:
            if column in row and not (column == "completion_mask" and reading.completion_only_loss is False):
                trained &= integers_field(row, index, column, len(ids)).astype(bool)
        yield _sample(ids, trained, index)


def read_text(chunk: Chunk, reading: Reading) -> Iterator[Encoded]:
    """Plain text from a column or from formatting_func: trained on whole, and ended with eos."""
    texts, rows = [], []
    for index, row in chunk:
        if reading.formatting_func is None:
            new = [text_field(row, index, reading.text_field)]
        else:
            new = formatted_texts(row, index, reading.formatting_func)
        texts += new
        rows += [index] * len(new)
    for text, ids, index in zip(texts, _encode_ended(reading, texts), rows, strict=True):
        yield _whole(ids if text.strip() else [], index)


def read_prompt_completion(chunk: Chunk, reading: Reading) -> Iterator[Encoded]:
    prompts = [text_field(row, index, "prompt") for index, row in chunk]
    texts = [
        prompt + text_field(row, index, "completion")
        for prompt, (index, row) in zip(prompts, chunk, strict=True)
    ]
    prompt_ids = _encode(reading, prompts)
    text_ids = _encode_ended(reading, texts)
    for text, before, ids, (index, _) in zip(texts, prompt_ids, text_ids, chunk, strict=True):
        if not text.strip():
            yield _whole([], index)
            continue
        # Where prompt and completion share a token, it holds some of the completion: train on it.
        border = next((at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        trained = np.arange(len(ids)) >= border if reading.completion_only_loss is not False else True
        yield _sample(ids, trained, index, border_moved=border < len(before))


def read_messages(chunk: Chunk, reading: Reading) -> Iterator[Encoded]:
    yield from _read_chats(chunk, [messages_field(row, index, "messages") for index, row in chunk], reading)


def read_conversations(chunk: Chunk, reading: Reading) -> Iterator[Encoded]:
    """`conversations`, whose messages may have `from` and `value`: `role` and `content`, as TRL reads them."""
    chats = [
        [with_standard_keys(message) for message in messages_field(row, index, "conversations")]
        for index, row in chunk
    ]
    yield from _read_chats(chunk, chats, reading)


def _odd_role(chat: list[Row], index: int, tokenizer: "Tokenizer") -> str:
    """The first role that is not usual and not one of the chat template's, or "". Some templates write any role, and
    would write turns of `5`, or of `human` and `gpt`, which no model has seen: these are errors."""
    roles = [message.get("role", message.get("from")) for message in chat]
    if wrong := [role for role in roles if role is not None and not isinstance(role, str)]:
        raise bad_row(
            index,
            f"has a message whose role is {wrong[0]!r}",
            "a name, such as `user` or `assistant`",
            "Correct that row.",
        )
    odd = [role for role in dict.fromkeys(roles) if role is not None and role not in USUAL_ROLES]
    odd = [
        role for role in odd if not re.search(f"['\"]{re.escape(role)}['\"]", str(tokenizer.chat_template))
    ]
    if {"gpt", "human"} & set(odd):
        raise bad_row(
            index,
            f"has messages from {' and '.join(map(repr, sorted(odd)))}, roles that the chat template does not name",
            "the roles `user` and `assistant`",
            "Call `standardize_sharegpt(dataset)` first, or `get_chat_template` with a `mapping`.",
        )
    return next(iter(odd), "")


def _read_chats(chunk: Chunk, chats: list[list[Row]], reading: Reading) -> Iterator[Encoded]:
    odd = [_odd_role(chat, index, reading.tokenizer) for chat, (index, _) in zip(chats, chunk, strict=True)]
    encoded = _encode_chats(chunk, chats, reading)
    for (index, _), (ids, by_assistant), role in zip(chunk, encoded, odd, strict=True):
        yield _sample(ids, by_assistant, index, odd_role=role)


def read_chat_prompt_completion(chunk: Chunk, reading: Reading) -> Iterator[Encoded]:
    prompts = [messages_field(row, index, "prompt") for index, row in chunk]
    chats = [
        prompt + messages_field(row, index, "completion")
        for prompt, (index, row) in zip(prompts, chunk, strict=True)
    ]
    odd = [_odd_role(chat, index, reading.tokenizer) for chat, (index, _) in zip(chats, chunk, strict=True)]
    rendered = [
        _render(prompt, index, reading, add_generation_prompt=True, **template_options(row, index))
        for prompt, (index, row) in zip(prompts, chunk, strict=True)
    ]
    prompt_ids = encoding.encode_verbatim(reading.tokenizer, rendered)
    encoded = _encode_chats(chunk, chats, reading)
    for before, (index, _), (ids, by_assistant), role in zip(prompt_ids, chunk, encoded, odd, strict=True):
        # Unlike in plain text, the first difference may lie deep in the prompt (a template that drops the reasoning
        # of earlier turns), so the border is where the prompt ends when it is alone, as in TRL.
        completion = np.arange(len(ids)) >= len(before) if reading.completion_only_loss is not False else True
        yield _sample(ids, by_assistant & completion, index, ids[: len(before)] != before, role)


def _encode_chats(
    chunk: Chunk, chats: list[list[Row]], reading: Reading
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Token ids, and which of them the assistant wrote (all of them, where that is not asked for)."""
    extra = {"chat_template": _marked_template(reading.tokenizer)} if reading.assistant_only_loss else {}
    rendered = [
        _render(chat, index, reading, **(template_options(row, index) | extra))
        for chat, (index, row) in zip(chats, chunk, strict=True)
    ]
    if reading.assistant_only_loss:
        yield from encoding.encode_marked(reading.tokenizer, rendered)
        return
    for ids in encoding.encode_verbatim(reading.tokenizer, rendered):
        yield ids, np.ones(len(ids), dtype=bool)


def _render(chat: list[Row], row: int, reading: Reading, **options: Any) -> str:
    return encoding.render_chat(reading.tokenizer, chat, what=_named(row), **options) if chat else ""


def _marked_template(tokenizer: "Tokenizer") -> str:
    encoding.require_chat_template(tokenizer)
    template = masking_template(tokenizer)
    if template is None:
        raise ChatTemplateError(
            "assistant_only_loss=True, but the tokenizer's chat template does not mark what the assistant writes.",
            expected="a template with {% generation %} ... {% endgeneration %} around the assistant's turns.",
            fix="Use `get_chat_template` with a named template, add the markers to yours, or set "
            "assistant_only_loss=False and call `train_on_responses_only(trainer)`.",
        )
    return encoding.visibly_marked(template)


def _encode(reading: Reading, texts: Sequence[str]) -> list[list[int]]:
    encode = encoding.encode_texts if reading.add_special_tokens else encoding.encode_verbatim
    return encode(reading.tokenizer, texts)


def _encode_ended(reading: Reading, texts: Sequence[str]) -> list[list[int]]:
    """Texts that end here: with the tokenizer's eos, which a text that ends with it already does not get twice."""
    eos = reading.tokenizer.eos_token_id
    end = [eos] if eos is not None and reading.add_special_tokens else []
    return [ids if ids[-1:] == end else ids + end for ids in _encode(reading, texts)]


def _sample(
    ids: Sequence[int] | np.ndarray,
    trained: np.ndarray | bool,
    row: int,
    border_moved: bool = False,
    odd_role: str = "",
) -> Encoded:
    ids = np.asarray(ids, dtype=np.int32)
    return Encoded(ids, np.where(trained, ids, np.int32(IGNORED)), row, border_moved, odd_role)


def _named(row: int) -> str:
    return f"row {row} of the dataset"


def _whole(ids: Sequence[int], row: int) -> Encoded:
    return _sample(ids, True, row)
