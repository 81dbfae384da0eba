"""What a model can be saved as: an adapter, a merged folder, GGUF. The methods of LanguageModel that write."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.errors import AdapterError, ModelNotFoundError, OptionError, nearest
from jaxtune.export import card
from jaxtune.export.adapter import save_adapter
from jaxtune.export.bnb_folder import save_bnb
from jaxtune.export.card import Card
from jaxtune.export.compressed_folder import SCHEMES, save_compressed
from jaxtune.export.gguf.adapter import save_adapter_gguf
from jaxtune.export.gguf.calibration import save_imatrix
from jaxtune.export.gguf.folder import check_methods, save_gguf
from jaxtune.export.hf_folder import EARLIER_WEIGHTS, parse_size
from jaxtune.export.hub import Output, save
from jaxtune.export.merge import Trained
from jaxtune.export.merged_4bit import save_merged_4bit
from jaxtune.export.merged_folder import save_merged_16bit
from jaxtune.export.original import Base, original_of, record, require_quantized
from jaxtune.export.weights import own_weights
from jaxtune.loading.config import CONFIG_FILE
from jaxtune.loading.hub import resolve
from jaxtune.loading.tokenizer import require_rows
from jaxtune.lora import peft_format
from jaxtune.lora.config import EMBEDDING, LoraConfig
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.options import ANY, mirrors
from jaxtune.quant import PackedArray
from jaxtune.reporting.last_run import LastRun

ADAPTER_WITHOUT_EFFECT = {"safe_serialization": (True, None), "is_main_process": True}
MERGE_WITHOUT_EFFECT = {
    **ADAPTER_WITHOUT_EFFECT,
    "state_dict": None,
    "save_function": ANY,
    "variant": None,
    "save_peft_format": ANY,
    "temporary_location": ANY,
    "maximum_memory_usage": ANY,
}
GGUF_WITHOUT_EFFECT = {
    **MERGE_WITHOUT_EFFECT,
    "max_shard_size": ANY,
    "first_conversion": ANY,
    "merge_is_disposable": ANY,
}


_MERGES: dict[str, Callable[..., None]] = {
    "merged_16bit": save_merged_16bit,
    "merged_4bit": save_merged_4bit,
    "merged_4bit_forced": save_merged_4bit,
    **{scheme: functools.partial(save_compressed, scheme=scheme) for scheme in SCHEMES},
    "fp8": functools.partial(save_compressed, scheme="fp8_dynamic"),
}
NEEDS = {
    **dict.fromkeys(("merged_4bit", "merged_4bit_forced"), "bitsandbytes"),
    **dict.fromkeys((*SCHEMES, "fp8"), "compressed-tensors"),
}
"""What transformers asks for, to load what some of these write."""
SAVE_METHODS = (*_MERGES, "lora")
"""Of save_pretrained_merged."""
Names = Sequence[str] | str | None


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
    last_run: LastRun | None

    @mirrors(ADAPTER_WITHOUT_EFFECT)
    def save_pretrained(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        tags: Names = None,
        datasets: Names = None,
        verify: bool = True,
    ) -> None:
        """Writes the adapter as a PEFT folder. A model without one is written whole, as transformers would: packed
        weights as a bitsandbytes checkpoint, others as the original's.

        Args:
            save_directory: The folder.
            tokenizer: What is saved with it; None saves none.
            push_to_hub: Send it to the hub as well.
            repo_id: There; None is the folder's name, or the folder itself if it could be an id.
            token: The hub's.
            private: Whether a repository that is made is private.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            verify: Read the folder back, and compare it with what was to be written, before it bears its name.
        """
        output = self._as_it_is(tokenizer, tags, datasets, verify=verify)
        save(output, save_directory, push_to_hub, repo_id, token, private)

    @mirrors(MERGE_WITHOUT_EFFECT)
    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        max_shard_size: int | str = "5GB",
        token: str | None = None,
        original_model: str | Path | None = None,
        dequantize: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        tags: Names = None,
        datasets: Names = None,
        verify: bool = True,
    ) -> None:
        """Writes the original weights with the adapter merged in, as a Hugging Face folder. What a 4-bit model was
        trained on differs from its merge by NF4's error.

        Args:
            save_directory: The folder.
            tokenizer: What is saved with it; None copies the original's files.
            save_method: "merged_16bit"; "merged_4bit", which quantises the merge as a bitsandbytes checkpoint (as
                "merged_4bit_forced" does); "fp8_dynamic" ("fp8"), "w8a16" or "w4a16", which quantise it as a
                compressed-tensors checkpoint, for vLLM; or "lora", which writes the adapter alone.
            max_shard_size: The most that one file of weights holds.
            token: The hub's, to push, and to fetch original weights that are gated.
            original_model: What a base that is quantised itself was made from, an id or a folder; None finds it.
            dequantize: Merge into the weights of such a base as they are.
            push_to_hub: Send it to the hub as well.
            repo_id: There; None is the folder's name, or the folder itself if it could be an id.
            private: Whether a repository that is made is private.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            verify: Read the folder back, compare its bytes with what was written and its layers with the base's and the
                adapter beside it, before it bears its name.
        """
        output = self._merged(
            tokenizer,
            save_method,
            max_shard_size,
            tags,
            datasets,
            token,
            original_model,
            dequantize,
            verify=verify,
        )
        save(output, save_directory, push_to_hub, repo_id, token, private)

    @mirrors(GGUF_WITHOUT_EFFECT)
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
        save_method: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        tags: Names = None,
        datasets: Names = None,
        verify: bool = True,
    ) -> list[Path]:
        """Writes `<save_directory>_gguf/`: the merged model as GGUF, a file for each method that was asked for, and a
        Modelfile for Ollama.

        Args:
            save_directory: The folder's name, without its ending.
            tokenizer: Whose vocabulary and template the file has; None is the one loaded with the model.
            quantization_method: One of llama.cpp's ("q4_k_m", "q8_0", "f16", ...: docs/export.md), or several;
                "fast_quantized" is q8_0.
            imatrix_file: What save_imatrix or llama-imatrix measured with the model; methods of few bits need it, and
                all others lose less with it.
            max_shard_size: The most that one file holds, such as "20GB"; None is one file for each method, which is
                what Ollama reads.
            token: The hub's, to push, and to fetch original weights that are gated.
            original_model: As in save_pretrained_merged.
            dequantize: Likewise.
            save_method: "lora" writes the adapter alone, as save_pretrained_ggml does; None, or "merged_16bit", the
                merged model.
            push_to_hub: Send it to the hub as well.
            repo_id: There; None is the folder's name, or the folder itself if it could be an id.
            private: Whether a repository that is made is private.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            verify: Read the files back, and compare them with what they were made of, before they bear their names.
        """
        output = self._gguf(
            tokenizer,
            quantization_method,
            imatrix_file,
            save_method,
            tags,
            datasets,
            token,
            original_model,
            dequantize,
            max_shard_size=max_shard_size,
            verify=verify,
        )
        return save(output, save_directory, push_to_hub, repo_id, token, private)

    @mirrors(GGUF_WITHOUT_EFFECT)
    def save_pretrained_ggml(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str = "f16",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        tags: Names = None,
        datasets: Names = None,
        verify: bool = True,
    ) -> list[Path]:
        """Writes the adapter alone as GGUF, which llama.cpp adds to a GGUF of the base (`--lora`).

        Args:
            save_directory: The folder.
            tokenizer: Whose template the Modelfile has; None is the one loaded with the model.
            quantization_method: "f32", "f16", "bf16", "q8_0", or "auto", which is f16.
            push_to_hub: Send it to the hub as well.
            repo_id: There; None is the folder's name, or the folder itself if it could be an id.
            token: The hub's.
            private: Whether a repository that is made is private.
            tags: More of them, for the model card.
            datasets: What it was trained on, by their ids on the hub, for the model card.
            verify: Read the file back, and compare it with the adapter, before it bears its name.
        """
        output = self._gguf_adapter(tokenizer, quantization_method, tags, datasets, verify=verify)
        return save(output, save_directory, push_to_hub, repo_id, token, private)

    def save_lora(self, save_directory: str | Path, tokenizer: Any = None) -> None:
        """Writes the adapter as a PEFT folder, for `load_lora` and everyone else."""
        self._adapter()
        self.save_pretrained(save_directory, tokenizer)

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

    def _as_it_is(self, tokenizer: Any, tags: Names, datasets: Names, *, verify: bool = True) -> Output:
        lora, config = self.lora, self.causal_lm.lora_config
        if lora is None or config is None:
            if any(map(_is_packed, jax.tree.leaves(self.params, is_leaf=_is_packed))):
                return self._packed(tokenizer, tags, datasets, verify)
            return self._merged(tokenizer, "merged_16bit", "5GB", tags, datasets, verify=verify)
        saved_tokenizer = self._saved_tokenizer(tokenizer)

        def write(folder: Path, name: str) -> list[Path]:
            save_adapter(
                folder,
                lora,
                config,
                self.causal_lm.module_names,
                base=self.name_or_path,
                revision=self.revision,
                tokenizer=saved_tokenizer,
                tables={name: np.asarray(self.params[name]["weight"]) for name in self.own_parts},
                verify=verify,
            )
            self._card(card.ADAPTER, name, tags, datasets).write(folder)
            return [folder / peft_format.WEIGHTS_FILE]

        return Output(write, beside=CONFIG_FILE)

    def _packed(self, tokenizer: Any, tags: Names, datasets: Names, verify: bool) -> Output:
        base, saved_tokenizer = self.original_folder(), self._saved_tokenizer(tokenizer)
        made_from = {} if self.own_parts else record(Base(base, self.name_or_path, self.revision))

        def write(folder: Path, name: str) -> list[Path]:
            card.refuse_foreign_model(folder)
            save_bnb(
                folder,
                base,
                self.causal_lm,
                self.params,
                tokenizer=saved_tokenizer,
                record=made_from,
                verify=verify,
            )
            self._card(card.MODEL, name, tags, datasets)._replace(needs="bitsandbytes").write(folder)
            return [folder / CONFIG_FILE]

        return Output(write, beside=peft_format.CONFIG_FILE, replaces=EARLIER_WEIGHTS)

    def _merged(
        self,
        tokenizer: Any,
        save_method: str,
        max_shard_size: int | str,
        tags: Names,
        datasets: Names,
        *original: Any,
        verify: bool = True,
    ) -> Output:
        """`original` is what `_trained` is asked for."""
        if save_method == "lora":
            if self.full_finetuning:
                raise AdapterError(
                    "save_method='lora' of a model that was loaded with full_finetuning=True.",
                    expected="a model with an adapter: this one is trained whole.",
                    fix="Leave save_method out.",
                )
            self._adapter()
            return self._as_it_is(tokenizer, tags, datasets, verify=verify)
        if save_method not in _MERGES:
            raise OptionError(
                f"save_method={save_method!r}.",
                expected=f"one of {', '.join(SAVE_METHODS)}.",
                fix=f"Leave save_method out.{nearest(str(save_method), SAVE_METHODS)}",
            )
        parse_size(max_shard_size)
        trained, saved_tokenizer = self._trained(*original), self._saved_tokenizer(tokenizer)

        def write(folder: Path, name: str) -> list[Path]:
            card.refuse_foreign_model(folder)
            _MERGES[save_method](
                folder, trained, tokenizer=saved_tokenizer, max_shard_size=max_shard_size, verify=verify
            )
            made = self._card(card.MODEL, name, tags, datasets)
            needs = NEEDS.get(save_method)
            made._replace(is_dequantized=trained.dequantize, needs=needs).write(folder)
            return [folder / CONFIG_FILE]

        return Output(write, beside=peft_format.CONFIG_FILE, replaces=EARLIER_WEIGHTS)

    def _gguf(
        self,
        tokenizer: Any,
        quantization_method: str | Sequence[str] | None,
        imatrix_file: str | Path | None,
        save_method: str | None,
        tags: Names,
        datasets: Names,
        *original: Any,
        max_shard_size: int | str | None = None,
        verify: bool = True,
    ) -> Output:
        if save_method == "lora":
            return self._gguf_adapter(tokenizer, quantization_method, tags, datasets, verify=verify)
        if save_method not in (None, "merged_16bit"):
            raise OptionError(
                f"save_method={save_method!r} of a GGUF.",
                expected="lora, or merged_16bit, of which quantization_method says the rest.",
                fix="Leave save_method out.",
            )
        check_methods(quantization_method, imatrix_file)
        trained = self._trained(*original)

        def write(folder: Path, name: str) -> list[Path]:
            card.refuse_foreign_model(Path(f"{folder}_gguf"))
            files = save_gguf(
                folder,
                trained,
                tokenizer=self.tokenizer if tokenizer is None else tokenizer,
                name=trained.name,
                quantization_method=quantization_method,
                imatrix_file=imatrix_file,
                max_shard_size=max_shard_size,
                verify=verify,
            )
            made = self._card(card.GGUF, name, tags, datasets, files)
            made._replace(is_dequantized=trained.dequantize).write(files[0].parent)
            return files

        return Output(write)

    def _gguf_adapter(
        self, tokenizer: Any, quantization_method: Any, tags: Names, datasets: Names, *, verify: bool = True
    ) -> Output:
        lora, config = self._adapter()
        if self.own_parts:
            raise AdapterError(
                f"The model's {' and '.join(sorted(self.own_parts))} are not the original's.",
                expected="a base as it was published, without tokens added: a GGUF adapter has A and B alone.",
                fix="Write the merged model instead, with save_pretrained_gguf.",
            )

        def write(folder: Path, name: str) -> list[Path]:
            file = save_adapter_gguf(
                folder,
                lora,
                config,
                self.causal_lm.module_names,
                self.causal_lm.config,
                tokenizer=self.tokenizer if tokenizer is None else tokenizer,
                name=self.name_or_path,
                quantization_method=quantization_method,
                verify=verify,
            )
            if not (folder / peft_format.CONFIG_FILE).is_file():  # whose card says more
                self._card(card.GGUF_ADAPTER, name, tags, datasets, [file]).write(folder)
            return [file]

        return Output(write)

    def _adapter(self) -> tuple[Lora, LoraConfig]:
        if self.lora is None or self.causal_lm.lora_config is None:
            raise AdapterError(
                "The model has no adapter.",
                expected="a model that went through FastLanguageModel.get_peft_model, or that was loaded with one.",
                fix="Save it with save_pretrained_merged or save_pretrained_gguf.",
            )
        return self.lora, self.causal_lm.lora_config

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

    def _card(
        self, form: card.Form, name: str, tags: Names, datasets: Names, files: Sequence[Path] = ()
    ) -> Card:
        try:
            at_hand = resolve(
                self.name_or_path, revision=self.revision, cache_dir=self.cache_dir, local_files_only=True
            )
        except ModelNotFoundError:
            at_hand = None
        return Card(
            form,
            name,
            base=self.name_or_path,
            base_folder=at_hand,
            lora=None if self.lora is None else self.causal_lm.lora_config,
            run=self.last_run,
            is_trained=self.lora is not None or bool(self.own_parts),
            files=[file.name for file in files],
            tags=_listed(tags),
            datasets=_listed(datasets),
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


def _listed(names: Names) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or ()


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedArray)
