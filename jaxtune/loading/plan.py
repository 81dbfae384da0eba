"""What loading will do, settled before a weight is read: where each comes from, how it lies there, what it becomes.

A checkpoint that bitsandbytes quantised keeps what it has: packed weights stay packed, and the others stay in 16 bits.
Of any other, the linears of the layers are packed in the precision that was asked for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import quant
from jaxtune.errors import CheckpointError, OptionError, nearest
from jaxtune.loading.checkpoint import Tensors
from jaxtune.loading.stored import Source, recognise
from jaxtune.log import get_logger
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM, Params
from jaxtune.quant import Format, FourBit, PackedArray, Unpacked

log = get_logger(__name__)

DEFAULT = FourBit()
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK = 64 << 20
"""Bytes of a large table (embedding, head) that are handled at once, so that no copy of it is ever whole."""


class Leaf(NamedTuple):
    """One leaf of `params`."""

    path: names.Path
    target: Any
    """Its shapes and dtypes; packed arrays have several."""
    sources: list[Source]
    """One for each repeat of a stacked leaf, or one in all."""

    @property
    def is_stacked(self) -> bool:
        return names.is_stacked(self.path)


def is_quantized(path: names.Path, shape: tuple[int, ...]) -> bool:
    """What is packed: the linears inside the layers, as transformers and bitsandbytes choose."""
    return names.is_stacked(path) and path[-1] == "weight" and len(shape) == 3


def plan(model: CausalLM, checkpoint: Tensors, *, dtype: jnp.dtype, precision: Format | None) -> list[Leaf]:
    """A plan for every leaf of the model's skeleton. `precision=None` is the checkpoint's own, or else NF4."""
    shapes = {names.keys(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(model.skeleton)}
    _require_all(model, checkpoint, list(shapes))
    sources = {
        path: [
            recognise(checkpoint, name, shape[1:] if names.is_stacked(path) else shape, dtype)
            for name in names.hf_names(model.config, path)
        ]
        for path, shape in shapes.items()
    }
    if model.config.tie_word_embeddings:
        _require_tied(checkpoint)
    _report_unknown(model, checkpoint, [source for each in sources.values() for source in each])
    if own := [source.name for each in sources.values() for source in each if source.has_own_maps]:
        log.warning("%s: the value maps of %d weights differ from bitsandbytes' of today in their last bits: %s.",
                    checkpoint.folder, len(own), some(own))  # fmt: skip
    kept: set[Format] = {
        s.stored.format for each in sources.values() for s in each if s.stored.format is not None
    }
    if kept:
        _require_compatible(checkpoint, kept, precision)
    leaves = []
    for path, shape in shapes.items():
        asked: Format = (precision or DEFAULT) if is_quantized(path, shape) else Unpacked()
        if kept and asked.bits < 16:
            asked = _kept(path, sources[path])
        spec = sources[path][0].stored
        kept_dtype = spec.dtype if asked.bits < 16 and spec.format is not None else dtype
        leaves.append(Leaf(path, quant.abstract(shape, kept_dtype, asked), sources[path]))
    # Large tables first, while the device is empty.
    return sorted(leaves, key=lambda leaf: leaf.is_stacked)


def abstract_params(model: CausalLM, *, dtype: jnp.dtype, precision: Format = DEFAULT) -> Params:
    """The shapes and dtypes that loading a checkpoint in 16 or 32 bits gives."""

    def leaf(path, spec):
        asked = precision if is_quantized(names.keys(path), spec.shape) else Unpacked()
        return quant.abstract(spec.shape, dtype, asked)

    return jax.tree_util.tree_map_with_path(leaf, model.skeleton)


def nbytes(target: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))


def _kept(path: names.Path, sources: list[Source]) -> Format:
    """The format of a stack whose layers lie there packed alike. Where they do not, the same values in 16 bits: what is
    scanned must be alike in every layer."""
    kinds = {source.stored for source in sources}
    if len(kinds) == 1:
        return next(iter(kinds)).format or Unpacked()
    if any(kind.format for kind in kinds):
        log.warning(
            "%s is quantised in some layers only (%d of %d): all of them hold it in 16 bits, with the same values.",
            ".".join(map(str, path[3:])), sum(s.stored.format is not None for s in sources), len(sources),
        )  # fmt: skip
    return Unpacked()


def _require_compatible(checkpoint: Tensors, kept: set[Format], precision: Format | None) -> None:
    found = " and ".join(sorted(format.name for format in kept))
    if precision is None or precision in kept:
        return
    if precision.bits == 16:
        log.warning(
            "%s holds %s: 16 bits hold the same values, not the original ones.", checkpoint.folder, found
        )
    elif all(format.bits == precision.bits for format in kept):
        log.info("%s holds %s, which is kept.", checkpoint.folder, found)
    else:
        raise OptionError(
            f"{checkpoint.folder} holds weights in {found}, and {precision.name} was asked for.",
            expected="the precision that is there, or 16 bits.",
            fix="Leave the precision out; or name the original 16-bit model.",
        )


def _require_all(model: CausalLM, checkpoint: Tensors, paths: list[names.Path]) -> None:
    expected = [name for path in paths for name in names.hf_names(model.config, path)]
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        renamed = nearest(missing[0], checkpoint.names) if len(missing) > len(expected) / 2 else ""
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(expected)} weights that its config asks for: "
            f"{some(missing)}.",
            expected="every weight of the architecture.",
            fix="Download the model again; if it is an adapter, name its folder with its adapter_config.json."
            + renamed,
        )


def _require_tied(checkpoint: Tensors) -> None:
    """A head that is stored though it is tied has to be the embedding once more. transformers unties it otherwise."""
    if HEAD not in checkpoint:
        return
    head, embedding = (checkpoint.read(name).view(np.uint8) for name in (HEAD, EMBEDDING))
    rows = max(1, CHUNK // embedding.shape[1])
    pieces = [slice(start, start + rows) for start in range(0, len(embedding), rows)]
    if len(head) != len(embedding) or not all(
        np.array_equal(head[piece], embedding[piece]) for piece in pieces
    ):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json ties the head to the embedding, and {HEAD} is not {EMBEDDING}.",
            expected="one matrix for both, or a config that does not tie them.",
            fix='If the head was trained apart, set "tie_word_embeddings": false in config.json.',
        )


def _report_unknown(model: CausalLM, checkpoint: Tensors, sources: list[Source]) -> None:
    known = set().union(*(source.siblings() for source in sources))
    unknown = set(checkpoint.names) - known
    if model.config.tie_word_embeddings:
        unknown = {name for name in unknown if not name.startswith("lm_head.")}
    unknown = {name for name in unknown if not name.endswith("rotary_emb.inv_freq")}
    if unknown:
        log.warning("%s holds %d weights that this architecture has no place for: %s.",
                    checkpoint.folder, len(unknown), some(sorted(unknown)))  # fmt: skip


def some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def element(target: Any) -> Any:
    """One repeat of a stacked target."""
    if isinstance(target, PackedArray):
        return quant.abstract(target.out_in, target.dtype, target.format)
    return jax.ShapeDtypeStruct(target.shape[1:], target.dtype)
