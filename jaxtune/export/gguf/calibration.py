"""An importance matrix by our own measurement, of text: what `llama-imatrix` measures, in the same file.

The text's tokens, laid end to end, are cut into contexts of equal length, each begun as the tokenizer begins a text.
What is left at the end is too little for one, and is left out.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import DatasetError, OptionError
from jaxtune.export.gguf import tensors
from jaxtune.export.gguf.quants import TensorType
from jaxtune.export.gguf.writer import TensorInfo, write_gguf
from jaxtune.folders import named
from jaxtune.log import counted, get_logger
from jaxtune.lora.config import LoraConfig
from jaxtune.lora.tree import at, insert, linears
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.progress import progress_bar

log = get_logger(__name__)

AT_ONCE = 4096
"""Tokens of one call."""


def save_imatrix(
    file: str | Path,
    model: CausalLM,
    params: Params,
    lora: Lora | None,
    texts: str | Iterable[str],
    tokenizer: Any,
    *,
    context: int = 512,
) -> None:
    """Writes what goes into every linear of the layers, with the adapter as it is."""
    contexts = contexts_of(texts, tokenizer, context)
    sums = measure(model, params, lora, contexts)
    log.info("Measured %s of %d tokens, for %s.", counted(len(contexts), "context"), context, file)
    of_hf = {hf: gguf for gguf, hf in tensors.gguf_names(model.config, sums, file).items()}
    arrays = {}
    for name, of_columns in sums.items():
        arrays[f"{of_hf[name]}.in_sum2"] = of_columns[None]
        arrays[f"{of_hf[name]}.counts"] = np.full((1, 1), contexts.size, np.float32)
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": ["texts"],
        "imatrix.chunk_count": np.uint32(len(contexts)),
        "imatrix.chunk_size": np.uint32(context),
    }
    infos = [TensorInfo(name, array.shape, TensorType.F32) for name, array in arrays.items()]
    path = named(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_gguf(partial, metadata, infos, lambda info: arrays[info.name].astype(np.float32).view(np.uint8))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def contexts_of(texts: str | Iterable[str], tokenizer: Any, context: int) -> np.ndarray:
    """int32 [contexts, context]"""
    texts = [texts] if isinstance(texts, str) else list(texts or ())
    if not texts or not all(isinstance(text, str) for text in texts):
        found = type(next((text for text in texts if not isinstance(text, str)), None)).__name__
        raise DatasetError(
            "There is no text." if not texts else f"The texts hold a {found}.",
            expected="a string, or several: conversations as the chat template prints them, or any other text.",
            fix="Pass such as the model will see, some tens of thousands of tokens in all.",
        )
    if context < 2:
        raise OptionError(f"context={context}.", expected="some hundred tokens.", fix="Leave it out for 512.")
    start = list(tokenizer("").input_ids)
    start = start[:-1] if start and start[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else start
    # Not verbose, which would warn of texts longer than the model takes: they are cut here.
    plain = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    tokens = np.asarray([token for text in plain for token in text], np.int32)
    length = context - len(start)
    count = len(tokens) // length
    if not count:
        raise DatasetError(
            f"The text has {counted(len(tokens), 'token')}.",
            expected=f"some contexts of {context} each: a hundred of 512 is what is often taken.",
            fix="Give more text, or a smaller context.",
        )
    body = tokens[: count * length].reshape(count, length)
    return np.concatenate([np.tile(np.asarray(start, np.int32), (count, 1)), body], axis=1)


def measure(
    model: CausalLM, params: Params, lora: Lora | None, contexts: np.ndarray
) -> dict[str, np.ndarray]:
    """For each linear of the layers, by its weight's name, the sums [in] of the squares of what goes in."""
    model = dataclasses.replace(model, lora_config=model.lora_config or LoraConfig())
    totals: dict[tuple, np.ndarray] = {}
    rows = max(1, AT_ONCE // contexts.shape[1])
    for start in progress_bar(range(0, len(contexts), rows), desc="importance", unit="batch", leave=False):
        found = _sums(model, params, lora, jnp.asarray(contexts[start : start + rows]))
        for path, _ in linears(model.skeleton):
            totals[path] = totals.get(path, 0) + np.asarray(at(found, path), np.float64)
    return dict(_by_name(model, totals))


def _by_name(model: CausalLM, totals: dict[tuple, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for path, of_layers in totals.items():
        for name, sums in zip(model.module_names(path), of_layers, strict=True):
            yield f"{name}.weight", sums


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: CausalLM, params: Params, lora: Lora | None, tokens_BT: jax.Array) -> Lora:
    squares: Lora = {}
    for path, (repeats, _, inn) in linears(model.skeleton):
        insert(squares, path, jnp.zeros((repeats, inn), jnp.float32))

    def output(squares: Lora) -> jax.Array:
        watching = jax.tree.map(lambda leaf: leaf, lora or {})
        for path, _ in linears(model.skeleton):
            insert(watching, (*path, "squares"), at(squares, path))
        return model.hidden(params, watching, tokens_BT)[0].sum(dtype=jnp.float32)

    return jax.grad(output)(squares)
