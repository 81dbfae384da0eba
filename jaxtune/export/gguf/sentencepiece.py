"""A SentencePiece BPE (Llama 2, Mistral 7B, Gemma, Phi-3), as tokenizer.json has it, in the terms of llama.cpp.

tokenizer.json lists merges; llama.cpp, like SentencePiece, has a score for each token and merges whatever two
neighbours make the token of the highest. These are the same if the list is sorted by what a merge makes, and has every
way to make it: as lists are that were made of a SentencePiece model.
"""

import json
import re
from typing import Any

from jaxtune.errors import UnsupportedModelError
from jaxtune.log import get_logger

log = get_logger(__name__)

UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0
SPACE = "\u2581"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PROBES = ("a  b\n c", "ﬁ e\u0301 ½ Ａ\u00a0\t\r\nx ", "你好 🙂")


def merge_scores(merges: list[tuple[str, str]], vocab: dict[str, int], added: set[str]) -> dict[str, float]:
    """The score of each token that merges make: the earlier, the higher. `added` ones are found in the text before."""
    listed = {pair: made for pair in merges if (made := "".join(pair)) not in added}
    scores: dict[str, float] = {}
    last_of = {made: rank for rank, made in enumerate(listed.values())}
    group: set[str] = set()
    end = score = 0
    for rank, made in enumerate(listed.values()):
        if rank > end:
            group, score = set(), score - 1
        group.add(made)
        end = max(end, last_of[made])
        scores[made] = score
        # Runs of spaces have one score in Llama 2's model, so that the merges that make them are mixed.
        if len(group) > 1 and len(set("".join(group))) > 1:
            raise _no_sentencepiece(f"the merges that make {made!r} do not follow one another")
    for token in vocab:
        if token in added:
            continue
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in listed and all(part in vocab and part not in added for part in pair):
                raise _no_sentencepiece(
                    f"{pair[0]!r} and {pair[1]!r} are not merged, though {token!r} is a token"
                )
    return scores


def space_prefix(backend: Any, tokenizer: Any) -> bool:
    """Whether a space is put before a text; all other text has to come through unchanged but for spaces."""
    prefix = {_prefix(_whole(backend, text), text) for text in _PROBES}
    if prefix == {""}:
        return False
    if prefix != {SPACE}:
        raise _no_sentencepiece(f"it makes {_whole(backend, _PROBES[0])!r} of {_PROBES[0]!r}")
    if _whole(backend, " a") == f"{SPACE}{SPACE}a":
        return True
    always = json.loads(backend.to_str())["pre_tokenizer"].get("prepend_scheme") == "always"
    if always or not _begins_with_a_special(tokenizer):
        log.info(
            "The tokenizer puts a space before a text that begins with none%s: llama.cpp will put one before all, and "
            "after special tokens.", ", or after a special token" if always else "",
        )  # fmt: skip
        return True
    log.info(
        "The tokenizer puts a space before a text, unless it begins with a special token, as its chat template does: "
        "llama.cpp cannot tell these apart, and is told to put none."
    )
    return False


def _whole(backend: Any, text: str) -> str:
    """What merges see of a text, which no rule may cut."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return text
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return pieces[0] if len(pieces) == 1 else "|".join(pieces)


def _prefix(seen: str, text: str) -> str | None:
    rest = text.replace(" ", SPACE)
    return seen.removesuffix(rest) if seen.endswith(rest) else None


def _begins_with_a_special(tokenizer: Any) -> bool:
    if not tokenizer.chat_template:
        return False
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    return text.startswith(tuple(map(str, tokenizer.added_tokens_decoder.values())))


def _no_sentencepiece(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The tokenizer is a BPE with bytes to fall back on, but no SentencePiece model: {reason}.",
        expected="merges as they come from a SentencePiece model such as Llama 2's or Gemma's.",
        fix="Save the merged 16-bit model instead, and convert it with llama.cpp's own converter.",
    )
