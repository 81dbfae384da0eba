"""What every implementation of an op is held to: one set of cases, tiny on a CPU and of real size on a GPU.

    check(case, case.tiny, implementation, dtype, seed)

draws fresh inputs, fills the buffers of the outputs with NaN, runs the implementation into them, and compares with the
definition, written out in float32.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.data.layout import Shape
from jaxtune.data.pieces import piece_lengths
from jaxtune.kernels import nf4, scaled
from jaxtune.kernels.attention import api as attention_api
from jaxtune.kernels.attention import attention
from jaxtune.kernels.choice import runnable
from jaxtune.kernels.linear_cross_entropy import api as cross_entropy_api
from jaxtune.kernels.linear_cross_entropy import linear_cross_entropy, nll_and_entropy
from jaxtune.kernels.nf4 import reference as nf4_reference
from jaxtune.kernels.scaled import reference as scaled_reference
from tests.kit.compare import assert_close, rms

Sizes = tuple[Any, ...]
Keys = Iterator[jax.Array]
CANDIDATES = {
    api.NAME: api.IMPLEMENTATIONS for api in (attention_api, cross_entropy_api, nf4.api, scaled.api)
}
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
"""Relative RMS: sums in another order, and the rounding of 16 bits at every step."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    op: str
    name: str
    tiny: Sizes
    real: Sizes
    inputs: Callable[..., tuple]
    """(keys, dtype, *sizes) -> arguments."""
    ours: Callable[..., Any]
    """(*arguments, implementation=...) -> arrays, all of which mean something."""
    exact: Callable[..., Any]
    """(*arguments) -> the same in float32."""
    separate: int
    """So many first arguments, and all outputs, have a leading axis of rows that know nothing of one another."""
    least: float = 1e-30
    """What errors are compared with at least, of inputs of size 1, where outputs are zero but by cancelling."""

    def __str__(self):
        return f"{self.op}: {self.name}"


def over_implementations(cases: list[Case]) -> list:
    """Parameters (case, implementation) for every implementation that can run on this machine."""
    return [
        pytest.param(case, implementation, id=f"{case}-{implementation}")
        for case in cases
        for implementation in runnable(CANDIDATES[case.op])
    ]


def normal(keys: Keys, *shape: int, dtype: str = "float32", size: float = 1.0) -> jax.Array:
    return (size * jax.random.normal(next(keys), shape)).astype(dtype)


def check(case: Case, sizes: Sizes, implementation: str, dtype: str, seed: int) -> None:
    inputs = draw(case, sizes, dtype, seed)
    ours = run(case, inputs, implementation)
    compare(ours, jax.jit(case.exact)(*inputs), TOLERANCE[dtype], case.least)


def check_nan(case: Case, sizes: Sizes, implementation: str, dtype: str, seed: int) -> None:
    """NaN in a row of the inputs is NaN in that row of the outputs, and changes no other row."""
    inputs = draw(case, sizes, dtype, seed)
    with_nan = jax.tree.map(with_nan_first, inputs[: case.separate])
    clean, spoilt = (
        jax.device_get(run(case, (*given, *inputs[case.separate :]), implementation))
        for given in (inputs[: case.separate], with_nan)
    )
    for before, after in zip(jax.tree.leaves(clean), jax.tree.leaves(spoilt), strict=True):
        if before[0].any():  # what is 0 by definition (padding, ignored labels) may stay 0
            assert np.isnan(after[0]).any(), "NaN was hidden"
        if len(before) > 1:
            compare(after[1:], before[1:], TOLERANCE[dtype])


def with_nan_first(x: jax.Array) -> np.ndarray:
    spoilt = np.array(x)
    spoilt[0] = np.nan
    return spoilt


def draw(case: Case, sizes: Sizes, dtype: str, seed: int) -> tuple:
    """Arguments on the device, other ones for every seed and case."""
    print(f"seed {seed}")  # pytest shows it where a test fails
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(str(case).encode()))
    return drawing(case, sizes, dtype)(key)


