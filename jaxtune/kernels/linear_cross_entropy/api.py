"""Linear cross-entropy: hidden states and the head in, one negative log-likelihood per token out, logits never whole.

The gradient of the hidden states is made in the forward pass, chunk by chunk, while the chunk's logits exist: each
token's loss depends on its own hidden state only, so the backward pass is one product with the incoming gradient.
The head's gradient is computed only if the head is being differentiated (full fine-tuning), from the logits again.
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
    x_TD: jax.Array,
    w_VD: jax.Array,
    labels_T: jax.Array,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    implementation: str | None = None,
) -> jax.Array:
    """-log softmax(logits)[label] for each token, float32 [T]; 0 (and no gradient) where the label is -100.

    Logits are scale x @ w.T; with a `softcap`, softcap tanh(that / softcap); divided by the temperature."""
    choose(NAME, implementation, IMPLEMENTATIONS)
    return _nll(chunk, reference.Form(scale, softcap, temperature), x_TD, w_VD, labels_T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(chunk, form, x_TD, w_VD, labels_T):
    return reference.map_chunks(lambda x, y: reference.nll_of_chunk(x, w_VD, y, form), chunk, x_TD, labels_T)


def _fwd(chunk, form, x, w, labels):
    x_TD, w_VD, labels_T = x.value, w.value, labels.value
    nll_and_dx = functools.partial(reference.nll_and_dx_of_chunk, w_VD=w_VD, form=form)
    nll_T, dx_TD = reference.map_chunks(lambda x, y: nll_and_dx(x, labels_C=y), chunk, x_TD, labels_T)
    return nll_T, (dx_TD, (x_TD, w_VD, labels_T) if w.perturbed else None)


def _bwd(chunk, form, residuals, dnll_T):
    dx_TD, for_dw = residuals
    if isinstance(dnll_T, jax.custom_derivatives.SymbolicZero):
        dnll_T = jnp.zeros(dnll_T.shape, dnll_T.dtype)
    dx_TD = dx_TD * dnll_T.astype(dx_TD.dtype)[:, None]
    if for_dw is None:
        return dx_TD, None, None
    x_TD, w_VD, labels_T = for_dw
    zero = jnp.zeros(w_VD.shape, jnp.float32)
    dw_VD = reference.sum_chunks(
        lambda x, dnll, y: reference.dw_of_chunk(x, w_VD, y, dnll, form), chunk, zero, x_TD, dnll_T, labels_T
    )
    return dx_TD, dw_VD.astype(w_VD.dtype), None


_nll.defvjp(_fwd, _bwd, symbolic_zeros=True)
