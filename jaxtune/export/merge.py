"""The merge itself: a checkpoint seen through an adapter, W + s B A, one tensor at a time.

The sum is formed in float32 and rounded once, to the dtype in which the checkpoint stores the tensor. What the adapter
does not touch is the checkpoint's own bytes. The base is always the original checkpoint, never the packed weights that
were trained on: the result is "16-bit base + adapter", and differs from the model seen in training by NF4's error.
"""

import dataclasses
from collections.abc import Iterator, KeysView, Mapping
from typing import Self

import jax.numpy as jnp
import numpy as np

from jaxtune.errors import AdapterError, CheckpointError
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.lora.config import LoraConfig
from jaxtune.lora.peft_format import ModuleNames
from jaxtune.lora.tree import Tree, modules


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint:
    """Names, shapes and dtypes are the checkpoint's; `read` gives merged values."""

    checkpoint: Checkpoint
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Weight's name -> (A [r, in], B [out, r]), float32."""
    scale: float

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        lora: Tree | None,
        config: LoraConfig | None,
        module_names: ModuleNames,
    ) -> Self:
        """`lora=None` gives the checkpoint as it is. Everything that can be checked without reading weights is."""
        if lora is None or config is None:
            return cls(checkpoint, {}, 0.0)
        factors = dict(_factors(lora, module_names))
        for name, (a, b) in factors.items():
            _require_fit(checkpoint, name, (b.shape[0], a.shape[1]))
        return cls(checkpoint, factors, config.scale)

    @property
    def names(self) -> KeysView[str]:
        return self.checkpoint.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self.checkpoint.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """The merged tensor: a view into the file where nothing is added."""
        weight = self.checkpoint.read(name)
        if name not in self.factors:
            return weight
        a, b = self.factors[name]
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the tensor's name
            merged = b @ a
            merged *= np.float32(self.scale)
            merged += weight.astype(np.float32)
            rounded = merged.astype(weight.dtype)
        if not np.isfinite(rounded).all():
            raise AdapterError(
                f"Merging the adapter into {name} gives values that {weight.dtype} cannot hold.",
                expected="finite weights.",
                fix="Use an adapter from before its training diverged.",
            )
        return rounded


def _factors(lora: Tree, module_names: ModuleNames) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    for path, ab in modules(lora):
        stacks = (np.asarray(ab[factor], np.float32) for factor in ("a", "b"))
        for module, a, b in zip(module_names(path), *stacks, strict=True):
            yield f"{module}.weight", (a, b)


def _require_fit(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> None:
    if checkpoint.shape(name) != shape:
        raise AdapterError(
            f"The adapter changes {name} as a {shape} matrix; {checkpoint.folder} holds it as "
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
