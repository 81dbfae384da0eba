"""GGUF's types, each by numpy, by a compiled program where there is one, and by llama.cpp: milliseconds for a million
normal numbers. On one core, as docs/export.md has them:

    PYTHONPATH=. taskset -c 0 python benchmarks/quantisers.py --llama-cpp
    PYTHONPATH=. python benchmarks/quantisers.py --types Q4_K Q6_K        # on the GPU, if there is one

`--llama-cpp` needs the package llama_cpp, whose library quantises with one thread here.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable

import numpy as np

from benchmarks.harness import record
from jaxtune.export.gguf.quants import TensorType, encode, encoding

QUANTISED = [type.name for type in TensorType if type.block > 1]


def milliseconds(work: Callable[[], object], numbers: int, repeats: int = 3) -> float:
    """For a million numbers; the least of some times, the first of which is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times) * 1e9 / numbers


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", choices=QUANTISED, default=QUANTISED)
    parser.add_argument("--rows", type=int, default=512, help="of 4096 numbers")
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("--name", default="quantisers", help="of the result file")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    x = (0.02 * rng.standard_normal((args.rows, 4096))).astype(np.float32)
    measured = (0.1 + rng.chisquare(1, 4096)).astype(np.float32)
    encoding.SOONER_IN_NUMPY = set()
    theirs = None
    if args.llama_cpp:
        from scripts.make_gguf_golden import ggml, quantized

        theirs = functools.partial(quantized, ggml())
    rows = []
    for name in args.types:
        type = TensorType[name]
        for importance in (None, measured):
            if importance is None and type.needs_importance:
                continue
            ways: dict[str, Callable[[], object]] = {
                "numpy": lambda t=type, w=importance: encode(x, t, "x", w)
            }
            if type in encoding.ON_DEVICE:
                ways["program"] = ways["numpy"]
            if theirs is not None:
                ways["llama.cpp"] = functools.partial(theirs, x, name, importance)
            row = {"type": name, "importance": importance is not None}
            for way, work in ways.items():
                encoding.WORTH_COMPILING = 0 if way == "program" else x.size + 1
                row[way] = milliseconds(work, x.size)
            rows.append(row)
            print(
                {name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()}
            )
    record(args.name, rows, cores=len(os.sched_getaffinity(0)), unit="ms for a million numbers")


if __name__ == "__main__":
    main()
