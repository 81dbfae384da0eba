"""LanguageModel: a loaded model with the methods that users know (`generate`, `save_pretrained`, ...), and underneath
`params`, `lora` and the pure `apply`."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.errors import AdapterError, ModelNotFoundError, OptionError, nearest
from jaxtune.export.adapter import save_adapter
from jaxtune.export.bnb_folder import save_bnb
from jaxtune.export.gguf.folder import check_methods, save_gguf
from jaxtune.export.merged_4bit import save_merged_4bit
from jaxtune.export.merged_folder import parse_size, save_merged_16bit
from jaxtune.export.weights import Weight, own_weights
from jaxtune.inference.generate import ends, generate
from jaxtune.loading.hub import resolve
from jaxtune.loading.tokenizer import require_rows
from jaxtune.log import get_logger
from jaxtune.lora import tree as lora_tree
from jaxtune.lora.config import EMBEDDING, LoraConfig
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.options import ANY, mirrors
from jaxtune.quant import PackedArray

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
_MERGE_WITHOUT_EFFECT = {
    "push_to_hub": False,
    "safe_serialization": (True, None),
    "is_main_process": True,
    "state_dict": None,
    "save_function": ANY,
    "variant": None,
    "private": ANY,
    "tags": ANY,
    "save_peft_format": ANY,
    "temporary_location": ANY,
    "maximum_memory_usage": ANY,
}
_GGUF_WITHOUT_EFFECT = {
    **_MERGE_WITHOUT_EFFECT,
    "max_shard_size": ANY,
    "first_conversion": ANY,
    "save_method": (None, "merged_16bit"),
    "merge_is_disposable": ANY,
}


_MERGES = {
    "merged_16bit": save_merged_16bit,
    "merged_4bit": save_merged_4bit,
    "merged_4bit_forced": save_merged_4bit,
}


@dataclasses.dataclass(eq=False, repr=False)
class LanguageModel:
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
        """
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
            self.causal_lm,
            self.params,
            self.lora,
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

    @mirrors({"safe_serialization": True, "push_to_hub": False})
    def save_pretrained(self, save_directory: str | Path, tokenizer: Any = None) -> None:
        """Writes the adapter as a PEFT folder. A model without one is written whole, as transformers would: packed
        weights as a bitsandbytes checkpoint, others as the original's.

        Args:
            save_directory: The folder.
            tokenizer: What is saved with it; None saves none.
        """
        if self.lora is None or self.causal_lm.lora_config is None:
            if any(map(_is_packed, jax.tree.leaves(self.params, is_leaf=_is_packed))):
                folder, saved = self.original_folder(), self._saved_tokenizer(tokenizer)
                save_bnb(save_directory, folder, self.causal_lm, self.params, tokenizer=saved)
            else:
                self.save_pretrained_merged(save_directory, tokenizer)
            return
        save_adapter(
            save_directory,
            self.lora,
            self.causal_lm.lora_config,
            self.module_names,
            base=self.name_or_path,
            revision=self.revision,
            tokenizer=self._saved_tokenizer(tokenizer),
            tables={name: np.asarray(self.params[name]["weight"]) for name in self.own_parts},
        )

    @mirrors(_MERGE_WITHOUT_EFFECT)
    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        max_shard_size: int | str = "5GB",
        token: str | None = None,
    ) -> None:
        """Writes the original weights with the adapter merged in, as a Hugging Face folder. What a 4-bit model was
        trained on differs from its merge by NF4's error.

        Args:
            save_directory: The folder.
            tokenizer: What is saved with it; None saves none.
            save_method: "merged_16bit"; "merged_4bit", which quantises the merge as a bitsandbytes checkpoint (as
                "merged_4bit_forced" does); or "lora", which writes the adapter alone.
            max_shard_size: The most that one file of weights holds.
            token: The hub's, to fetch original weights that are gated.
        """
        if save_method == "lora":
            if self.full_finetuning:
                raise AdapterError(
                    "save_method='lora' of a model that was loaded with full_finetuning=True.",
                    expected="a model with an adapter: this one is trained whole.",
                    fix="Leave save_method out.",
                )
            self.save_pretrained(save_directory, tokenizer)
            return
        if save_method not in _MERGES:
            raise OptionError(
                f"save_method={save_method!r}.",
                expected=f"one of {', '.join(_MERGES)}, or lora.",
                fix=f"Leave save_method out.{nearest(str(save_method), (*_MERGES, 'lora'))}",
            )
        parse_size(max_shard_size)
        _MERGES[save_method](
            save_directory,
            self.original_folder(token),
            *self._adapter,
            own=self._own_weights,
            config=self.causal_lm.config,
            tokenizer=self._saved_tokenizer(tokenizer),
            max_shard_size=max_shard_size,
        )

    @mirrors(_GGUF_WITHOUT_EFFECT)
    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] | None = "fast_quantized",
        imatrix_file: str | Path | None = None,
        token: str | None = None,
    ) -> list[Path]:
        """Writes `<save_directory>_gguf/`: the merged model as GGUF, a file for each method that was asked for, and a
        Modelfile for Ollama.

        Args:
            save_directory: The folder's name, without its ending.
            tokenizer: Whose vocabulary and template the file has; None is the one loaded with the model.
            quantization_method: One of llama.cpp's ("q4_k_m", "q8_0", "f16", ...: docs/export.md), or several;
                "fast_quantized" is q8_0.
            imatrix_file: What llama-imatrix measured with the model; methods of few bits need it, and all others lose
                less with it.
            token: The hub's, to fetch original weights that are gated.
        """
        check_methods(quantization_method, imatrix_file)
        return save_gguf(
            save_directory,
            self.original_folder(token),
            self.causal_lm.config,
            *self._adapter,
            tokenizer=self.tokenizer if tokenizer is None else tokenizer,
            name=self.name_or_path,
            quantization_method=quantization_method,
            own=self._own_weights,
            imatrix_file=imatrix_file,
        )

    def original_folder(self, token: str | None = None) -> Path:
        """The folder of the original weights, which a merge starts from."""
        try:
            return resolve(self.name_or_path, revision=self.revision, token=token, cache_dir=self.cache_dir)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                f"A merge starts from the original 16-bit weights, and {self.name_or_path!r} cannot be reached. "
                f"{error.found}",
                expected=error.expected,
                fix=f"{error.fix} Or set model.name_or_path to where it is now; save_pretrained, which writes the "
                "adapter alone, does not need it.",
            ) from error

    @property
    def _adapter(self) -> tuple[Lora | None, LoraConfig | None, Callable[[names.Path], list[str]]]:
        return self.lora, self.causal_lm.lora_config, self.module_names

    @property
    def _own_weights(self) -> dict[str, Weight]:
        return own_weights(self.causal_lm.config, self.params, self.own_parts)

    def _saved_tokenizer(self, given: Any) -> Any:
        """An embedding of its own may have new tokens, which the original's tokenizer lacks."""
        if given is None:
            return self.tokenizer if EMBEDDING in self.own_parts else None
        if not hasattr(given, "save_pretrained"):
            raise OptionError(
                f"The tokenizer that is to be saved is {given!r}.",
                expected="the tokenizer that from_pretrained returned.",
                fix="Pass that, or leave it out.",
            )
        require_rows(given, self.causal_lm.config.vocab_size)
        return given

    def module_names(self, path: names.Path) -> list[str]:
        """The Hugging Face name of each repeat of a stacked module."""
        return self.causal_lm.module_names(path)

    def print_trainable_parameters(self) -> None:
        base = sum(leaf.size for leaf in jax.tree.leaves(self.causal_lm.skeleton))
        config, trained, total = self.causal_lm.lora_config, 0, base
        if self.full_finetuning:
            trained = base
        elif self.lora is not None and config is not None:
            trained = lora_tree.count(self.lora, config, self.module_names)
            adapted = lora_tree.layers(self.lora, config, self.module_names)
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

    def _is_real(self, row: np.ndarray) -> np.ndarray:
        """The mask of a prompt that came without one: its padding is not part of it, unless that ends texts as well."""
        pad, eos = (getattr(self.tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos"))
        if pad is None or pad == eos or (row == pad).all():
            return np.ones_like(row)
        return (row != pad).astype(row.dtype)

    def _pad_id(self, stops: Sequence[int]) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if pad is not None else next(iter(stops), 0)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedArray)


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
