"""Linear cross-entropy in plain XLA: logits exist for one chunk of tokens at a time.

Shapes: T tokens, D hidden, V vocabulary, C tokens in a chunk. Hidden states x and head w come in parts: tuples of
[C, D] and of [V, D], each pair with a D of its own, whose products are added.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

IGNORE = -100

Parts = tuple[jax.Array, ...]


class Form(NamedTuple):
    """What a product x . w becomes before the softmax: scaled, then capped, then divided by the temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


PLAIN = Form()


def product(x: Parts, w: Parts) -> jax.Array:
    """[..., V] in float32, from parts [..., D] and [V, D]."""
    each = (
        jnp.einsum("...d,vd->...v", x_D, w_VD, preferred_element_type=jnp.float32)
        for x_D, w_VD in zip(x, w, strict=True)
    )
    return functools.reduce(jnp.add, each)


def _logits(x, w, form):
    """The logits, and their slope by the product: a number, or an array where they are capped."""
    logits = product(x, w)
    slope = form.scale / form.temperature
    if form.softcap is not None:
        tanh = jnp.tanh(logits * (form.scale / form.softcap))
        return tanh * (form.softcap / form.temperature), (1 - tanh * tanh) * slope
    return (logits if slope == 1 else logits * slope), slope


def _label_hot(labels_C, vocab):
    return jax.nn.one_hot(labels_C, vocab, dtype=jnp.float32)  # all zeros where the label is IGNORE


def nll_of_chunk(x: Parts, w: Parts, labels_C: jax.Array, form: Form = PLAIN) -> jax.Array:
    """Negative log-likelihood of each label [C]; 0 where the label is IGNORE (or any other negative number)."""
    logits_CV, _ = _logits(x, w, form)
    label = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C, 0)[:, None], axis=1)[:, 0]
    return jnp.where(labels_C >= 0, jax.nn.logsumexp(logits_CV, axis=1) - label, 0.0)


def nll_and_dx_of_chunk(
    x: Parts, w: Parts, labels_C: jax.Array, form: Form = PLAIN
) -> tuple[jax.Array, Parts]:
    """The same, with d nll[t] / d x[t], [C, D] each, from the very logits that the loss needed."""
    dlogits_CV, nll_C = _dlogits(x, w, labels_C, form)
    return nll_C, tuple(jnp.einsum("cv,vd->cd", dlogits_CV, w_VD) for w_VD in w)


def dw_of_chunk(
    x: Parts, w: Parts, trained: tuple, labels_C: jax.Array, dnll_C: jax.Array, form: Form = PLAIN
) -> tuple:
    """The chunk's part of d (dnll . nll) / d w, float32 [V, D] each; None where `trained` is None."""
    dlogits_CV, _ = _dlogits(x, w, labels_C, form)
    weighted = dlogits_CV * dnll_C.astype(dlogits_CV.dtype)[:, None]
    return tuple(
        None if part is None
        else jnp.einsum("cv,cd->vd", weighted, x_CD, preferred_element_type=jnp.float32)
        for x_CD, part in zip(x, trained, strict=True)
    )  # fmt: skip


def _dlogits(x, w, labels_C, form):
    """d nll / d product [C, V], and the nll."""
    logits_CV, slope = _logits(x, w, form)
    lse_C = jax.nn.logsumexp(logits_CV, axis=1)
    label = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C, 0)[:, None], axis=1)[:, 0]
    trained_C = labels_C >= 0
    dlogits = jnp.exp(logits_CV - lse_C[:, None]) - _label_hot(labels_C, logits_CV.shape[1])
    if form != PLAIN:
        dlogits = dlogits * slope
    dlogits = jnp.where(trained_C[:, None], dlogits, 0.0).astype(x[0].dtype)
    return dlogits, jnp.where(trained_C, lse_C - label, 0.0)


def map_chunks(function: Callable, chunk: int, *trees_T: Any) -> Any:
    """`function` over chunks of the leading axis, results laid end to end again. The labels are the last tree."""
    out = lax.map(lambda cut: function(*cut), _cut(chunk, *trees_T))
    T = trees_T[-1].shape[0]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], out)


def sum_chunks(function: Callable, chunk: int, zero: Any, *trees_T: Any) -> Any:
    """The sum of `function` over chunks, one chunk's result alive at a time. The labels are the last tree."""
    add = lambda total, cut: (jax.tree.map(jnp.add, total, function(*cut)), None)
    return lax.scan(add, zero, _cut(chunk, *trees_T))[0]


def _cut(chunk: int, *trees_T: Any) -> tuple:
    """[T, ...] -> [n, chunk, ...] each; the last one is the labels, whose padding is IGNORE."""
    T = trees_T[-1].shape[0]
    chunk = (
        math.ceil(T / math.ceil(T / chunk)) if T else 1
    )  # all of one size, with as little padding as that allows
    fills = (0,) * (len(trees_T) - 1) + (IGNORE,)

    def cut(x, fill):
        x = jnp.pad(x, [(0, -T % chunk)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(-1, chunk, *x.shape[1:])

    return tuple(
        jax.tree.map(functools.partial(cut, fill=fill), tree)
        for tree, fill in zip(trees_T, fills, strict=True)
    )
