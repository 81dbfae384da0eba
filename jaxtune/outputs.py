"""What a model can become: an adapter, a merged folder, GGUF. Each is an `Output`, which is yet to be written."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
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
from jaxtune.export.gguf.folder import check_methods, save_gguf
from jaxtune.export.hf_folder import EARLIER_WEIGHTS, parse_size
from jaxtune.export.hub import Output
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
from jaxtune.quant import PackedArray
from jaxtune.reporting.last_run import LastRun

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


class Saved:
    """A model, as far as it can be saved. The fields are `LanguageModel`'s."""

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

    def require_adapter(self) -> tuple[Lora, LoraConfig]:
        if self.lora is None or self.causal_lm.lora_config is None:
            raise AdapterError(
                "The model has no adapter.",
                expected="a model that went through FastLanguageModel.get_peft_model, or that was loaded with one.",
                fix="Save it with save_pretrained_merged or save_pretrained_gguf.",
            )
        return self.lora, self.causal_lm.lora_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """What every kind of folder is asked for alike, and the kinds. Options are those of `Exportable`'s methods."""

    model: Saved
    tokenizer: Any = None
    tags: Names = None
    datasets: Names = None
    verify: bool = True
    token: str | None = None
    original_model: str | Path | None = None
    dequantize: bool = False

    def adapter(self) -> Output:
        """The adapter as a PEFT folder. A model without one is written whole: packed weights as they are, others
        merged with what was trained."""
        lora, config = self.model.lora, self.model.causal_lm.lora_config
        if lora is None or config is None:
            if any(map(_is_packed, jax.tree.leaves(self.model.params, is_leaf=_is_packed))):
                return self._packed()
            return self.merged()
        saved_tokenizer = self._saved_tokenizer()

        def write(folder: Path, name: str) -> list[Path]:
            save_adapter(
                folder,
                lora,
                config,
                self.model.causal_lm.module_names,
                base=self.model.name_or_path,
                revision=self.model.revision,
                tokenizer=saved_tokenizer,
                tables={part: np.asarray(self.model.params[part]["weight"]) for part in self.model.own_parts},
                verify=self.verify,
            )
            self._card(card.ADAPTER, name).write(folder)
            return [folder / peft_format.WEIGHTS_FILE]

        return Output(write, beside=CONFIG_FILE)

    def merged(self, save_method: str = "merged_16bit", max_shard_size: int | str = "5GB") -> Output:
        if save_method == "lora":
            if self.model.full_finetuning:
                raise AdapterError(
                    "save_method='lora' of a model that was loaded with full_finetuning=True.",
                    expected="a model with an adapter: this one is trained whole.",
                    fix="Leave save_method out.",
                )
            self.model.require_adapter()
            return self.adapter()
        if save_method not in _MERGES:
            raise OptionError(
                f"save_method={save_method!r}.",
                expected=f"one of {', '.join(SAVE_METHODS)}.",
                fix=f"Leave save_method out.{nearest(str(save_method), SAVE_METHODS)}",
            )
        parse_size(max_shard_size)
        trained, saved_tokenizer = self._trained(), self._saved_tokenizer()

        def write(folder: Path, name: str) -> list[Path]:
            card.refuse_foreign_model(folder)
            _MERGES[save_method](
                folder, trained, tokenizer=saved_tokenizer, max_shard_size=max_shard_size, verify=self.verify
            )
            made = self._card(card.MODEL, name)
            needs = NEEDS.get(save_method)
            made._replace(is_dequantized=trained.dequantize, needs=needs).write(folder)
            return [folder / CONFIG_FILE]

        return Output(write, beside=peft_format.CONFIG_FILE, replaces=EARLIER_WEIGHTS)

    def gguf(
        self,
        quantization_method: str | Sequence[str] | None,
        imatrix_file: str | Path | None = None,
        save_method: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> Output:
        if save_method == "lora":
            return self.gguf_adapter(quantization_method)
        if save_method not in (None, "merged_16bit"):
            raise OptionError(
                f"save_method={save_method!r} of a GGUF.",
                expected="lora, or merged_16bit, of which quantization_method says the rest.",
                fix="Leave save_method out.",
            )
        check_methods(quantization_method, imatrix_file)
        trained = self._trained()

        def write(folder: Path, name: str) -> list[Path]:
            card.refuse_foreign_model(Path(f"{folder}_gguf"))
            files = save_gguf(
                folder,
                trained,
                tokenizer=self._any_tokenizer(),
                name=trained.name,
                quantization_method=quantization_method,
                imatrix_file=imatrix_file,
                max_shard_size=max_shard_size,
                verify=self.verify,
            )
            made = self._card(card.GGUF, name, files)
            made._replace(is_dequantized=trained.dequantize).write(files[0].parent)
            return files

        return Output(write)

    def gguf_adapter(self, quantization_method: Any) -> Output:
        lora, config = self.model.require_adapter()
        if self.model.own_parts:
            raise AdapterError(
                f"The model's {' and '.join(sorted(self.model.own_parts))} are not the original's.",
                expected="a base as it was published, without tokens added: a GGUF adapter has A and B alone.",
                fix="Write the merged model instead, with save_pretrained_gguf.",
            )

        def write(folder: Path, name: str) -> list[Path]:
            file = save_adapter_gguf(
                folder,
                lora,
                config,
                self.model.causal_lm.module_names,
                self.model.causal_lm.config,
                tokenizer=self._any_tokenizer(),
                name=self.model.name_or_path,
                quantization_method=quantization_method,
                verify=self.verify,
            )
            if not (folder / peft_format.CONFIG_FILE).is_file():  # whose card says more
                self._card(card.GGUF_ADAPTER, name, [file]).write(folder)
            return [file]

        return Output(write)

    def _packed(self) -> Output:
        base, saved_tokenizer = self.model.original_folder(), self._saved_tokenizer()
        of = Base(base, self.model.name_or_path, self.model.revision)
        made_from = {} if self.model.own_parts else record(of)

        def write(folder: Path, name: str) -> list[Path]:
            card.refuse_foreign_model(folder)
            save_bnb(
                folder,
                base,
                self.model.causal_lm,
                self.model.params,
                tokenizer=saved_tokenizer,
                record=made_from,
                verify=self.verify,
            )
            self._card(card.MODEL, name)._replace(needs="bitsandbytes").write(folder)
            return [folder / CONFIG_FILE]

        return Output(write, beside=peft_format.CONFIG_FILE, replaces=EARLIER_WEIGHTS)

    def _trained(self) -> Trained:
        """What was trained, on the weights in 16 bits that a merge starts from."""
        if self.dequantize and self.original_model is not None:
            raise OptionError(
                f"original_model={str(self.original_model)!r} and dequantize=True.",
                expected="one of them: the merge starts from the original, or from the quantised weights.",
                fix="Leave one out.",
            )
        model = self.model
        base = Base(model.original_folder(self.token), model.name_or_path, model.revision)
        if self.dequantize:
            require_quantized(base)
        else:
            fetch = functools.partial(resolve, token=self.token, cache_dir=model.cache_dir)
            base = original_of(base, fetch, self.original_model)
        config = model.causal_lm.config
        return Trained(
            base.folder,
            config,
            model.causal_lm.module_names,
            model.lora,
            model.causal_lm.lora_config,
            own_weights(config, model.params, model.own_parts),
            base.name,
            base.revision,
            self.dequantize,
        )

    def _card(self, form: card.Form, name: str, files: Sequence[Path] = ()) -> Card:
        model = self.model
        try:
            at_hand = resolve(
                model.name_or_path, revision=model.revision, cache_dir=model.cache_dir, local_files_only=True
            )
        except ModelNotFoundError:
            at_hand = None
        return Card(
            form,
            name,
            base=model.name_or_path,
            base_folder=at_hand,
            lora=None if model.lora is None else model.causal_lm.lora_config,
            run=model.last_run,
            is_trained=model.lora is not None or bool(model.own_parts),
            files=[file.name for file in files],
            tags=_listed(self.tags),
            datasets=_listed(self.datasets),
        )

    def _any_tokenizer(self) -> Any:
        """A GGUF file holds one in any case."""
        return self.model.tokenizer if self.tokenizer is None else self.tokenizer

    def _saved_tokenizer(self) -> Any:
        """An embedding of its own may have new tokens, which the original's tokenizer lacks."""
        given = self.tokenizer
        if given is None:
            return self.model.tokenizer if EMBEDDING in self.model.own_parts else None
        if not hasattr(given, "save_pretrained"):
            raise OptionError(
                f"The tokenizer that is to be saved is {given!r}.",
                expected="the tokenizer that from_pretrained returned.",
                fix="Pass that, or leave it out.",
            )
        require_rows(given, self.model.causal_lm.config.vocab_size)
        return given


def _listed(names: Names) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or ()


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedArray)
