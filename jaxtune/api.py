"""FastLanguageModel: Unsloth's entry points, `from_pretrained` and `get_peft_model`, which return a LanguageModel."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.compilation import enable_cache
from jaxtune.device_memory import beside
from jaxtune.errors import AdapterError, OptionError
from jaxtune.export.card import read_run
from jaxtune.inference.generate import ends as ends_with
from jaxtune.language_model import LanguageModel
from jaxtune.loading import new_tokens as new_token_rows
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.loading.describe import describe
from jaxtune.loading.dtypes import dtypes
from jaxtune.loading.hub import resolve
from jaxtune.loading.load import load_params
from jaxtune.loading.offloading import offloads_embedding
from jaxtune.loading.offloading import require_known as require_known_offloading
from jaxtune.loading.precision import choose_precision
from jaxtune.log import get_logger, show
from jaxtune.lora import init as lora_init
from jaxtune.lora import tree as lora_tree
from jaxtune.lora.config import ALL_LINEAR, LOFTQ, PISSA, PROJECTIONS, WHOLE_MODULES, LoraConfig
from jaxtune.lora.tables import unlike
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.options import ANY, mirrors
from jaxtune.training.remat import level

log = get_logger(__name__)

FUSED_PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""What PROJECTIONS are called where they are fused (Phi-3)."""
_LOAD_WITHOUT_EFFECT = {
    "device_map": ANY,
    "fix_tokenizer": ANY,
    "trust_remote_code": ANY,
    "use_exact_model_name": ANY,
    "attn_implementation": ANY,
    "gpu_memory_utilization": ANY,
    "max_lora_rank": ANY,
    "unsloth_tiled_mlp": ANY,
    "float8_kv_cache": False,
    "qat_scheme": None,
    "random_state": ANY,
    "disable_log_stats": ANY,
    "fast_inference": False,
    "rope_scaling": None,
    "resize_model_vocab": None,
}
_LORA_WITHOUT_EFFECT = {
    "max_seq_length": ANY,
    "task_type": ANY,
    "target_parameters": None,
    "offload_layers": None,
    "checkpoint_skip_layers": (0, None),
    "qat_scheme": None,
    "temporary_location": ANY,
}


