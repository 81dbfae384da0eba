"""Exporting a trained model in a real model's shape: the merged folder, beside a copy of the same bytes on the same
disk, and GGUF, beside llama.cpp's own quantiser. Weights are random (`on_disk.make`), the adapter is of rank 16 on
every linear, and nothing of the model is loaded: exports read the checkpoint.

    PYTHONPATH=. python benchmarks/export.py                      # 8B: 16 GB on disk, and as much twice more
    PYTHONPATH=. taskset -c 0,1 python benchmarks/export.py --shape llama-3.2-1b --llama-cpp
    PYTHONPATH=. python benchmarks/export.py --shape tiny         # seconds on a CPU: checks the script

Files are written and synced within the time. `--llama-cpp` needs the package llama_cpp, and quantises our bf16 file.
"""

import argparse
import ctypes
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import AutoTokenizer

from benchmarks.harness import record
from benchmarks.on_disk import SHAPES, SHARD, HostPeak, drop_pages, make, warm_pages
from jaxtune.export.gguf.folder import save_gguf
from jaxtune.export.merge import Trained
from jaxtune.export.merged_folder import save_merged_16bit
from jaxtune.loading.config import read_config
from jaxtune.lora import init as lora_init
from jaxtune.lora.config import LoraConfig
from jaxtune.models.causal_lm import CausalLM
from jaxtune.models.families import FAMILIES


def trained_on(base: Path) -> Trained:
    """An adapter whose B is not zero."""
    hf = read_config(base)
    model, config = CausalLM(FAMILIES[hf["model_type"]](hf)), LoraConfig(r=16, lora_alpha=16)
    lora = lora_init.init(model.skeleton, config, model.module_names, jax.random.key(0))
    rng = np.random.default_rng(0)
    awake = lambda x: rng.normal(0, 0.01, x.shape).astype(np.float32)
    return Trained(base, model.config, model.module_names, jax.tree.map(awake, lora), config)


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds until what was written is on the disk, and the process' own memory at most, mapped files aside."""
    os.sync()
    with HostPeak() as host:
        start = time.perf_counter()
        work()
        returned = time.perf_counter() - start
        os.sync()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "seconds_until_it_returns": returned, "host_peak_gb": host.gb}


def copy(source: Path, target: Path) -> None:
    """By reads and writes: some file systems copy without any."""
    target.mkdir()
    for file in source.glob("*.safetensors"):
        with file.open("rb") as reads, (target / file.name).open("wb") as writes:
            shutil.copyfileobj(reads, writes, 1 << 24)


def merge(trained: Trained, tokenizer: Any, target: Path, *, verify: bool) -> None:
    save_merged_16bit(target, trained, tokenizer=tokenizer, verify=verify)


def by_llama_cpp(source: Path, target: Path, method: str, threads: int) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{method.upper()}")
    params.nthread = threads
    done = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert done == 0, f"llama.cpp gave {done}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--folder", type=Path, help="where everything is written; a temporary one otherwise")
    parser.add_argument("--methods", nargs="+", default=["q4_k_m"])
    parser.add_argument("--llama-cpp", action="store_true", help="quantise by llama.cpp as well")
    parser.add_argument("--name", default="export", help="of the result file")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []

    def measure(what: str, work: Callable[[], Any], written: Path, **more: Any) -> None:
        rows.append({"what": what, **timed(work), **more})
        files = [written] if written.is_file() else written.glob("*.safetensors")
        rows[-1]["gb"] = sum(file.stat().st_size for file in files) / 1e9
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory(prefix="jaxtune-export-", dir=args.folder) as temporary:
        folder = Path(temporary)
        base = folder / "base"
        base.mkdir()
        make(base, SHAPES[args.shape], SHARD if args.shape != "tiny" else 1_000_000)
        trained, tokenizer = trained_on(base), AutoTokenizer.from_pretrained(base)
        for cache, prepare in (("cold", drop_pages), ("warm", warm_pages)):
            for what, work in (
                ("copy", lambda target: copy(base, target)),
                ("merged_16bit", functools.partial(merge, trained, tokenizer, verify=False)),
                ("merged_16bit, verified", functools.partial(merge, trained, tokenizer, verify=True)),
            ):
                target = folder / what
                prepare(base)
                measure(what, functools.partial(work, target), target, cache=cache)
                shutil.rmtree(target)
        for method in [*args.methods, *["bf16"] * args.llama_cpp]:
            save = functools.partial(
                save_gguf, folder / "out", trained, tokenizer=tokenizer, name="m", quantization_method=method
            )
            file = folder / "out_gguf" / f"m.{method.upper()}.gguf"
            measure(
                method, functools.partial(save, verify=False), file, cache="warm", programs="compiled now"
            )
            if method != "bf16":
                measure(method, functools.partial(save, verify=False), file, cache="warm", programs="there")
                measure(f"{method}, verified", save, file, cache="warm", programs="there")
        for method in args.methods if args.llama_cpp else ():
            source, target = folder / "out_gguf" / "m.BF16.gguf", folder / "theirs.gguf"
            threads = len(os.sched_getaffinity(0))
            work = functools.partial(by_llama_cpp, source, target, method, threads)
            measure(f"{method} by llama.cpp", work, target, threads=threads)
    record(args.name, rows, shape=args.shape, cores=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
