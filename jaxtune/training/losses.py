"""Losses as pure functions of (lora, params, batch): usable alone, under jit, grad and vmap."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.kernels.linear_cross_entropy import linear_cross_entropy, nll_and_entropy
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.models.layer_loop import Remat
from jaxtune.training import neftune

MicroBatch = Mapping[str, jax.Array]
"""`tokens`, `labels`, `segment_ids`, `positions`, int32 [R, L] (a whole batch: [A, R, L]); labels are already shifted,
-100 is not trained on, nor is any negative number. `piece_lengths` [G, M] promises rows without gaps (see
`kernels.attention`). A `dropout_key` [] (a whole batch: [A]) makes the adapter drop inputs, if its settings do, and
the loss add noise to embeddings, if it has an alpha."""

Loss = Callable[[Lora | None, Params, MicroBatch], jax.Array]
"""The sum over a micro-batch's trained tokens. The step divides by their number in the whole batch."""

Sums = dict[str, jax.Array]
"""What is worth watching beside the loss, by name, summed and divided as the loss is."""

Tree = dict[str, Any]
WatchedLoss = Callable[[Tree | None, Tree, MicroBatch], tuple[jax.Array, Sums]]
"""A loss and its sums, of what is trained and what is not: (lora, params, batch), or see `of_all_weights`."""


NOISE = 2**32 - 1
"""What the key of a micro-batch becomes noise with; the adapter's modules count from 0."""

LOSS_TYPES = ("nll", "dft")
"""What `next_token_loss` sums: -log p(label), or the same times p(label), as a constant (dynamic fine-tuning)."""


def label_nll(
    model: CausalLM,
    remat: Remat | None = None,
    temperature: float = 1.0,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    neftune_noise_alpha: float | None = None,
) -> Callable[[Lora | None, Params, MicroBatch], jax.Array]:
    """-log p(label) of every token of a micro-batch, float32 [R * L], 0 where there is no label, as a function of
    (lora, params, batch). Logits exist for some labelled tokens at a time (see `Remat.head_tokens`). With
    `label_smoothing`, that part of it is the mean of -log p over the vocabulary; `z_loss` times the square of the
    logits' logsumexp is added."""
    op = functools.partial(linear_cross_entropy, label_smoothing=label_smoothing, z_loss=z_loss)
    return _of_labels(op, model, remat, temperature, neftune_noise_alpha)


def label_nll_and_entropy(
    model: CausalLM,
    remat: Remat | None = None,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = True,
) -> Callable[[Lora | None, Params, MicroBatch], tuple[jax.Array, jax.Array]]:
    """The same, and the entropy of what a label is drawn from, in nats; without a gradient it costs no product."""
    op = functools.partial(nll_and_entropy, entropy_gradient=entropy_gradient)
    return _of_labels(op, model, remat, temperature)


def _of_labels(
    op: Callable, model: CausalLM, remat: Remat | None, temperature: float, noise_alpha: float | None = None
) -> Callable[[Lora | None, Params, MicroBatch], Any]:
    def of_batch(lora: Lora | None, params: Params, batch: MicroBatch) -> Any:
        key, noise_BTM = batch.get("dropout_key"), None
        if key is not None and noise_alpha:
            width = model.config.hidden_size
            noise_BTM = neftune.noise(
                jax.random.fold_in(key, NOISE), batch["segment_ids"], width, noise_alpha
            )
        hidden_RLM, _ = model.hidden(
            params,
            lora,
            batch["tokens"],
            segments_BT=batch["segment_ids"],
            positions_BT=batch["positions"],
            piece_lengths=batch.get("piece_lengths"),
            remat=remat,
            dropout_key=key,
            noise_BTM=noise_BTM,
        )
        x_RL, w_V = model.head(params, hidden_RLM, lora, key)
        return op(
            tuple(x_RLD.reshape(-1, x_RLD.shape[-1]) for x_RLD in x_RL),
            w_V,
            batch["labels"].reshape(-1),
            scale=model.config.logit_scale,
            softcap=model.config.logit_softcap,
            temperature=temperature,
            chunk=remat.head_tokens if remat else None,
        )

    return of_batch


def next_token_loss(
    model: CausalLM,
    remat: Remat | None = None,
    *,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    neftune_noise_alpha: float | None = None,
) -> Loss:
    """The sum of -log p(label) over the tokens that have a label, as a function of (lora, params, batch); or what else
    the type says (see LOSS_TYPES)."""
    nll = label_nll(
        model,
        remat,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        neftune_noise_alpha=neftune_noise_alpha,
    )

    def loss(lora: Lora | None, params: Params, batch: MicroBatch) -> jax.Array:
        each = nll(lora, params, batch)
        return (each * jax.lax.stop_gradient(jnp.exp(-each)) if loss_type == "dft" else each).sum()

    return loss


def unwatched(loss: Loss) -> WatchedLoss:
    """A loss with nothing to watch but itself."""
    return lambda lora, params, batch: (loss(lora, params, batch), {})


def of_all_weights(loss: WatchedLoss) -> WatchedLoss:
    """The loss for full fine-tuning: `params` are trained, nothing is frozen, and there is no adapter."""

    def whole(params: Tree | None, nothing: Tree, batch: MicroBatch) -> tuple[jax.Array, Sums]:
        assert params is not None
        return loss(None, params, batch)

    return whole


def trained_tokens(batch: MicroBatch) -> jax.Array:
    """How many tokens have a label, int32 []."""
    return (batch["labels"] >= 0).sum(dtype=jnp.int32)
