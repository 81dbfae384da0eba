"""The searches of `search.py` in JAX, for GPUs and CPUs: the same names, the same bytes, the same order of additions.

Compilers take liberties with floats that change these bytes, and each has its remedy here. A product that is then added
to something would be fused with the sum; its bits pass through an integer operation of which only the caller knows that
it does nothing (`sealed`). Quotients and roots are approximate; they are taken in float64 and rounded, sealed before
and after, for else a quotient by a constant becomes a product, and one that is rounded the float32 one again. So is
what is rounded to float16, which else is left as it was. What remains are numbers so small that a product of theirs may
vanish, which a CPU's program takes for zero: `are_odd` finds the rows that have some, which numpy then does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.export.gguf.quants.search import NOTHING, ONE, Affine, Steps

LEAST, MOST = np.float32(1e-7), np.float32(1e4)
"""Values within these bounds, and zeros, have products, and squares of differences, that are no smaller than float32's
smallest normal number, and scales that float16 can hold."""
LEAST_WEIGHTED, LEAST_IN_32 = np.float32(1e-6), np.float32(1e-4)
"""The same when columns have an importance of 0 or within `IMPORTANCES`; and what one of 32 values must be at least."""
IMPORTANCES = 1e-5, 1e5
_MAGIC = np.float32(12582912)


@dataclasses.dataclass(frozen=True)
class JaxSearch:
    nought: jax.Array
    """int32 0, as an argument of the program."""
    on_gpu: bool
    np: Any = jnp

    def are_odd(self, x: jax.Array, weighted: bool) -> jax.Array:
        """Whether a row has values beyond the bounds, zeros aside. [rows, columns] -> [rows]"""
        is_zero = self._bits(x) << 1 == 0  # which a subnormal number is not
        size, least = abs(x), LEAST_WEIGHTED if weighted else LEAST
        are_fit = (is_zero | ((size >= least) & (size <= MOST))).all(axis=1)
        if weighted:
            in_32 = lambda each: each.reshape(len(x), -1, 32)
            are_fit &= ((in_32(size).max(axis=2) >= LEAST_IN_32) | in_32(is_zero).all(axis=2)).all(axis=1)
        return ~are_fit

    def sealed(self, x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(self._bits(x), jnp.float32)

    def _bits(self, x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, jnp.int32) ^ self.nought

    def settled(self, x: jax.Array) -> jax.Array:
        """In memory, so that it is not computed again for each of its uses."""
        return lax.optimization_barrier(x)

    def product(self, a: Any, b: Any) -> jax.Array:
        return self.sealed(a * b)

    def quotient(self, a: Any, b: Any) -> jax.Array:
        return self._rounded(self._wide(a) / self._wide(b))

    def root(self, x: jax.Array) -> jax.Array:
        return self._rounded(jnp.sqrt(self._wide(x)))

    def _wide(self, x: Any) -> jax.Array:
        return self.sealed(jnp.asarray(x, jnp.float32)).astype(jnp.float64)

    def _rounded(self, x: jax.Array) -> jax.Array:
        """A float64 as float32, of which a compiler must not know that it was made of float32."""
        bits = lax.bitcast_convert_type(x, jnp.int64) ^ self.nought.astype(jnp.int64)
        return self.sealed(lax.bitcast_convert_type(bits, jnp.float64).astype(jnp.float32))

    def nearest(self, x: jax.Array) -> jax.Array:
        return (lax.bitcast_convert_type(self.sealed(x) + _MAGIC, jnp.int32) & 0x7FFFFF) - 0x400000

    def sums(self, count: int, terms: Callable[[Any], tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
        """Of the terms of 0, 1, ..., count - 1, in that order: a loop, or one kernel of a GPU."""

        def add(n: Any, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            return tuple(total + self.sealed(term) for total, term in zip(so_far, terms(n), strict=True))

        first = tuple(self.sealed(term) for term in terms(0))
        return lax.fori_loop(1, count, add, first, unroll=self.on_gpu and count <= 32)

    def total(self, x_NB: jax.Array) -> jax.Array:
        return self.sums(x_NB.shape[0], lambda n: (x_NB[n],))[0]

    def largest(self, x_NB: jax.Array) -> jax.Array:
        return functools.reduce(lambda a, b: jnp.where(jnp.abs(b) > jnp.abs(a), b, a), x_NB)

    def smallest(self, x_NB: jax.Array) -> jax.Array:
        return functools.reduce(lambda a, b: jnp.where(b < a, b, a), x_NB)

    def inverse(self, x: jax.Array) -> jax.Array:
        return jnp.where(x == 0, np.float32(0), self.quotient(jnp.ones_like(x), x))

    def ratio(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, self.quotient(a, b), np.float32(0))

    def sub_blocks(self, x: jax.Array, n: int) -> jax.Array:
        return x.reshape(-1, n).T

    def half(self, x: jax.Array) -> jax.Array:
        rounded = lax.bitcast_convert_type(x.astype(jnp.float16), jnp.int16)  # else it may be left in float32
        return lax.bitcast_convert_type(rounded ^ self.nought.astype(jnp.int16), jnp.float16)

    def packed(self, codes: jax.Array, bits: int, axis: int) -> jax.Array:
        each = jnp.unstack(codes, axis=axis)
        return functools.reduce(jnp.bitwise_or, [code << np.uint8(bits * i) for i, code in enumerate(each)])

    def joined(self, blocks: int, *fields: jax.Array) -> jax.Array:
        def as_bytes(field: jax.Array) -> jax.Array:
            return lax.bitcast_convert_type(field, jnp.uint8).reshape(blocks, -1)

        return jnp.concatenate([as_bytes(field) for field in fields], axis=1)

    def affine(
        self, x_NB: jax.Array, w_NB: jax.Array, top: int, steps: Steps, *, absolute: bool = False
    ) -> Affine:
        N = len(x_NB)
        lowest_B = self.smallest(x_NB)
        lowest_B = jnp.where(lowest_B > 0, np.float32(0), lowest_B)
        high_B = x_NB.max(axis=0)

        def encoded(x: jax.Array, inverse_B: jax.Array, low_B: jax.Array) -> jax.Array:
            return jnp.clip(self.nearest((x - low_B) * inverse_B), 0, top).astype(jnp.float32)

        def error(
            inverse_B: jax.Array, low_B: jax.Array, scale_B: jax.Array, fit_low_B: jax.Array
        ) -> jax.Array:
            def term(n: Any) -> tuple[jax.Array]:
                off = self.product(encoded(x_NB[n], inverse_B, low_B), scale_B) + fit_low_B - x_NB[n]
                return ((jnp.abs(off) if absolute else off * off) * w_NB[n],)

            return self.sums(N, term)[0]

        sum_w_B, sum_wx_B = self.sums(N, lambda n: (w_NB[n], w_NB[n] * x_NB[n]))
        divisors = jnp.asarray(np.asarray([*steps.divisors(top)], np.float32))

        def step(t: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            low_B = found[-1]
            inverse_B = self.quotient(jnp.broadcast_to(divisors[t], high_B.shape), high_B - low_B)

            def terms(n: Any) -> tuple[jax.Array, ...]:
                code = encoded(x_NB[n], inverse_B, low_B)
                wc = w_NB[n] * code
                return wc, wc * x_NB[n], wc * code

            sum_wc_B, sum_wcx_B, sum_wcc_B = self.sums(N, terms)
            difference = lambda a, b, c, d: self.product(a, b) - self.product(c, d)
            determinant_B = difference(sum_w_B, sum_wcc_B, sum_wc_B, sum_wc_B)
            fit_B = self.quotient(difference(sum_w_B, sum_wcx_B, sum_wx_B, sum_wc_B), determinant_B)
            fit_low_B = self.quotient(difference(sum_wcc_B, sum_wx_B, sum_wc_B, sum_wcx_B), determinant_B)
            above_B = fit_low_B > 0
            fit_B = jnp.where(above_B, self.quotient(sum_wcx_B, sum_wcc_B), fit_B)
            fit_low_B = jnp.where(above_B, np.float32(0), fit_low_B)
            error_B = error(inverse_B, low_B, fit_B, fit_low_B)
            better_B = (determinant_B > 0) & (error_B < found[0])
            tried = error_B, fit_B, inverse_B, low_B, fit_low_B
            return tuple(jnp.where(better_B, new, old) for new, old in zip(tried, found, strict=True))

        inverse_B = self.quotient(jnp.full_like(high_B, top), high_B - lowest_B)
        scale_B = self.quotient(jnp.ones_like(inverse_B), inverse_B)
        first = error(inverse_B, lowest_B, scale_B, lowest_B), scale_B, inverse_B, lowest_B, lowest_B
        _, scale_B, inverse_B, low_B, next_low_B = lax.fori_loop(0, len(divisors), step, first)
        flat_B = high_B == lowest_B
        return Affine(
            jnp.where(flat_B, np.float32(0), scale_B),
            -jnp.where(flat_B, lowest_B, next_low_B),
            jnp.where(flat_B, np.float32(0), encoded(x_NB, inverse_B, low_B)),
        )

    def symmetric(self, x_NB: jax.Array, w_NB: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
        extreme_B = self.largest(x_NB)
        zeros_B = jnp.abs(extreme_B) < NOTHING
        extreme_B = jnp.where(zeros_B, ONE, extreme_B)
        around = np.asarray([0, *range(-9, 0), *range(1, 10)], np.float32)  # the middle one first
        divisors = jnp.asarray(-(np.float32(top) + np.float32(0.1) * around))

        def encoded(x: jax.Array, inverse_B: jax.Array) -> jax.Array:
            return jnp.clip(self.nearest(x * inverse_B), -top, top - 1).astype(jnp.float32)

        def tried(t: Any) -> tuple[jax.Array, ...]:
            inverse_B = self.quotient(jnp.broadcast_to(divisors[t], extreme_B.shape), extreme_B)

            def terms(n: Any) -> tuple[jax.Array, ...]:
                code = encoded(x_NB[n], inverse_B)
                return self.product(w_NB[n], x_NB[n]) * code, w_NB[n] * code * code

            return inverse_B, *self.sums(len(x_NB), terms)

        def step(t: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            best_B = found[2]
            inverse_B, sum_wxc_B, sum_wcc_B = tried(t)
            better_B = (sum_wcc_B > 0) & (
                self.product(sum_wxc_B, sum_wxc_B) > self.product(best_B, sum_wcc_B)
            )
            scale_B = self.quotient(sum_wxc_B, sum_wcc_B)
            these = inverse_B, scale_B, self.product(scale_B, sum_wxc_B)
            return tuple(jnp.where(better_B, new, old) for new, old in zip(these, found, strict=True))

        inverse_B, sum_wxc_B, sum_wcc_B = tried(0)
        scale_B = self.ratio(sum_wxc_B, sum_wcc_B)
        first = inverse_B, scale_B, self.product(scale_B, sum_wxc_B)
        inverse_B, scale_B, _ = lax.fori_loop(1, len(divisors), step, first)
        return (
            jnp.where(zeros_B, np.float32(0), scale_B),
            jnp.where(zeros_B, np.float32(-top), encoded(x_NB, inverse_B)),
        )

    def one_by_one(self, x_NB: jax.Array, w_NB: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
        extreme_B = self.largest(x_NB)
        zeros_B = jnp.abs(extreme_B) < NOTHING
        inverse_B = self.quotient(jnp.full_like(extreme_B, -top), jnp.where(zeros_B, ONE, extreme_B))
        codes_NB = jnp.clip(self.nearest(x_NB * inverse_B), -top, top - 1).astype(jnp.float32)

        def move(x: jax.Array, p_rest: jax.Array, q_rest: jax.Array) -> jax.Array:
            wanted = self.quotient(self.product(x, q_rest), p_rest)
            return jnp.clip(self.nearest(wanted), -top, top - 1).astype(jnp.float32)

        codes_NB, p, q = self._moved(x_NB, w_NB, codes_NB, move, lambda q_rest, q_new: q_new > 0)
        return (
            jnp.where(zeros_B, np.float32(0), self.ratio(p, q)),
            jnp.where(zeros_B, np.float32(-top), codes_NB),
        )

    def positive(self, x_NB: jax.Array, w_NB: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
        largest_B = jnp.maximum(x_NB.max(axis=0), np.float32(0))
        zeros_B = largest_B < NOTHING

        def encoded(x: jax.Array, inverse_B: jax.Array) -> jax.Array:
            return jnp.minimum(top, self.nearest(inverse_B * x)).astype(jnp.float32)

        def error(inverse_B: jax.Array, encode: Callable = encoded) -> jax.Array:
            def term(n: Any) -> tuple[jax.Array]:
                again = self.product(
                    self.quotient(jnp.ones_like(inverse_B), inverse_B), encode(x_NB[n], inverse_B)
                )
                off = x_NB[n] - again
                return (w_NB[n] * off * off,)

            return self.sums(len(x_NB), term)[0]

        best_inverse_B = self.quotient(jnp.full_like(largest_B, top), largest_B)
        best_B = error(best_inverse_B, lambda x, inverse_B: _as_byte(self.nearest(inverse_B * x)))
        for t in (t for t in range(-4, 5) if t):
            divisor = np.float32(0.1) * np.float32(t) + np.float32(top)
            inverse_B = self.quotient(jnp.full_like(largest_B, divisor), largest_B)
            error_B = error(inverse_B)
            better_B = error_B < best_B
            best_B = jnp.where(better_B, error_B, best_B)
            best_inverse_B = jnp.where(better_B, inverse_B, best_inverse_B)
        codes_NB = encoded(x_NB, best_inverse_B)

        def move(x: jax.Array, p_rest: jax.Array, q_rest: jax.Array) -> jax.Array:
            wanted = self.quotient(self.product(x, q_rest), p_rest)
            return jnp.minimum(top, self.nearest(wanted)).astype(jnp.float32)

        codes_NB, p, q = self._moved(
            x_NB, w_NB, codes_NB, move, lambda q_rest, q_new: q_rest > 0, stored=_as_byte
        )
        return (
            jnp.where(zeros_B, np.float32(0), self.ratio(p, q)),
            jnp.where(zeros_B, np.float32(0), codes_NB),
        )

    def _moved(
        self,
        x_NB: jax.Array,
        w_NB: jax.Array,
        codes_NB: jax.Array,
        move: Callable[..., jax.Array],
        allowed: Callable[..., jax.Array],
        stored: Callable[[jax.Array], jax.Array] = lambda codes: codes,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The codes after each has moved in turn to where the others' scale would put it, if that leaves less error,
        five times over; with the sums that the scale is a quotient of."""

        def one(n: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            codes_NB, p, q = state
            x, w, code = x_NB[n], w_NB[n], codes_NB[n]
            wx = self.product(w, x)
            p_rest = p - self.product(wx, code)
            q_rest = q - self.product(w * code, code)
            new = move(x, p_rest, q_rest)
            p_new = p_rest + self.product(wx, new)
            q_new = q_rest + self.product(w * new, new)
            less = self.product(p_new * p_new, q) > self.product(p * p, q_new)
            better = (p_rest > 0) & allowed(q_rest, q_new) & (new != code) & less
            pick = lambda a, b: jnp.where(better, a, b)
            return codes_NB.at[n].set(pick(stored(new), code)), pick(p_new, p), pick(q_new, q)

        p, q = self.sums(
            len(x_NB),
            lambda n: (self.product(w_NB[n], x_NB[n]) * codes_NB[n], w_NB[n] * codes_NB[n] * codes_NB[n]),
        )
        state = stored(codes_NB), p, q
        return lax.fori_loop(0, 5, lambda _, state: lax.fori_loop(0, len(x_NB), one, state), state)

    def importance_weights(
        self, x: jax.Array, importance: jax.Array, n: int, *, over: int, factor: int
    ) -> jax.Array:
        squares = self.total(self.sub_blocks(x * x, over)) * np.float32(factor)
        mean = jnp.repeat(self.quotient(squares, np.float32(over)), over).reshape(x.shape)
        return self.sub_blocks(importance * self.root(mean + self.product(x, x)), n)


def _as_byte(codes: jax.Array) -> jax.Array:
    return (codes.astype(jnp.int32) & 255).astype(jnp.float32)
