"""A merged folder computes what its base computes with the adapter beside it: W' x is W x + s B A x, layer by layer.

Both models see the same few tokens. Each layer of the folder's is also given what the base's layer is given: its own
error is then seen apart from those of the layers before it, which add up, and which a deep model makes larger. That is
what is bounded; the logits at the end are said. All is computed in float32 on the CPU, and one layer of either model is
in memory at a time. Of a head that is the base's own, whose bytes are compared anyway, some rows will do.

Shapes: T tokens, M model width, V vocabulary. Where there are two rows, the first is what the base's layer reads, the
second what the folder's own layers have come to.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ExportError
from jaxtune.export.merge import EMBEDDING_WEIGHT, HEAD_WEIGHT, MergedCheckpoint, Trained, Update
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.loading.config import read_config
from jaxtune.log import get_logger
from jaxtune.lora.config import EMBEDDING, WHOLE_MODULES
from jaxtune.lora.tree import insert, with_settings
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.context import at_length
from jaxtune.models.families import FAMILIES

log = get_logger(__name__)

_EMBEDDED = 32
"""Tokens whose embedding is compared."""
_TOKENS = 8
"""Of these, how many go through the layers: few, since a processor then only waits for the weights."""
_ROWS = 16384
"""Of the head, at a time."""
_SOME_ROWS = 256
"""Of a head that is the base's."""
_ALIGNMENT = 64
"""Of arrays that jax uses where they are."""
_FLOAT32_BOUND = 1e-4
_LOGITS = "The logits"
_Rows = np.ndarray | slice
"""Of the vocabulary."""


def verify_forward(folder: Path, merged: MergedCheckpoint, trained: Trained) -> None:
    """Raises if a part of the folder's model does not compute what it should."""
    length = max((rope.length for rope in trained.config.ropes), default=0) or trained.config.max_position
    hf = read_config(folder, supported=FAMILIES)
    bound = _bound(merged)
    config = at_length(FAMILIES[hf["model_type"]](hf), length)
    _require_sizes(config, trained.config)
    rows = _rows_of_head(merged, config.vocab_size)
    with Checkpoint(folder) as checkpoint, _exactly(), concurrent.futures.ThreadPoolExecutor() as threads:
        theirs = _Model(CausalLM(config), checkpoint.read, threads)
        base = CausalLM(trained.config, trained.lora_config)
        ours = _Model(base, functools.partial(_of_base, merged), threads, trained.lora)
        errors = dict(_compare(ours, theirs, rows))
    bounded = [part for part in errors if part != _LOGITS or bound == _FLOAT32_BOUND]
    worst = max(bounded, key=lambda part: errors[part] if errors[part] >= 0 else np.inf)  # a NaN first of all
    if not errors[worst] <= bound:
        raise ExportError(
            f"{worst} of the merged model, read back: the relative error to the base with its adapter is "
            f"{errors[worst]:.2g}.",
            expected=f"at most {bound:.2g}, which rounding the merged weights may cost.",
            fix="This is a fault of jaxtune's: please report it. verify=False writes the folder all the same.",
        )
    log.info(
        "The merged model, read back, computes what its base does with the adapter: logits off by %.2g; one part (%s) "
        "by %.2g, which may be off by %.2g.",
        errors[_LOGITS], worst.lower(), errors[worst], bound,
    )  # fmt: skip


def _require_sizes(found: ModelConfig, expected: ModelConfig) -> None:
    sizes = lambda c: {
        "tokens": c.vocab_size,
        "layers": c.num_layers,
        "width": c.hidden_size,
        "heads": c.num_heads,
    }
    if sizes(found) != sizes(expected):
        raise ExportError(
            f"config.json, read back, says of the merged model: {sizes(found)}.",
            expected=f"{sizes(expected)}, as trained.",
            fix="This is a fault of jaxtune's: please report it. verify=False writes the folder all the same.",
        )


def _bound(merged: MergedCheckpoint) -> float:
    """What rounding weights once to their dtype may change a layer by. Each is off by half a unit in its last place at
    most, by 0.2 of that unit on average, and so is what a product of them gives; four such products follow one another
    in a layer. Four units leave room for softmaxes, and for sums of large terms, which make errors larger."""
    rounded = [merged.dtype(name) for name in {*merged.changes, *merged.own} if name in merged]
    return max([_FLOAT32_BOUND, *(4 * float(jnp.finfo(dtype).eps) for dtype in rounded)])


