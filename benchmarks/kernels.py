"""Every op in the shapes of real models: each implementation that can run here, beside the bf16 products alone and the
floor, which is the fewest bytes at the rate of a copy or the arithmetic at the rate of a product, whichever takes
longer; both rates are measured in the same run.

    python benchmarks/kernels.py                    # all ops, three models
    python benchmarks/kernels.py --quick            # one model, shorter bulks
    python benchmarks/kernels.py --models tiny      # seconds on a CPU: checks the script
    python benchmarks/kernels.py --table            # measures nothing: the rows of a result into docs/kernels.md

Shapes: T tokens in all, M model width, V vocabulary.
"""

import argparse
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.harness import ROOT, record, result_path, time_by_turns
from benchmarks.shapes import SHAPES
from jaxtune.compilation import enable_cache
from jaxtune.data.layout import Shape
from jaxtune.data.pieces import piece_lengths
from jaxtune.kernels import nf4, scaled
from jaxtune.kernels.attention import api as attention_api
from jaxtune.kernels.attention import attention
from jaxtune.kernels.choice import runnable
from jaxtune.kernels.linear_cross_entropy import api as cross_entropy_api
from jaxtune.kernels.linear_cross_entropy import linear_cross_entropy, nll_and_entropy
from jaxtune.models import rope
from jaxtune.models.config import ModelConfig
from jaxtune.models.parts import ACTIVATIONS, RMSNorm

PAGE = ROOT / "docs" / "kernels.md"
PRODUCT = "bf16 product alone"
CALLS = 32
"""Of one program at most: each is compiled."""


class Scale(NamedTuple):
    """How much of everything."""

    rows: int = 4
    length: int = 4096
    segment: int = 512
    """Of a packed row."""
    decoded: tuple[int, ...] = (1, 16, 64)
    """Tokens of a decoding step."""
    rotated: float = 512e6
    """Bytes of inputs that take turns: several times the largest cache."""
    program: float = 200e-6
    """Seconds of a program at the least, so that dispatching it takes no part."""
    copied: int = 2**30
    product: int = 8192


TINY = Scale(rows=2, length=32, segment=8, decoded=(1, 4), rotated=0, program=0, copied=2**16, product=64)


class Case(NamedTuple):
    what: str
    inputs: tuple
    """Shapes of what is drawn at random, for every set of inputs anew."""
    candidates: Mapping[str, Callable]
    """Functions of the inputs, then of `given`, by implementation."""
    moved: float
    """Bytes that must be read or written."""
    flops: float = 0
    product: Callable | None = None
    """The bf16 products that the flops are, alone."""
    given: tuple = ()
    size: float = 1
    """Of the random numbers."""


class Rates(NamedTuple):
    copy: float
    """Bytes read and written a second."""
    product: float
    """Floating-point operations a second."""

    def floor(self, case: Case) -> float:
        return max(case.moved / self.copy, case.flops / self.product)


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def nbytes(specs: Any) -> int:
    return sum(spec.size * spec.dtype.itemsize for spec in jax.tree.leaves(specs))


def each(candidates: Mapping, function: Callable) -> dict[str, Callable]:
    """`function` by every implementation that this machine has."""
    return {name: functools.partial(function, implementation=name) for name in runnable(candidates)}


def pullback(function: Callable, x: Any, dy: Any) -> Any:
    """The backward pass; what it does not need of the forward pass is not computed."""
    return jax.vjp(function, x)[1](dy)[0]


# ---- the ops ----


