"""Steps that are not taken, because their loss or their gradient is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def skipping(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`update(..., is_finite=...)`: where it is not, the update is nothing and the state stays, but for the schedule's
    count. A run's rate follows from the number of its steps, whatever became of them."""

    def update(grads: Any, state: Any, trained: Any = None, *, is_finite: jax.Array) -> tuple[Any, Any]:
        updates, new = optimizer.update(grads, state, trained)

        def choose(new: Any, old: Any) -> Any:
            return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(is_finite, new, old)

        # Added to -0.0, even a weight of -0.0 is what it was.
        updates = jax.tree.map(lambda update: jnp.where(is_finite, update, -0.0), updates)
        is_count = lambda x: isinstance(x, optax.ScaleByScheduleState)
        return updates, jax.tree.map(choose, new, state, is_leaf=is_count)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