def _rows_of_head(merged: MergedCheckpoint, vocabulary: int) -> list[_Rows]:
    """Those that are compared, so many at a time: all, if the adapter or the model changes any."""
    if {EMBEDDING_WEIGHT, HEAD_WEIGHT}.isdisjoint({*merged.changes, *merged.own}):
        return [np.unique(np.linspace(0, vocabulary - 1, _SOME_ROWS).astype(int))]
    return [slice(start, start + _ROWS) for start in range(0, vocabulary, _ROWS)]


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """On the CPU if there is one: a GPU may have no room left, and makes float32 shorter in products."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision("highest"))
        with contextlib.suppress(RuntimeError):  # JAX was told to know GPUs only
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def _of_base(merged: MergedCheckpoint, name: str) -> np.ndarray:
    """A weight as the adapter is added to it."""
    change, weight = merged.changes.get(name), merged.base(name)
    return change.start(weight) if isinstance(change, Update) else weight


class _Excerpt(NamedTuple):
    """One layer, and the rows of the embedding and of the head that belong to a few tokens: a whole model by itself."""

    model: CausalLM
    params: Params
    lora: Lora
    """As the model reads it."""

    def embed(self, tokens_1T: jax.Array) -> jax.Array:
        return self.model.decoder(self.params).embed(tokens_1T, self.lora.get(EMBEDDING), jnp.float32)

    def norm(self, x_BTM: jax.Array) -> jax.Array:
        return self.model.decoder(self.params).norm(x_BTM)


@functools.partial(jax.jit, static_argnums=0)
def _through(model: CausalLM, params: Params, lora: Lora, x_BTM: jax.Array) -> jax.Array:
    """One program for all layers of a kind."""
    segments_BT = jnp.ones(x_BTM.shape[:2], jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTM.shape[1], dtype=jnp.int32), x_BTM.shape[:2])
    return model.decoder(params).through_layers(x_BTM, segments_BT, positions_BT, lora)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: CausalLM, params: Params, lora: Lora, x_BTM: jax.Array) -> jax.Array:
    return model.logits(params, x_BTM, lora)


class _Model:
    """A model of which only excerpts are ever in memory."""

    def __init__(
        self,
        model: CausalLM,
        read: Callable[[str], np.ndarray],
        threads: concurrent.futures.Executor,
        lora: Lora | None = None,
    ):
        self.model = dataclasses.replace(model, compute_dtype="float32")
        self.config, self.read, self.threads = model.config, read, threads
        self.lora = jax.tree.map(np.asarray, lora or {})
        self._buffers: dict[Any, np.ndarray] = {}
        self._paths = [names.keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(model.skeleton)]

    def ends(self, rows: _Rows) -> tuple[Params, Lora]:
        """What is outside the layers, with some rows of the vocabulary; and what the adapter has there."""
        params: Params = {}
        for path in self._paths:
            if not names.is_stacked(path):
                array = self.read(names.hf_names(self.config, path)[0])
                insert(params, path, self._lent(path, array[rows] if path[0] in WHOLE_MODULES else array))
        return params, {name: _rows(self.lora[name], rows) for name in WHOLE_MODULES if name in self.lora}

    def excerpts(self, rows: np.ndarray) -> Iterator[_Excerpt]:
        """Each layer, in order, beside these rows of the vocabulary. The next one takes the place of the last one."""
        ends, lora_ends = self.ends(rows)
        lora = self._settled({**self.lora, **lora_ends})
        for s, (layers, period) in enumerate(self.config.segments):
            for n, i in enumerate(layers):
                repeat, p = divmod(n, period)
                params: Params = dict(ends)
                paths = [path for path in self._paths if path[:3] == ("layers", s, p)]
                hf_names = [names.hf_names(self.config, path)[repeat] for path in paths]
                lent = lambda path, name: self._lent(path[3:], self.read(name)[None])
                for path, array in zip(paths, self.threads.map(lent, paths, hf_names), strict=True):
                    insert(params, ("layers", 0, 0, *path[3:]), array)
                adapter = lora.get("layers", {}).get(s, {}).get(p, {})
                one = jax.tree.map(lambda stack, at=repeat: stack[at : at + 1], adapter)
                yield _Excerpt(
                    _of_one_layer(self.model, self.config.layers[i], len(rows)),
                    params,
                    {**lora, "layers": {0: {0: one}}},
                )

    def logits(self, x_BTM: jax.Array, rows: Iterable[_Rows]) -> np.ndarray:
        """[B, T, rows of the head]"""
        return np.concatenate([_logits(self.model, *self.ends(some), x_BTM) for some in rows], axis=-1)

    def _lent(self, path: names.Path, array: np.ndarray) -> np.ndarray:
        """In float32, where jax takes it without a copy of its own, in memory that is used again once what was computed
        with it is there: to ask the system for so much memory every time would take longer than all else."""
        key = (path, array.shape)
        if key not in self._buffers:
            room = np.empty(array.size * 4 + _ALIGNMENT, np.uint8)
            start = -room.ctypes.data % _ALIGNMENT
            self._buffers[key] = room[start:][: array.size * 4].view(np.float32).reshape(array.shape)
        np.copyto(self._buffers[key], array)
        return self._buffers[key]

    def _settled(self, lora: Lora) -> Lora:
        config = self.model.lora_config
        return {} if config is None else with_settings(lora, config, self.model.module_names)


def _rows(module: Lora, rows: _Rows) -> Lora:
    """What an adapter has of the embedding or of the head, for some rows of the vocabulary."""
    if "weight" in module:
        return {"weight": module["weight"][rows]}
    return {"a": module["a"], "b": module["b"][:, rows]}


def _of_one_layer(model: CausalLM, kind: LayerKind, vocabulary: int) -> CausalLM:
    config = dataclasses.replace(model.config, layers=(kind,), vocab_size=vocabulary)
    return dataclasses.replace(model, config=config)


def _compare(ours: _Model, theirs: _Model, of_head: list[_Rows]) -> Iterator[tuple[str, float]]:
    """Every part of the model, and by how much it is off; the logits last."""
    rows = np.unique(np.linspace(0, ours.config.vocab_size - 1, _EMBEDDED).astype(int))
    tokens_1T = jnp.asarray(np.random.default_rng(0).permutation(len(rows))[None])
    x_1TM = own_1TM = None
    for i, (our, their) in enumerate(zip(ours.excerpts(rows), theirs.excerpts(rows), strict=True)):
        if x_1TM is None or own_1TM is None:
            x_1TM, own_1TM = our.embed(tokens_1T), their.embed(tokens_1T)
            yield "The embedding", _relative(own_1TM, x_1TM)
            x_1TM, own_1TM = x_1TM[:, :_TOKENS], own_1TM[:, :_TOKENS]
        y_1TM = _through(our.model, our.params, our.lora, x_1TM)
        y_2TM = _through(their.model, their.params, their.lora, jnp.concatenate([x_1TM, own_1TM]))
        yield f"Layer {i}", _relative(y_2TM[:1], y_1TM, before=x_1TM)
        x_1TM, own_1TM = y_1TM, y_2TM[1:]
    assert x_1TM is not None and own_1TM is not None
    x_1TM, x_2TM = our.norm(x_1TM), their.norm(jnp.concatenate([x_1TM, own_1TM]))
    expected_1TV, found_2TV = ours.logits(x_1TM, of_head), theirs.logits(x_2TM, of_head)
    yield "The head", _relative(found_2TV[:1], expected_1TV)
    yield _LOGITS, _relative(found_2TV[1:], expected_1TV)


def _relative(found: Any, expected: Any, before: Any = None) -> float:
    """Root mean square over tokens of |found - expected| / |expected|; or of what has changed since `before`. Where
    that is little it is lost in float32's own rounding, and counts as a hundredth."""
    length = lambda x: np.linalg.norm(np.asarray(x, np.float64), axis=-1)
    size, off = length(expected), length(found - expected)
    if before is not None:
        size = length(expected - before) + size / 100
    return float(
        np.sqrt(np.mean(np.divide(off, size, out=np.where(off > 0, np.inf, 0), where=size > 0) ** 2))
    )