def linears(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers' linears."""
    return {
        "q": (c.num_heads * c.head_dim, c.hidden_size),
        "k": (c.num_kv_heads * c.head_dim, c.hidden_size),
        "gate": (c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
    }


def nf4_dequantize(c: ModelConfig, s: Scale) -> Iterable[Case]:
    for name, shape in linears(c).items():
        packed = jax.eval_shape(nf4.quantize, bf16(*shape))
        to_bf16 = functools.partial(nf4.dequantize, shape=shape, dtype=jnp.bfloat16)
        moved = nbytes((packed, bf16(*shape)))
        yield Case(
            f"{name}, {shape[0]} x {shape[1]}", (packed,), each(nf4.api.IMPLEMENTATIONS, to_bf16), moved
        )


def nf4_matmul(c: ModelConfig, s: Scale) -> Iterable[Case]:
    shape = linears(c)["gate"]

    def forward(x, packed, w, *, implementation):
        return nf4.matmul(x, packed, shape, implementation=implementation)

    candidates = each(nf4.api.IMPLEMENTATIONS, forward)
    return packed_products(shape, jax.eval_shape(nf4.quantize, bf16(*shape)), candidates, s)


def scaled_matmul(c: ModelConfig, s: Scale) -> Iterable[Case]:
    shape = linears(c)["gate"]

    def forward(x, packed, w, *, implementation):
        return scaled.matmul(x, packed, implementation=implementation)

    candidates = each(scaled.api.IMPLEMENTATIONS, forward)
    for dtype, block in (("int8", (1, None)), ("float8_e4m3fn", (128, 128))):
        packed = jax.eval_shape(functools.partial(scaled.quantize, dtype=dtype, block=block), bf16(*shape))
        for case in packed_products(shape, packed, candidates, s._replace(decoded=())):
            yield case._replace(what=f"{dtype}, {case.what}")


def packed_products(shape: tuple[int, int], packed: Any, forwards: Mapping, s: Scale) -> Iterable[Case]:
    """x @ w.T and dy @ w over a whole batch, and x @ w.T over the few tokens of a decoding step."""
    out, inn = shape

    def backwards(forward):
        zeros = lambda dy: jnp.zeros((len(dy), inn), dy.dtype)
        return lambda dy, packed, w: pullback(lambda x: forward(x, packed, w), zeros(dy), dy)

    def case(what, tokens, candidates, product, given, gives):
        return Case(
            f"{what}, {tokens} tokens, {out} x {inn}", (bf16(tokens, given), packed, bf16(out, inn)), candidates,
            moved=nbytes((bf16(tokens, given), packed, bf16(tokens, gives))), flops=2 * tokens * out * inn,
            product=product,
        )  # fmt: skip

    multiply = lambda x, packed, w: x @ w.T
    transposed = {name: backwards(forward) for name, forward in forwards.items()}
    yield case("forward", s.rows * s.length, forwards, multiply, inn, out)
    yield case("transposed", s.rows * s.length, transposed, lambda dy, packed, w: dy @ w, out, inn)
    for tokens in s.decoded:
        yield case("forward", tokens, forwards, multiply, inn, out)


def cross_entropy(c: ModelConfig, s: Scale) -> Iterable[Case]:
    T, M, V = s.rows * s.length, c.hidden_size, c.vocab_size
    inputs = bf16(T, M), bf16(V, M), jax.ShapeDtypeStruct((T,), jnp.float32)
    labels = np.random.default_rng(0).integers(0, V, T).astype(np.int32)

    def forward(x, w, dnll, labels, *, implementation):
        return linear_cross_entropy(x, w, labels, implementation=implementation)

    def both(x, w, dnll, labels, *, implementation):
        nll, pull = jax.vjp(lambda x: forward(x, w, dnll, labels, implementation=implementation), x)
        return nll, pull(dnll)

    def with_entropy(x, w, dnll, labels, *, implementation):
        loss = functools.partial(nll_and_entropy, entropy_gradient=False, implementation=implementation)
        nll, pull, entropy = jax.vjp(lambda x: loss(x, w, labels), x, has_aux=True)
        return nll, entropy, pull(dnll)

    def two_products(x, w, dnll, labels):
        return lax.optimization_barrier(x @ w.T) @ w

    size, implementations = f"{T} x {M} x {V}", cross_entropy_api.IMPLEMENTATIONS
    one = 2 * T * M * V
    shared = dict(inputs=inputs, given=(labels,), size=M**-0.25)  # logits of size 1: no softmax is all zeros
    yield Case(f"forward, {size}", candidates=each(implementations, forward), moved=nbytes(inputs[:2]), flops=one,
               product=lambda x, w, *_: x @ w.T, **shared)  # fmt: skip
    for what, function in (("", both), (", with entropies to watch", with_entropy)):
        yield Case(f"forward and gradient, {size}{what}", candidates=each(implementations, function),
                   moved=nbytes((inputs[:2], inputs[0])), flops=2 * one, product=two_products, **shared)  # fmt: skip


def lognormal(count: int, total: int, sigma: float = 0.5) -> list[int]:
    """So many lengths, drawn log-normally, of this sum."""
    drawn = np.random.default_rng(0).lognormal(0, sigma, count)
    ends = np.round(np.cumsum(drawn) / drawn.sum() * total).astype(int)
    return np.diff(ends, prepend=0).tolist()


def causal_attention(c: ModelConfig, s: Scale) -> Iterable[Case]:
    tokens = s.rows * s.length

    def case(what, rows, *, backward=True, window=None, softcap=None):
        """`rows` of segments; the flops are of the scores that are needed."""
        of = functools.partial(attend, window=window, softcap=softcap)

        def both(q, k, v, dout, *where, implementation):
            out, pull = jax.vjp(lambda *qkv: of(*qkv, *where, implementation=implementation), q, k, v)
            return out, pull(dout)

        def forward(q, k, v, dout, *where, implementation):
            return of(q, k, v, *where, implementation=implementation)

        length = sum(rows[0])
        q, k = (bf16(len(rows), length, heads, c.head_dim) for heads in (c.num_heads, c.num_kv_heads))
        segments, positions = (
            np.array([np.concatenate([each(i, n) for i, n in enumerate(row)]) for row in rows], np.int32)
            for each in (lambda i, n: np.full(n, i + 1), lambda i, n: np.arange(n))
        )
        pieces = piece_lengths(rows, Shape(1, len(rows), length))[0]
        seen = sum(sum(min(i + 1, window or n) for i in range(n)) for row in rows for n in row)
        function, products = (both, 7) if backward else (forward, 2)
        return Case(
            f"{'forward and backward' if backward else 'forward'}, {what}", (q, k, k, q),
            each(attention_api.IMPLEMENTATIONS, function),
            moved=nbytes((q, k, k, q)) * (2 if backward else 1),
            flops=2 * products * seen * c.num_heads * c.head_dim, given=(segments, positions, pieces),
        )  # fmt: skip

    def attend(q, k, v, segments, positions, pieces, *, window, softcap, implementation):
        return attention(
            q, k, v, q_segments_BT=segments, kv_segments_BS=segments, q_positions_BT=positions,
            kv_positions_BS=positions, pieces_GM=pieces, scale=c.attention_scale, window=window, softcap=softcap,
            implementation=implementation,
        )  # fmt: skip

    heads = f"{c.num_heads} on {c.num_kv_heads} heads of {c.head_dim}"
    dense, one = [[s.length]] * s.rows, [[tokens]]
    window, segments = tokens // 16, tokens // s.segment
    yield case(f"{s.rows} x {s.length}, {heads}", dense, backward=False)
    yield case(f"{s.rows} x {s.length}, {heads}", dense)
    yield case(f"{2 * s.rows} x {s.length // 2}", [[s.length // 2]] * (2 * s.rows))
    yield case(f"1 x {tokens}", one)
    yield case(f"1 x {tokens}, packed by {s.segment}", [[s.segment] * segments])
    yield case(f"1 x {tokens}, packed, {s.segment} on average", [lognormal(segments, tokens)])
    yield case(f"1 x {tokens}, a window of {window}", one, window=window)
    yield case(f"{s.rows} x {s.length}, a softcap", dense, softcap=50.0)


def elementwise(forward: Callable, what: str, inputs: Any, outputs: Any, weights: Any = ()) -> Iterable[Case]:
    """`forward(inputs, weights)` and its backward pass, as XLA fuses them."""

    def backward(x, dy, weights):
        return pullback(lambda x: forward(x, weights), x, dy)

    yield Case(f"forward, {what}", (inputs, weights), {"xla": forward}, nbytes((inputs, weights, outputs)))
    yield Case(f"backward, {what}", (inputs, outputs, weights), {"xla": backward},
               nbytes((inputs, outputs, weights, inputs)))  # fmt: skip


def norm(width: int, c: ModelConfig) -> Callable:
    definition = nnx.split(jax.eval_shape(lambda: RMSNorm(width, c)))[0]
    return lambda x, weight: nnx.merge(definition, {"weight": weight})(x)


def rms_norm(c: ModelConfig, s: Scale) -> Iterable[Case]:
    x = bf16(s.rows, s.length, c.hidden_size)
    return elementwise(norm(c.hidden_size, c), " x ".join(map(str, x.shape)), x, x, bf16(c.hidden_size))


def qk_norm_and_rope(c: ModelConfig, s: Scale) -> Iterable[Case]:
    of_head = norm(c.head_dim, c)
    frequencies = rope.frequencies(c.ropes[0], c.head_dim)
    positions = jax.ShapeDtypeStruct((s.rows, s.length), jnp.int32)
    turns = jax.eval_shape(lambda positions: rope.tables(positions, frequencies), positions)

    def forward(qk, weights):
        q_weight, k_weight, turns = weights
        q, k = (of_head(x, weight) for x, weight in zip(qk, (q_weight, k_weight), strict=True))
        return rope.rotate(q, *turns), rope.rotate(k, *turns)

    qk = tuple(bf16(s.rows, s.length, heads, c.head_dim) for heads in (c.num_heads, c.num_kv_heads))
    what = f"{s.rows} x {s.length}, {c.num_heads} and {c.num_kv_heads} heads of {c.head_dim}"
    return elementwise(forward, what, qk, qk, (bf16(c.head_dim), bf16(c.head_dim), turns))


def gated_activation(c: ModelConfig, s: Scale) -> Iterable[Case]:
    x = bf16(s.rows, s.length, c.intermediate_size)
    forward = lambda gate_up, _: ACTIVATIONS[c.activation](gate_up[0]) * gate_up[1]
    return elementwise(forward, " x ".join(map(str, x.shape)), (x, x), x)


OPS: dict[str, Callable[[ModelConfig, Scale], Iterable[Case]]] = {
    "nf4_dequantize": nf4_dequantize,
    nf4.api.NAME: nf4_matmul,
    scaled.api.NAME: scaled_matmul,
    cross_entropy_api.NAME: cross_entropy,
    attention_api.NAME: causal_attention,
    "rms_norm": rms_norm,
    "qk_norm_and_rope": qk_norm_and_rope,
    "gated_activation": gated_activation,
}


# ---- measuring ----


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key: jax.Array, specs: tuple, size: float = 1) -> tuple:
    """Random arrays of these shapes: normal numbers, and any bits where they are codes."""
    leaves, tree = jax.tree.flatten(specs)

    def one(key, spec):
        if jnp.issubdtype(spec.dtype, jnp.integer):
            return lax.bitcast_convert_type(jax.random.bits(key, spec.shape, jnp.uint8), spec.dtype)
        return (size * jax.random.normal(key, spec.shape, jnp.bfloat16)).astype(spec.dtype)

    return jax.tree.unflatten(tree, map(one, jax.random.split(key, len(leaves)), leaves))


def program(function: Callable, sets: list[tuple], calls: int) -> jax.stages.Compiled:
    """One program of many calls over inputs that take turns; barriers keep them apart and in order."""

    def run(sets):
        outputs: list[Any] = []
        for inputs in itertools.islice(itertools.cycle(sets), calls):
            if outputs:
                inputs, _ = lax.optimization_barrier((inputs, outputs[-1]))
            outputs.append(function(*inputs))
        return outputs

    # A CUDA graph would be written anew for each run's outputs, which takes longer than a short kernel.
    return jax.jit(run).lower(sets).compile({"xla_gpu_enable_command_buffer": ""})


def measure(case: Case, s: Scale, rates: Rates, seconds: float) -> list[dict[str, Any]]:
    """A row for every candidate that takes the case, the products alone among them."""
    floor = rates.floor(case)
    count = max(1, min(CALLS, math.ceil(s.rotated / nbytes(case.inputs))))
    given = jax.device_put(case.given)
    sets = [
        (*draw(key, case.inputs, case.size), *given) for key in jax.random.split(jax.random.key(0), count)
    ]
    calls = max(count, min(CALLS, math.ceil(s.program / floor)))
    candidates = {**case.candidates, **({PRODUCT: case.product} if case.product else {})}
    programs, rows = {}, []
    for name, function in candidates.items():
        try:
            programs[name] = program(function, sets, calls)
            jax.block_until_ready(programs[name](sets))
        except NotImplementedError:  # a case that it does not take
            programs.pop(name, None)
        except jax.errors.JaxRuntimeError as error:
            programs.pop(name, None)
            rows.append(
                {"what": case.what, "implementation": name, "error": str(error).splitlines()[0][:200]}
            )
    runs = {name: functools.partial(compiled, sets) for name, compiled in programs.items()}
    timings = time_by_turns(runs, seconds=seconds)
    for name, timing in timings.items():
        micro = {key: value / calls for key, value in timing.as_row().items()}
        memory = programs[name].memory_analysis()
        rows.append({
            "what": case.what, "implementation": name, **micro, "floor_us": floor * 1e6,
            "product_us": timings[PRODUCT].median / calls * 1e6 if PRODUCT in timings else None,
            "temp_mb": memory.temp_size_in_bytes / 1e6 if memory else None, "calls": calls,
        })  # fmt: skip
    return rows


def measure_rates(s: Scale, seconds: float) -> Rates:
    """Of a large copy and of a large bf16 product, by turns."""
    (x,), (a, b) = (
        draw(jax.random.key(1), specs)
        for specs in ((bf16(s.copied // 2),), (bf16(s.product, s.product), bf16(s.product, s.product)))
    )
    copy, product = jax.jit(jnp.copy), jax.jit(jnp.matmul)
    runs = {"copy": lambda: copy(x), "product": lambda: product(a, b)}
    timings = time_by_turns(runs, seconds=seconds)
    return Rates(2 * s.copied / timings["copy"].median, 2 * s.product**3 / timings["product"].median)


# ---- the page ----


def tables(result: Mapping[str, Any]) -> str:
    """The recorded rows as the page shows them: a table for every op."""
    said = (
        f"{result['device']}, {result['date'][:10]}, commit {(result['commit'] or 'unknown')[:10]}. Copies run at "
        f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s, counting bytes read and written, and bf16 products of "
        f"{result['product_size']} cubed at {result['product_flops_per_second'] / 1e12:.0f} TFLOP/s."
    )
    lines = [said]
    for op, rows in itertools.groupby(sorted(result["rows"], key=lambda row: list(OPS).index(row["op"])),
                                      key=lambda row: row["op"]):  # fmt: skip
        head = "| model | | implementation | µs | floor µs | × floor | × product (rate) | temporary MB |"
        lines += ["", f"### {op}", "", head, "|---|---|---|---|---|---|---|---|", *map(table_row, rows)]
    return "\n".join(lines)


def table_row(row: Mapping[str, Any]) -> str:
    cells = [row["model"], row["what"], row["implementation"]]
    if "error" in row:
        return f"| {' | '.join(cells)} | {row['error'][:80]} | | | | |"
    us, product = row["us"], row["product_us"]
    cells += [
        f"{us:,.0f}" if us >= 100 else f"{us:.1f}",
        f"{row['floor_us']:,.1f}",
        f"{us / row['floor_us']:.2f}",
    ]
    cells += ["" if product is None else f"{us / product:.2f} ({product / us:.0%})"]
    cells += ["" if row["temp_mb"] is None else f"{row['temp_mb']:,.0f}"]
    return f"| {' | '.join(cells)} |"


def with_tables(page: str, name: str, text: str) -> str:
    """The page with this text between the two marks of a result."""
    mark, end = f"<!-- {name}.json: written by benchmarks/kernels.py --table -->", f"<!-- /{name}.json -->"
    found = re.subn(f"(?s){mark}.*{end}", lambda _: f"{mark}\n{text}\n{end}", page)
    assert found[1] == 1, "the page has lost its marks"
    return found[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    parser.add_argument(
        "--quick", action="store_true", help="one model, unless some are named; shorter bulks"
    )
    parser.add_argument(
        "--table", action="store_true", help="only write the recorded rows into docs/kernels.md"
    )
    parser.add_argument("--name", default="kernels", help="of the result file")
    args = parser.parse_args()
    if args.table:
        result = json.loads(result_path(args.name).read_text())
        PAGE.write_text(with_tables(PAGE.read_text(), args.name, tables(result)))
        return

    enable_cache()
    models = args.models or (["llama-3.1-8b"] if args.quick else [name for name in SHAPES if name != "tiny"])
    seconds = 0.02 if models == ["tiny"] else 0.1 if args.quick else 0.3
    scales = {name: TINY if name == "tiny" else Scale() for name in models}
    largest = scales[models[0]]
    rates = measure_rates(largest, 5 * seconds)
    print(f"copy {rates.copy / 1e12:.2f} TB/s, product {rates.product / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []
    for model, op in itertools.product(models, args.ops):
        for case in OPS[op](SHAPES[model], scales[model]):
            for row in measure(case, scales[model], rates, seconds):
                rows.append({"model": model, "op": op, **row})
                print(table_row(rows[-1]), flush=True)
        record(args.name, rows, copy_bytes_per_second=rates.copy, product_flops_per_second=rates.product,
               product_size=largest.product)  # fmt: skip


if __name__ == "__main__":
    main()