@functools.cache
def drawing(case: Case, sizes: Sizes, dtype: str) -> Callable:
    return jax.jit(lambda key: case.inputs(iter(jax.random.split(key, 8)), dtype, *sizes))


def run(case: Case, inputs: tuple, implementation: str) -> Any:
    """The outputs, written into buffers that held NaN before; skips the test where the implementation says that it does
    not take the case."""
    function = program(case, implementation)
    try:
        return function(jax.tree.map(poisoned, jax.eval_shape(function, None, *inputs)), *inputs)
    except NotImplementedError as error:
        pytest.skip(str(error))


@functools.cache
def program(case: Case, implementation: str) -> Callable:
    return into_poison(functools.partial(case.ours, implementation=implementation))


def into_poison(function: Callable) -> Callable:
    """(poison, *inputs) -> function(*inputs), in the memory of the poison: a donated array for each output."""
    return jax.jit(lambda poison, *inputs: function(*inputs), donate_argnums=0, keep_unused=True)


def poisoned(spec: Any) -> jax.Array:
    """NaN everywhere, or -1 where numbers are whole."""
    return jnp.full(spec.shape, jnp.nan if jnp.issubdtype(spec.dtype, jnp.floating) else -1, spec.dtype)


def compare(ours: Any, exact: Any, tolerance: float, least: float = 1e-30) -> None:
    """Each output by itself, and no number of it far off: a wrong tile drowns in the mean of a large array. What is far
    is measured by the array, the number's row, and the number: of 128k keys, the first have gradients like no other."""
    for i, pair in enumerate(zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)):
        mine, right = (np.asarray(x).astype(np.float32) for x in pair)
        assert np.isfinite(mine).all(), f"output {i} is not finite everywhere"
        assert_close(mine, right, tolerance, f"output {i}", least)
        row = np.sqrt((right * right).mean(axis=-1, keepdims=True)) if right.ndim else right
        worst = (np.abs(mine - right) / np.maximum(rms(right) + row + np.abs(right), least)).max()
        assert worst <= 30 * tolerance, (
            f"output {i}: one number is off by {worst:.3g} of itself and the RMS around it"
        )


# ---- products with packed weights: y = x w^T and dx = dy w, row by row ----


def value_and_pullback(function: Callable, x: jax.Array, dy: Any) -> tuple[Any, jax.Array]:
    y, pull = jax.vjp(function, x)
    return y, pull(dy)[0]


def product_inputs(quantize, keys, dtype, tokens, out, inn):
    packed = jax.jit(quantize)(normal(keys, out, inn, size=0.02))
    return normal(keys, tokens, inn, dtype=dtype), normal(keys, tokens, out, dtype=dtype), packed


def product_exact(dequantize, x, dy, packed):
    w = dequantize(packed, (dy.shape[1], x.shape[1]))
    return value_and_pullback(lambda x: x @ w.T, *(each.astype(jnp.float32) for each in (x, dy)))


WIDTHS: dict[str, tuple[Sizes, Sizes]] = {
    "gate": ((5, 128, 256), (512, 14336, 4096)),
    "down": ((5, 256, 128), (512, 4096, 14336)),
    "one token": ((1, 128, 256), (1, 14336, 4096)),
    "a few tokens": ((3, 64, 128), (17, 4096, 4096)),
    "64 tokens": ((8, 128, 128), (64, 1024, 4096)),
    "2880 wide, an odd number of blocks": ((5, 64, 192), (300, 2880, 2880)),
    "576 wide": ((5, 48, 192), (300, 1536, 576)),
    "4304 wide, blocks cross rows": ((5, 48, 50), (300, 1152, 4304)),
    "4304 rows": ((5, 50, 128), (300, 4304, 1152)),
}
"""(tokens, out, in), tiny and real."""


