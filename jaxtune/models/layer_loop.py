"""How training runs a stack of equal layers: in a loop, one by one, or in a loop whose kept values wait in the host's
memory; and what a layer keeps for its backward pass.

`block(x, layer, shared)` is one layer: x goes in and comes out, `layer` is its own part of the stacks, (modules,
adapters), `shared` what all layers see. It closes over no arrays.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Block = Callable[[jax.Array, Any, Any], jax.Array]


class Remat(NamedTuple):
    """How layers are trained; `training.remat` has the named ways."""

    policy: Callable | None
    """What a layer keeps for its backward pass (see `jax.checkpoint`), besides its input; None is everything."""
    unrolled: bool = False
    """Each layer a piece of the program, instead of a loop over them: what is kept then need not be copied into stacks
    and out of them again, but every layer is compiled."""
    on_host: bool = False
    """What a layer keeps waits in the host's pinned memory: sent as it is made, fetched while the layer above goes
    backward. Not for `jax.vmap`."""
    mlp_tokens: int | None = None
    """The MLP is computed for so many tokens at a time, and keeps nothing."""
    head_tokens: int | None = None
    """Logits exist for so many labelled tokens at a time; None is as many as 512 MiB hold."""


def checkpointed(block: Callable, remat: Remat) -> Callable:
    if remat.policy is None:
        return block
    # Inside a loop nothing can be shared between forward and backward, so CSE needs no preventing.
    return jax.checkpoint(block, policy=remat.policy, prevent_cse=remat.unrolled)


def run(block: Block, x: jax.Array, layers: tuple[Any, Any], shared: Any, remat: Remat) -> jax.Array:
    """x after all layers, of which `layers` holds stacks."""
    if remat.on_host:
        return _through_host(block, x, layers, shared)
    if remat.unrolled:
        block = jax.jit(block)  # traced and lowered once; XLA compiles every call by itself
        for modules, adapters in _unstacked(layers):
            # One of these is trained; the other must not look as if it were.
            if jax.tree.leaves(adapters):
                x, adapters = _both_at_once(x, adapters)
            else:
                x, modules = _both_at_once(x, modules)
            x = block(x, (modules, adapters), shared)
        return x
    return lax.scan(lambda x, layer: (block(x, layer, shared), None), x, layers)[0]


def _unstacked(stacks: Any) -> list[Any]:
    """Each layer's part of a tree of stacks. The gradient of a split is one concatenation; that of as many slices would
    be as many sums of whole stacks."""
    leaves, structure = jax.tree.flatten(stacks)
    repeats = len(leaves[0])

    def parts(stack: jax.Array) -> list[jax.Array]:
        if jnp.issubdtype(stack.dtype, jnp.floating):
            return [part[0] for part in lax.split(stack, (1,) * repeats)]
        return [stack[i] for i in range(repeats)]

    return [jax.tree.unflatten(structure, layer) for layer in zip(*map(parts, leaves), strict=True)]


@jax.custom_vjp
def _both_at_once(x: jax.Array, trained: Any) -> tuple[jax.Array, Any]:
    """Its arguments. Going backward, their gradients are ready together: XLA would put the small products of an
    adapter's gradient off, and hold the large arrays that they need, of every layer."""
    return x, trained


_both_at_once.defvjp(
    lambda x, trained: ((x, trained), None),
    lambda _, gradients: lax.optimization_barrier(gradients),
)


# What follows is a scan whose gradient is written by hand: XLA overlaps a transfer with computing only if it is a copy
# of its own (not a kernel that reads the host's memory), begun long before its result is needed. So
# - a slice of a stack on the host is taken at a place linear in the loop's counter, and never below its start: such
#   slices become copies, others kernels;
# - slices of what lies on the device are taken where XLA cannot tell (`_downward`): they would become copies too, and
#   queue behind the large ones;
# - the backward loop turns once for two layers: while one uses what it fetched, the other's is on its way, each in
#   memory of its own; the last layer's are there still.


def _through_host(block: Block, x: jax.Array, layers: Any, shared: Any) -> jax.Array:
    layers, of_layer = jax.tree.flatten(layers)
    shared, of_shared = jax.tree.flatten(shared)

    def of_leaves(x, layer, shared):
        return block(x, jax.tree.unflatten(of_layer, layer), jax.tree.unflatten(of_shared, shared))

    return _hosted(of_leaves, x, layers, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hosted(block: Callable, x: jax.Array, layers: list[jax.Array], shared: list[jax.Array]) -> jax.Array:
    return lax.scan(lambda x, layer: (block(x, layer, shared), None), x, layers)[0]


def _hosted_forward(block, x, layers, shared):
    trained = [leaf.value if leaf.perturbed else None for leaf in layers]
    x, layers, shared = jax.tree.map(lambda leaf: leaf.value, (x, layers, shared), is_leaf=_is_primal)
    trains = tuple(leaf is not None for leaf in trained)

    def one(x, layer):
        # What the backward pass has anyhow, a layer need not keep.
        return jax.vjp(
            block, x, layer, shared, saveable_args=(True, False, False), in_nzs=(True, trains, False)
        )

    def step(carry, i):
        x, _ = carry
        x, pullback = one(x, _at(i, layers))
        kept = jax.tree.leaves(pullback)
        return (x, kept), jax.device_put(kept, jax.memory.Space.Host)

    like, structure = jax.tree.flatten(jax.eval_shape(one, x, [leaf[0] for leaf in layers])[1])
    nothing = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in like]
    # In reverse, so that the backward pass reads upward.
    (x, last), on_host = lax.scan(step, (x, nothing), _downward(len(layers[0])), reverse=True)
    return x, (jax.tree.unflatten(structure, last), on_host, layers, shared, trained)


def _hosted_backward(block, kept, dx):
    last, on_host, layers, shared, trained = kept
    last, structure = jax.tree.flatten(last)
    repeats = len(layers[0])
    order = _downward(repeats)

    def one(carry):
        done, dx, here, gradients = carry
        next_one = jax.device_put(_at(done + 1, on_host), jax.memory.Space.Device)  # beyond the end: unused
        i = order[done]
        pullback = jax.tree.unflatten(structure, here)
        pullback.args_res = [pullback.args_res[0], _at(i, layers), shared]
        # Together: what this layer holds is free before the layer below begins.
        dx, dlayer, _ = lax.optimization_barrier(pullback(dx))
        parts = [d for d, own in zip(dlayer, trained, strict=True) if own is not None]
        gradients = [
            lax.dynamic_update_index_in_dim(stack, d, i, 0) for stack, d in zip(gradients, parts, strict=True)
        ]
        return done + 1, dx, next_one, gradients

    carry = (jnp.int32(0), dx, last, [jnp.zeros_like(own) for own in trained if own is not None])
    if repeats % 2:
        carry = one(carry)
    _, dx, _, stacks = lax.while_loop(lambda carry: carry[0] < repeats, lambda carry: one(one(carry)), carry)
    gradients = iter(stacks)
    return dx, [None if own is None else next(gradients) for own in trained], None


def _at(i: jax.Array, stacks: list[jax.Array]) -> list[jax.Array]:
    return [lax.dynamic_index_in_dim(stack, i, keepdims=False) for stack in stacks]


def _downward(repeats: int) -> jax.Array:
    """repeats - 1 ... 0, of which XLA does not know that."""
    return lax.optimization_barrier(jnp.arange(repeats)[::-1])


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


_hosted.defvjp(_hosted_forward, _hosted_backward, symbolic_zeros=True)
