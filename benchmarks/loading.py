"""Loading through `FastLanguageModel.from_pretrained`: random bfloat16 weights in a real model's shape are written as
safetensors shards to local disk, then loaded: cold (pages dropped as far as a user can) and warm. Seconds from the
call until every array is ready (imports and the device's start apart), host and device peaks, bytes a weight.

    python benchmarks/loading.py                        # Llama-3.1-8B shape: 16 GB on disk, under $TMPDIR
    python benchmarks/loading.py --folder /data/8b --keep    # the shards are made once, and stay
    python benchmarks/loading.py --shape tiny           # seconds on a CPU: checks the script

Each load is a process of its own, so that peaks are its own. Compiled programs are kept between them, as they are
between two runs of a user's: the cold one compiles unless `--compiled` names a folder from an earlier run.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

SHAPES = {
    "llama-3.1-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, num_hidden_layers=32, max_position_embeddings=131072,
    ),
    "tiny": dict(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=2, max_position_embeddings=512,
    ),
}  # fmt: skip
SHARD = 4_500_000_000


def weights(c: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, in the order of the layers."""
    width, ffn = c["hidden_size"], c["intermediate_size"]
    kv = width // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,), "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width), "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], width)}
    for i in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (c["vocab_size"], width)}


def make(folder: Path, c: dict, shard: int) -> None:
    """Shards, config and tokenizer. The weights are normal: 4 million draws, repeated, fill each tensor."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    normal = (0.02 * np.random.default_rng(0).standard_normal(2**22 + 17)).astype(ml_dtypes.bfloat16)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in weights(c).items():
        if 2 * sum(map(np.prod, [*groups[-1].values(), shape])) > shard:
            groups.append({})
        groups[-1][name] = shape
    weight_map = {}
    for n, group in enumerate(groups, 1):
        file = f"model-{n:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            name: np.ones(shape, ml_dtypes.bfloat16) if "norm" in name else np.resize(normal, shape)
            for name, shape in group.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
        del tensors
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    LlamaConfig(**c, tie_word_embeddings=False, dtype="bfloat16").save_pretrained(folder)
    words = {f"w{i}": i for i in range(100)}
    backend = Tokenizer(models.WordLevel({**words, "<eos>": 100, "<pad>": 101}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder
    )


def drop_pages(folder: Path) -> None:
    """Asks the kernel to forget the files' pages; another process' use of them, or a lazy kernel, keeps some."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_pages(folder: Path) -> None:
    buffer = bytearray(1 << 24)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


class HostPeak:
    """The most memory of the process' own, above what it had at the start; pages of mapped files are not counted."""

    def __init__(self):
        self.start = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    @property
    def gb(self) -> float:
        return (self.peak - self.start) / 1e9

    def _watch(self):
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        """Anonymous and shared-memory pages (what a driver pins may be either)."""
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
        )
        if "RssAnon" not in status:
            return int(status["VmRSS"].split()[0]) * 1024
        return sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def load(folder: Path, options: dict) -> dict:
    """One load, in this process."""
    imports = time.perf_counter()
    import jax
    from transformers import AutoTokenizer, LlamaConfig  # noqa: F401  (which `from_pretrained` would import)

    from jaxtune import FastLanguageModel
    from jaxtune.quant import PackedArray

    jax.block_until_ready(jax.numpy.zeros(8))  # the device is up before the clock starts
    imports = time.perf_counter() - imports
    with HostPeak() as host:
        start = time.perf_counter()
        model, _ = FastLanguageModel.from_pretrained(folder, dtype="bfloat16", **options)
        jax.block_until_ready(model.params)
        seconds = time.perf_counter() - start
    arrays = jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, PackedArray))
    packed = [array for array in arrays if isinstance(array, PackedArray)]
    stats = jax.devices()[0].memory_stats() or {}
    size = sum(array.nbytes for array in arrays)
    quantised = sum(int(np.prod(array.shape)) for array in packed)
    peak = stats.get("peak_bytes_in_use")
    return {
        "seconds": seconds,
        "import_seconds": imports,
        "host_peak_gb": host.gb,
        "weights_gb": size / 1e9,
        "device_peak_gb": peak and peak / 1e9,
        "device_peak_to_weights": peak and peak / size,
        "bytes_per_quantised_weight": sum(array.nbytes for array in packed) / quantised if packed else None,
    }


def child(folder: Path, options: dict, compiled: Path) -> dict:
    """The same in a process of its own."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, "--load-only", json.dumps(options), "--folder", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument(
        "--folder", type=Path, help="where the shards are, or will be; a temporary one otherwise"
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder in place")
    parser.add_argument("--compiled", type=Path, help="a folder of compiled programs; an empty one otherwise")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="of from_pretrained: '{\"load_in_8bit\": true}'"
    )
    parser.add_argument("--name", default="loading", help="of the result file")
    parser.add_argument("--load-only", type=json.loads, metavar="OPTIONS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_only is not None:
        print(json.dumps(load(args.folder, args.load_only)))
        return

    rows = []
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxtune-loading-")))
        folder = args.folder or temporary / "model"
        compiled = args.compiled or temporary / "compiled"
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            make(folder, SHAPES[args.shape], SHARD if args.shape != "tiny" else 1_000_000)
            print(f"made {folder} in {time.perf_counter() - start:.0f} s", flush=True)
        gb = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
        for cache, prepare in (("cold", drop_pages), ("warm", warm_pages), ("warm", warm_pages)):
            prepare(folder)
            rows.append(
                {"cache": cache, "on_disk_gb": gb, **args.options, **child(folder, args.options, compiled)}
            )
            rows[-1]["gb_per_second"] = gb / rows[-1]["seconds"]
            print(rows[-1], flush=True)
        if args.folder and not args.keep:
            shutil.rmtree(folder)
    # Only now: this process takes no device's memory while the others are measured.
    from benchmarks.harness import record

    record(
        args.name, rows, shape=args.shape, note="the first row compiles; host peak without mapped file pages"
    )


if __name__ == "__main__":
    main()
