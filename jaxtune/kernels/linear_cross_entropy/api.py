"""Linear cross-entropy: hidden states and the head in, one negative log-likelihood per token out (and, if asked, the
entropy of what the token is drawn from), logits never whole.

Only tokens that have a label are computed. The gradient of their hidden states is made in the forward pass, chunk by
chunk, while the chunk's logits exist: each token's values depend on its own hidden state only, so the backward pass is
one product with the incoming gradient. The head's gradient is computed only if the head is being differentiated (full
fine-tuning), from the logits again; of a head in parts (a weight and its low-rank change), that of the parts that are.
Works per token, so the same op serves the mean loss of SFT and the log-probabilities (`-nll`) of RL.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.kernels.choice import Candidates, choose
from jaxtune.kernels.linear_cross_entropy import chunks, reference

NAME = "linear_cross_entropy"
IMPLEMENTATIONS: Candidates = {"xla": None}


def linear_cross_entropy(
    x_TD: jax.Array | reference.Parts,
    w_VD: jax.Array | reference.Parts,
    labels_T: jax.Array,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """-log softmax(logits)[label] for each token, float32 [T]; 0 (and no gradient) where the label is -100 or any other
    negative number; NaN where it is V or more.

    Logits are scale x @ w.T; with a `softcap`, softcap tanh(that / softcap); divided by the temperature. Tuples stand
    for the sum of their parts' products, of which each has a D of its own. With `label_smoothing`, that part of each
    value is the mean of -log softmax(logits) over the vocabulary instead. `z_loss` times the square of
    logsumexp(logits) is added. Logits of at most `chunk` tokens exist at a time; None is as many as 512 MiB hold."""
    form = reference.Form(scale, softcap, temperature, label_smoothing, z_loss)
    (nll_T,) = _of_tokens(x_TD, w_VD, labels_T, form, chunk, implementation, values=1, gradients=1)
    return nll_T


def nll_and_entropy(
    x_TD: jax.Array | reference.Parts,
    w_VD: jax.Array | reference.Parts,
    labels_T: jax.Array,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    implementation: str | None = None,
    entropy_gradient: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """What `linear_cross_entropy` returns, and the entropy of softmax(logits) in nats, float32 [T] both; 0 where there
    is no label. `entropy_gradient=False` makes the entropy a constant, to be watched alone: its gradient costs a third
    product of the head's size, chunks of half the size (unless `chunk` says otherwise), and memory for as many hidden
    states again."""
    form = reference.Form(scale, softcap, temperature)
    nll_T, entropy_T = _of_tokens(
        x_TD, w_VD, labels_T, form, chunk, implementation, values=2, gradients=1 + entropy_gradient
    )
    return nll_T, entropy_T


def _of_tokens(x, w, labels_T, form, chunk, implementation, *, values, gradients):
    choose(NAME, implementation, IMPLEMENTATIONS)
    x, w = jax.tree.map(jnp.asarray, [each if isinstance(each, tuple) else (each,) for each in (x, w)])
    labels_T = jnp.asarray(labels_T)
    T, V = x[0].shape[0], w[0].shape[0]
    if labels_T.shape != (T,) or not jnp.issubdtype(labels_T.dtype, jnp.integer):
        raise ValueError(
            f"labels are {labels_T.dtype}{list(labels_T.shape)} for {T} tokens, not integers [{T}]"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}, which has to be at least one token, or None")
    if T == 0:
        return (jnp.zeros(0, jnp.float32),) * values
    # Two gradients are made of as much memory as one.
    task = Task(chunks.chunk_size(T, gradients * V, chunk), form, values, gradients)
    return _per_token(task, x, w, labels_T)


class Task(NamedTuple):
    chunk: int
    form: reference.Form
    values: int
    """How many of `reference.OfTokens` are asked for,"""
    gradients: int
    """and how many of these have a gradient; the first ones, in both cases."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_token(task, x, w, labels_T):
    def of_chunk(x, labels_C):
        return reference.values_and_slopes(x, w, labels_C, task.form)[0][: task.values]

    return chunks.unpack(chunks.map_labelled(of_chunk, task.chunk, x, labels_T), labels_T)


def _fwd(task, x, w, labels):
    trained = tuple(part.value if part.perturbed else None for part in w)
    x, w = (tuple(part.value for part in parts) for parts in (x, w))
    labels_T = labels.value

    def of_chunk(x, labels_C):
        values, slopes = reference.values_and_slopes(x, w, labels_C, task.form)
        return values[: task.values], [reference.dx_of_chunk(each, x, w) for each in slopes[: task.gradients]]

    values, dx = chunks.map_labelled(of_chunk, task.chunk, x, labels_T)
    for_dw = (x, w, trained) if any(part is not None for part in trained) else None
    return chunks.unpack(values, labels_T), (dx, labels_T, for_dw)


def _bwd(task, residuals, dvalues):
    dx, labels_T, for_dw = residuals
    dvalues = [
        jnp.zeros(each.shape, each.dtype) if isinstance(each, jax.custom_derivatives.SymbolicZero) else each
        for each in dvalues[: task.gradients]
    ]
    terms = [
        jax.tree.map(lambda part, by=by: part * by.astype(part.dtype)[:, None], chunks.unpack(each, labels_T))
        for each, by in zip(dx, dvalues, strict=True)
    ]
    dx = jax.tree.map(lambda *each: functools.reduce(jnp.add, each), *terms)
    if for_dw is None:
        return dx, None, None
    x, w, trained = for_dw

    def of_chunk(tree, labels_C):
        x, dvalues = tree
        slopes = reference.values_and_slopes(x, w, labels_C, task.form)[1]
        weighted = [slope_CV * by[:, None] for slope_CV, by in zip(slopes, dvalues, strict=False)]
        return reference.dw_of_chunk(functools.reduce(jnp.add, weighted), x, trained)

    # Parts that are not trained are None, and so is their gradient.
    dw = chunks.sum_labelled(of_chunk, task.chunk, (x, dvalues), labels_T)
    return dx, jax.tree.map(lambda part, like: part.astype(like.dtype), dw, trained), None


_per_token.defvjp(_fwd, _bwd, symbolic_zeros=True)
