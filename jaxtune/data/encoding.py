"""From text and conversations to token ids: what a tokenizer puts in front of a text exactly once, chat templates
rendered with errors that name the row, and the mask of the tokens that the assistant wrote."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.errors import ChatTemplateError

if TYPE_CHECKING:  # transformers takes a second to import; whoever holds a tokenizer has done that
    from transformers import PreTrainedTokenizerBase as Tokenizer

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


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


def render_chat(
    tokenizer: "Tokenizer", messages: Sequence[Mapping], *, what: str, **template_options: Any
) -> str:
    """The conversation as the tokenizer's chat template writes it. Errors call it `what`."""
    return _apply_template(tokenizer, messages, what=what, tokenize=False, **template_options)


def encode_chat_with_mask(
    tokenizer: "Tokenizer",
    messages: Sequence[Mapping],
    *,
    what: str,
    chat_template: str,
    **template_options: Any,
) -> tuple[list[int], np.ndarray]:
    """Token ids, and True where the assistant wrote the token: inside `chat_template`'s generation markers."""
    encoded = _apply_template(
        tokenizer,
        messages,
        what=what,
        chat_template=chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **template_options,
    )
    return encoded["input_ids"], np.asarray(encoded["assistant_masks"], dtype=bool)


def marks_generation(chat_template: str) -> bool:
    return bool(_GENERATION_TAG.search(chat_template))


def require_chat_template(tokenizer: "Tokenizer") -> str:
    if not isinstance(tokenizer.chat_template, str):
        raise ChatTemplateError(
            "the tokenizer has no chat template, and the dataset holds conversations.",
            expected="a tokenizer whose `chat_template` is set.",
            fix='Call `tokenizer = get_chat_template(tokenizer, "chatml")` (or another template) before training.',
        )
    return tokenizer.chat_template


def _apply_template(tokenizer: "Tokenizer", messages: Sequence[Mapping], *, what: str, **options: Any) -> Any:
    require_chat_template(tokenizer)
    # Columns of structs come back from `datasets` with every key in every message, None where it was absent;
    # templates ask `'tool_calls' in message`, so absent must be absent.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is a program of someone else's: it may raise anything
        keys = sorted({key for message in messages for key in message})
        raise ChatTemplateError(
            f"the chat template failed on {what}, whose messages have the keys {keys}: {error}",
            expected="messages that the template can render, usually with a `role` and a `content` each.",
            fix="Correct them. If the keys have other names (`from` and `value`, say), rename them, or tell "
            "`get_chat_template` in its `mapping`.",
        ) from error
