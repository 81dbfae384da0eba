"""Fills `params` from a checkpoint: one tensor at a time is read, sent to the device, packed there and written into the
donated buffer of its stack, so that neither host nor device ever holds a second copy of the model.

Everything that can be checked without reading weights is checked before the first byte is sent.
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.errors import CheckpointError
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.log import get_logger
from jaxtune.lora.tree import insert
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM, Params
from jaxtune.progress import progress_bar
from jaxtune.quant import nf4

log = get_logger(__name__)

IN_FLIGHT = 4
"""Tensors that may be on their way to the device at once: bounds the host memory that transfers pin."""


def is_quantized(path: names.Path, shape: tuple[int, ...]) -> bool:
    """What becomes 4-bit: the linears inside the layers, as transformers and bitsandbytes choose."""
    return names.is_stacked(path) and path[-1] == "weight" and len(shape) == 3


def load_params(
    model: CausalLM,
    checkpoint: Checkpoint,
    *,
    dtype: jnp.dtype,
    in_4bit: bool,
) -> Params:
    """The tree of `model.skeleton` with arrays: linears packed in NF4 if `in_4bit`, all else in `dtype`."""
    leaves = [
        (names.keys(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(model.skeleton)
    ]
    _check_names_and_shapes(model, checkpoint, leaves)
    params: Params = {}
    in_flight: collections.deque[jax.Array] = collections.deque()
    finite: dict[str, jax.Array] = {}
    total = sum(len(names.hf_names(model.config, path)) for path, _ in leaves)
    bar = progress_bar(total=total, unit="tensor", desc="loading", leave=False)
    for path, shape in leaves:
        packed = in_4bit and is_quantized(path, shape)
        stacked = names.is_stacked(path)
        value = _buffer(shape, dtype, packed) if stacked else None
        for i, name in enumerate(names.hf_names(model.config, path)):
            # A copy: on a CPU the device's array could otherwise be the mapped file itself.
            tensor = jax.device_put(checkpoint.read(name), may_alias=False)
            if stacked:
                value, finite[name] = _put(value, tensor, i)
            else:
                value = tensor.astype(dtype)
                finite[name] = _is_finite(value)
            in_flight.append(finite[name])
            if len(in_flight) > IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            bar.update()
        insert(params, path, value)
    bar.close()
    broken = [name for name, ok in zip(finite, jax.device_get(list(finite.values())), strict=True) if not ok]
    if broken:
        raise CheckpointError(
            f"{checkpoint.folder}: {_some(broken)} hold NaN or infinite values.",
            expected=f"finite weights in {jnp.dtype(dtype).name}.",
            fix="Use a checkpoint from before its training diverged"
            + (
                "; or dtype='bfloat16', since float16 ends at 65504."
                if dtype == jnp.float16
                else ", or download it again."
            ),
        )
    return params


def abstract_params(model: CausalLM, *, dtype: jnp.dtype, in_4bit: bool) -> Params:
    """The shapes and dtypes that `load_params` would give."""

    def leaf(path, spec):
        packed = in_4bit and is_quantized(names.keys(path), spec.shape)
        return nf4.abstract(spec.shape, dtype) if packed else jax.ShapeDtypeStruct(spec.shape, dtype)

    return jax.tree_util.tree_map_with_path(leaf, model.skeleton)


def _buffer(shape: tuple[int, ...], dtype: jnp.dtype, packed: bool) -> Any:
    if not packed:
        return jnp.zeros(shape, dtype)
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), nf4.abstract(shape, dtype))


@functools.partial(jax.jit, donate_argnums=0)
def _put(buffer, tensor, i):
    """Writes one repeat into the stack, packed if the stack is, and says whether it was finite."""
    value = tensor.astype(buffer.dtype)
    one = nf4.quantize(value) if isinstance(buffer, nf4.NF4Array) else value
    buffer = jax.tree.map(lambda stack, new: lax.dynamic_update_index_in_dim(stack, new, i, 0), buffer, one)
    return buffer, jnp.isfinite(value).all()


@jax.jit
def _is_finite(value):
    return jnp.isfinite(value).all()


def _check_names_and_shapes(
    model: CausalLM, checkpoint: Checkpoint, leaves: list[tuple[names.Path, tuple[int, ...]]]
) -> None:
    expected = {
        name: shape[1:] if names.is_stacked(path) else shape
        for path, shape in leaves
        for name in names.hf_names(model.config, path)
    }
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(expected)} weights that its config asks for: "
            f"{_some(missing)}.",
            expected="every weight of the architecture.",
            fix="Download the model again; if it is an adapter, name its folder with its adapter_config.json.",
        )
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has the shape {checkpoint.shape(name)}.",
                expected=f"{shape}, from config.json.",
                fix="Use the config.json that was saved with these weights.",
            )
        if not jnp.issubdtype(checkpoint.dtype(name), jnp.floating):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is stored as {checkpoint.dtype(name)}.",
                expected="float32, float16 or bfloat16.",
                fix="Name the original 16-bit model instead of a quantised copy.",
            )
    ignored = set(checkpoint.names) - set(expected)
    if model.config.tie_word_embeddings:
        ignored.discard("lm_head.weight")
    ignored = {name for name in ignored if not name.endswith("rotary_emb.inv_freq")}
    if ignored:
        log.warning("%s holds %d weights that this architecture has no place for: %s.",
                    checkpoint.folder, len(ignored), _some(sorted(ignored)))  # fmt: skip


def _some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
