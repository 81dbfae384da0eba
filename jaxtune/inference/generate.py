"""Cached generation as one compiled program: prefill the prompts, then a loop that emits a token a turn until every
row has met its stop token. Lengths of prompts and answers are bucketed, so a handful of programs serve
all prompts.

Shapes: B rows, P prompt columns (left-padded), N columns for new tokens, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.errors import OptionError
from jaxtune.inference.sampler import sample
from jaxtune.models.cache import KVCache
from jaxtune.models.causal_lm import CausalLM, Lora, Params

BUCKET = 64
"""Columns: prompts are padded to a multiple of it, and so is the room for new tokens."""


def generate(
    model: CausalLM,
    params: Params,
    lora: Lora | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float | None = None,
    key: jax.Array | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and including the first stop token. `temperature=None` is greedy."""
    _check(model, prompts, max_new_tokens, temperature)
    longest = max(map(len, prompts))
    columns = -(-longest // BUCKET) * BUCKET
    tokens_BP = np.zeros((len(prompts), columns), np.int32)
    mask_BP = np.zeros((len(prompts), columns), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, columns - len(prompt) :] = prompt
        mask_BP[row, columns - len(prompt) :] = 1
    new_BN, count_B = _generate(
        model,
        temperature is None,
        -(-max_new_tokens // BUCKET) * BUCKET,
        jnp.asarray(max_new_tokens, jnp.int32),
        params,
        lora,
        tokens_BP,
        mask_BP,
        jnp.asarray(np.pad(np.asarray(stop_ids, np.int32), (0, -len(stop_ids) % 4), constant_values=-1)),
        jnp.asarray(1.0 if temperature is None else temperature, jnp.float32),
        jax.random.key(0) if key is None else key,
    )
    return [row[:n].tolist() for row, n in zip(np.asarray(new_BN), np.asarray(count_B), strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model, greedy, N, limit, params, lora, tokens_BP, mask_BP, stop_ids, temperature, key):
    B, P = tokens_BP.shape
    cache = KVCache.empty(model.config, B, P + N, model.dtype(params))
    counted_BP = jnp.cumsum(mask_BP, axis=1, dtype=jnp.int32)
    positions_BP, prompt_length_B = jnp.maximum(counted_BP - 1, 0), counted_BP[:, -1]
    hidden, cache = model.hidden(
        params, lora, tokens_BP, segments_BT=mask_BP, positions_BT=positions_BP, cache=cache
    )

    def next_token(hidden_BM, step):
        return sample(
            model.logits(params, hidden_BM, lora), jax.random.fold_in(key, step), temperature, greedy
        )

    def emit(step, token_B, out_BN, count_B, done_B):
        """Writes a token for the rows that are not done; a stop token is written, and is the row's last."""
        out_BN = lax.dynamic_update_slice(out_BN, jnp.where(done_B, 0, token_B)[:, None], (0, step))
        count_B = count_B + (~done_B).astype(jnp.int32)
        return out_BN, count_B, done_B | (token_B[:, None] == stop_ids[None, :]).any(axis=1)

    def going_on(state):
        step, _, _, _, done_B, _ = state
        return (step < limit) & ~done_B.all()

    def turn(state):
        step, token_B, out_BN, count_B, done_B, cache = state
        hidden, cache = model.hidden(
            params,
            lora,
            token_B[:, None],
            segments_BT=jnp.ones((B, 1), jnp.int32),
            positions_BT=(prompt_length_B + step - 1)[:, None],
            cache=cache,
        )
        token_B = next_token(hidden[:, -1], step)
        return step + 1, token_B, *emit(step, token_B, out_BN, count_B, done_B), cache

    nothing = (jnp.zeros((B, N), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool))
    first_B = next_token(hidden[:, -1], 0)
    state = (jnp.int32(1), first_B, *emit(0, first_B, *nothing), cache)
    _, _, out_BN, count_B, _, _ = lax.while_loop(going_on, turn, state)
    return out_BN, count_B


def ends(stop_ids: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a generation: the model's, and the tokenizer's end token as it is now, since a chat template
    may have given it another one."""
    eos = getattr(tokenizer, "eos_token_id", None)
    return tuple(dict.fromkeys((*stop_ids, *(() if eos is None else (int(eos),)))))


def _check(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float | None
) -> None:
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise OptionError(
            "generate was given an empty prompt." if prompts else "generate was given no prompts.",
            expected="at least one token in every prompt.",
            fix="Start an empty prompt with the tokenizer's bos token.",
        )
    vocab = model.config.vocab_size
    if any(not 0 <= token < vocab for prompt in prompts for token in prompt):
        raise OptionError(
            "A prompt holds a token id outside the model's vocabulary.",
            expected=f"ids from 0 to {vocab - 1}.",
            fix="Use the tokenizer that belongs to this model.",
        )
    if max_new_tokens < 1:
        raise OptionError(
            f"max_new_tokens={max_new_tokens}.", expected="at least 1.", fix="Ask for at least one new token."
        )
    if temperature is not None and not temperature > 0:
        raise OptionError(
            f"temperature={temperature}.",
            expected="a number above 0.",
            fix="For the likeliest token at every step use do_sample=False.",
        )