def nf4_cases() -> Iterator[Case]:
    def ours(x, dy, packed, *, values, implementation):
        shape = (dy.shape[1], x.shape[1])
        multiply = lambda x: nf4.matmul(x, packed, shape, values=values, implementation=implementation)
        return value_and_pullback(multiply, x, dy)

    def weight(packed, shape, *, values):
        return nf4_reference.dequantize(*packed, shape=shape, dtype=jnp.dtype("float32"), values=values)

    def case(name, sizes, values="nf4", double=True):
        quantize = functools.partial(nf4.quantize, values=values, double=double)
        return Case(
            op=nf4.api.NAME, name=name, tiny=sizes[0], real=sizes[1], separate=2,
            inputs=functools.partial(product_inputs, quantize),
            ours=functools.partial(ours, values=values),
            exact=functools.partial(product_exact, functools.partial(weight, values=values)),
        )  # fmt: skip

    for name, sizes in WIDTHS.items():
        yield case(name, sizes)
    yield case("plain scales", WIDTHS["gate"], double=False)
    yield case("fp4", WIDTHS["gate"], values="fp4")


def scaled_cases() -> Iterator[Case]:
    def ours(x, dy, packed, *, implementation):
        multiply = lambda x: scaled.matmul(x, packed, implementation=implementation)
        return value_and_pullback(multiply, x, dy)

    def weight(packed, shape):
        return scaled_reference.dequantize(*packed, dtype=jnp.dtype("float32"))

    for dtype, block in (("int8", (1, None)), ("float8_e4m3fn", (128, 128)), ("float8_e4m3fn", (None, None))):
        quantize = functools.partial(scaled.quantize, dtype=dtype, block=block)
        for name in (
            "gate",
            "one token",
            "2880 wide, an odd number of blocks",
            "4304 wide, blocks cross rows",
        ):
            blocks = " x ".join("all" if size is None else str(size) for size in block)
            yield Case(
                op=scaled.api.NAME, name=f"{dtype} by {blocks}, {name}",
                tiny=WIDTHS[name][0], real=WIDTHS[name][1], separate=2,
                inputs=functools.partial(product_inputs, quantize),
                ours=ours, exact=functools.partial(product_exact, weight),
            )  # fmt: skip


# ---- linear cross-entropy: the nll and its gradient for any weighting of tokens ----


def cross_entropy_cases() -> Iterator[Case]:
    def inputs(keys, dtype, tokens, width, vocab, *, ignored):
        labels = jax.random.randint(next(keys), (tokens,), 0, vocab)
        is_ignored = jax.random.uniform(next(keys), (tokens,)) < ignored
        x, dnll = normal(keys, tokens, width, dtype=dtype), normal(keys, tokens)
        w = normal(keys, vocab, width, dtype=dtype, size=width**-0.5)
        return x, dnll, w, jnp.where(is_ignored, -100, labels)

    def ours(x, dnll, w, labels, *, implementation, **form):
        loss = lambda x: linear_cross_entropy(x, w, labels, implementation=implementation, **form)
        return value_and_pullback(loss, x, dnll)

    def exact(x, dnll, w, labels, **form):
        return value_and_pullback(lambda x: plain_nll(x, w, labels, **form), x.astype(jnp.float32), dnll)

    def case(name, tiny, real, ignored=0.2, **form):
        return Case(
            op=cross_entropy_api.NAME, name=name, tiny=tiny, real=real, separate=2,
            inputs=functools.partial(inputs, ignored=ignored),
            ours=functools.partial(ours, **form), exact=functools.partial(exact, **form),
        )  # fmt: skip

    yield case("8B", (37, 16, 101), (2053, 4096, 128256))
    yield case("2880 wide", (37, 18, 101), (1030, 2880, 201088))
    yield case("576 wide", (37, 9, 101), (1030, 576, 49152))
    yield case("one token", (1, 16, 101), (1, 4096, 128256))
    yield case("every token masked", (37, 16, 101), (1030, 4096, 128256), ignored=1)
    form = dict(scale=0.25, softcap=30.0, temperature=0.7)
    yield case("scaled, capped, tempered", (37, 16, 101), (1030, 3584, 256000), **form)
    yield case("z-loss", (37, 16, 101), (1030, 4096, 128256), z_loss=1e-2)


