"""The merge itself: a checkpoint seen through an adapter, one tensor at a time: W + s B A, with DoRA each row at its
trained length, and what was trained whole (biases, embedding, head) in place of the checkpoint's.

The sum is formed in float32 and rounded once, to the dtype in which the checkpoint stores the tensor. What the adapter
does not touch is the checkpoint's own bytes. The base is always the original checkpoint, never the packed weights that
were trained on: the result is "16-bit base + adapter", and differs from the model seen in training by NF4's error.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Self

import jax.numpy as jnp
import numpy as np

from jaxtune.errors import AdapterError, CheckpointError
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.lora.config import (
    EMBEDDING_PATH,
    HEAD_PATH,
    LOFTQ,
    PISSA,
    WHOLE_MODULES,
    LoraConfig,
    ModuleNames,
)
from jaxtune.lora.init import rest_of
from jaxtune.lora.tree import Tree, layers

EMBEDDING_WEIGHT, HEAD_WEIGHT = f"{EMBEDDING_PATH}.weight", f"{HEAD_PATH}.weight"


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

    def of(self, weight: np.ndarray) -> np.ndarray:
        if self.config.init_lora_weights == PISSA:
            weight = np.asarray(rest_of(jnp.asarray(weight), self.config, self.module))
        merged = self.b @ self.a
        merged *= np.float32(self.config.scale_of(self.module))
        merged += weight.astype(np.float32)
        if self.lengths is not None:
            own = np.linalg.norm(merged, axis=1)
            merged *= (self.lengths / np.maximum(own, np.finfo(np.float32).tiny))[:, None]
        return merged


Change = Update | np.ndarray
"""An array is put in the tensor's place."""


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint:
    """Names, shapes and dtypes are the checkpoint's; `read` gives merged values. A head that was trained apart from the
    embedding that it was tied to is a tensor more."""

    checkpoint: Checkpoint
    changes: Mapping[str, Change]
    """By the tensor's name."""
    unties: bool = False
    """Whether embedding and head, tied in the checkpoint, no longer are."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        lora: Tree | None,
        config: LoraConfig | None,
        module_names: ModuleNames,
        *,
        tied: bool = False,
    ) -> Self:
        """`lora=None` gives the checkpoint as it is; `tied` says whether its head is the embedding. Everything that can
        be checked without reading weights is."""
        if lora is None or config is None:
            return cls(checkpoint, {})
        if config.init_lora_weights == LOFTQ:
            raise AdapterError(
                "A merge of an adapter that began with init_lora_weights='loftq'.",
                expected="an adapter that is added to the original weights: this one makes up for the error of 4 bits.",
                fix="Save the adapter, and use it on the base in 4 bits.",
            )
        changes = dict(_changes(lora, config, module_names))
        unties = tied and not config.ensure_weight_tying and any(name in lora for name in WHOLE_MODULES)
        if config.ensure_weight_tying and EMBEDDING_WEIGHT in changes and HEAD_WEIGHT in checkpoint.names:
            changes[HEAD_WEIGHT] = changes[EMBEDDING_WEIGHT]  # stored, though it is the embedding
        merged = cls(checkpoint, changes, unties)
        for name, change in changes.items():
            _require_fit(checkpoint, merged.origin(name), change.shape)
        return merged

    @property
    def names(self) -> list[str]:
        extra = {HEAD_WEIGHT} - set(self.checkpoint.names) if self.unties else ()
        return [*self.checkpoint.names, *extra]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(self.origin(name))

    def dtype(self, name: str) -> np.dtype:
        return self.checkpoint.dtype(self.origin(name))

    def read(self, name: str) -> np.ndarray:
        """The merged tensor: a view into the file where nothing is changed."""
        weight = self.checkpoint.read(self.origin(name))
        if name not in self.changes:
            return weight
        change = self.changes[name]
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the tensor's name
            merged = change.of(weight) if isinstance(change, Update) else change
            rounded = merged.astype(weight.dtype)
        if not np.isfinite(rounded).all():
            raise AdapterError(
                f"Merging the adapter into {name} gives values that {weight.dtype} cannot hold.",
                expected="finite weights.",
                fix="Use an adapter from before its training diverged.",
            )
        return rounded

    def origin(self, name: str) -> str:
        """The tensor of the checkpoint that this one is made of: of a tied head, the embedding."""
        return EMBEDDING_WEIGHT if self.unties and name == HEAD_WEIGHT else name


def _changes(lora: Tree, config: LoraConfig, module_names: ModuleNames) -> Iterator[tuple[str, Change]]:
    for module, leaves in layers(lora, config, module_names):
        host = {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}
        if "a" in host:
            yield f"{module}.weight", Update(module, host["a"], host["b"], config, host.get("m"))
        for name in ("weight", "bias"):
            if name in host:
                yield f"{module}.{name}", host[name]


def _require_fit(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if checkpoint.shape(name) != shape:
        raise AdapterError(
            f"The adapter changes {name} as {shape}; {checkpoint.folder} holds it as "
            f"{checkpoint.shape(name)}.",
            expected="the checkpoint that the adapter was trained on.",
            fix="Merge into that base model.",
        )
    if not jnp.issubdtype(checkpoint.dtype(name), jnp.floating) or checkpoint.dtype(name).itemsize < 2:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is stored as {checkpoint.dtype(name)}.",
            expected="float32, float16 or bfloat16: an adapter is merged into original weights, not quantised ones.",
            fix="Name the original 16-bit model instead of a quantised copy.",
        )
