"""A quantised checkpoint read as numbers: the names and shapes of its original, with the values that it holds."""

from collections.abc import KeysView
from pathlib import Path
from types import TracebackType
from typing import Self

import jax.numpy as jnp
import numpy as np

from jaxtune import quant
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.loading.plan import EMBEDDING
from jaxtune.loading.stored import Plain, Source, numbers_shape, recognise


class Dequantized:
    """What is quantised there is read in the dtype of the embedding, which nobody quantises; everything else as it is.
    Of a checkpoint that is not quantised, the weights."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._dtype = checkpoint.dtype(EMBEDDING)
        names = [name for name in checkpoint.names if name.endswith((".weight", ".bias"))]
        self._shapes = {name: numbers_shape(checkpoint, name) for name in names}
        self.sources: dict[str, Source] = {
            name: recognise(checkpoint, name, shape, jnp.dtype(self._dtype))
            for name, shape in self._shapes.items()
        }

    @property
    def folder(self) -> Path:
        return self._checkpoint.folder

    @property
    def names(self) -> KeysView[str]:
        return self.sources.keys()

    def __contains__(self, name: object) -> bool:
        return name in self.sources

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return self._checkpoint.dtype(name) if self._is_plain(name) else self._dtype

    def read(self, name: str) -> np.ndarray:
        if self._is_plain(name):
            return self._checkpoint.read(name)
        source = self.sources[name]
        return np.asarray(quant.dequantize(source.stored.decode(source.read(self._checkpoint)), self._dtype))

    def _is_plain(self, name: str) -> bool:
        return isinstance(self.sources[name].stored, Plain)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpoint.close()
