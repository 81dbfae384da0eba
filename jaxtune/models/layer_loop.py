"""How training runs a stack of equal layers: in a loop, one by one, or in a loop whose kept values wait in the host's
memory; and what a layer keeps for its backward pass.

`block(x, layer, shared)` is one layer: x goes in and comes out, `layer` is its own part of the stacks, `shared` what
all layers see. It closes over no arrays.
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
    """What a layer keeps waits in the host's pinned memory. It is sent there while the next layer computes, and fetched
    while the one after it goes backward."""
    mlp_tokens: int | None = None
    """The MLP is computed for so many tokens at a time, and keeps nothing."""


def checkpointed(block: Callable, remat: Remat) -> Callable:
    if remat.policy is None:
        return block
    # Inside a loop nothing can be shared between forward and backward, so CSE needs no preventing.
    return jax.checkpoint(block, policy=remat.policy, prevent_cse=remat.unrolled)


def run(block: Block, x: jax.Array, layers: Any, shared: Any, remat: Remat) -> jax.Array:
    """x after all layers, of which `layers` holds stacks."""
    if remat.on_host:
        return _through_host(block, x, layers, shared)
    if remat.unrolled:
        for layer in _unstacked(layers):
            x, layer = _both_at_once(x, layer)
            x = block(x, layer, shared)
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
def _both_at_once(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
    """Its arguments. Going backward, their gradients are ready together: XLA would put the small products of an
    adapter's gradient off, and hold the large arrays that they need, of every layer."""
    return x, layer


_both_at_once.defvjp(
    lambda x, layer: ((x, layer), None),
    lambda _, gradients: lax.optimization_barrier(gradients),
)


def _through_host(block: Block, x: jax.Array, layers: Any, shared: Any) -> jax.Array:
    layers, layer_structure = jax.tree.flatten(layers)
    shared, shared_structure = jax.tree.flatten(shared)

    def flat(x, layer, shared):
        return block(x, layer_structure.unflatten(layer), shared_structure.unflatten(shared))

    return _hosted(flat, x, layers, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hosted(block, x, layers, shared):
    return lax.scan(lambda x, layer: (block(x, layer, shared), None), x, layers)[0]


def _hosted_forward(block, x, layers, shared):
    trained = [leaf.value if leaf.perturbed else None for leaf in layers]
    x, layers, shared = jax.tree.map(lambda leaf: leaf.value, (x, layers, shared), is_leaf=_is_primal)
    trains = tuple(leaf is not None for leaf in trained)

    def one(x, layer):
        # What the backward pass has anyhow, a layer need not keep.
        x, pullback = jax.vjp(
            block, x, layer, shared, saveable_args=(True, False, False), in_nzs=(True, trains, False)
        )
        return x, jax.device_put(pullback, jax.memory.Space.Host)

    x, pullbacks_L = lax.scan(one, x, layers)
    return x, (pullbacks_L, layers, shared, trained)


def _hosted_backward(block, kept, dx):
    pullbacks_L, layers, shared, trained = kept
    on_host, structure = jax.tree.flatten(pullbacks_L)
    last = len(layers[0]) - 1

    def fetch(i):
        return [jax.device_put(lax.dynamic_index_in_dim(leaf, i, keepdims=False), jax.memory.Space.Device) for leaf in on_host]

    def one(carry, at):
        dx, here = carry
        i, layer = at
        before = fetch(jnp.maximum(i - 1, 0))  # nothing below waits for it
        pullback = structure.unflatten(here)
        pullback.args_res = [pullback.args_res[0], layer, shared]
        dx, dlayer, _ = pullback(dx)
        return (dx, before), [d for d, own in zip(dlayer, trained, strict=True) if own is not None]

    (dx, _), gradients = lax.scan(one, (dx, fetch(last)), (jnp.arange(last + 1), layers), reverse=True)
    gradients = iter(gradients)
    return dx, [None if own is None else next(gradients) for own in trained], None


def _is_primal(leaf):
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


_hosted.defvjp(_hosted_forward, _hosted_backward, symbolic_zeros=True)
