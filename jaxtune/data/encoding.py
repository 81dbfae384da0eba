"""From text and conversations to token ids: what a tokenizer puts in front of a text exactly once, chat templates
rendered with errors that name the row, and which tokens the assistant wrote.

The last is what `{% generation %}` marks in a template. transformers' own masks come from looking up one token for the
first and one for the last character of such a block, and lose the rest of a conversation where there is none (a
tokenizer whose offsets leave out a leading space). Here the tags are rendered as two characters that no text has
(Unicode sets them apart for internal use), taken out again, and every token is asked whether it overlaps a block.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.errors import ChatTemplateError

if TYPE_CHECKING:  # transformers takes a second to import; whoever holds a tokenizer has done that
    from transformers import PreTrainedTokenizerBase as Tokenizer

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_GENERATION = re.compile(r"\{%(-?)\s*generation\s*(-?)%\}")
_END_GENERATION = re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}")


def prefix_ids(tokenizer: "Tokenizer") -> list[int]:
    """What the tokenizer itself puts before a text: `[bos]` for Llama, nothing for Qwen. Found by asking it, because
    `bos_token` is also set by tokenizers that never add it (SmolLM2 names its `<|im_start|>` so)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
    return full[: next(starts, 0)]


def encode_texts(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    """Plain texts, each starting with `prefix_ids` exactly once: texts that a chat template wrote have theirs already.
    The end-of-text token is left to the caller, who knows whether the text ends here."""
    prefix = prefix_ids(tokenizer)
    return [
        ids if ids[: len(prefix)] == prefix else prefix + ids for ids in encode_verbatim(tokenizer, texts)
    ]


def encode_verbatim(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    """Texts that hold all their special tokens already (rendered conversations), in one call: the tokenizer spreads
    it over the cores. `verbose=False`: longer than the model is for truncation to see to, not for a warning here."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def encode_with_offsets(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
    """For each verbatim text its token ids, and from which to which character each goes [token, 2]."""
    if not tokenizer.is_fast:
        raise ChatTemplateError(
            f"{type(tokenizer).__name__} does not say which characters its tokens come from.",
            expected="a tokenizer of the `tokenizers` library (`tokenizer.is_fast`).",
            fix="Load it with AutoTokenizer from a folder with tokenizer.json.",
        )
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = (np.asarray(pairs, dtype=np.int32).reshape(-1, 2) for pairs in encoded["offset_mapping"])
    return list(zip(encoded["input_ids"], offsets, strict=True))


def encode_marked(tokenizer: "Tokenizer", texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Token ids of what a `visibly_marked` template rendered, and True for tokens that overlap a marked part."""
    pieces = [re.split(f"[{_OPEN}{_CLOSE}]", text) for text in texts]
    for parts, (ids, offsets) in zip(
        pieces, encode_with_offsets(tokenizer, ["".join(parts) for parts in pieces]), strict=True
    ):
        borders = list(accumulate(map(len, parts)))
        marked = np.zeros(len(ids), dtype=bool)
        for start, end in zip(borders[0::2], borders[1::2], strict=False):  # outside, inside, outside, ...
            marked |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        yield ids, marked


def visibly_marked(chat_template: str) -> str:
    """The template with its generation tags rendered as `encode_marked` expects them. They become block tags again, on
    either side, so that Jinja trims the white space around them as before."""
    opened = _GENERATION.sub(rf"{{%\1 if true %}}{_OPEN}{{% endif %}}{{% if true \2%}}", chat_template)
    return _END_GENERATION.sub(rf"{{%\1 endif %}}{{% if true %}}{_CLOSE}{{% endif \2%}}", opened)


def marks_generation(chat_template: str) -> bool:
    return bool(_GENERATION.search(chat_template))


def render_chat(tokenizer: "Tokenizer", messages: Sequence[Mapping], *, what: str, **options: Any) -> str:
    """The conversation as the tokenizer's chat template (or that in `options`) writes it. Errors call it `what`."""
    if "chat_template" not in options:
        require_chat_template(tokenizer)
    # Columns of structs come back from `datasets` with every key in every message, None where it was absent;
    # templates ask `'tool_calls' in message`, so absent must be absent.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of someone else's: it may raise anything
        raise ChatTemplateError(
            f"the chat template failed on {what}, whose {_keys_of(messages)}: {error}",
            expected="messages that the template can render, usually with a `role` and a `content` each.",
            fix="Correct them. If the keys have other names (`from` and `value`, say), `standardize_sharegpt(dataset)` "
            "renames them; or tell `get_chat_template` in its `mapping`.",
        ) from error


def _keys_of(messages: Sequence[Mapping]) -> str:
    """Those of the first message that lacks one of the usual, or else of all."""
    for number, message in enumerate(messages):
        if not message.keys() >= {"role", "content"}:
            return f"message {number} has only the keys {list(message)}"
    return f"messages have the keys {sorted({key for message in messages for key in message})}"


def require_chat_template(tokenizer: "Tokenizer") -> None:
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            "the tokenizer has no chat template, and the dataset holds conversations.",
            expected="a tokenizer whose `chat_template` is set.",
            fix='Call `tokenizer = get_chat_template(tokenizer, "chatml")` (or another template) before training.',
        )
