"""Byte-level BPE tokenizers of the kinds that models come with, trained on this very file, and nasty texts."""

import functools
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # as in the published tokenizer.json
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = TEKKEN.replace("+|[^", "+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^").replace(
    r"*|\p{N}|", r"*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
)
EXPRESSIONS = {
    "llama-bpe": LLAMA_3,
    "qwen2": LLAMA_3.replace("{1,3}", ""),
    "tekken": TEKKEN,
    "gpt-4o": GPT_4O,
}
SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|im_start|>", "<|im_end|>", "<|finetune_right_pad_id|>",
]  # fmt: skip
VOCAB = 1000
NASTY = [
    "", " ", "  ", "\n", "\n\n\n", "\t", "\r\n", "a", " a", "a ", "  a", "\n a", "a\n", "a  b   c    d", "a\n\n\nb",
    " \n \n", "\t\tx = 1\n\t\treturn x\n", "Hello, world!", "I'm, you'LL, we'd: they'VE don'T 'tis", "it''s 's",
    "it'SAM o'reilly I'Mx", "0", "12", "123", "1234", "12345678901", "3.14159 1,000,000 1e-5", "a1b22c333d4444",
    "x²½Ⅷ ١٢٣٤٥", "Ünïcödé naïve", "e\u0301 vs é", "Привет, мир", "你好，世界！", "日本語テキスト", "한국어",
    "नमस्ते क्षि", "שלום مرحبا", "🙂", "👩‍👩‍👧 🇩🇪🇫🇷 ❤️ 1️⃣", "\u00a0\u3000\u200b\u2028\ufeff", "\x00\x01\x7f",
    "…—–“”‘’", "!!!???...", "$€£ #tag @you", "<b>&amp;</b>", "camelCase snake_case XMLParser",
    "path/to/file.txt C:\\dir\\*", "{[(<`~^|>)]}",
    '"quoted" \'text\'',
    "<|eot_id|>", "a<|eot_id|>b", " <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|im_start|>x<|im_end|>\n", "<|not_a_token|> <|eot_id", "<think>yes</think>",
    "the test of the model and the tokenizer in the file", "a" * 300,
    " " * 70 + "x", "= " * 40, "\U0001f9d1\U0001f3fd\u200d\U0001f680",
]  # fmt: skip


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "gpt-2":
        return plain
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(EXPRESSIONS[kind]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


@functools.cache
def _trained(kind: str) -> str:
    backend = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    backend.pre_tokenizer = _pre_tokenizer(kind)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 20,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text(), *NASTY], trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if kind == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    return backend.to_str()


def byte_level(kind: str, *, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """`kind` is llama.cpp's name of the pre-tokenizer; "llama-bpe" adds a bos token, as Llama 3's does."""
    backend = Tokenizer.from_str(_trained(kind))
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|finetune_right_pad_id|>",
    )
