"""Tokenizers like those that are made of SentencePiece models, trained on this very file: Gemma's kind, Llama 2's, and
that of today's Llama classes."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.export.byte_level import NASTY

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]
SPACE = "\u2581"
VOCAB = 1000


@functools.cache
def _trained() -> str:
    """All ways to make a token, in the order of the tokens, as converters write them."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 20, special_tokens=[*SPECIALS, *BYTES], show_progress=False, limit_alphabet=150
    )
    # No token may be called as llama.cpp expects other models' ends of turns to be, nor hold a zero byte.
    texts = [text for text in NASTY if "eot_id" not in text and "\0" not in text]
    backend.train_from_iterator([Path(__file__).read_text(), *texts], trainer)
    spec = json.loads(backend.to_str())
    vocab = spec["model"]["vocab"]
    learnt = sorted({"".join(pair) for pair in spec["model"]["merges"]}, key=vocab.__getitem__)
    cuts = ((token[:n], token[n:]) for token in learnt for n in range(1, len(token)))
    spec["model"]["merges"] = [pair for pair in cuts if all(part in vocab for part in pair)]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    return json.dumps(spec)


def sentence_piece(kind: str, *, strip: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """`strip`: the special tokens that take the spaces after them."""
    backend = Tokenizer.from_str(_trained())
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer, backend.pre_tokenizer = {
        "gemma": (spaces, pre_tokenizers.Split(" ", "merged_with_previous")),
        "llama 2": (normalizers.Sequence([normalizers.Prepend(SPACE), spaces]), None),
        "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    }[kind]
    backend.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
    ])  # fmt: skip
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False, rstrip="<think>" in strip)])
    backend.add_special_tokens(
        [AddedToken(token, special=True, rstrip=True) for token in strip if token in SPECIALS]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
