"""A folder's safetensors as named numpy arrays.

Every header is checked when the folder is opened, before any weight is read; `read` returns a read-only view
into a memory map, so opening 16 GB costs milliseconds and no memory.

Pickled weights (`pytorch_model.bin` and the like) are refused: loading a pickle can run code.
"""

import fnmatch
import json
import mmap
import os
from collections.abc import Collection, Iterable, KeysView, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import ml_dtypes
import numpy as np

from jaxtune.errors import CheckpointError, ModelNotFoundError, nearest

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_PATTERNS = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # the limit that safetensors itself sets; beyond it the file is something else
_DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class _Tensor(NamedTuple):
    """Where one tensor lies: bytes `start:stop` of `file`."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Tensors(Protocol):
    """What weights are read from: a checkpoint, or one that is seen through a merge."""

    @property
    def folder(self) -> object:
        """What errors call it."""

    @property
    def names(self) -> Collection[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...


class Checkpoint:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._tensors = _find_tensors(self.folder)
        self._maps: dict[Path, np.ndarray] = {}
        self._closed = False

    @property
    def names(self) -> KeysView[str]:
        """Every tensor's name, in the order of the index or of the file; usable as a set."""
        return self._tensors.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype:
        """numpy's dtype, or ml_dtypes' for bfloat16 and the float8 kinds."""
        return self._find(name).dtype

    def read(self, name: str) -> np.ndarray:
        """A read-only view into the memory-mapped file; it stays valid after `close`."""
        tensor = self._find(name)
        return _view(self._map(tensor.file), tensor)

    def close(self) -> None:
        """Lets the memory maps go; each is unmapped once the last array read from it is gone."""
        self._maps.clear()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, name: str) -> _Tensor:
        if name in self._tensors:
            return self._tensors[name]
        raise CheckpointError(
            f"The checkpoint in {self.folder} has no tensor {name!r}.",
            expected=f"One of its {len(self._tensors)} tensors.",
            fix="Check that config.json belongs to these weights." + nearest(name, self._tensors),
        )

    def _map(self, file: Path) -> np.ndarray:
        if self._closed:
            raise CheckpointError(
                f"The checkpoint in {self.folder} has been closed.",
                expected="An open checkpoint.",
                fix="Read inside the `with` block, or open the folder again.",
            )
        if file not in self._maps:
            self._maps[file] = _map_bytes(file)
        return self._maps[file]


