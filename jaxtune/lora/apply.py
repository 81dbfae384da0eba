"""What an adapter adds to a linear: B (A x), scaled, in the dtype of x, with A and B kept in float32."""

import jax


def delta(x: jax.Array, adapter: dict[str, jax.Array]) -> jax.Array:
    """x [..., in]; adapter a [r, in], b [out, r], scale [] -> [..., out]."""
    a, b, scale = (adapter[name].astype(x.dtype) for name in ("a", "b", "scale"))
    return ((x @ a.T) * scale) @ b.T
