"""Which part of each array a device holds: rules beside the parameters' names, none in the model's code.

A rule gives the mesh axes of a weight's (out, in). Packed arrays are cut along the same axes, in multiples of what
their class says: 4-bit ones along `in` in whole tiles of 128 inputs. An adapter follows its weight: a has its `in`, b
its `out`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.errors import ShardingError
from jaxtune.quant.packed import PackedArray

_COLUMN = ("tensor", "fsdp")
_ROW = ("fsdp", "tensor")
RULES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), _COLUMN),
    **dict.fromkeys(("qkv_proj", "gate_up_proj", "embed_tokens", "lm_head"), _COLUMN),
    **dict.fromkeys(("o_proj", "down_proj"), _ROW),
}
"""A module's name -> the axes of its weight's (out, in). What is not named here (norms) is whole everywhere."""

BATCH = P(None, ("data", "fsdp"), None)
"""Of a batch [A, R, L]: its rows."""


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A sharding for every array of `params` (packed ones have several), in the same tree."""
    return _map_leaves(_weight, params, mesh)


def lora_shardings(lora: Any, mesh: Mesh) -> Any:
    return _map_leaves(_factor, lora, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def _map_leaves(rule: Callable, tree: Any, mesh: Mesh) -> Any:
    def leaf(path, value):
        keys = tuple(getattr(key, "key", key) for key in path)
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            rule(keys, value, mesh),
            is_leaf=lambda x: isinstance(x, P),
        )

    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=lambda x: isinstance(x, PackedArray))


def _weight(keys: tuple, weight: Any, mesh: Mesh) -> Any:
    axes = RULES.get(keys[-2]) if keys[-1] == "weight" else None
    packed = isinstance(weight, PackedArray)
    if packed and not weight.is_cuttable:
        axes = None
    if axes is not None:
        granule = weight.granule if packed else (1, 1)
        for size, axis, unit in zip(weight.shape[-2:], axes, granule, strict=True):
            _require_whole(keys, size, axis, unit, mesh)
    if not packed:
        return P() if axes is None else P(*(None,) * (weight.ndim - 2), *axes)
    on = dict(zip(("out", "in"), axes or (None, None), strict=True))
    leading = (None,) * len(weight.leading)

    def place(*dims):
        spec = tuple(on[dim] if dim else None for dim in dims)
        return P(*leading, *spec) if any(spec) else P()

    return weight.map_axes(place)


def _factor(keys: tuple, factor: Any, mesh: Mesh) -> P:
    out, inn = RULES.get(keys[-2], (None, None))
    # Without a trailing None: a step returns it like that, and would otherwise be compiled again for its own result.
    # Whole modules are cut as the weight that they replace; b, and what is by output (m, biases), along `out`.
    spec = {"a": P(None, None, inn), "weight": P(out, inn)}.get(keys[-1], P(None, out))
    for size, axis in zip(factor.shape, spec, strict=False):
        _require_whole(keys, size, axis, 1, mesh)
    return spec if any(spec) else P()


def _require_whole(keys: tuple, size: int, axis: str | None, unit: int, mesh: Mesh) -> None:
    """Left to itself, automatic sharding would gather what it cannot cut, silently."""
    parts = 1 if axis is None else mesh.shape[axis]
    if parts > 1 and size % (parts * unit):
        raise ShardingError(
            f"{'.'.join(map(str, keys))}: {size} cannot be cut into {parts} parts.",
            expected=f"parts that are multiples of {unit}.",
            fix=f"Use a mesh with a smaller {axis!r} axis.",
        )
