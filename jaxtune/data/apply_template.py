"""`apply_chat_template`: a tokenizer gets the chat template that an example shows, a dataset the texts in its form."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.data.encoding import prefix_ids, render_chat
from jaxtune.data.example_template import ExampleTemplate, derive
from jaxtune.data.rows import Row, messages_field
from jaxtune.data.tables import column_among, map_rows
from jaxtune.data.templates import end_turns_with
from jaxtune.errors import ChatTemplateError, OptionError
from jaxtune.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = get_logger(__name__)

LLAMA_3_EXAMPLE = """<|begin_of_text|><|start_header_id|>system<|end_header_id|>

{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>

{INPUT}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{OUTPUT}<|eot_id|><|start_header_id|>user<|end_header_id|>

{INPUT}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{OUTPUT}<|eot_id|>"""
SYSTEM_MESSAGE = "You are a helpful assistant."

_LOOKS_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")


def apply_chat_template(
    dataset: Any,
    tokenizer: "Tokenizer | None" = None,
    chat_template: str = LLAMA_3_EXAMPLE,
    default_system_message: str = SYSTEM_MESSAGE,
    extra_eos_tokens: Sequence[str] | None = None,
) -> Any:
    """The dataset with a column `text`: its conversations as the example shows them. The tokenizer gets the template.

    Args:
        dataset: a `datasets.Dataset` or a list of dicts, with a column `conversations` or `messages` of messages with
            `role` and `content`.
        tokenizer, chat_template, default_system_message, extra_eos_tokens: those of `construct_chat_template`.
    """
    fix = "Make conversations with `to_sharegpt`, and bring them to role and content with `standardize_sharegpt`."
    column = column_among(dataset, ("conversations", "messages"), fix)
    template = construct_chat_template(tokenizer, chat_template, default_system_message, extra_eos_tokens)
    assert tokenizer is not None  # construct_chat_template asked for it

    def change(row: Row, index: int) -> dict[str, Any]:
        what = f"row {index} of the dataset"
        messages = messages_field(row, index, column)
        return {"text": render_chat(tokenizer, messages, what=what, chat_template=template.jinja)}

    changed = map_rows(dataset, change, description="Applying the chat template")
    tokenizer.chat_template = template.jinja
    return changed


def construct_chat_template(
    tokenizer: "Tokenizer | None" = None,
    chat_template: str = LLAMA_3_EXAMPLE,
    default_system_message: str = SYSTEM_MESSAGE,
    extra_eos_tokens: Sequence[str] | None = None,
) -> ExampleTemplate:
    """The chat template that an example shows: `jinja` for a tokenizer, `go` for Ollama, and its parts.

    Args:
        tokenizer: of the model. Its eos token is put after the example's answers, unless they end with it already or
            with one of `extra_eos_tokens`.
        chat_template: the example: two turns with {INPUT} and {OUTPUT} each, and {SYSTEM} before them or not.
        default_system_message: goes into {SYSTEM} where a conversation has no system message.
        extra_eos_tokens: other tokens that end an answer. If the example's answers end with one, it becomes the
            tokenizer's eos token, so that generation stops at it.
    """
    if tokenizer is None or tokenizer.eos_token is None:
        raise OptionError(
            f"the tokenizer {'is None' if tokenizer is None else 'has no eos token'}.",
            expected="the model's tokenizer, with an eos token, which ends the answers.",
            fix="Pass tokenizer=tokenizer." if tokenizer is None else "Set tokenizer.eos_token.",
        )
    if not isinstance(chat_template, str):
        raise ChatTemplateError(
            f"the example of the chat template is a {type(chat_template).__name__}.",
            expected="a text with {INPUT} and {OUTPUT}.",
            fix="For Jinja of your own, call `get_chat_template(tokenizer, (jinja, stop_word))`.",
        )
    if isinstance(extra_eos_tokens, str):
        raise OptionError(
            f"extra_eos_tokens is the string {extra_eos_tokens!r}.",
            expected="a list of tokens.",
            fix=f"Write extra_eos_tokens=[{extra_eos_tokens!r}].",
        )
    if not isinstance(default_system_message, str):
        raise OptionError(
            f"default_system_message is {default_system_message!r}.",
            expected="a text.",
            fix='Pass one, or "" for an empty system message.',
        )
    vocabulary = tokenizer.get_vocab()
    if unknown := dict.fromkeys(t for t in _LOOKS_SPECIAL.findall(chat_template) if t not in vocabulary):
        log.warning(
            "%s of the chat template's example: no tokens of this tokenizer. Each is several ordinary ones, which the "
            "model has to learn",
            ", ".join(unknown),
        )
    # A bos token may also be one that nothing puts before texts (SmolLM2's is its <|im_start|>): then it is a text.
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in prefix_ids(tokenizer)
    extra = list(extra_eos_tokens or [])
    template = derive(
        chat_template,
        default_system=default_system_message,
        stops=[tokenizer.eos_token, *extra],
        eos=tokenizer.eos_token,
        bos=tokenizer.bos_token if adds_bos else "",
    )
    if tokenizer.eos_token not in template.answer_end:
        end_turns_with(tokenizer, next(token for token in extra if token in template.answer_end))
    elif tokenizer.eos_token not in chat_template:
        log.info("%s is put after every answer of the example, so that generation ends", tokenizer.eos_token)
    return template
