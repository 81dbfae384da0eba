"""Where one step's time goes, by the GPU's own clock: every kernel of a training step, how often it ran and for how
long, under the name that XLA gave its operation.

    python benchmarks/account.py --row 4x4096x1:mlp
    python benchmarks/account.py --shape tiny --row 2x64x2:block    # seconds on a CPU: checks the script
"""

import argparse
import collections
import re
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks import sft
from benchmarks.harness import record
from jaxtune import FastLanguageModel
from jaxtune.compilation import enable_cache
from jaxtune.data.batches import BatchStream
from jaxtune.data.sample import Sample
from jaxtune.training.losses import next_token_loss, unwatched
from jaxtune.training.optimizers import adamw
from jaxtune.training.remat import compiler_options, remat
from jaxtune.training.step import init_state, make_step

STEPS = 3


def kernels(folder: str) -> dict[str, tuple[float, int]]:
    """Operation -> (seconds, runs) in all, of what the trace says about the device's streams."""
    (path,) = Path(folder).rglob("*.xplane.pb")
    total: dict[str, list] = collections.defaultdict(lambda: [0.0, 0])
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if "Stream" not in line.name:
                continue
            for event in line.events:
                stats = {str(name): value for name, value in event.stats}
                name = f"{stats.get('hlo_op', '')} {event.name[:60]}"
                total[name][0] += event.duration_ns / 1e9
                total[name][1] += 1
    return {name: (seconds, runs) for name, (seconds, runs) in total.items()}


def kind(name: str) -> str:
    """What an operation is, as far as its name says."""
    for pattern, said in (
        ("fmha|cudnn|flash|sdpa", "attention"),
        ("gemm|cutlass|nvjet|cublas|xmma", "products"),
        ("memcpy|MemcpyD2D|Memcpy", "copies"),
        ("dequantize", "dequantising"),
    ):
        if re.search(pattern, name, re.IGNORECASE):
            return said
    return "elementwise and the rest"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sft.SHAPES, default="llama-3.1-8b")
    parser.add_argument("--row", default="4x4096x1:mlp", help="see sft.py")
    parser.add_argument("--name", default="account", help="of the result file")
    args = parser.parse_args()
    enable_cache()
    row = sft.Row.parse(args.row)
    how = remat(row.level)
    model = FastLanguageModel.get_peft_model(
        sft.random_model(args.shape, offload_embedding=row.offload_embedding), r=16, lora_alpha=16
    )
    rate = lambda step: jax.numpy.float32(1e-4)
    optimizer = adamw(rate, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, bits=8)
    loss = unwatched(next_token_loss(model.causal_lm, how))
    step = make_step(loss, optimizer, rate, 1.0, compiler_options=compiler_options(how))
    ids = [np.array(each, np.int32) for each in sft.random_ids(row, model.causal_lm.config.vocab_size)]
    stream = BatchStream([Sample(each, each) for each in ids], len(ids) // row.accumulation, row.accumulation)
    given = jax.device_put(next(stream)[0])
    assert model.lora is not None
    state = init_state(model.lora, optimizer)
    step = step.lower(state, model.params, given).compile()
    memory = step.memory_analysis()
    for _ in range(3):
        state, metrics = step(state, model.params, given)
    jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                state, metrics = step(state, model.params, given)
            jax.block_until_ready(metrics)
        found = kernels(folder)
    rows = [
        {"operation": name, "kind": kind(name), "ms": 1e3 * seconds / STEPS, "runs": runs / STEPS}
        for name, (seconds, runs) in sorted(found.items(), key=lambda item: -item[1][0])
    ]
    kinds: dict[str, float] = collections.defaultdict(float)
    for each in rows:
        kinds[each["kind"]] += each["ms"]
    for each in rows[:60]:
        print(f"{each['ms']:9.2f} ms {each['runs']:7.0f}  {each['operation']}")
    print({name: round(ms, 1) for name, ms in kinds.items()}, "temp GB", memory.temp_size_in_bytes / 1e9)
    record(args.name, rows[:100], shape=args.shape, row=args.row, ms_by_kind=dict(kinds),
           temp_gb=memory.temp_size_in_bytes / 1e9)  # fmt: skip


if __name__ == "__main__":
    main()