class FastLanguageModel:
    """Unsloth's entry points. Nothing is patched; both return values, and leave what they were given as it was."""

    @staticmethod
    @mirrors(_LOAD_WITHOUT_EFFECT, aliases={"torch_dtype": "dtype"})
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = None,
        dtype: Any = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        load_in_fp8: bool | str = False,
        quantization_config: Any = None,
        full_finetuning: bool = False,
        float32_mixed_precision: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        offload_embedding: bool | str = "auto",
    ) -> tuple[LanguageModel, Any]:
        """(model, tokenizer) from a hub id, a folder, or a PEFT adapter's id or folder (its base is found and loaded).

        Weights are packed in NF4 with double quantisation unless one other precision is asked for, by one of
        `load_in_8bit`, `load_in_fp8`, `load_in_16bit`, `load_in_4bit=False` and `quantization_config`. A bitsandbytes
        checkpoint stays as it is.

        Args:
            model_name: The hub id, or the folder.
            max_seq_length: The longest sequence. None is 2048, or what the model was trained for if that is less;
                beyond that, the rotary embedding of a model without scaling is stretched.
            dtype: What is computed in, and what unpacked weights are kept in. None is bfloat16 on a GPU, float32 on a
                CPU.
            load_in_4bit: False leaves the weights as they are, in `dtype`; True says what None does, and that no other
                precision is meant.
            load_in_8bit: Pack them as int8.
            load_in_16bit: Leave them as they are, in `dtype`.
            load_in_fp8: Pack them as float8: True with a scale a row, "block" with one for 128 x 128.
            quantization_config: transformers' BitsAndBytesConfig, or a dict of its names: for plain NF4, and FP4.
            full_finetuning: For training every weight instead of an adapter. They are kept in `dtype`, in bfloat16
                rounded by chance as they are trained.
            float32_mixed_precision: With full_finetuning, keep them in float32, and compute in `dtype`.
            token: The hub's, for models that are gated; None is huggingface_hub's own.
            revision: A branch, tag or commit of the hub's model.
            cache_dir: Where the hub's files are kept; None is where huggingface_hub keeps them.
            local_files_only: Take the hub's files from there, and ask nobody.
            use_gradient_checkpointing: What a training step computes again: True, False, a level of training.remat, or
                "unsloth", the fastest level that fits.
            offload_embedding: Leave the table of an embedding that is no head as well in the host's memory, from where
                the device reads the rows that it needs; "auto" does where it would take a twentieth of the device's.
        """
        precision = choose_precision(
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            load_in_16bit=load_in_16bit,
            load_in_fp8=load_in_fp8,
            quantization_config=quantization_config,
            full_finetuning=full_finetuning,
        )
        kept_dtype, computed_dtype = dtypes(
            dtype, full_finetuning=full_finetuning, float32_mixed_precision=float32_mixed_precision
        )
        show()
        enable_cache()
        level(use_gradient_checkpointing)
        require_known_offloading(offload_embedding)
        if max_seq_length is not None and (type(max_seq_length) is not int or max_seq_length < 2):
            raise OptionError(
                f"max_seq_length={max_seq_length!r}.",
                expected="a whole number of at least 2.",
                fix="Choose, for example, 2048.",
            )
        find = functools.partial(resolve, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        described = describe(
            model_name,
            find,
            revision=revision,
            max_seq_length=max_seq_length,
            compute_dtype=computed_dtype,
            full_finetuning=full_finetuning,
        )
        base, causal_lm = described.base, described.model
        with Checkpoint(described.folder) as checkpoint:
            params = load_params(
                base,
                checkpoint,
                dtype=kept_dtype,
                precision=precision,
                offload_embedding=offloads_embedding(offload_embedding, base, kept_dtype, full_finetuning),
            )
        tables = unlike(described.tables, params)
        params |= {
            name: {"weight": beside(jnp.asarray(table, kept_dtype), params[name]["weight"])}
            for name, table in tables.items()
        }
        lora = None
        if described.lora is not None:
            lora = jax.tree.map(jnp.asarray, described.lora)
            params = base_of(causal_lm, params)
        model = LanguageModel(
            causal_lm,
            params,
            lora,
            described.tokenizer,
            name_or_path=described.name,
            revision=described.revision,
            max_seq_length=described.max_seq_length,
            gradient_checkpointing=use_gradient_checkpointing,
            stop_ids=ends_with(described.ends, described.tokenizer),
            full_finetuning=full_finetuning,
            own_parts=frozenset(params if full_finetuning else tables),
            cache_dir=cache_dir,
            last_run=read_run(described.own_folder),
        )
        return model, described.tokenizer

    @staticmethod
    @mirrors(_LORA_WITHOUT_EFFECT)
    def get_peft_model(
        model: LanguageModel,
        r: int = 16,
        target_modules: Sequence[str] | str | None = PROJECTIONS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: Sequence[int] | int | None = None,
        layers_pattern: Sequence[str] | str | None = None,
        use_gradient_checkpointing: bool | str | None = None,
        random_state: int | None = 3407,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, int] | None = None,
        finetune_last_n_layers: int | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        exclude_modules: Sequence[str] | str | None = None,
        use_dora: bool = False,
        ensure_weight_tying: bool = False,
    ) -> LanguageModel:
        """The same base with a fresh adapter, which changes nothing until it is trained. Options are PEFT's, and
        `LoraConfig` documents those that are not here.

        As in Unsloth, `embed_tokens` and `lm_head` among a list of `target_modules` are trained whole. As in PEFT, a
        regular expression that matches those two gives them low-rank adapters.

        Args:
            model: As from_pretrained returns it.
            use_gradient_checkpointing: As in from_pretrained; None leaves what was said there.
            random_state: The seed of the adapter; None is 3407.
            loftq_config: PEFT's LoftQConfig, or a dict: 4 bits and one iteration, the only ones there are.
            finetune_last_n_layers: Leave the layers before the last n alone.
        """
        if random_state is not None and type(random_state) is not int:
            raise OptionError(
                f"random_state={random_state!r}.",
                expected="a whole number.",
                fix="Choose, for example, 3407.",
            )
        if not isinstance(model, LanguageModel):
            raise OptionError(
                f"get_peft_model was given a {type(model).__name__}.",
                expected="a LanguageModel.",
                fix="from_pretrained returns two things: model, tokenizer = FastLanguageModel.from_pretrained(...).",
            )
        if model.full_finetuning:
            log.info(
                "The model was loaded with full_finetuning=True: every weight is trained, without an adapter."
            )
            return model
        target_modules = _names(PROJECTIONS if target_modules is None else target_modules)
        _check_loftq(loftq_config)
        if finetune_last_n_layers is not None:
            layers_to_transform = _last_layers(model, finetune_last_n_layers, layers_to_transform)
        if target_modules == ALL_LINEAR and layers_to_transform is not None:
            target_modules = [path[-1] for path, _ in lora_tree.linears(model.causal_lm.skeleton)]
        if isinstance(target_modules, list | tuple | set):
            named = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save or ()
            modules_to_save = [*named, *(name for name in target_modules if name in WHOLE_MODULES)]
            target_modules = [name for name in target_modules if name not in WHOLE_MODULES]
            if model.causal_lm.config.fused_projections and set(target_modules) == set(PROJECTIONS):
                target_modules = FUSED_PROJECTIONS  # the seven names mean all of them
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=_names(target_modules),
            exclude_modules=_names(exclude_modules),
            layers_to_transform=layers_to_transform,  # type: ignore[arg-type]  # any form of it; the config has one
            layers_pattern=_names(layers_pattern),
            rank_pattern=rank_pattern,  # type: ignore[arg-type]
            alpha_pattern=alpha_pattern,  # type: ignore[arg-type]
            use_rslora=use_rslora,
            use_dora=use_dora,
            bias=bias,
            modules_to_save=_names(modules_to_save),
            ensure_weight_tying=ensure_weight_tying,
            init_lora_weights=init_lora_weights,
        ).on(tied=model.causal_lm.config.tie_word_embeddings)
        if model.lora is not None:
            if not config.continues(model.causal_lm.lora_config):
                raise AdapterError(
                    f"The model has an adapter already, with {model.causal_lm.lora_config}.",
                    expected="a model without one, or the same settings, which keep it.",
                    fix="To go on training it, leave get_peft_model out; for a fresh one, load the base model.",
                )
            log.info("The model's own adapter is kept.")
            return model
        causal_lm = dataclasses.replace(model.causal_lm, lora_config=config)
        # First, since it says so if it can't.
        params = base_of(causal_lm, model.params)
        lora = _fresh_adapter(model, config, jax.random.key(3407 if random_state is None else random_state))
        level(True if use_gradient_checkpointing is None else use_gradient_checkpointing)
        checkpointing = (
            model.gradient_checkpointing if use_gradient_checkpointing is None else use_gradient_checkpointing
        )
        return dataclasses.replace(
            model,
            causal_lm=causal_lm,
            params=params,
            lora=lora,
            gradient_checkpointing=checkpointing,
            last_run=None,
        )

    @staticmethod
    def for_inference(model: LanguageModel) -> LanguageModel:
        """The model itself: nothing needs switching."""
        return model

    @staticmethod
    def for_training(model: LanguageModel) -> LanguageModel:
        """The model itself: nothing needs switching."""
        return model


