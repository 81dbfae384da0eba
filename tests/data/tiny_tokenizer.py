"""A byte-level BPE tokenizer made on the spot: every byte is a token, and so is what the given merges join."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")

# Two newlines, or a space and a letter, are one token: then where a text ends depends on what follows.
MERGES = (("\n", "\n"), (" ", "w"), (":", "\n"))


def tiny_tokenizer(
    special_tokens: Sequence[str] = ("</s>",),
    *,
    bos: str | None = None,
    eos: str | None = "</s>",
    adds_bos: bool = False,
    merges: Sequence[tuple[str, str]] = MERGES,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    symbols = _byte_symbols()
    pairs = [tuple("".join(symbols[byte] for byte in part.encode()) for part in merge) for merge in merges]
    tokens = [*symbols.values(), *("".join(pair) for pair in pairs)]
    backend = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=pairs)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special_tokens))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def chatml_tokenizer(**options) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(CHATML, eos="<|im_end|>", **options)


def llama_tokenizer(**options) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(LLAMA, bos="<|begin_of_text|>", eos="<|end_of_text|>", adds_bos=True, **options)


def trained_text(tokenizer, sample) -> str:
    """The part of a sample that is trained on, decoded; `…` where something is left out."""
    parts, gap = [], True
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        if label == -100:
            gap = True
            continue
        assert label == token
        parts.append(("…" if gap and parts else "") + tokenizer.decode([token]))
        gap = False
    return "".join(parts)


def _byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    pretokenise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    symbols = {ord(character): pretokenise(character)[0][0] for character in map(chr, range(128))}
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(symbols.values()))
    return symbols | dict(zip(range(128, 256), others, strict=True))
