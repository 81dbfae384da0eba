"""A folder's tokenizer, through transformers' AutoTokenizer, with a pad token that is not its eos token.

Padding must be told apart from a real end of text, or a model learns never to stop: a tokenizer published
without a pad token, or with its eos token for one, gets one that its vocabulary already holds unused. The vocabulary
never grows here. Bos tokens and the side of padding stay as published: some models have no bos, and rows are laid out
by us, not by the tokenizer.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.errors import ConfigError, ModelNotFoundError
from jaxtune.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

# Any of these holds the vocabulary itself (tokenizer_config.json does not).
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Made for padding first, then reserved and never seen, then the one that stands for no text at all.
PAD_CANDIDATES = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|reserved_special_token_0|>",
    "<unk>",
)
RESERVED = re.compile(
    r"<\|?(reserved(_special_token|_token)?|unused|special|extra|placeholder)[_-]?\d+\|?>|\[unused\d+\]",
    re.IGNORECASE,
)
"""What families call the tokens that they left room for."""
ABSENT_MODALITIES = ("image_token", "audio_token", "video_token", "boi_token", "eoi_token")
"""Tokens of a family's larger members, which text-only ones may list without having a row for them (Gemma 3)."""


def load_tokenizer(
    folder: str | Path, *, eos_token_id: int | None = None, vocab_size: int | None = None
) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer. Its own code, if it brings any, is never run.

    `eos_token_id` is the model's own, for a tokenizer that names none; `vocab_size` is the rows of its embedding, which
    must hold every token."""
    folder = Path(folder)
    _require_vocabulary(folder)
    tokenizer = _load(folder)
    if tokenizer.eos_token is None and eos_token_id in tokenizer.get_vocab().values():
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_token_id)
        log.info("the tokenizer names no eos token; the model's own is %r", tokenizer.eos_token)
    _ensure_pad_token(tokenizer, folder, vocab_size)
    if vocab_size is not None:
        require_rows(tokenizer, vocab_size, f"The tokenizer in {folder}")
    return tokenizer


def is_tokenizer_of(tokenizer: Any, folder: Path) -> bool:
    """Whether it is the very one in that folder, but for the choice of a pad token and what calls leave behind."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return False
    return _identity(tokenizer) == _identity(_load(folder))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """As transformers does. It builds some classes' pipelines anew when it reads them, from settings that it did not
    write (Llama's `legacy`, which says where spaces are put): then the class is one that takes tokenizer.json as it
    is."""
    tokenizer.save_pretrained(folder)
    if hasattr(tokenizer, "backend_tokenizer") and _identity(_load(folder)) != _identity(tokenizer):
        path = folder / "tokenizer_config.json"
        settings = {
            **json.loads(path.read_text(encoding="utf-8")),
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _identity(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a processor, or one that is in Python: known as itself only
        return tokenizer
    pipeline = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    named = {kind: str(token) for kind, token in tokenizer.special_tokens_map.items() if kind != "pad_token"}
    return pipeline, named, tokenizer.chat_template


def _require_vocabulary(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"There is no folder {folder}.",
            expected="A folder that holds a tokenizer.",
            fix="Check the path.",
        )
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ModelNotFoundError(
            f"{folder} has no tokenizer files.",
            expected=f"One of {', '.join(VOCABULARY_FILES)}; tokenizer.json is the usual one.",
            fix="Copy the tokenizer's files from the base model, or write them with its save_pretrained().",
        )


def _load(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        # Without `mistral_format`, a Mistral folder would give a class of another interface where mistral-common is
        # installed.
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, mistral_format=False
        )
    # A broken file surfaces as whatever its parser raises; tokenizers' own errors are plain Exceptions.
    except Exception as error:
        raise ConfigError(
            f"The tokenizer in {folder} cannot be loaded: {' '.join(str(error).split()).removesuffix('.')}.",
            expected="Tokenizer files that transformers reads without running code from the folder.",
            fix="Fetch tokenizer.json again; a folder that has only tokenizer.model also needs `pip install "
            "sentencepiece`.",
        ) from error


def _ensure_pad_token(tokenizer: "PreTrainedTokenizerBase", folder: Path, vocab_size: int | None) -> None:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        chosen = _unused_token(tokenizer, vocab_size) or tokenizer.eos_token
        if chosen is None:
            raise ConfigError(
                f"The tokenizer in {folder} has neither a pad token nor an end-of-text token.",
                expected="`eos_token` in tokenizer_config.json, and best a `pad_token` too.",
                fix="Name the model's own special tokens in tokenizer_config.json.",
            )
        published = tokenizer.pad_token
        tokenizer.pad_token = chosen
        if chosen != published:
            log.info(
                "the tokenizer has %s; padding with %r",
                "no pad token" if published is None else f"its eos token {published!r} as pad token", chosen,
            )  # fmt: skip
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        log.warning(
            "the tokenizer's pad token is its eos token %r: masks, not token ids, decide what is trained on",
            tokenizer.eos_token,
        )


def _unused_token(tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None) -> str | None:
    """One made for padding, else a reserved one; <unk> last, which text may hold."""
    rows = len(tokenizer) if vocab_size is None else vocab_size
    template = str(tokenizer.chat_template or "")
    taken = {tokenizer.bos_token, tokenizer.eos_token}
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if i < rows and token not in taken}
    reserved = sorted(
        (token for token in vocabulary if RESERVED.fullmatch(token)), key=vocabulary.__getitem__
    )
    candidates = (*PAD_CANDIDATES[:-1], *reserved, PAD_CANDIDATES[-1])
    return next((token for token in candidates if token in vocabulary and token not in template), None)


def require_rows(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int, whose: str = "The tokenizer that was given"
) -> None:
    """A lookup beyond the embedding would be clamped to its last row, without a word."""
    if not hasattr(tokenizer, "get_vocab"):  # a processor, say
        return
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    if not beyond:
        return
    absent = {str(getattr(tokenizer, name, None)) for name in ABSENT_MODALITIES}
    if beyond.keys() <= absent:
        log.info("the model has no embedding for %s: text cannot use it", ", ".join(sorted(beyond)))
        return
    first = min(beyond, key=beyond.__getitem__)
    raise ConfigError(
        f"{whose} has {len(beyond)} tokens that the model's embedding of {vocab_size:,} rows does "
        f"not hold, the first {first!r} with id {beyond[first]:,}.",
        expected="a row for every token.",
        fix="Use the tokenizer that belongs to the model; to add tokens, load the model's own and call add_new_tokens.",
    )
