"""What a model's card says of the run that trained it."""

from typing import TYPE_CHECKING

import jax

from jaxtune.quant import PackedArray

if TYPE_CHECKING:
    from jaxtune.training.running import Run


def facts_for_card(run: "Run") -> dict[str, str]:
    """Of a run that has ended."""
    args, state = run.args, run.state
    length = getattr(args, "max_length", None) or run.model.max_seq_length
    ends = {
        name: record[name] for record in state.log_history for name in ("loss", "reward") if name in record
    }
    return {
        "trained on weights in": _precision(run.model.params),
        "steps": f"{state.global_step}",
        "epochs": f"{state.epoch:.2f}",
        "tokens": f"{run.tally.tokens:,}",
        "batch": f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} samples",
        "longest sequence": f"{length}",
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type}, "
        f"{args.warmup(state.max_steps)} steps of warm-up",
        "optimizer": f"{args.optim}, weight decay {args.weight_decay:g}",
        "seed": f"{args.seed}",
        "mean loss": f"{run.tally.mean_loss:.4f}",
        **{f"last {name}": f"{value:.4f}" for name, value in ends.items()},
    }


def _precision(params: dict) -> str:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, PackedArray))
    packed = [leaf.format.name for leaf in leaves if isinstance(leaf, PackedArray)]
    return packed[0] if packed else leaves[0].dtype.name
