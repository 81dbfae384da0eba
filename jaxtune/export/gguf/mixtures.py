"""Which type each tensor of a GGUF file gets: what is meant by "q4_k_m".

A method has a type for most matrices, and gives more bits to those that suffer most from few: v, the way down of the
MLP, the output of attention, the head. The choice is llama.cpp's, tensor by tensor, and depends on nothing but names,
shapes and the five numbers of `Layout`.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtune.export.gguf.quants import TensorType
from jaxtune.log import get_logger

log = get_logger(__name__)

F16, F32, Q8_0 = TensorType.F16, TensorType.F32, TensorType.Q8_0
Q4_0, Q4_1, Q5_0, Q5_1 = TensorType.Q4_0, TensorType.Q4_1, TensorType.Q5_0, TensorType.Q5_1
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = (
    TensorType.Q2_K,
    TensorType.Q3_K,
    TensorType.Q4_K,
    TensorType.Q5_K,
    TensorType.Q6_K,
)
IQ1_S, IQ1_M, IQ4_NL, IQ4_XS = TensorType.IQ1_S, TensorType.IQ1_M, TensorType.IQ4_NL, TensorType.IQ4_XS
IQ2_XXS, IQ2_XS, IQ2_S = TensorType.IQ2_XXS, TensorType.IQ2_XS, TensorType.IQ2_S
IQ3_XXS, IQ3_S = TensorType.IQ3_XXS, TensorType.IQ3_S


class Layout(NamedTuple):
    """What of a model has a say."""

    architecture: str
    """`general.architecture`."""
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    """In each layer; 0 for a dense model."""

    @property
    def shared_heads(self) -> bool:
        """Four or more queries for each key: v is small, and bits for it cost little."""
        return self.heads // self.kv_heads >= 4

    @property
    def is_70b(self) -> bool:
        """As llama.cpp recognises it."""
        grouped = self.architecture == "llama" and self.heads != self.kv_heads
        return self.layers == 80 and (grouped or self.architecture == "qwen2")


class Place(NamedTuple):
    """Where a tensor stands among those of its kind."""

    number: int
    of: int
    layout: Layout
    weighted: bool
    """By an importance matrix."""

    def among_first(self, part: int) -> bool:
        """Of `part` equal parts."""
        return self.number < self.of // part

    @property
    def needs_more(self) -> bool:
        """The first and the last eighth, and every third between."""
        eighth = self.of // 8
        return self.number < eighth or self.number >= 7 * self.of // 8 or (self.number - eighth) % 3 == 2


Rule = Callable[[Place], TensorType | None]
"""None is the mixture's own type."""


class Mixture(NamedTuple):
    file_type: int
    """`general.file_type`."""
    most: TensorType
    v: Rule = lambda at: None
    """Of v, or of q, k and v in one."""
    down: Rule = lambda at: None
    output: TensorType | None = None
    """Of attention; not with eight experts."""
    output_of_eight: TensorType | None = None
    q_and_k: TensorType | None = None
    gate_and_up: Rule = lambda at: None
    head: TensorType = Q6_K
    embedding: TensorType | None = None
    """Where it is not the head too."""
    both_ends: TensorType | None = None
    """Of the embedding and the head, whatever their rows."""
    tiny: bool = False
    """Of two bits or less, for which eight experts and many layers mean less."""
    needs_importance: bool = False


_five_first = lambda at: Q5_K if at.among_first(8) else None
_four_first = lambda at: Q4_K if at.among_first(8) else None
_six_more = lambda at: Q6_K if at.needs_more else None
_four_or_three_bits = lambda at: Q4_K if at.layout.shared_heads else Q3_K
_four_shared = lambda at: Q4_K if at.layout.shared_heads else None
_five_shared = lambda at: Q5_K if at.layout.shared_heads else None
_five_first_unless_weighted = lambda at: None if at.weighted else _five_first(at)
_four_more = lambda at: Q4_K if at.among_first(8) or (at.layout.experts == 8 and at.needs_more) else None
_less_between = lambda at: None if at.among_first(8) or at.number >= 7 * at.of // 8 else IQ3_XXS


