"""Linear cross-entropy: hidden states and the head in, one negative log-likelihood per token out, logits never whole.

The gradient of the hidden states is made in the forward pass, chunk by chunk, while the chunk's logits exist: each
token's loss depends on its own hidden state only, so the backward pass is one product with the incoming gradient.
The head's gradient is computed only if the head is being differentiated (full fine-tuning), from the logits again; of
a head in parts (a weight and its low-rank change), that of the parts that are.
Works per token, so the same op serves the mean loss of SFT and the log-probabilities (`-nll`) of RL.
"""

import functools

import jax
import jax.numpy as jnp

from jaxtune.kernels.choice import Candidates, choose
from jaxtune.kernels.linear_cross_entropy import reference

CHUNK = 1024
"""Tokens whose logits are alive together: 0.5 GiB in float32 at a vocabulary of 128,256."""


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
    chunk: int = CHUNK,
    implementation: str | None = None,
) -> jax.Array:
    """-log softmax(logits)[label] for each token, float32 [T]; 0 (and no gradient) where the label is -100.

    Logits are scale x @ w.T; with a `softcap`, softcap tanh(that / softcap); divided by the temperature. Tuples stand
    for the sum of their parts' products, of which each has a D of its own."""
    choose(NAME, implementation, IMPLEMENTATIONS)
    x, w = (parts if isinstance(parts, tuple) else (parts,) for parts in (x_TD, w_VD))
    return _nll(chunk, reference.Form(scale, softcap, temperature), x, w, labels_T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(chunk, form, x, w, labels_T):
    return reference.map_chunks(lambda x, y: reference.nll_of_chunk(x, w, y, form), chunk, x, labels_T)


def _fwd(chunk, form, x, w, labels):
    trained = tuple(part.value if part.perturbed else None for part in w)
    x, w = (tuple(part.value for part in parts) for parts in (x, w))
    nll_and_dx = functools.partial(reference.nll_and_dx_of_chunk, w=w, form=form)
    nll_T, dx = reference.map_chunks(lambda x, y: nll_and_dx(x, labels_C=y), chunk, x, labels.value)
    return nll_T, (dx, (x, w, labels.value, trained) if any(part is not None for part in trained) else None)


def _bwd(chunk, form, residuals, dnll_T):
    dx, for_dw = residuals
    if isinstance(dnll_T, jax.custom_derivatives.SymbolicZero):
        dnll_T = jnp.zeros(dnll_T.shape, dnll_T.dtype)
    dx = tuple(part * dnll_T.astype(part.dtype)[:, None] for part in dx)
    if for_dw is None:
        return dx, None, None
    x, w, labels_T, trained = for_dw
    # Parts that are not trained are None, and so is their gradient.
    zero = jax.tree.map(lambda part: jnp.zeros(part.shape, jnp.float32), trained)
    dw_of_chunk = functools.partial(reference.dw_of_chunk, w=w, trained=trained, form=form)
    dw = reference.sum_chunks(
        lambda x, dnll, y: dw_of_chunk(x, labels_C=y, dnll_C=dnll), chunk, zero, x, dnll_T, labels_T
    )
    return dx, jax.tree.map(lambda part, like: part.astype(like.dtype), dw, trained), None


_nll.defvjp(_fwd, _bwd, symbolic_zeros=True)
