"""Writes what llama.cpp makes of tests/export/gguf_cases.py, to tests/export/golden:

gguf_blocks   a digest of each row's bytes, for each type that is quantised, with and without the columns' importance;
              0 for a row whose scales leave float16's range
gguf_types    the type of each tensor, for each model and method, with and without an importance matrix

It needs real llama.cpp with its quantisers, in an environment of its own; the build takes some minutes:

    CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf ml_dtypes
    PYTHONPATH=. python scripts/make_gguf_golden.py
"""

import ctypes
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from tests.export import gguf_cases

TYPES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ3_S IQ4_NL IQ4_XS".split()
WEIGHTED_ONLY = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS".split()


def ggml() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(llama_cpp.llama_cpp._lib._name).with_name("libggml-base.so")))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library


def quantized(library: ctypes.CDLL, rows: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
    type = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[type]
    out = np.empty((len(rows), rows.shape[1] // numbers * size), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    shape = (0, len(rows), rows.shape[1])
    assert library.ggml_quantize_chunk(type, rows.ctypes.data, out.ctypes.data, *shape, weights) == out.nbytes
    return out


def write_model(path: Path, model: gguf_cases.Model) -> None:
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.hidden)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(2)
    if model.architecture == "phi3":
        writer.add_rope_dimension_count(32)
        writer.add_rope_scaling_orig_ctx_len(64)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(model.hidden)
    for name, shape in model.shapes():
        plain = len(shape) == 1 or "ffn_gate_inp" in name
        writer.add_tensor(name, np.ones(shape, np.float32 if plain else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types_after(source: Path, model: gguf_cases.Model, method: str, weighted: bool) -> np.ndarray:
    """By the order of `model.shapes()`."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType["MOSTLY_" + method.upper()]
    params.nthread = 1
    if weighted:
        entries = [(name, np.ones(shape[-1] * (shape[0] if len(shape) == 3 else 1), np.float32))
                   for name, shape in model.shapes()]  # fmt: skip
        data = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
        for place, (name, ones) in zip(data, entries, strict=False):
            place.name = name.encode()
            place.data = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            place.size = len(ones)
        params.imatrix = ctypes.cast(data, type(params.imatrix))
    out = source.with_suffix(".out")
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    found = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(out).tensors}
    return np.asarray([found[name] for name, _ in model.shapes()], np.uint8)


def main() -> None:
    gguf_cases.GOLDEN.mkdir(exist_ok=True)
    library = ggml()
    inputs = gguf_cases.rows()
    blocks = {f"input/{name}": gguf_cases.digests(rows) for name, rows in inputs.items()}
    columns = gguf_cases.importance()
    for kind in [*TYPES, *WEIGHTED_ONLY]:
        for weights, importance in columns.items():
            if kind in WEIGHTED_ONLY and importance is None:
                continue
            made = [quantized(library, rows, kind, importance) for rows in inputs.values()]
            blocks[f"{kind}/{weights}"] = np.concatenate([gguf_cases.digests(rows) for rows in made])
        rows = quantized(
            library, gguf_cases.huge(), kind, columns["weighted"] if kind in WEIGHTED_ONLY else None
        )
        held = [
            library.ggml_validate_row_data(gguf.GGMLQuantizationType[kind], row.ctypes.data, len(row))
            for row in rows
        ]
        blocks[f"{kind}/huge"] = np.where(held, gguf_cases.digests(rows), 0)
    np.savez_compressed(gguf_cases.BLOCKS_FILE, **blocks)
    methods = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in gguf_cases.MODELS.items():
            source = Path(folder) / "model.gguf"
            write_model(source, model)
            methods[name] = np.asarray([types_after(source, model, *case) for case in gguf_cases.METHODS])
    np.savez_compressed(gguf_cases.TYPES_FILE, **methods)


if __name__ == "__main__":
    main()
