"""The merge itself: a checkpoint seen through what was trained, one tensor at a time: W + s B A, with DoRA each row at
its trained length; what an adapter trained whole (biases, embedding, head) in place of the checkpoint's; and the
model's own weights, after full fine-tuning or with added tokens.

The sum is formed in float32 and rounded once, to the dtype in which the checkpoint stores the tensor. What the adapter
does not touch is the checkpoint's own bytes. The base is always the original checkpoint, never the packed weights that
were trained on: the result is "16-bit base + adapter", and differs from the model seen in training by NF4's error.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from jaxtune.errors import AdapterError, CheckpointError
from jaxtune.export.weights import Weight
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.loading.dequantized import Dequantized
from jaxtune.lora import config as lora_config
from jaxtune.lora.config import LOFTQ, PISSA, LoraConfig, ModuleNames
from jaxtune.lora.init import rest_of
from jaxtune.lora.tree import Tree, layers
from jaxtune.models.config import ModelConfig

EMBEDDING_WEIGHT, HEAD_WEIGHT = f"{lora_config.EMBEDDING_PATH}.weight", f"{lora_config.HEAD_PATH}.weight"
SCALES = (".absmax", ".SCB", ".weight_scale", ".weight_scale_inv")
"""What lies beside a quantised weight, which itself may go by any dtype."""
AT_ONCE = 1 << 18
"""Numbers that are merged at once: whole rows, so few that they stay in a processor's cache."""


class Trained(NamedTuple):
    """What was trained, and on what: all that an export asks of a model."""

    base: Path
    """The folder of the original weights."""
    config: ModelConfig
    """As the model has it now, with tokens added, say."""
    module_names: ModuleNames
    lora: Tree | None = None
    lora_config: LoraConfig | None = None
    own: Mapping[str, Weight] = {}
    """What the model holds otherwise than its base, an adapter aside."""
    name: str = ""
    """What the base is called: its id on the hub, or where it is."""
    revision: str | None = None
    dequantize: bool = False
    """Whether `base` holds quantised weights, and those are meant."""

    def open(self) -> Checkpoint | Dequantized:
        """The weights of the base."""
        checkpoint = Checkpoint(self.base)
        return Dequantized(checkpoint) if self.dequantize else checkpoint


