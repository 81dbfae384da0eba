"""What a model can be saved as: an adapter, a merged folder, GGUF. The methods of LanguageModel that write."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.errors import AdapterError, ModelNotFoundError, OptionError, nearest
from jaxtune.export.adapter import save_adapter
from jaxtune.export.bnb_folder import save_bnb
from jaxtune.export.compressed_folder import SCHEMES, save_compressed
from jaxtune.export.gguf.calibration import save_imatrix
from jaxtune.export.gguf.folder import check_methods, save_gguf
from jaxtune.export.hf_folder import parse_size
from jaxtune.export.merge import Trained
from jaxtune.export.merged_4bit import save_merged_4bit
from jaxtune.export.merged_folder import save_merged_16bit
from jaxtune.export.original import Base, original_of, record, require_quantized
from jaxtune.export.weights import own_weights
from jaxtune.loading.hub import resolve
from jaxtune.loading.tokenizer import require_rows
from jaxtune.lora.config import EMBEDDING
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.options import ANY, mirrors
from jaxtune.quant import PackedArray

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
    "first_conversion": ANY,
    "save_method": (None, "merged_16bit"),
    "merge_is_disposable": ANY,
}


_MERGES: dict[str, Callable[..., None]] = {
    "merged_16bit": save_merged_16bit,
    "merged_4bit": save_merged_4bit,
    "merged_4bit_forced": save_merged_4bit,
    **{scheme: functools.partial(save_compressed, scheme=scheme) for scheme in SCHEMES},
    "fp8": functools.partial(save_compressed, scheme="fp8_dynamic"),
}
SAVE_METHODS = (*_MERGES, "lora")
"""Of save_pretrained_merged."""


class Exportable:
    """A model's methods that write. Its fields are `LanguageModel`'s."""

    causal_lm: CausalLM
    params: Params
    lora: Lora | None
    tokenizer: Any
    name_or_path: str
    revision: str | None
    full_finetuning: bool
    cache_dir: str | Path | None
    own_parts: frozenset[str]

    @mirrors({"safe_serialization": True, "push_to_hub": False})
    def save_pretrained(self, save_directory: str | Path, tokenizer: Any = None, verify: bool = True) -> None:
        """Writes the adapter as a PEFT folder. A model without one is written whole, as transformers would: packed
        weights as a bitsandbytes checkpoint, others as the original's.

        Args:
            save_directory: The folder.
            tokenizer: What is saved with it; None saves none.
            verify: Read the folder back, and compare it with what was to be written, before it bears its name.
        """
        if self.lora is None or self.causal_lm.lora_config is None:
            if any(map(_is_packed, jax.tree.leaves(self.params, is_leaf=_is_packed))):
                folder, saved = self.original_folder(), self._saved_tokenizer(tokenizer)
                base = Base(folder, self.name_or_path, self.revision)
                save_bnb(
                    save_directory,
                    folder,
                    self.causal_lm,
                    self.params,
                    tokenizer=saved,
                    record={} if self.own_parts else record(base),
                    verify=verify,
                )
            else:
                self.save_pretrained_merged(save_directory, tokenizer, verify=verify)
            return
        save_adapter(
            save_directory,
            self.lora,
            self.causal_lm.lora_config,
            self.causal_lm.module_names,
            base=self.name_or_path,
            revision=self.revision,
            tokenizer=self._saved_tokenizer(tokenizer),
            tables={name: np.asarray(self.params[name]["weight"]) for name in self.own_parts},
            verify=verify,
        )

    @mirrors(_MERGE_WITHOUT_EFFECT)
    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        max_shard_size: int | str = "5GB",
        token: str | None = None,
        original_model: str | Path | None = None,
        dequantize: bool = False,
        verify: bool = True,
    ) -> None:
        """Writes the original weights with the adapter merged in, as a Hugging Face folder. What a 4-bit model was
        trained on differs from its merge by NF4's error.

        Args:
            save_directory: The folder.
            tokenizer: What is saved with it; None saves none.
            save_method: "merged_16bit"; "merged_4bit", which quantises the merge as a bitsandbytes checkpoint (as
                "merged_4bit_forced" does); "fp8_dynamic" ("fp8"), "w8a16" or "w4a16", which quantise it as a
                compressed-tensors checkpoint, for vLLM; or "lora", which writes the adapter alone.
            max_shard_size: The most that one file of weights holds.
            token: The hub's, to fetch original weights that are gated.
            original_model: What a base that is quantised itself was made from, an id or a folder; None finds it.
            dequantize: Merge into the weights of such a base as they are.
            verify: Read the folder back, compare its bytes with what was written and its layers with the base's and the
                adapter beside it, before it bears its name.
        """
        if save_method == "lora":
            if self.full_finetuning:
                raise AdapterError(
                    "save_method='lora' of a model that was loaded with full_finetuning=True.",
                    expected="a model with an adapter: this one is trained whole.",
                    fix="Leave save_method out.",
                )
            self.save_pretrained(save_directory, tokenizer, verify=verify)
            return
        if save_method not in _MERGES:
            raise OptionError(
                f"save_method={save_method!r}.",
                expected=f"one of {', '.join(SAVE_METHODS)}.",
                fix=f"Leave save_method out.{nearest(str(save_method), SAVE_METHODS)}",
            )
        parse_size(max_shard_size)
        _MERGES[save_method](
            save_directory,
            self._trained(token, original_model, dequantize),
            tokenizer=self._saved_tokenizer(tokenizer),
            max_shard_size=max_shard_size,
            verify=verify,
        )

    @mirrors(_GGUF_WITHOUT_EFFECT)
    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] | None = "fast_quantized",
        imatrix_file: str | Path | None = None,
        max_shard_size: int | str | None = None,
        token: str | None = None,
        original_model: str | Path | None = None,
        dequantize: bool = False,
        verify: bool = True,
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
            max_shard_size: The most that one file holds, such as "20GB"; None is one file for each method, which is
                what Ollama reads.
            token: The hub's, to fetch original weights that are gated.
            original_model: As in save_pretrained_merged.
            dequantize: Likewise.
            verify: Read the files back, and compare them with what they were made of, before they bear their names.
        """
        check_methods(quantization_method, imatrix_file)
        trained = self._trained(token, original_model, dequantize)
        return save_gguf(
            save_directory,
            trained,
            tokenizer=self.tokenizer if tokenizer is None else tokenizer,
            name=trained.name,
            quantization_method=quantization_method,
            imatrix_file=imatrix_file,
            max_shard_size=max_shard_size,
            verify=verify,
        )

    def save_imatrix(
        self, file: str | Path, texts: str | Iterable[str], tokenizer: Any = None, context: int = 512
    ) -> None:
        """Measures how much each column of the weights matters, on text like that which the model will see, and writes
        it as llama.cpp's tools do: an `imatrix_file` of save_pretrained_gguf.

        Args:
            file: What is written, such as "imatrix.gguf".
            texts: The text; some tens of thousands of tokens do.
            tokenizer: Whose tokens the text is made of; None is the one loaded with the model.
            context: How many tokens the model sees at once.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        save_imatrix(file, self.causal_lm, self.params, self.lora, texts, tokenizer, context=context)

    def original_folder(self, token: str | None = None) -> Path:
        """The folder that the base was loaded from, where a merge starts."""
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

    def _trained(
        self,
        token: str | None = None,
        original_model: str | Path | None = None,
        dequantize: bool = False,
    ) -> Trained:
        if dequantize and original_model is not None:
            raise OptionError(
                f"original_model={str(original_model)!r} and dequantize=True.",
                expected="one of them: the merge starts from the original, or from the quantised weights.",
                fix="Leave one out.",
            )
        base = Base(self.original_folder(token), self.name_or_path, self.revision)
        if dequantize:
            require_quantized(base)
        else:
            fetch = functools.partial(resolve, token=token, cache_dir=self.cache_dir)
            base = original_of(base, fetch, original_model)
        config = self.causal_lm.config
        return Trained(
            base.folder,
            config,
            self.causal_lm.module_names,
            self.lora,
            self.causal_lm.lora_config,
            own_weights(config, self.params, self.own_parts),
            base.name,
            base.revision,
            dequantize,
        )

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


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedArray)
