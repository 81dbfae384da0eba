"""A tokenizer as GGUF key/values: tokens, their types, merges or scores, special ids, the chat template. It is a
byte-level BPE (Llama 3, Qwen) or one of SentencePiece's (Gemma, Llama 2, Phi-3).

The source of truth is what the loaded tokenizer would save as tokenizer.json, and what it does to a text. What
llama.cpp would do differently raises: a file that tokenises another way than the model was trained is worse than none.
Where llama.cpp has no other form for a family's own tokenizer, and the difference is at the edges, the log says it.
"""

import json
import re
from typing import Any

import numpy as np
from tokenizers import models

from jaxtune.data.encoding import prefix_ids
from jaxtune.data.templates import template_of
from jaxtune.errors import UnsupportedModelError
from jaxtune.export.gguf import pretokenizers, sentencepiece
from jaxtune.log import get_logger

log = get_logger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, by their numbers in the file. Control tokens are never read out of a user's text."""

_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
_NEVER_STRIP = {"<unk>", "<s>", "<|endoftext|>"}
_PHI_3_HAS = {*_NEVER_STRIP, "</s>"}
"""Without these, llama.cpp does not load what is called so."""


def vocabulary(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` key/values of a `vocab_size`-row model; ids without a token become unused ones."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {}
    bpe = spec.get("model") or {}
    added = spec.get("added_tokens") or []
    kind = _sentencepiece if bpe.get("type") == "BPE" and bpe.get("byte_fallback") else _byte_level
    found = {
        **kind(tokenizer, spec, bpe, added, vocab_size),
        **_special_ids(tokenizer),
        **_added_around(tokenizer),
    }
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def model_name(tokenizer: Any, title: str) -> str:
    """`general.name`, by which alone llama.cpp knows whether special tokens take the spaces after them: all do but
    three in what is called Phi-3, none in anything else."""
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    greedy = [name for name, token in added.items() if token.lstrip or token.rstrip]
    expected = [name for name in added if name not in _NEVER_STRIP]
    if _PHI_3_HAS <= set(added) and greedy == expected and not any(token.lstrip for token in added.values()):
        return title if _PHI_3.search(title) else f"{title} (phi-3)"
    if greedy:
        log.warning(
            "The tokenizer takes spaces beside %s as part of these tokens; llama.cpp will not.",
            ", ".join(greedy),
        )
    return _PHI_3.sub("phi 3", title)


def _byte_level(
    tokenizer: Any, spec: dict[str, Any], bpe: dict[str, Any], added: list[dict[str, Any]], vocab_size: int
) -> dict[str, Any]:
    _require_byte_level_bpe(spec, bpe)
    pre = pretokenizers.recognise(tokenizer.backend_tokenizer.pre_tokenizer)
    _require_same_use_of_merges(bpe, added, pre)
    tokens, types = _tokens(bpe, added, vocab_size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
        "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in bpe["merges"]],
    }


def _sentencepiece(
    tokenizer: Any, spec: dict[str, Any], bpe: dict[str, Any], added: list[dict[str, Any]], vocab_size: int
) -> dict[str, Any]:
    tokens, types = _tokens(bpe, added, vocab_size)
    merges = [_pair(merge) for merge in bpe["merges"]]
    made = sentencepiece.merge_scores(merges, bpe["vocab"], {token["content"] for token in added})
    scores = []
    for n, token in enumerate(tokens):
        if sentencepiece.BYTE.fullmatch(token):
            types[n] = BYTE
        elif token == bpe.get("unk_token"):
            types[n] = UNKNOWN
        elif types[n] == USER_DEFINED:
            tokens[n] = token.replace(
                sentencepiece.SPACE, " "
            )  # it is looked for in the text as it is written
        low = {UNUSED: sentencepiece.UNUSED_SCORE, NORMAL: -float(len(merges))}
        scores.append(made.get(token, low.get(types[n], sentencepiece.ADDED_SCORE)))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
        "tokenizer.ggml.scores": np.asarray(scores, np.float32),
        "tokenizer.ggml.add_space_prefix": sentencepiece.space_prefix(tokenizer.backend_tokenizer, tokenizer),
    }


def _require_byte_level_bpe(spec: dict[str, Any], bpe: dict[str, Any]) -> None:
    changed = [
        name for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if bpe.get(name)
    ]
    wrong = (
        f"is of type {bpe.get('type', 'unknown')!r}, not BPE" if bpe.get("type") != "BPE"
        else f"sets {', '.join(changed)}" if changed
        else f"normalises text ({spec['normalizer']['type']})" if spec.get("normalizer")
        else None
    )  # fmt: skip
    if wrong:
        raise UnsupportedModelError(
            f"The tokenizer {wrong}.",
            expected="a byte-level BPE such as Llama 3's, or a SentencePiece BPE such as Gemma's.",
            fix="Save the merged 16-bit model instead, and convert it with llama.cpp's own converter.",
        )


def _require_same_use_of_merges(bpe: dict[str, Any], added: list[dict[str, Any]], pre: str) -> None:
    """`ignore_merges` decides only where a token cannot be reached by merges; usually there is none."""
    if bool(bpe.get("ignore_merges")) == (pre in pretokenizers.IGNORES_MERGES):
        return
    merging = models.BPE(vocab=bpe["vocab"], merges=[_pair(merge) for merge in bpe["merges"]])
    whole = {token["content"] for token in added}  # found in a text before it is cut into words
    unreached = [
        token
        for token in bpe["vocab"]
        if token not in whole and [piece.value for piece in merging.tokenize(token)] != [token]
    ]
    if unreached:
        raise UnsupportedModelError(
            f"The tokenizer's ignore_merges={bool(bpe.get('ignore_merges'))} matters for {len(unreached)} tokens, "
            f"such as {unreached[0]!r}, and llama.cpp's {pre!r} sets it the other way.",
            expected="tokens that merges lead to.",
            fix="Save the merged 16-bit model instead, and convert it with llama.cpp's own converter.",
        )


def _pair(merge: list[str] | str) -> tuple[str, str]:
    """Older files have the two in one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _tokens(bpe: dict[str, Any], added: list[dict[str, Any]], vocab_size: int) -> tuple[list[str], list[int]]:
    ids = [*bpe["vocab"].values(), *(token["id"] for token in added)]
    if max(ids) >= vocab_size:
        raise UnsupportedModelError(
            f"The tokenizer has a token of id {max(ids)}, and the model embeds {vocab_size}.",
            expected="a tokenizer whose tokens the model knows.",
            fix="Export with the tokenizer that the model was trained with.",
        )
    tokens, types = [f"[PAD{n}]" for n in range(vocab_size)], [UNUSED] * vocab_size
    for text, n in bpe["vocab"].items():
        tokens[n], types[n] = text, NORMAL
    for token in added:
        n, text = token["id"], token["content"]
        tokens[n] = text
        types[n] = CONTROL if token["special"] or _looks_special(text) else USER_DEFINED
    return tokens, types


def _looks_special(text: str) -> bool:
    """Tokens that structure a chat, which some models' files do not mark as special."""
    return text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>"))


def _special_ids(tokenizer: Any) -> dict[str, Any]:
    template = template_of(tokenizer)
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    if template is not None:
        # What ends a turn, where that is not what ends a text: generation has to stop at both.
        stop = tokenizer.convert_tokens_to_ids(template.stop_token_of(tokenizer))
        ids["eot"] = stop if stop not in (tokenizer.unk_token_id, tokenizer.eos_token_id) else None
    return {f"tokenizer.ggml.{name}_token_id": np.uint32(n) for name, n in ids.items() if n is not None}


def _added_around(tokenizer: Any) -> dict[str, Any]:
    before = prefix_ids(tokenizer)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    after = tokenizer("a")["input_ids"][len(before) + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise UnsupportedModelError(
            f"The tokenizer puts the tokens {before} before a text and {after} after it.",
            expected="its bos token or nothing before, its eos token or nothing after: GGUF can say no more.",
            fix="Set the tokenizer's bos_token and eos_token to the tokens that it adds.",
        )
    return {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}