def _tiny(file_type: int, most: TensorType, more: TensorType, output: TensorType | None) -> Mixture:
    """`more` for what suffers most."""
    return Mixture(
        file_type,
        most,
        v=lambda at: Q4_K if at.layout.shared_heads or at.layout.experts >= 4 else more,
        down=lambda at: more if at.among_first(8) else None,
        output=output,
        output_of_eight=Q5_K,
        head=Q5_K,
        embedding=more,
        tiny=True,
        needs_importance=True,
    )


MIXTURES = {
    "f32": Mixture(0, F32),
    "f16": Mixture(1, F16),
    "bf16": Mixture(32, TensorType.BF16),
    "q8_0": Mixture(7, Q8_0),
    "q4_0": Mixture(2, Q4_0, down=lambda at: Q4_1 if at.weighted and at.among_first(8) else None),
    "q4_1": Mixture(3, Q4_1),
    "q5_0": Mixture(8, Q5_0, down=lambda at: Q5_1 if at.weighted and at.among_first(8) else None),
    "q5_1": Mixture(9, Q5_1),
    "q2_k": Mixture(10, Q2_K, _four_or_three_bits, lambda at: Q3_K, Q3_K, Q5_K),
    "q2_k_l": Mixture(10, Q2_K, _four_or_three_bits, lambda at: Q3_K, Q3_K, Q5_K, both_ends=Q8_0),
    "q2_k_s": Mixture(21, Q2_K, _four_shared, _four_first, needs_importance=True),
    "q3_k_s": Mixture(11, Q3_K, output_of_eight=Q5_K),
    "q3_k_m": Mixture(
        12,
        Q3_K,
        v=lambda at: Q5_K if at.number < 2 else Q4_K,
        down=lambda at: Q5_K if at.among_first(16) else Q4_K,
        output=Q4_K,
        output_of_eight=Q5_K,
    ),
    "q3_k_l": Mixture(13, Q3_K, lambda at: Q5_K, lambda at: Q5_K, Q5_K),
    "q4_k_s": Mixture(
        14, Q4_K, lambda at: Q5_K if at.number < 4 else None, _five_first, output_of_eight=Q5_K
    ),
    "q4_k_m": Mixture(15, Q4_K, _six_more, _six_more, output_of_eight=Q5_K),
    "q5_k_s": Mixture(16, Q5_K),
    "q5_k_m": Mixture(17, Q5_K, _six_more, _six_more),
    "q6_k": Mixture(18, Q6_K),
    "iq4_nl": Mixture(25, IQ4_NL, _five_shared, _five_first_unless_weighted, output_of_eight=Q5_K),
    "iq4_xs": Mixture(30, IQ4_XS, _five_shared, _five_first_unless_weighted, output_of_eight=Q5_K),
    "iq3_m": Mixture(27, IQ3_S, lambda at: Q4_K, _four_more, Q4_K, Q5_K),
    "iq3_s": Mixture(26, IQ3_S, _four_shared, output_of_eight=Q5_K),
    "iq3_xs": Mixture(
        22,
        IQ3_S,
        _four_shared,
        output_of_eight=Q5_K,
        q_and_k=IQ3_XXS,
        gate_and_up=_less_between,
        needs_importance=True,
    ),
    "iq3_xxs": Mixture(
        23,
        IQ3_XXS,
        _four_shared,
        output=IQ3_S,
        output_of_eight=Q5_K,
        q_and_k=IQ2_S,
        head=Q5_K,
        embedding=IQ3_S,
        needs_importance=True,
    ),
    "iq2_m": _tiny(29, IQ2_S, IQ3_S, IQ3_S),
    "iq2_s": _tiny(28, IQ2_XS, IQ3_S, IQ3_S),
    "iq2_xs": _tiny(20, IQ2_XS, Q2_K, None),
    "iq2_xxs": _tiny(19, IQ2_XXS, Q2_K, None),
    "iq1_m": _tiny(31, IQ1_M, Q2_K, IQ2_XXS),
    "iq1_s": _tiny(24, IQ1_S, Q2_K, IQ2_XXS),
}