@dataclasses.dataclass(frozen=True)
class Update:
    """What an adapter makes of a weight, all float32."""

    module: str
    a: np.ndarray
    """[r, in]"""
    b: np.ndarray
    """[out, r]"""
    config: LoraConfig
    lengths: np.ndarray | None = None
    """DoRA's, [out]."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape[0], self.a.shape[1]

    def start(self, weight: np.ndarray) -> np.ndarray:
        """What is added to: with PiSSA, what is left of the weight when the adapter's beginning is taken away."""
        if self.config.init_lora_weights != PISSA:
            return weight
        return np.asarray(rest_of(jnp.asarray(weight), self.config, self.module))

    def added_to(self, start: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
        """The sum, formed in float32 and rounded to `dtype`."""
        merged, scale = np.empty(start.shape, dtype), np.float32(self.config.scale_of(self.module))
        step = max(1, AT_ONCE // start.shape[1])
        for first in range(0, len(start), step):
            rows = slice(first, first + step)
            change = self.b[rows] @ self.a
            change *= scale
            change += start[rows].astype(np.float32)
            if self.lengths is not None:
                own = np.linalg.norm(change, axis=1)
                change *= (self.lengths[rows] / np.maximum(own, np.finfo(np.float32).tiny))[:, None]
            merged[rows] = _rounded(name, change, dtype)
        return merged


Change = Update | np.ndarray
"""An array is put in the tensor's place."""


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint:
    """Names, shapes and dtypes are the checkpoint's; `read` gives merged values. A head that was trained apart from the
    embedding that it was tied to is a tensor more."""

    checkpoint: Checkpoint | Dequantized
    changes: Mapping[str, Change]
    """By the tensor's name."""
    own: Mapping[str, Weight]
    unties: bool = False
    """Whether embedding and head, tied in the checkpoint, no longer are."""

    @classmethod
    def of(cls, checkpoint: Checkpoint | Dequantized, trained: Trained) -> Self:
        """`checkpoint` is the base's. Everything that can be checked without reading weights is."""
        _require_original(checkpoint)
        lora, config = trained.lora, trained.lora_config
        if lora is None or config is None:
            return cls(checkpoint, {}, trained.own)
        if config.init_lora_weights == LOFTQ:
            raise AdapterError(
                "A merge of an adapter that began with init_lora_weights='loftq'.",
                expected="an adapter that is added to the original weights: this one makes up for the error of 4 bits.",
                fix="Save the adapter, and use it on the base in 4 bits.",
            )
        changes = dict(_changes(lora, config, trained.module_names))
        unties = (
            trained.config.tie_word_embeddings
            and not config.ensure_weight_tying
            and any(name in lora for name in lora_config.WHOLE_MODULES)
        )
        if config.ensure_weight_tying and EMBEDDING_WEIGHT in changes and HEAD_WEIGHT in checkpoint.names:
            changes[HEAD_WEIGHT] = changes[EMBEDDING_WEIGHT]  # stored, though it is the embedding
        merged = cls(checkpoint, changes, trained.own, unties)
        for name, change in changes.items():
            _require_fit(merged, merged.origin(name), change.shape)
        return merged

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint or (self.unties and name == HEAD_WEIGHT)

    def settings(self, config: ModelConfig) -> ModelConfig:
        """Of the merged model, whose head may no longer be its embedding."""
        return dataclasses.replace(config, tie_word_embeddings=config.tie_word_embeddings and not self.unties)

    @property
    def names(self) -> list[str]:
        extra = {HEAD_WEIGHT} - set(self.checkpoint.names) if self.unties else ()
        return [*self.checkpoint.names, *extra]

    def shape(self, name: str) -> tuple[int, ...]:
        origin = self.origin(name)
        return self.own[origin].shape if origin in self.own else self.checkpoint.shape(origin)

    def dtype(self, name: str) -> np.dtype:
        return self.checkpoint.dtype(self.origin(name))

    def read(self, name: str) -> np.ndarray:
        """The merged tensor: a view into the file where nothing is changed."""
        change, dtype = self.changes.get(name), self.dtype(name)
        if change is None and self.origin(name) not in self.own:
            return self.base(name)
        if isinstance(change, np.ndarray):
            return _rounded(name, change, dtype)
        weight = self.base(name)
        if change is None:
            return _rounded(name, weight, dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # reported with the tensor's name
            return change.added_to(change.start(weight), dtype, name)

    def base(self, name: str) -> np.ndarray:
        """The tensor without the adapter: the model's own, or the checkpoint's."""
        own = self.own.get(self.origin(name))
        return self.checkpoint.read(self.origin(name)) if own is None else np.asarray(own.fetch())

    def origin(self, name: str) -> str:
        """The tensor of the checkpoint that this one is made of: of a tied head, the embedding."""
        return EMBEDDING_WEIGHT if self.unties and name == HEAD_WEIGHT else name


def _rounded(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(dtype)
    if not np.isfinite(rounded.astype(np.float32)).all():  # numpy knows float32 better than bfloat16
        raise AdapterError(
            f"What was trained makes {name} hold values that {dtype} cannot hold.",
            expected="finite weights.",
            fix="Use a state from before its training diverged.",
        )
    return rounded


def _changes(lora: Tree, config: LoraConfig, module_names: ModuleNames) -> Iterator[tuple[str, Change]]:
    for module, leaves in layers(lora, config, module_names):
        host = {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}
        if "a" in host:
            yield f"{module}.weight", Update(module, host["a"], host["b"], config, host.get("m"))
        for name in ("weight", "bias"):
            if name in host:
                yield f"{module}.{name}", host[name]


def _require_fit(merged: MergedCheckpoint, name: str, shape: tuple[int, ...]) -> None:
    checkpoint = merged.checkpoint
    if merged.shape(name) != shape:
        raise AdapterError(
            f"The adapter changes {name} as {shape}; {checkpoint.folder} holds it as {merged.shape(name)}.",
            expected="the checkpoint that the adapter was trained on.",
            fix="Merge into that base model.",
        )


def _require_original(checkpoint: Checkpoint | Dequantized) -> None:
    """What is packed can take no change, and without its scales' settings means nothing."""
    for name in checkpoint.names:
        dtype = checkpoint.dtype(name)
        packed = dtype.itemsize < 2 or not jnp.issubdtype(dtype, jnp.floating)
        if name.endswith(SCALES) or (name.endswith(".weight") and packed):
            raise CheckpointError(
                f"{checkpoint.folder} holds quantised weights: {name} ({dtype}).",
                expected="float32, float16 or bfloat16: a merge is of original weights, not quantised ones.",
                fix="Name the original 16-bit model with original_model=; or save the adapter, or the quantised model "
                "as it is, with save_pretrained.",
            )
