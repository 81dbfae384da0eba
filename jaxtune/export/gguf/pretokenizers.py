"""Which of llama.cpp's pre-tokenizers cuts text as a given tokenizer does, found by having both cut the same page.

llama.cpp knows each by a name and carries its regular expression itself. One expression has many spellings, and a
fine-tune's files may be saved anew, so what is compared is behaviour: no file's hash, no model's name.
"""

from tokenizers import Regex, pre_tokenizers

from jaxtune.errors import UnsupportedModelError
from jaxtune.log import get_logger

log = get_logger(__name__)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PROBE = (
    "Hello world, it's I'M we'LL you'd they'VE don't x'S 'tis",
    "it'SAM it'sam we'LLama we'llama I'Mx o'REilly o'reilly you'DARE I'VEx can'THE",
    "1 12 123 1234 12345 a1b22c333 3.14159 1,000,000 ١٢٣٤٥ ½ Ⅷ x²",
    "  two   three    spaces \t tab\t\ttabs  ",
    "line\nline\n\nlines\r\n\r\nend \n  indented\n\t\tcode \n \n ",
    "a\u00a0b\u3000c\u200bd\u2028e",
    "!!! ... a,b;c -- (x) [y] {z} $1 #a @b ?\n!\n/path/to_file ~`^",
    "Ünïcödé naïve Привет мир שלום नमस्ते 你好，世界！ 日本語テキスト 한국어",
    "e\u0301 क्षि 👩‍👩‍👧 🇩🇪🇫🇷 ❤️ 🙂🙂 1️⃣",
    "<tag> x_y camelCase XMLParser 'quoted' \"double\" foo(bar)=>{return;}",
    " a  b\n c   \n\n\n d'",
)


def _by(expression: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _known() -> dict[str, pre_tokenizers.PreTokenizer]:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
    # As published models have them, cut where small letters end and capitals begin, for which llama.cpp has ASCII's.
    before = r"[^\r\n\p{L}\p{N}]?"
    capitalised, capitals = rf"{before}{_UPPER}*{_LOWER}+", rf"{before}{_UPPER}+{_LOWER}*"
    tail = _TAIL.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
    return {
        "llama-bpe": _by(rf"{words}|\p{{N}}{{1,3}}|{_TAIL}"),
        "qwen2": _by(rf"{words}|\p{{N}}|{_TAIL}"),
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "tekken": _by(rf"{capitalised}|{capitals}|\p{{N}}|{tail}"),
        "gpt-4o": _by(rf"{capitalised}{_CONTRACTIONS}?|{capitals}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{tail}"),
    }


IGNORES_MERGES = frozenset({"llama-bpe", "tekken"})
"""Where llama.cpp takes a word that is a token as that token, whether or not merges lead to it."""


NEARLY = frozenset({"tekken", "gpt-4o"})
"""Of which llama.cpp's own form knows only ASCII's capitals, and takes marks for no letters."""


def recognise(theirs: pre_tokenizers.PreTokenizer | None) -> str:
    """llama.cpp's name for a tokenizer's pre-tokenizer."""
    cut = _cut(theirs) if theirs is not None else None
    known = _known()
    for name, ours in known.items():
        if _cut(ours) == cut:
            if name in NEARLY:
                log.warning(
                    "llama.cpp's %r cuts words otherwise than the tokenizer where their letters carry marks (as in "
                    "Hindi), or where letters beyond ASCII change their case.", name,
                )  # fmt: skip
            return name
    raise UnsupportedModelError(
        "The tokenizer cuts text in a way that no pre-tokenizer known here does.",
        expected=f"the cuts of one of llama.cpp's {', '.join(known)}.",
        fix="Save the merged 16-bit model instead, and convert it with llama.cpp's own converter.",
    )


def _cut(pre_tokenizer: pre_tokenizers.PreTokenizer) -> list[list[str]]:
    return [[piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] for text in PROBE]
