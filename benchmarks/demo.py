"""The demo for several seeds: how much fine-tuning and reinforcement raise what is tested, and how long it takes.

PYTHONPATH=. python benchmarks/demo.py                 # three seeds: minutes each on two CPU cores
PYTHONPATH=. python benchmarks/demo.py --seeds 0 --name demo-gpu
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax

from benchmarks.harness import record
from jaxtune.cli.demo import SUMMARY, demo


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="demo", help="of the result file")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            demo(Path(folder), seed)
            rows.append(json.loads((Path(folder) / SUMMARY).read_text()))
        jax.clear_caches()  # on a CPU each seed compiles, as a first run does; on a GPU a cache on disk serves it
        record(args.name, rows)


if __name__ == "__main__":
    main()
