"""Loading through `FastLanguageModel.from_pretrained`: random bfloat16 weights in a real model's shape are written as
safetensors shards to local disk, then loaded: cold (pages dropped as far as a user can) and warm. Seconds from the
call until every array is ready (imports and the device's start apart), host and device peaks, bytes a weight.

    PYTHONPATH=. python benchmarks/loading.py                        # Llama-3.1-8B shape: 16 GB on disk, under $TMPDIR
    PYTHONPATH=. python benchmarks/loading.py --folder /data/8b --keep    # the shards are made once, and stay
    PYTHONPATH=. python benchmarks/loading.py --shape tiny           # seconds on a CPU: checks the script

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
import time
from pathlib import Path

import numpy as np

from benchmarks.on_disk import SHAPES, SHARD, HostPeak, drop_pages, make, warm_pages


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
