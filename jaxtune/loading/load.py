"""Fills `params` from a checkpoint: pieces of it are read ahead by threads, sent to the device, packed there and put
into the donated buffer of their stack, so that neither host nor device ever holds a second copy of the model.

Everything that can be checked without reading weights is checked before the first byte is sent. The programs, one for
each kind and shape of piece, are compiled by threads while the first pieces are read.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune import quant
from jaxtune.device_memory import default_device, on_host
from jaxtune.errors import CheckpointError
from jaxtune.loading.checkpoint import Tensors
from jaxtune.loading.plan import CHUNK, Leaf, element, nbytes, plan, some
from jaxtune.loading.read_ahead import read_ahead
from jaxtune.loading.room import require_room
from jaxtune.loading.stored import Arrays, Plain, Source, Stored
from jaxtune.lora.config import EMBEDDING
from jaxtune.lora.tree import insert
from jaxtune.models.causal_lm import CausalLM, Params
from jaxtune.progress import progress_bar
from jaxtune.quant import Format, PackedArray

IN_FLIGHT = 256 << 20
"""Bytes that may be on their way to the device at once: bounds what transfers pin on the host and hold there."""
COMPILING = 4
"""Programs that are compiled at once."""


class Piece(NamedTuple):
    """What is read, sent and written at once: a weight, or some rows of a large table."""

    leaf: Leaf
    source: Source
    at: int
    """Where it goes: its layer in the stack, or its first row."""
    rows: slice | None = None


def load_params(
    model: CausalLM,
    checkpoint: Tensors,
    *,
    dtype: jnp.dtype,
    precision: Format | None = None,
    offload_embedding: bool = False,
) -> Params:
    """The tree of `model.skeleton` with arrays: linears packed in `precision`, all else in `dtype`. Without a
    precision, what the checkpoint holds packed stays as it is, and others are packed in NF4. With
    `offload_embedding`, the embedding's table goes on to the host's pinned memory as soon as it is whole."""
    leaves = plan(model, checkpoint, dtype=dtype, precision=precision)
    device = default_device()
    offloaded = {leaf.path for leaf in leaves if offload_embedding and leaf.path[0] == EMBEDDING}
    require_room([leaf for leaf in leaves if leaf.path not in offloaded], device, in_flight=IN_FLIGHT)
    pieces = [(piece, _size(piece, checkpoint)) for leaf in leaves for piece in _pieces(leaf, checkpoint)]
    to_come = collections.Counter(piece.leaf.path for piece, _ in pieces)
    buffers: dict[Any, Any] = {}
    flags: dict[str, list[jax.Array]] = collections.defaultdict(list)
    in_flight: collections.deque[tuple[jax.Array, int]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(COMPILING) as compilers:
        programs: dict[tuple[Hashable, ...], concurrent.futures.Future] = {}
        bar = progress_bar(total=len(pieces), unit="piece", desc="loading", leave=False)
        for (piece, size), arrays in read_ahead(
            ((each, each[1]) for each in _started(pieces, checkpoint, device, compilers, programs)),
            lambda each: each[0].source.read(checkpoint, each[0].rows),
        ):
            leaf = piece.leaf
            empty, write = programs[_program_key(piece, checkpoint)].result()
            if leaf.path not in buffers:
                buffers[leaf.path] = empty()
            # A copy: on a CPU the device's array could otherwise be the mapped file itself.
            sent = jax.device_put(arrays, may_alias=False)
            buffers[leaf.path], flag = write(buffers[leaf.path], sent, np.int32(piece.at))
            del arrays, sent
            to_come[leaf.path] -= 1
            if leaf.path in offloaded and not to_come[leaf.path]:
                buffers[leaf.path] = on_host(buffers[leaf.path])
            flags[piece.source.name].append(flag)
            in_flight.append((flag, size))
            while len(in_flight) > 1 and sum(size for _, size in in_flight) > IN_FLIGHT:
                in_flight.popleft()[0].block_until_ready()
            bar.update()
        bar.close()
    _require_finite(checkpoint, flags, dtype)
    params: Params = {}
    for leaf in leaves:
        insert(params, leaf.path, buffers[leaf.path])
    return params


def _pieces(leaf: Leaf, checkpoint: Tensors) -> Iterator[Piece]:
    if leaf.is_stacked:
        yield from (Piece(leaf, source, i) for i, source in enumerate(leaf.sources))
        return
    (source,) = leaf.sources
    size = nbytes(leaf.target)
    if len(leaf.target.shape) < 2 or size <= CHUNK or not isinstance(source.stored, Plain):
        yield Piece(leaf, source, 0)
        return
    count = leaf.target.shape[0]
    rows = max(1, CHUNK * count // size)
    for start in range(0, count, rows):
        start = min(
            start, count - rows
        )  # the last one overlaps: all are of one shape, so that one program does
        yield Piece(leaf, source, start, slice(start, start + rows))


def _specs(piece: Piece, checkpoint: Tensors) -> dict[str, tuple[tuple[int, ...], str]]:
    """Part -> shape and dtype of what `source.read` will give."""
    source, found = piece.source, {}
    for part, name in source.tensors.items():
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        if source.stored.format is not None and part == "weight" and source.stored.format.bits == 4:
            shape, dtype = (int(np.prod(shape)) * dtype.itemsize,), np.dtype(np.uint8)
        if piece.rows is not None:
            shape = (piece.rows.stop - piece.rows.start, *shape[1:])
        found[part] = (tuple(shape), jnp.dtype(dtype).name)
    return found | {part: (value.shape, value.dtype.name) for part, value in source.constants.items()}


def _size(piece: Piece, checkpoint: Tensors) -> int:
    return sum(
        int(np.prod(shape)) * jnp.dtype(dtype).itemsize for shape, dtype in _specs(piece, checkpoint).values()
    )


def _program_key(piece: Piece, checkpoint: Tensors) -> tuple[Hashable, ...]:
    target, structure = jax.tree.flatten(piece.leaf.target)
    return (
        piece.source.stored,
        piece.leaf.is_stacked,
        tuple(sorted(_specs(piece, checkpoint).items())),
        structure,
        tuple((spec.shape, jnp.dtype(spec.dtype).name) for spec in target),
    )


def _started(pieces, checkpoint, device, compilers, programs):
    """The pieces, each with its program being compiled by the time that it is read."""
    for each in pieces:
        key = _program_key(each[0], checkpoint)
        if key not in programs:
            programs[key] = compilers.submit(_compile, device, *key)
        yield each


@functools.lru_cache(maxsize=256)
def _compile(device, stored, is_stacked, parts, structure, target_specs):
    """The programs that make a leaf of zeros and write such a piece into it; compiled once in a process."""

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    buffer = jax.tree.unflatten(structure, [spec(*each) for each in target_specs])
    arrays = {part: spec(*each) for part, each in parts}
    write = functools.partial(_write, stored=stored, is_stacked=is_stacked)
    zeros = lambda: jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), buffer)
    with jax.default_device(device):
        return (
            jax.jit(zeros).lower().compile(),
            jax.jit(write, donate_argnums=0).lower(buffer, arrays, spec((), "int32")).compile(),
        )


def _write(buffer: Any, arrays: Arrays, at: jax.Array, *, stored: Stored, is_stacked: bool) -> Any:
    """The buffer with one piece written into it, and whether that was finite."""
    value = stored.decode(arrays)
    target = element(buffer) if is_stacked else buffer
    if isinstance(target, PackedArray) and not isinstance(value, PackedArray):
        value = value.astype(target.dtype)
        one = target.format.quantize(value)
    elif isinstance(target, PackedArray):
        one = value
    else:
        one = value = quant.dequantize(value, target.dtype)
    numbers = [leaf for leaf in jax.tree.leaves(value) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in numbers]).all()
    if is_stacked:
        update = lambda stack, new: lax.dynamic_update_index_in_dim(stack, new, at, 0)
    else:
        update = lambda table, rows: lax.dynamic_update_slice_in_dim(table, rows, at, 0)
    return jax.tree.map(update, buffer, one), finite


def _require_finite(checkpoint: Tensors, flags: dict[str, list[jax.Array]], dtype: jnp.dtype) -> None:
    broken = [name for name, ok in jax.device_get(dict(flags)).items() if not all(ok)]
    if broken:
        raise CheckpointError(
            f"{checkpoint.folder}: {some(broken)} hold NaN or infinite values.",
            expected=f"finite weights in {jnp.dtype(dtype).name}.",
            fix="Use a checkpoint from before its training diverged"
            + (
                "; or dtype='bfloat16', since float16 ends at 65504."
                if dtype == jnp.float16
                else ", or download it again."
            ),
        )