def plain_nll_and_entropy(x, w, labels, scale=1.0, softcap=None, temperature=1.0):
    logits = scale * (x @ w.astype(jnp.float32).T)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logp = jax.nn.log_softmax(logits / temperature)
    nll = -jnp.take_along_axis(logp, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
    entropy = -(jnp.exp(logp) * logp).sum(axis=1)
    return jnp.where(labels == -100, 0.0, nll), jnp.where(labels == -100, 0.0, entropy)


def plain_nll(x, w, labels, z_loss=0.0, **form):
    lse = jax.nn.logsumexp(x @ w.astype(jnp.float32).T, axis=1)
    return plain_nll_and_entropy(x, w, labels, **form)[0] + z_loss * jnp.where(labels == -100, 0.0, lse**2)


def entropy_cases() -> Iterator[Case]:
    """The nll and the entropy, and the gradient of both."""

    def ours(x, dnll, w, labels, *, implementation):
        both = lambda x: nll_and_entropy(x, w, labels, implementation=implementation)
        return value_and_pullback(both, x, (dnll, 1 - dnll))

    def exact(x, dnll, w, labels):
        both = lambda x: plain_nll_and_entropy(x, w, labels)
        return value_and_pullback(both, x.astype(jnp.float32), (dnll, 1 - dnll))

    like = next(cross_entropy_cases())
    yield dataclasses.replace(like, name="8B, with entropies", ours=ours, exact=exact)


def head_cases() -> Iterator[Case]:
    """The head's own gradient: full fine-tuning. It sums over tokens, so that none is separate."""

    def ours(x, dnll, w, labels, *, implementation):
        loss = lambda w: linear_cross_entropy(x, w, labels, implementation=implementation)
        return value_and_pullback(loss, w, dnll)

    def exact(x, dnll, w, labels):
        loss = lambda w: plain_nll(x.astype(jnp.float32), w, labels)
        return value_and_pullback(loss, w.astype(jnp.float32), dnll)

    like = next(cross_entropy_cases())
    real = (1030, 4096, 32000)
    yield dataclasses.replace(like, name="a trained head", real=real, ours=ours, exact=exact, separate=0)


# ---- attention: output and gradients of real tokens; padding has no gradient ----

ROWS: dict[str, tuple[Sizes, Sizes]] = {
    "one segment a row": (((20,), (24,)), ((1900,), (2048,))),
    "packed": (((7, 10, 3, 4), (1, 22, 0, 0)), ((300, 500, 1200, 48), (1, 1900, 0, 0))),
    "a row of padding": (((24, 0), (0, 0)), ((1000, 1048), (0, 0))),
    "segments of no tokens": (((7, 0, 10, 0), (0, 0, 22, 1)), ((300, 0, 500, 0), (0, 0, 1900, 1))),
    "short segments": (((3,) * 8, (5,) * 4 + (0,) * 4), ((17,) * 120, (90,) * 22 + (0,) * 98)),
    "one token": (((1,), (1,)), ((1,), (1,))),
}
"""Lengths of the segments in rows of the longest sum."""


def pieces_of(lengths: np.ndarray, tokens: int) -> np.ndarray:
    """[G, M]: as a trainer lays them out, but with what is 0 first, if a row has segments of no tokens."""
    rows = [[length for length in line if length] for line in lengths.tolist()]
    pieces = piece_lengths(rows, Shape(1, len(rows), int(tokens)))[0]
    if any(0 in line[: len(row)] for line, row in zip(lengths.tolist(), rows, strict=True)):
        pieces = np.roll(pieces.reshape(-1), (pieces == 0).sum()).reshape(pieces.shape)
    return pieces


def attention_cases() -> Iterator[Case]:
    def inputs(keys, dtype, lengths, heads, kv_heads, size):
        lengths = np.array(lengths, np.int32)
        tokens = lengths.sum(1).max()
        segments, positions = np.zeros((2, len(lengths), tokens), np.int32)
        for row, line in enumerate(lengths):
            for i, (end, length) in enumerate(zip(np.cumsum(line), line, strict=True)):
                segments[row, end - length : end] = i + 1
                positions[row, end - length : end] = np.arange(length)
        q, k, v, dout = (
            normal(keys, *segments.shape, h, size, dtype=dtype) for h in (heads, kv_heads, kv_heads, heads)
        )
        return q, k, v, dout, normal(keys, heads), segments, positions, pieces_of(lengths, tokens)

    def all_of(attend, q, k, v, dout, segments, *sinks):
        real = (segments > 0)[:, :, None, None]
        out, pull = jax.vjp(lambda *inputs: jnp.where(real, attend(*inputs), 0), q, k, v, *sinks)
        return out, *pull(dout)

    def ours(q, k, v, dout, sinks, segments, positions, pieces, *, with_sinks, implementation, **form):
        def attend(q, k, v, sinks=None):
            return attention(
                q, k, v, q_segments_BT=segments, kv_segments_BS=segments, q_positions_BT=positions,
                kv_positions_BS=positions, pieces_GM=pieces, scale=q.shape[-1] ** -0.5, sinks_H=sinks,
                implementation=implementation, **form,
            )  # fmt: skip

        return all_of(attend, q, k, v, dout, segments, *[sinks] * with_sinks)

    def exact(q, k, v, dout, sinks, segments, positions, pieces, *, with_sinks, **form):
        def attend(q, k, v, sinks=None):
            return plain_attention(q, k, v, segments, positions, q.shape[-1] ** -0.5, sinks=sinks, **form)

        floats = (x.astype(jnp.float32) for x in (q, k, v, dout))
        return all_of(attend, *floats, segments, *[sinks] * with_sinks)

    def case(name, rows, heads, with_sinks=False, **form):
        tiny, real = ROWS[rows]
        form["with_sinks"] = with_sinks
        return Case(
            op=attention_api.NAME, name=name, tiny=(tiny, 4, 2, 8), real=(real, *heads),
            separate=0 if with_sinks else 4,  # a sink's gradient is a sum over rows
            least=1e-3 if rows == "one token" else 1e-30,  # the gradients of its query and key
            inputs=inputs, ours=functools.partial(ours, **form), exact=functools.partial(exact, **form),
        )  # fmt: skip

    llama_8b, llama_1b, gemma, phi_3 = (16, 4, 128), (32, 8, 64), (8, 4, 256), (8, 8, 96)
    for rows in ROWS:
        yield case(rows, rows, llama_8b)
    for rows in ("one segment a row", "packed"):
        yield case(f"heads of 64, {rows}", rows, llama_1b)
        yield case(f"heads of 96, {rows}", rows, phi_3)
        yield case(f"sinks, {rows}", rows, llama_1b, with_sinks=True)
        yield case(f"sinks and a window, {rows}", rows, llama_1b, with_sinks=True, window=128)
        yield case(f"heads of 256, {rows}", rows, gemma)
        yield case(f"a window, {rows}", rows, llama_8b, window=5)
        yield case(f"a window and a softcap, {rows}", rows, gemma, window=5, softcap=2.0)
    yield case("a window, a row of padding", "a row of padding", llama_8b, window=5)


def plain_attention(q, k, v, segments, positions, scale, window=None, softcap=None, sinks=None):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = scale * jnp.einsum("bthd,bshd->bhts", q, k)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    behind = positions[:, :, None] - positions[:, None]
    visible = (segments[:, :, None] == segments[:, None]) & (behind >= 0)
    visible &= behind < (2**30 if window is None else window)
    scores = jnp.where(visible[:, None], scores, jnp.finfo(scores.dtype).min)
    if sinks is not None:
        scores = jnp.append(
            scores, jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1)), axis=-1
        )
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]], v)


CASES = [
    *nf4_cases(), *scaled_cases(), *cross_entropy_cases(), *entropy_cases(), *head_cases(), *attention_cases(),
]  # fmt: skip
SEPARATE = [case for case in CASES if case.separate]
