"""Optimizer state that waits in the host's memory between steps.

A step fetches what belongs to one leaf of the trained tree, updates that leaf and sends it back, then the next: of all
moments, the device holds two leaves' at most. What leaves share (the number of steps) stays on the device.
"""

from typing import Any

import jax
import optax
from jax import lax

from jaxtune import device_memory
from jaxtune.device_memory import gb_free, gb_needed, on_device, on_host
from jaxtune.errors import DeviceMemoryError


def offloaded(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, whose leaves must not know of one another, with the same state in another memory."""
    inner = optax.with_extra_args_support(optimizer)

    def init(trained: Any) -> Any:
        pieces, owners, _ = _cut(jax.eval_shape(inner.init, trained), trained)
        own = [piece for piece, owner in zip(pieces, owners, strict=True) if owner is not None]
        _require_room(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(own)))

        @jax.jit
        def sent(trained: Any) -> Any:
            pieces, owners, structure = _cut(inner.init(trained), trained)
            last: Any = None
            for i, owner in enumerate(owners):
                if owner is not None:
                    pieces[i], last = lax.optimization_barrier((pieces[i], last))
                    last = pieces[i]
                    pieces[i] = jax.tree.map(on_host, last)
            return jax.tree.unflatten(structure, pieces)

        return sent(trained)

    def update(grads: Any, state: Any, trained: Any = None, **more: Any) -> tuple[Any, Any]:
        pieces, owners, structure = _cut(state, grads)
        leaves, tree = jax.tree.flatten(grads)
        updates: list[Any] = [None] * len(leaves)
        shared = {
            i: piece for i, (piece, owner) in enumerate(zip(pieces, owners, strict=True)) if owner is None
        }
        new = dict(shared)

        def only(at: int, all_leaves: list[Any]) -> Any:
            return jax.tree.unflatten(tree, [leaf if j == at else None for j, leaf in enumerate(all_leaves)])

        def send_back(own: dict[int, Any]) -> None:
            new.update((i, jax.tree.map(on_host, piece)) for i, piece in own.items())

        done: dict[int, Any] = {}
        for at in range(len(leaves)):
            own = {i: piece for i, piece in enumerate(pieces) if owners[i] == at}
            # Not fetched before the last one's are new.
            own, done = lax.optimization_barrier((own, done))
            send_back(done)
            here = {**shared, **jax.tree.map(on_device, own)}
            state_of_leaf = jax.tree.unflatten(structure, [here.get(i) for i in range(len(pieces))])
            update_of_leaf, state_of_leaf = inner.update(
                only(at, leaves), state_of_leaf, only(at, jax.tree.leaves(trained)), **more
            )
            (updates[at],) = jax.tree.leaves(update_of_leaf)
            fresh = structure.flatten_up_to(state_of_leaf)
            done = {i: fresh[i] for i in own}
            new.update((i, fresh[i]) for i in shared)
        send_back(done)
        return jax.tree.unflatten(tree, updates), jax.tree.unflatten(
            structure, [new[i] for i in range(len(pieces))]
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _cut(state: Any, trained: Any) -> tuple[list[Any], list[int | None], Any]:
    """The state in pieces: what lies at the place of a leaf of the trained tree (a moment, or several parts of one),
    with that leaf's number, and whatever else there is, with None; and how to put them together."""
    numbers = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(trained))}

    def owner(path: tuple) -> int | None:
        ends = (path[start:] for start in range(len(path)))
        return next((numbers[end] for end in ends if end in numbers), None)

    with_paths, structure = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda path, _: owner(path) is not None, is_leaf_takes_path=True
    )
    return [piece for _, piece in with_paths], [owner(path) for path, _ in with_paths], structure


def _require_room(size: int) -> None:
    if device_memory.of_device(device_memory.default_device()) is None:
        return
    free, limit = device_memory.free_of_host(), device_memory.pinned_limit()
    if size > min(free, limit):
        raise DeviceMemoryError(
            f"The optimizer's state takes {gb_needed(size)} of the host's memory.",
            expected=f"at most {gb_free(min(free, limit))}, which are free and may be pinned.",
            fix=device_memory.raise_limit(size)
            if size <= free
            else "Set optim='adamw_8bit', whose state is smaller.",
        )