_FALLBACKS = {Q2_K: Q4_0, Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
"""For rows that blocks of 256 do not fill; IQ4_NL for the others. What blocks of 32 do not fill either is float16."""
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|^position_embd|^token_types|ssm_conv1d|shortconv\.conv|attn_rel_b"
    r"|\.position_embd|\.patch_embd|\.patch_merger|altup|laurel|per_layer_model_proj"
)
"""Small, or told apart by small differences."""


def tensor_types(
    method: str,
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout,
    *,
    weighted: bool = False,
    say: Callable[..., None] = log.info,
) -> dict[str, TensorType]:
    """For each GGUF name its type in a file of `method`. `weighted`: an importance matrix is used. `say` is told of
    types that are not what the method has, since rows are no whole blocks of those."""
    mixture = MIXTURES[method]
    tied = "output.weight" not in shapes
    of_kind = Counter(filter(None, map(_kind, shapes)))
    seen: Counter[str] = Counter()
    types = {}
    for name in sorted(shapes, key=place):
        if is_kept(name, shapes[name]):
            types[name] = F32
        elif mixture.most.block == 1:
            types[name] = mixture.most
        else:
            kind, width = _kind(name), shapes[name][-1]
            # Experts may be stored apart, so that counting them does not count layers.
            by_name = layout.experts > 1 and kind != "v" and not (mixture.tiny and kind == "down")
            number = place(name)[0] if by_name else seen[kind]
            at = Place(number, of_kind["v"] if kind == "v" else layout.layers, layout, weighted)
            seen[kind] += 1
            if kind == "head" or (kind == "embedding" and tied):
                chosen = Q8_0 if mixture.most is Q8_0 or width % mixture.most.block else mixture.head
            elif kind == "embedding":
                chosen = mixture.embedding or mixture.most
            else:
                chosen = _of_kind(mixture, kind, at)
            if mixture.both_ends and kind in ("embedding", "head"):
                chosen = mixture.both_ends
            types[name] = _fitting(width, chosen)
            if types[name] is not chosen:
                say(
                    "%s is written as %s: its rows of %d are no whole blocks of %s.",
                    name, types[name].name, width, chosen.name,
                )  # fmt: skip
    return types


_KINDS = {
    "head": r"^output\.weight",
    "embedding": r"^(per_layer_)?token_embd\.weight",
    "v": r"attn_(v|qkv|kv_b)\.weight",
    "k": r"attn_k\.weight",
    "q": r"attn_q\.weight",
    "output": r"attn_output\.weight",
    "up": r"ffn_up.*\.weight",
    "gate": r"ffn_gate.*\.weight",
    "down": r"ffn_down.*\.weight",
}


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), "")


def _of_kind(mixture: Mixture, kind: str, at: Place) -> TensorType:
    eight = at.layout.experts == 8
    chosen = None
    if kind == "v":
        chosen = mixture.v(at) or mixture.most
        if at.layout.is_70b and chosen in (Q3_K, Q4_K) and not mixture.tiny:
            chosen = Q5_K
        if eight and not mixture.tiny:
            chosen = Q8_0
    elif kind == "k" and eight:
        chosen = Q4_K if mixture.tiny else Q8_0
    elif kind in ("q", "k"):
        chosen = mixture.q_and_k
    elif kind in ("gate", "up"):
        chosen = mixture.gate_and_up(at)
    elif kind == "down":
        chosen = mixture.down(at)
    elif kind == "output":
        chosen = mixture.output_of_eight if eight else mixture.output
    return chosen or mixture.most


def is_kept(name: str, shape: tuple[int, ...]) -> bool:
    """In float32, whatever the method."""
    return len(shape) < 2 or not name.endswith(".weight") or _KEPT.search(name) is not None


def _fitting(width: int, chosen: TensorType) -> TensorType:
    fallback = chosen
    if width % fallback.block:
        fallback = _FALLBACKS.get(chosen, IQ4_NL if chosen.block > 32 else chosen)
    return F16 if width % fallback.block else fallback


def place(name: str) -> tuple[int, str]:
    """The order of a file: outside the layers first, then block by block."""
    first, _, rest = name.partition(".")
    return (int(rest.split(".")[0]), name) if first == "blk" else (-1, name)
