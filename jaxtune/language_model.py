"""LanguageModel: a loaded model with the methods that users know (`generate`, `save_pretrained`, ...), and underneath
`params`, `lora` and the pure `apply`."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.device_memory import committed
from jaxtune.errors import AdapterError, OptionError
from jaxtune.inference.generate import ends, generate
from jaxtune.loading import adapter as adapters
from jaxtune.loading.hub import resolve
from jaxtune.log import get_logger
from jaxtune.lora import tree as lora_tree
from jaxtune.lora.config import PISSA
from jaxtune.lora.tables import unlike
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.options import ANY, mirrors
from jaxtune.pushable import Pushable
from jaxtune.reporting.last_run import LastRun

log = get_logger(__name__)

_GENERATE_WITHOUT_EFFECT = {
    "use_cache": (True, None),
    "streamer": None,
    "stopping_criteria": None,
    "tokenizer": ANY,
    "token_type_ids": ANY,
    "top_p": (1.0, None),
    "top_k": (0, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
}


class LoraRequest(NamedTuple):
    """An adapter beside the model's own, for `generate(..., lora_request=)`; or for
    `causal_lm.apply(model.params, lora, tokens)`."""

    name: str
    """The folder or id that it was loaded from."""
    causal_lm: CausalLM
    """The model with this adapter's settings."""
    lora: Lora