def read_file(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file, an adapter's say, checked and viewed as a `Checkpoint`'s are."""
    tensors = _read_header(Path(path))
    mapped = _map_bytes(Path(path))
    return {name: _view(mapped, tensor) for name, tensor in tensors.items()}


def foreign_weights(where: str, files: Iterable[str]) -> CheckpointError | None:
    """The error for `files` that hold weights, but in no form that jaxtune loads; None if they hold none."""
    names = sorted(files)
    if pickles := [name for name in names if _is_pickle(name)]:
        return CheckpointError(
            f"{where} holds its weights only as pickles ({_some(pickles)}).",
            expected="Weights as safetensors. Pickles are refused: loading one can run code hidden in it.",
            fix="Take a repository that has safetensors; or, if you trust the author, convert this one where "
            'PyTorch is installed: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('FROM').save_pretrained('TO')\".",
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(
            f"{where} holds its weights only as GGUF ({_some(ggufs)}).",
            expected="Weights as safetensors; GGUF is for running a finished model: jaxtune only writes it.",
            fix="Use the model that the GGUF was made from; its card usually names it as the base model.",
        )
    return None


def _is_pickle(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in PICKLE_PATTERNS)


def _map_bytes(file: Path) -> np.ndarray:
    with file.open("rb") as opened:
        return np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _view(mapped: np.ndarray, tensor: _Tensor) -> np.ndarray:
    array = mapped[tensor.start : tensor.stop].view(tensor.dtype).reshape(tensor.shape)
    if not array.flags.aligned:
        # An odd-sized neighbour lies before it in the file, and not all code takes an unaligned view.
        array = array.copy()
        array.flags.writeable = False
    return array


def _find_tensors(folder: Path) -> dict[str, _Tensor]:
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"There is no folder {folder}.",
            expected="A folder that holds a model.",
            fix="Check the path.",
        )
    files = sorted(entry.name for entry in folder.iterdir())
    # The single file wins over an index, as it does in transformers, so that both load the same weights.
    if SINGLE_FILE in files:
        tensors = _read_header(folder / SINGLE_FILE)
    elif INDEX_FILE in files:
        tensors = _read_sharded(folder)
    else:
        raise _no_weights(folder, files)
    if not tensors:
        raise CheckpointError(
            f"The checkpoint in {folder} holds no tensor at all.",
            expected="The model's weights.",
            fix="Download or save the model again.",
        )
    return tensors


def _no_weights(folder: Path, files: list[str]) -> CheckpointError:
    if shards := [name for name in files if name.endswith(".safetensors")]:
        return CheckpointError(
            f"{folder} holds {_some(shards)}, but neither {SINGLE_FILE} nor {INDEX_FILE}.",
            expected=f"{SINGLE_FILE}, or an index that says which shards belong to the model.",
            fix=f"Fetch {INDEX_FILE} from where the shards came from; for an adapter, pass its base model.",
        )
    return foreign_weights(str(folder), files) or CheckpointError(
        f"{folder} holds no weights; it holds {_some(files) or 'nothing'}.",
        expected=f"{SINGLE_FILE}, or {INDEX_FILE} with its shards.",
        fix="Check that the path is that of the model itself, and that its download or save finished.",
    )


def _read_sharded(folder: Path) -> dict[str, _Tensor]:
    weight_map = _read_index(folder / INDEX_FILE)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing in {folder}: {_some(missing)}.",
            expected=f"Every shard that {INDEX_FILE} names.",
            fix="Finish the download (loading by the hub id resumes it), or copy the missing files.",
        )
    headers = {shard: _read_header(folder / shard) for shard in shards}
    if lost := [name for name, shard in weight_map.items() if name not in headers[shard]]:
        name = lost[0]
        raise CheckpointError(
            f"{INDEX_FILE} says that {name!r} is in {weight_map[name]}, but it is not there "
            f"({len(lost)} of {len(weight_map)} tensors are not where the index says).",
            expected="Every tensor in the shard that the index names.",
            fix="The index and the shards are from different saves: fetch them again from one source.",
        )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    """The index's `weight_map`: tensor name -> shard's file name."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad_index(path, f"cannot be read as JSON: {error}.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise _bad_index(path, "has no `weight_map` object.")
    for name, shard in weight_map.items():
        # A plain file name: an index must not be able to point outside of its folder.
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise _bad_index(path, f"places {name!r} in {shard!r}, which is no file name in this folder.")
    return weight_map


def _bad_index(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {problem}",
        expected='{"weight_map": {tensor name: shard file name}}.',
        fix="Fetch the index again from where the shards came from.",
    )


def _read_header(path: Path) -> dict[str, _Tensor]:
    """A safetensors file's table of contents, checked against the file's real length.

    The file is: 8 bytes with the header's length, the header (JSON), then the tensors' bytes end to end.
    """
    header, data_start, size = _load_header(path)
    tensors: dict[str, _Tensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _tensor(path, name, entry, data_start)
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda each: (each.start, each.stop)):
        if tensor.start != end:
            raise _bad_file(path, "has a header whose tensors overlap or leave gaps.")
        end = tensor.stop
    if size != end:
        state = "is truncated" if size < end else "is longer than its header says"
        raise _bad_file(path, f"{state}: it has {size:,} bytes instead of {end:,}.")
    return tensors


def _load_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as parsed, where the data starts, and the file's length."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            text = file.read(length) if length <= _LONGEST_HEADER else b""
    except OSError as error:
        raise _bad_file(path, f"cannot be read: {error.strerror or error}.") from error
    if prefix == b"version ":
        raise CheckpointError(
            f"{path} is a Git LFS pointer of {size} bytes, not the weights.",
            expected="The file that the pointer stands for.",
            fix="Run `git lfs pull` in the clone, or load the model by its hub id.",
        )
    if len(prefix) == _LENGTH_BYTES and length > _LONGEST_HEADER:
        raise _bad_file(path, f"is no safetensors file: its header would have {length:,} bytes.")
    if len(prefix) < _LENGTH_BYTES or len(text) < length:
        raise _bad_file(path, f"is truncated: it has {size:,} bytes and ends inside its header.")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise _bad_file(path, f"has a header that is no JSON: {error}.") from error
    if not isinstance(header, dict):
        raise _bad_file(path, "has a header that is no JSON object.")
    return header, _LENGTH_BYTES + length, size


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> _Tensor:
    try:
        kind, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
        start, stop = (data_start + int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _bad_file(path, f"has a malformed header entry for {name!r}: {entry!r}.") from error
    if kind not in _DTYPES:
        raise CheckpointError(
            f"Tensor {name!r} in {path} has the dtype {kind!r}.",
            expected=f"One of {', '.join(_DTYPES)}.",
            fix="Use the 16-bit (or bitsandbytes 4-bit) version of this model.",
        )
    dtype = _DTYPES[kind]
    count = 1
    for size in shape:
        count *= size
    if min(shape, default=0) < 0 or start < data_start or stop - start != count * dtype.itemsize:
        raise _bad_file(
            path, f"gives {name!r} {stop - start:,} bytes, which is wrong for {kind} {list(shape)}."
        )
    return _Tensor(path, dtype, shape, start, stop)


def _bad_file(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {problem}",
        expected="A whole safetensors file.",
        fix="Delete it and download or save it again; the copy or the transfer that made it broke off.",
    )


def _some(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
