"""The policy's log-probabilities without its logits, and GRPO's loss, as functions of (lora, params, batch).

Shapes: R rows of L tokens, M model width; [A, R, L] is a whole step's micro-batches.
"""

from collections.abc import Callable

import jax
from jax import lax

from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.models.layer_loop import Remat
from jaxtune.rl.losses import policy_terms
from jaxtune.training.losses import MicroBatch, Sums, WatchedLoss, label_nll, label_nll_and_entropy

LogProbs = Callable[[Lora | None, Params, MicroBatch], jax.Array]
"""float32 [R, L]: log p(label) of every token that has one, 0 of the others. `lora=None` is the reference."""

LogProbsAndEntropy = Callable[[Lora | None, Params, MicroBatch], tuple[jax.Array, jax.Array]]
"""The same, and the entropy of what each of these tokens was drawn from."""


def log_probs(model: CausalLM, temperature: float = 1.0, remat: Remat | None = None) -> LogProbs:
    """By the function that SFT's loss is the sum of."""
    nll = label_nll(model, remat, temperature)
    return lambda lora, params, batch: -nll(lora, params, batch).reshape(batch["labels"].shape)


def log_probs_and_entropy(
    model: CausalLM,
    temperature: float = 1.0,
    remat: Remat | None = None,
    *,
    entropy_gradient: bool = True,
) -> LogProbsAndEntropy:
    """Without `entropy_gradient` the entropy is there to be watched, and costs no product."""
    both = label_nll_and_entropy(model, remat, temperature, entropy_gradient=entropy_gradient)

    def function(lora: Lora | None, params: Params, batch: MicroBatch) -> tuple[jax.Array, jax.Array]:
        nll, entropy = both(lora, params, batch)
        shape = batch["labels"].shape
        return -nll.reshape(shape), entropy.reshape(shape)

    return function


def of_all_micro_batches[Function: (LogProbs, LogProbsAndEntropy)](function: Function) -> Function:
    """The same for a whole batch [A, R, L], one micro-batch after the other, compiled."""
    return jax.jit(lambda lora, params, batch: lax.map(lambda micro: function(lora, params, micro), batch))


def grpo_loss(
    function: LogProbsAndEntropy,
    *,
    epsilon: float,
    epsilon_high: float | None,
    beta: float,
    use_bias_correction_kl: bool,
) -> WatchedLoss:
    """The batch has, besides what SFT's has, `advantages` and `weights` (see `losses.sequence_weights`), and may have
    `old_logps` (without them the policy is taken to be the one that sampled) and `ref_logps`: float32 [R, L]."""

    def loss(lora: Lora | None, params: Params, batch: MicroBatch) -> tuple[jax.Array, Sums]:
        logps_RL, entropy_RL = function(lora, params, batch)
        ref_logps_RL = batch.get("ref_logps")
        terms = policy_terms(
            logps_RL,
            batch.get("old_logps", lax.stop_gradient(logps_RL)),
            batch["advantages"],
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            ref_logps=ref_logps_RL,
            beta=beta,
            use_bias_correction_kl=use_bias_correction_kl,
        )
        sums = {
            "entropy": entropy_RL.sum(),
            "clip_ratio/low_mean": terms.clipped_low.sum(),
            "clip_ratio/high_mean": terms.clipped_high.sum(),
            "clip_ratio/region_mean": (terms.clipped_low + terms.clipped_high).sum(),
        }
        if ref_logps_RL is not None:
            sums["kl"] = terms.kl.sum()
        return (batch["weights"] * terms.loss).sum(), sums

    return loss
