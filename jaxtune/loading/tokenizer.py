"""A folder's tokenizer, through transformers' AutoTokenizer, with a pad token that is not its eos token.

Padding must be told apart from a real end of text, or a model learns never to stop: a tokenizer published
without a pad token gets one that its vocabulary already holds unused. The vocabulary never grows here.
"""

from pathlib import Path
from typing import TYPE_CHECKING

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


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer. Its own code, if it brings any, is never run."""
    folder = Path(folder)
    _require_vocabulary(folder)
    tokenizer = _load(folder)
    _ensure_pad_token(tokenizer, folder)
    return tokenizer


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


def _ensure_pad_token(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    if tokenizer.pad_token_id is None:
        chosen = _unused_token(tokenizer) or tokenizer.eos_token
        if chosen is None:
            raise ConfigError(
                f"The tokenizer in {folder} has neither a pad token nor an end-of-text token.",
                expected="`eos_token` in tokenizer_config.json, and best a `pad_token` too.",
                fix="Name the model's own special tokens in tokenizer_config.json.",
            )
        tokenizer.pad_token = chosen
        log.info("the tokenizer has no pad token; padding with %r", chosen)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        log.warning(
            "the tokenizer's pad token is its eos token %r: masks, not token ids, decide what is trained on",
            tokenizer.eos_token,
        )


def _unused_token(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    vocabulary = tokenizer.get_vocab()
    in_use = {tokenizer.bos_token, tokenizer.eos_token}
    return next((token for token in PAD_CANDIDATES if token in vocabulary and token not in in_use), None)