def without_weights(
    model_name: str | Path,
    *,
    base_model: str | Path | None = None,
    max_seq_length: int | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """A model that can be saved, but not run: of a base that is read when it is merged, nothing is loaded. With a
    `base_model` in place of the one that an adapter names."""
    find = functools.partial(resolve, token=token)
    described = describe(
        model_name, find, revision=revision, base_model=base_model, max_seq_length=max_seq_length
    )
    with Checkpoint(described.folder) as checkpoint:
        stored = {
            name: {"weight": checkpoint.read(f"{described.base.module_names((name,))[0]}.weight")}
            for name in described.tables
        }
        tables = unlike(described.tables, stored)
    return LanguageModel(
        described.model,
        {name: {"weight": table} for name, table in tables.items()},
        described.lora,
        described.tokenizer,
        name_or_path=described.name,
        revision=described.revision,
        max_seq_length=described.max_seq_length,
        own_parts=frozenset(tables),
        last_run=read_run(described.own_folder),
    )


def add_new_tokens(
    model: LanguageModel,
    tokenizer: Any,
    new_tokens: Sequence[str] = (),
    method: str = "mean",
    interpolation: float = 0.5,
    pad_to_multiple_of: int | None = None,
) -> None:
    """Adds tokens to the tokenizer and rows for them to the model, both in place as Unsloth does, ahead of adapters.

    `method="mean"` starts each at the mean of the trained rows, "interpolation" that far towards the mean of the pieces
    its text had before."""
    if not isinstance(model, LanguageModel):
        raise OptionError(
            f"add_new_tokens was given a {type(model).__name__} for its model.",
            expected="a LanguageModel, then its tokenizer.",
            fix="add_new_tokens(model, tokenizer, [...]).",
        )
    if model.lora is not None:
        raise AdapterError(
            "add_new_tokens was given a model that has an adapter.",
            expected="the base model: an adapter belongs to one vocabulary.",
            fix="Call add_new_tokens before get_peft_model.",
        )
    if not new_tokens:
        return
    new_token_rows.require_options(method, interpolation, pad_to_multiple_of)
    first = len(tokenizer)
    pieces = new_token_rows.add_to_tokenizer(tokenizer, new_tokens)
    model.causal_lm, grown = new_token_rows.grow(
        model.causal_lm, model.params, first, pieces,
        method=method, interpolation=interpolation, pad_to_multiple_of=pad_to_multiple_of,
    )  # fmt: skip
    model.params = {**model.params, **grown}
    model.own_parts |= frozenset(grown)


def base_of(causal_lm: CausalLM, params: Params) -> Params:
    """The weights that the adapter is added to: "pissa" takes its part out of the loaded ones."""
    config = causal_lm.lora_config
    if config is None or config.init_lora_weights != PISSA:
        return params
    return lora_init.without_principal(params, config, causal_lm.module_names)


def _fresh_adapter(model: LanguageModel, config: LoraConfig, key: jax.Array) -> Lora:
    if config.init_lora_weights != LOFTQ:
        return lora_init.init(model.params, config, model.module_names, key)
    with Checkpoint(model.original_folder()) as checkpoint:

        def original(module: str) -> Any:
            name = f"{module}.weight"
            dtype = checkpoint.dtype(name)
            if dtype.itemsize < 2 or not jnp.issubdtype(dtype, jnp.floating):
                raise AdapterError(
                    f"init_lora_weights='loftq', and {checkpoint.folder} holds {name} packed.",
                    expected="the original 16-bit weights: the adapter begins with what packing them loses.",
                    fix="Load the original model with load_in_4bit=True, or leave init_lora_weights out.",
                )
            return checkpoint.read(name)

        return lora_init.init(model.params, config, model.module_names, key, original)


def _check_loftq(settings: Any) -> None:
    """PEFT's `LoftQConfig`, or a dict."""
    if not isinstance(settings, Mapping | None):
        settings = getattr(settings, "__dict__", {"loftq_bits": repr(settings)})
    settings = settings or {}
    bits, iterations = settings.get("loftq_bits", 4), settings.get("loftq_iter", 1)
    if (bits, iterations) != (4, 1):
        raise AdapterError(
            f"loftq_config asks for {bits} bits and {iterations} iterations.",
            expected="4 bits, and 1 iteration: a second one changes the packed base, which then is not what anybody "
            "else gets by packing the same weights.",
            fix="Leave loftq_config out.",
        )


def _last_layers(model: LanguageModel, count: int, layers: Any) -> list[int]:
    total = model.causal_lm.config.num_layers
    if layers is not None or type(count) is not int or not 0 < count <= total:
        raise OptionError(
            f"finetune_last_n_layers={count!r}"
            + (f" beside layers_to_transform={layers!r}." if layers is not None else "."),
            expected=f"from 1 to the model's {total} layers, or layers_to_transform in its place.",
            fix="Use one of the two.",
        )
    return list(range(total - count, total))


def _names(given: Any) -> Any:
    """A list as a tuple; LoraConfig says what else may be."""
    return tuple(given) if isinstance(given, list | set) else given
