"""What an adapter adds to a linear: B (A x), scaled, in the dtype of x, with A and B kept in float32."""

import jax


def delta(x: jax.Array, adapter: dict[str, jax.Array]) -> jax.Array:
    """x [..., in]; adapter a [r, in], b [out, r], scale [] -> [..., out]."""
    a = adapter["a"].astype(x.dtype)
    b = (adapter["scale"] * adapter["b"]).astype(
        x.dtype
    )  # scaled in float32: alpha / r may have no 16-bit value
    return (x @ a.T) @ b.T
