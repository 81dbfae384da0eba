"""What a chunk of tokens has to do with its logits, in plain XLA: a loss, an entropy, and their gradients.

Shapes: D hidden, V vocabulary, C tokens in a chunk. Hidden states x and head w come in parts: tuples of
[C, D] and of [V, D], each pair with a D of its own, whose products are added.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Parts = tuple[jax.Array, ...]


class Form(NamedTuple):
    """What a product x . w becomes before the softmax: scaled, then capped, then divided by the temperature; and how
    much of what the softmax is compared with is spread evenly over the vocabulary, not at the label; and how much the
    square of its denominator's logarithm adds."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    smoothing: float = 0.0
    z_loss: float = 0.0


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


class OfTokens(NamedTuple):
    """One of each for every token, [C], or its gradient by the product x . w, [C, V]."""

    nll: jax.Array
    """-log p(label), or the cross-entropy with the smoothed label, and the z-loss; of one that is no token of the
    vocabulary, NaN."""
    entropy: jax.Array
    """- sum over the vocabulary of p log p, in nats."""


def values_and_slopes(
    x: Parts, w: Parts, labels_C: jax.Array, form: Form = PLAIN
) -> tuple[OfTokens, OfTokens]:
    """Both values [C] and their float32 gradients by the product [C, V]; all 0 where the label is negative. What is not
    used of it is not computed."""
    logits_CV, slope = _logits(x, w, form)
    V = logits_CV.shape[1]
    lse_C1 = jax.nn.logsumexp(logits_CV, axis=1, keepdims=True)
    logp_CV = logits_CV - lse_C1
    p_CV = jnp.exp(logp_CV)
    label_C1 = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C, 0)[:, None], axis=1, mode="fill")
    entropy_C1 = -(p_CV * logp_CV).sum(axis=1, keepdims=True)
    target_CV = jnp.where(labels_C[:, None] < V, jax.nn.one_hot(labels_C, V, dtype=jnp.float32), jnp.nan)
    if form.smoothing:
        spread = form.smoothing
        label_C1 = (1 - spread) * label_C1 + spread * logits_CV.mean(axis=1, keepdims=True)
        target_CV = (1 - spread) * target_CV + spread / V
    nll_C1, nll_slope_CV = lse_C1 - label_C1, p_CV - target_CV
    if form.z_loss:
        nll_C1 += form.z_loss * lse_C1**2
        nll_slope_CV += (2 * form.z_loss * lse_C1) * p_CV

    labelled_C1 = labels_C[:, None] >= 0
    value = lambda each_C1: jnp.where(labelled_C1, each_C1, 0.0)[:, 0]
    by_product = lambda each_CV: jnp.where(labelled_C1, each_CV if form == PLAIN else each_CV * slope, 0.0)
    return (
        OfTokens(value(nll_C1), value(entropy_C1)),
        OfTokens(by_product(nll_slope_CV), by_product(-p_CV * (logp_CV + entropy_C1))),
    )


def dx_of_chunk(slope_CV: jax.Array, x: Parts, w: Parts) -> Parts:
    """d value[t] / d x[t], [C, D] each."""
    slope_CV = slope_CV.astype(x[0].dtype)
    return tuple(jnp.einsum("cv,vd->cd", slope_CV, w_VD) for w_VD in w)


def dw_of_chunk(slope_CV: jax.Array, x: Parts, trained: Sequence[jax.Array | None]) -> tuple:
    """The chunk's part of d (sum of values) / d w, float32 [V, D] each; None where `trained` is None."""
    slope_CV = slope_CV.astype(x[0].dtype)
    return tuple(
        None if part is None
        else jnp.einsum("cv,cd->vd", slope_CV, x_CD, preferred_element_type=jnp.float32)
        for x_CD, part in zip(x, trained, strict=True)
    )  # fmt: skip
