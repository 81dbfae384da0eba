"""Room for new tokens: rows of the embedding, and of an untied head, that start where trained rows lie.

A row of zeros or of noise would make a new token's logit an outlier from the first step on. `method="mean"` gives each
new token the mean of the trained rows; "interpolation" moves it towards the mean of the pieces its text had before.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.device_memory import beside, on_device
from jaxtune.errors import OptionError, nearest
from jaxtune.models.causal_lm import CausalLM, Params

METHODS = ("mean", "interpolation")


def require_options(method: str, interpolation: float, pad_to_multiple_of: int | None) -> None:
    if pad_to_multiple_of is not None and (type(pad_to_multiple_of) is not int or pad_to_multiple_of < 1):
        raise OptionError(
            f"add_new_tokens was given pad_to_multiple_of={pad_to_multiple_of!r}.",
            expected="a whole number of at least 1, or None.",
            fix="Choose, for example, 64.",
        )
    if method not in METHODS or not isinstance(interpolation, int | float) or not 0 <= interpolation <= 1:
        raise OptionError(
            f"add_new_tokens was given method={method!r}, interpolation={interpolation!r}.",
            expected='"mean" or "interpolation", and a number from 0 to 1.',
            fix=f"Leave method out.{nearest(str(method), METHODS)}",
        )


def add_to_tokenizer(tokenizer: Any, new_tokens: Sequence[str]) -> list[list[int]]:
    """Adds the tokens in place; for each, the ids of the pieces that its text had before."""
    listed = isinstance(new_tokens, list | tuple | set | frozenset)
    if not listed or not all(isinstance(token, str) and token for token in new_tokens):
        raise OptionError(
            f"new_tokens={new_tokens!r}.",
            expected='a list of strings, as in ["<think>"].',
            fix="Pass a list.",
        )
    known = tokenizer.get_vocab()
    there = [token for token in new_tokens if token in known]
    if there or len(set(new_tokens)) < len(new_tokens):
        raise OptionError(
            f"new_tokens has {', '.join(map(repr, there)) or 'a token twice'}"
            f"{', which the tokenizer has already' if there else ''}.",
            expected="tokens that are new, each once.",
            fix="Leave those out: a token that is there needs no adding.",
        )
    pieces = [tokenizer.encode(token, add_special_tokens=False) for token in new_tokens]
    tokenizer.add_tokens(list(new_tokens))
    return pieces


def grow(
    causal_lm: CausalLM,
    params: Params,
    first: int,
    pieces: Sequence[Sequence[int]],
    *,
    method: str = "mean",
    interpolation: float = 0.5,
    pad_to_multiple_of: int | None = None,
) -> tuple[CausalLM, Params]:
    """The model with a row for each of the tokens `first`, `first + 1`, ..., and the parts of `params` that have them;
    rows that a checkpoint left over are used before new ones are made. Nothing that was given is changed."""
    rows = max(causal_lm.config.vocab_size, first + len(pieces))
    rows += -rows % (pad_to_multiple_of or 1)
    names = ["embed_tokens"] if causal_lm.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    towards = interpolation if method == "interpolation" else 0.0
    grown = {}
    for name in names:
        table = params[name]["weight"]
        new = _grow(on_device(table), first, pieces, rows, towards)
        grown[name] = {**params[name], "weight": beside(new, table)}
    config = dataclasses.replace(causal_lm.config, vocab_size=rows)
    return dataclasses.replace(causal_lm, config=config), grown


def _grow(
    table_VM: jax.Array, first: int, pieces: Sequence[Sequence[int]], rows: int, towards: float
) -> jax.Array:
    trained = jnp.any(table_VM[:first] != 0, axis=1)[:, None]
    total = jnp.where(trained, table_VM[:first], 0).sum(0, dtype=jnp.float32)
    mean = total / jnp.maximum(trained.sum(), 1).astype(jnp.float32)
    new = [
        mean if not towards or not ids
        else (1 - towards) * mean + towards * table_VM[np.asarray(ids)].astype(jnp.float32).mean(0)
        for ids in pieces
    ]  # fmt: skip
    table = jnp.pad(table_VM, ((0, rows - table_VM.shape[0]), (0, 0)))
    return table.at[first : first + len(new)].set(jnp.stack(new).astype(table.dtype))
