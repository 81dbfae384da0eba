"""Linear cross-entropy in plain XLA: logits exist for one chunk of tokens at a time.

Shapes: T tokens, D hidden, V vocabulary, C tokens in a chunk.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

IGNORE = -100


class Form(NamedTuple):
    """What a product x . w becomes before the softmax: scaled, then capped, then divided by the temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


PLAIN = Form()


def _logits(x_CD, w_VD, form):
    """The logits, and their slope by the product: a number, or an array where they are capped."""
    logits = jnp.einsum("cd,vd->cv", x_CD, w_VD, preferred_element_type=jnp.float32)
    slope = form.scale / form.temperature
    if form.softcap is not None:
        tanh = jnp.tanh(logits * (form.scale / form.softcap))
        return tanh * (form.softcap / form.temperature), (1 - tanh * tanh) * slope
    return (logits if slope == 1 else logits * slope), slope


def _label_hot(labels_C, vocab):
    return jax.nn.one_hot(labels_C, vocab, dtype=jnp.float32)  # all zeros where the label is IGNORE


def nll_of_chunk(x_CD: jax.Array, w_VD: jax.Array, labels_C: jax.Array, form: Form = PLAIN) -> jax.Array:
    """Negative log-likelihood of each label [C]; 0 where the label is IGNORE (or any other negative number)."""
    logits_CV, _ = _logits(x_CD, w_VD, form)
    label = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C, 0)[:, None], axis=1)[:, 0]
    return jnp.where(labels_C >= 0, jax.nn.logsumexp(logits_CV, axis=1) - label, 0.0)


def nll_and_dx_of_chunk(
    x_CD: jax.Array, w_VD: jax.Array, labels_C: jax.Array, form: Form = PLAIN
) -> tuple[jax.Array, jax.Array]:
    """The same, with d nll[t] / d x[t] [C, D] from the very logits that the loss needed."""
    dlogits_CV, nll_C = _dlogits(x_CD, w_VD, labels_C, form)
    return nll_C, jnp.einsum("cv,vd->cd", dlogits_CV, w_VD)


def dw_of_chunk(
    x_CD: jax.Array, w_VD: jax.Array, labels_C: jax.Array, dnll_C: jax.Array, form: Form = PLAIN
) -> jax.Array:
    """The chunk's part of d (dnll . nll) / d w, float32 [V, D]."""
    dlogits_CV, _ = _dlogits(x_CD, w_VD, labels_C, form)
    weighted = dlogits_CV * dnll_C.astype(dlogits_CV.dtype)[:, None]
    return jnp.einsum("cv,cd->vd", weighted, x_CD, preferred_element_type=jnp.float32)


def _dlogits(x_CD, w_VD, labels_C, form):
    """d nll / d product [C, V], and the nll."""
    logits_CV, slope = _logits(x_CD, w_VD, form)
    lse_C = jax.nn.logsumexp(logits_CV, axis=1)
    label = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C, 0)[:, None], axis=1)[:, 0]
    trained_C = labels_C >= 0
    dlogits = jnp.exp(logits_CV - lse_C[:, None]) - _label_hot(labels_C, logits_CV.shape[1])
    if form != PLAIN:
        dlogits = dlogits * slope
    dlogits = jnp.where(trained_C[:, None], dlogits, 0.0).astype(x_CD.dtype)
    return dlogits, jnp.where(trained_C, lse_C - label, 0.0)


def map_chunks(function: Callable, chunk: int, *arrays_T: jax.Array) -> Any:
    """`function` over chunks of the leading axis, results laid end to end again. The labels are the last array."""
    out = lax.map(lambda cut: function(*cut), _cut(chunk, *arrays_T))
    T = arrays_T[0].shape[0]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], out)


def sum_chunks(function: Callable, chunk: int, zero: jax.Array, *arrays_T: jax.Array) -> jax.Array:
    """The sum of `function` over chunks, one chunk's result alive at a time. The labels are the last array."""
    return lax.scan(lambda total, cut: (total + function(*cut), None), zero, _cut(chunk, *arrays_T))[0]


def _cut(chunk: int, *arrays_T: jax.Array) -> tuple[jax.Array, ...]:
    """[T, ...] -> [n, chunk, ...] each; the last array is the labels, whose padding is IGNORE."""
    T = arrays_T[0].shape[0]
    chunk = (
        math.ceil(T / math.ceil(T / chunk)) if T else 1
    )  # all of one size, with as little padding as that allows
    fills = (0,) * (len(arrays_T) - 1) + (IGNORE,)

    def cut(x, fill):
        x = jnp.pad(x, [(0, -T % chunk)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(-1, chunk, *x.shape[1:])

    return tuple(map(cut, arrays_T, fills))
