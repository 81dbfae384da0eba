"""Rows of an embedding's table, which lies in the device's memory or waits in the host's."""

import jax
import jax.numpy as jnp

from jaxtune.device_memory import is_on_host, on_device, on_host


def rows(table_VM: jax.Array, tokens: jax.Array) -> jax.Array:
    """table[tokens], on the device. Of a table on the host, no more than these rows ever are."""
    if not is_on_host(table_VM):
        return _rows(table_VM, tokens)
    # XLA makes it a kernel on the device, which reads the host's memory and writes to it what is then copied.
    return on_device(table_VM.at[on_host(tokens)].get(mode="clip", wrap_negative_indices=False))


@jax.custom_vjp
def _rows(table_VM: jax.Array, tokens: jax.Array) -> jax.Array:
    """A frequent token's gradient is summed in float32, whatever the table is kept in."""
    return table_VM[tokens]


def _rows_forward(table_VM, tokens):
    return table_VM[tokens], (tokens, table_VM)


def _rows_backward(kept, dx):
    tokens, table_VM = kept
    zeros_VM = jnp.zeros(table_VM.shape, jnp.float32)
    return zeros_VM.at[tokens].add(dx.astype(jnp.float32)).astype(table_VM.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
