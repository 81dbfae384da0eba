"""A bitsandbytes folder, read back as it will be loaded: every packed weight is the one that was written, code by code;
and if it was quantised from weights that are at hand, its values are as near to them as the 16 that there are allow."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ExportError
from jaxtune.export.weights import weights
from jaxtune.kernels.nf4 import layout
from jaxtune.loading.checkpoint import Checkpoint, Tensors
from jaxtune.loading.stored import recognise
from jaxtune.log import counted, get_logger
from jaxtune.models.causal_lm import CausalLM, Params
from jaxtune.quant import FourBitArray

log = get_logger(__name__)

_ROWS = 32
"""Of a weight, from the first to the last."""
_SCALE_STEP = float(np.diff(layout.DYNAMIC_MAP).max()) / 2 * 1.01
"""By how much a quantised scale may be off, in units of the largest of its group."""


def verify_packed(
    folder: Path, model: CausalLM, params: Params, quantised_from: Tensors | None = None
) -> None:
    """Raises if what `folder` holds is not `params`, or not near `quantised_from`."""
    furthest, count = (0.0, "no weight"), 0
    with Checkpoint(folder) as checkpoint:
        for name, weight in weights(model.config, params):
            expected = weight.fetch()
            source = recognise(checkpoint, name, weight.shape, jnp.dtype(weight.leaf.dtype))
            found = source.stored.decode(source.read(checkpoint))
            if not all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected))):
                raise ExportError(
                    f"{name}, read back, is not what was written.",
                    expected="the same codes and the same scales.",
                    fix="This is a fault of jaxtune's: please report it. verify=False writes the folder all the same.",
                )
            count += 1
            if quantised_from is not None and isinstance(found, FourBitArray):
                furthest = max(furthest, (_share_of_bound(name, found, quantised_from.read(name)), name))
    log.info("%s, read back: the packed arrays that were written.", counted(count, "weight"))
    if quantised_from is not None:
        log.info(
            "Their values are as near to the merged ones as 4 bits allow: at most %.2g of the bound (%s).",
            *furthest,
        )


def _share_of_bound(name: str, packed: FourBitArray, weight: np.ndarray) -> float:
    """How far values are from the weight's, at most, in units of what may be; more than that raises."""
    looked_at = np.unique(np.linspace(0, len(weight) - 1, _ROWS).astype(int))
    rows = weight[looked_at].astype(np.float32)
    off = np.abs(np.asarray(packed.dequantize(jnp.float32))[looked_at] - rows)
    share = float(np.max(off / np.maximum(_bound(rows, packed, weight), np.finfo(np.float32).tiny)))
    if not share <= 1:
        raise ExportError(
            f"{name}, read back, is off by {share:.3g} times what 4 bits allow.",
            expected="of the 16 values that a block has, the nearest for each weight.",
            fix="This is a fault of jaxtune's: please report it. verify=False writes the folder all the same.",
        )
    return share


def _bound(rows: np.ndarray, packed: FourBitArray, weight: np.ndarray) -> np.ndarray | float:
    """Half of the widest gap between the 16 values, times the block's largest weight, and what a quantised scale is off
    by. Where blocks cross rows, the largest is the whole weight's."""
    gap = float(np.diff(np.sort(layout.TABLES[packed.values])).max()) / 2
    scale = 0.0 if packed.nested_absmax is None else _SCALE_STEP * float(packed.nested_absmax.max())
    if not layout.is_planar(packed.out_in):
        return gap * float(np.abs(weight.astype(np.float32)).max()) + scale
    largest = np.abs(rows.reshape(len(rows), -1, layout.BLOCK)).max(axis=2)
    return (gap * largest + scale).repeat(layout.BLOCK, axis=1)
