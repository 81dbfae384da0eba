"""One model in several GGUF files, as llama.cpp's gguf-split has them: the first has the keys of the model, each says
which it is and of how many; a program that is given the first finds the others by their names."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.export.gguf.writer import TensorInfo


class Shard(NamedTuple):
    file: str
    metadata: dict[str, Any]
    tensors: list[TensorInfo]


def split(
    stem: str, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo], limit: int | None
) -> list[Shard]:
    """Files whose tensors take at most `limit` bytes, or that hold one tensor. What fits into one is one."""
    groups: list[list[TensorInfo]] = [[]]
    for info in tensors:
        if limit is not None and groups[-1] and sum(each.nbytes for each in groups[-1]) + info.nbytes > limit:
            groups.append([])
        groups[-1].append(info)
    if len(groups) == 1:
        return [Shard(f"{stem}.gguf", dict(metadata), groups[0])]
    return [
        Shard(
            f"{stem}-{n + 1:05d}-of-{len(groups):05d}.gguf",
            {
                **(metadata if n == 0 else {}),
                "split.no": np.uint16(n),
                "split.count": np.uint16(len(groups)),
                "split.tensors.count": np.int32(len(tensors)),
            },
            group,
        )
        for n, group in enumerate(groups)
    ]


def pattern(stem: str) -> str:
    """What the names of a model's shards match. `stem` is one already."""
    return f"{stem}-[0-9]*-of-[0-9]*.gguf"