@dataclasses.dataclass(eq=False, repr=False)
class LanguageModel(Pushable):
    """A loaded model. `params` and `lora` are plain nested dicts of arrays; `causal_lm` holds the pure functions."""

    causal_lm: CausalLM
    params: Params
    lora: Lora | None = None
    tokenizer: Any = None
    name_or_path: str = ""
    """Where the base came from: what an adapter's config will name."""
    revision: str | None = None
    max_seq_length: int = 2048
    gradient_checkpointing: bool | str = "unsloth"
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a generation."""
    full_finetuning: bool = False
    """Whether a trainer trains `params` themselves, instead of an adapter."""
    cache_dir: str | Path | None = None
    """Where the hub's files are kept, if not where huggingface_hub keeps them."""
    own_parts: frozenset[str] = frozenset()
    """The parts of `params` that are not the original checkpoint's: all after full fine-tuning, the embedding and an
    untied head after `add_new_tokens`. What is saved takes them from here."""
    last_run: LastRun | None = None
    """The run that trained it, in this process or as the card of its folder has it: for the next card."""

    def __post_init__(self):
        self.params, self.lora = committed(self.params, self.lora), committed(self.lora, self.params)

    def apply(self, params: Params, lora: Lora | None, tokens: jax.Array, **where: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32, as a pure function; `lora=None` is the base model. See `CausalLM.apply`."""
        return self.causal_lm.apply(params, lora, tokens, **where)

    @mirrors(_GENERATE_WITHOUT_EFFECT)
    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        lora_request: LoraRequest | None = None,
    ) -> np.ndarray:
        """Prompts [B, P] -> ids [B, P + new], as transformers' `generate`: the prompt as it was given, then the new
        tokens, padded on the right.

        Args:
            input_ids: An array, a torch tensor, nested lists, or a tokenizer's output; or one prompt [P].
            attention_mask: 0 for what is padding; None takes it from the tokens.
            max_new_tokens: How many there may be.
            do_sample: Sample, instead of taking the likeliest token.
            temperature: Of the sampling.
            eos_token_id: What ends a generation; None is what the model's files and its tokenizer, as it is now, call
                an end.
            pad_token_id: What the ids are padded with; None is the tokenizer's.
            seed: Of the sampling; None samples anew at each call.
            lora_request: What `load_lora` returned, to answer with that adapter; None answers with the model's own.
        """
        causal_lm, lora = self.causal_lm, self.lora
        if lora_request is not None:
            self._require_own(lora_request)
            causal_lm, lora = lora_request.causal_lm, lora_request.lora
        if isinstance(input_ids, Mapping):
            input_ids, attention_mask = input_ids["input_ids"], input_ids.get("attention_mask")
        rows = _rows(input_ids)
        masks = [self._is_real(row) for row in rows] if attention_mask is None else _rows(attention_mask)
        if [len(mask) for mask in masks] != [len(row) for row in rows]:
            raise OptionError(
                "attention_mask and input_ids have different shapes.",
                expected="a 0 or 1 for every id.",
                fix="Pass both as the tokenizer returned them.",
            )
        stops = (
            ends(self.stop_ids, self.tokenizer)
            if eos_token_id is None
            else np.atleast_1d(eos_token_id).tolist()
        )
        if temperature != 1.0 and not do_sample:
            log.warning("generate: temperature=%s has no effect without do_sample=True.", temperature)
        new = generate(
            causal_lm,
            self.params,
            lora,
            [row[mask > 0].tolist() for row, mask in zip(rows, masks, strict=True)],
            max_new_tokens=max_new_tokens,
            stop_ids=tuple(stops),
            temperature=temperature if do_sample else None,
            key=jax.random.key(secrets.randbits(32) if seed is None else seed),
        )
        whole = [
            np.concatenate([row, np.asarray(more, np.int32)]) for row, more in zip(rows, new, strict=True)
        ]
        pad = self._pad_id(stops) if pad_token_id is None else pad_token_id
        longest = max(map(len, whole))
        return np.stack([np.pad(row, (0, longest - len(row)), constant_values=pad) for row in whole])

    @mirrors({"load_tensors": ANY, "lora_request_id": ANY})
    def load_lora(self, save_directory: str | Path) -> LoraRequest:
        """An adapter for this model, beside its own, from a PEFT folder.

        Args:
            save_directory: The folder, as `save_lora` or PEFT writes it, or an id on the hub.
        """
        folder = resolve(save_directory, cache_dir=self.cache_dir)
        if not adapters.is_adapter(folder):
            raise AdapterError(
                f"{folder} holds no adapter.",
                expected="a folder with adapter_config.json, as save_lora writes it.",
                fix="Load a whole model with FastLanguageModel.from_pretrained.",
            )
        found = adapters.read_config(folder)
        adapted = adapters.read_weights(found, dataclasses.replace(self.causal_lm, lora_config=None))
        self._require_base_of(folder, adapted)
        if found.base != self.name_or_path:
            log.warning(
                "The adapter in %s was trained on %s; here it is added to %s.",
                folder, found.base, self.name_or_path,
            )  # fmt: skip
        lora = committed(jax.tree.map(jnp.asarray, adapted.lora), self.params)
        return LoraRequest(str(save_directory), adapted.model, lora)

    def module_names(self, path: names.Path) -> list[str]:
        """The Hugging Face name of each repeat of a stacked module."""
        return self.causal_lm.module_names(path)

    def print_trainable_parameters(self) -> None:
        base = sum(leaf.size for leaf in jax.tree.leaves(self.causal_lm.skeleton))
        config, trained, total = self.causal_lm.lora_config, 0, base
        if self.full_finetuning:
            trained = base
        elif self.lora is not None and config is not None:
            trained = lora_tree.count(self.lora, config, self.causal_lm.module_names)
            adapted = lora_tree.layers(self.lora, config, self.causal_lm.module_names)
            biases_of_the_base = sum(leaves["bias"].size for _, leaves in adapted if "bias" in leaves)
            total = base - biases_of_the_base + trained
        print(
            f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
        )

    def __repr__(self) -> str:
        c, lora = self.causal_lm.config, self.causal_lm.lora_config
        adapter = "no adapter" if self.lora is None else f"adapter of rank {lora.r if lora else '?'}"
        adapter = "trained whole" if self.full_finetuning else adapter
        return (
            f"LanguageModel({self.name_or_path!r}, {c.num_layers} layers of width {c.hidden_size}, {adapter})"
        )

    def _require_base_of(self, folder: Path, adapted: adapters.Adapted) -> None:
        """That the weights here are those that the adapter is for: adapters may bring tables of more tokens, and one
        that began as PiSSA's has taken its part out of the base."""
        own, other = self.causal_lm.lora_config, adapted.model.lora_config
        taken_out = [config for config in (own, other) if config and config.init_lora_weights == PISSA]
        if unlike(adapted.tables, self.params) or adapted.model.config != self.causal_lm.config:
            problem = "brings an embedding or a head of its own"
        elif taken_out and not (own and other and other.continues(own)):
            problem = "or the model's own adapter began as 'pissa', which changes the base"
        else:
            return
        raise AdapterError(
            f"The adapter in {folder} {problem}.",
            expected="an adapter for the weights that this model has.",
            fix="Load it with FastLanguageModel.from_pretrained, as a model of its own.",
        )

    def _require_own(self, request: Any) -> None:
        is_one = isinstance(request, LoraRequest)
        if not is_one or request.causal_lm.config != self.causal_lm.config:
            raise OptionError(
                f"lora_request is {'of another model' if is_one else f'a {type(request).__name__}'}.",
                expected="what this model's load_lora returned.",
                fix="Pass lora_request=model.load_lora(folder).",
            )

    def _is_real(self, row: np.ndarray) -> np.ndarray:
        """The mask of a prompt that came without one: its padding is not part of it, unless that ends texts as well."""
        pad, eos = (getattr(self.tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos"))
        if pad is None or pad == eos or (row == pad).all():
            return np.ones_like(row)
        return (row != pad).astype(row.dtype)

    def _pad_id(self, stops: Sequence[int]) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if pad is not None else next(iter(stops), 0)


def _rows(ids: Any) -> list[np.ndarray]:
    """Prompts, or their masks, as one array each: from anything with two dimensions, or one prompt with one."""
    try:
        rows = [np.asarray(row) for row in ids]
        if rows and all(row.ndim == 0 for row in rows):
            rows = [np.stack(rows)]
        return [
            row.astype(np.int32, casting="same_kind") if row.size else row.astype(np.int32) for row in rows
        ]
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"generate was given {type(ids).__name__}: {error}.",
            expected="token ids.",
            fix="Tokenise first: model.generate(**tokenizer(text, return_tensors='np')).",
        ) from error
