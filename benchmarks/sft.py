"""SFT through `SFTTrainer`, on random weights made on the device in a real model's shape: seconds per optimizer step,
tokens per second, peak memory, model FLOP/s utilisation, time to the first step, time to load.

    python benchmarks/sft.py                              # Llama-3.1-8B: small memory, packed rows, "auto"
    python benchmarks/sft.py --rows 2x2048x4:block        # batch x length x accumulation : level of training.remat
    python benchmarks/sft.py --rows 1x16384x1~512:auto    # rows packed with samples of about 512 tokens
    python benchmarks/sft.py --rows 2x2048x4:auto+embedding      # with offload_embedding=True
    python benchmarks/sft.py --shape llama-3.2-1b --full-finetuning --rows 4x2048x1:block --optim adamw_torch \
        --offload-optimizer                               # its state in the host's memory
    python benchmarks/sft.py --shape tiny --rows 2x64x2:block    # seconds on a CPU: checks the script
"""

import argparse
import functools
import statistics
import time
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import record
from benchmarks.shapes import SHAPES
from jaxtune import FastLanguageModel, LanguageModel, SFTConfig, SFTTrainer
from jaxtune.compilation import enable_cache
from jaxtune.device_memory import on_device
from jaxtune.errors import JaxtuneError
from jaxtune.loading.load import load_params
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM
from jaxtune.models.flops import useful_flops
from jaxtune.quant import Unpacked
from jaxtune.training.step import init_state
from jaxtune.training.trainer import optimizer_of

ROWS = [
    "2x2048x4:offload_attention+embedding", "4x4096x1:offload_attention+embedding",
    "1x16384x1:offload_attention+embedding", "1x16384x1~512:offload_attention+embedding",
    "2x2048x4:auto", "4x4096x1:auto",
]  # fmt: skip
SUSTAINED_FLOPS = 683e12
"""bf16 products of an H200 over 20 s, measured; what MFU is relative to."""


@functools.partial(jax.jit, static_argnums=1)
def draw(key, shape):
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16)


def table(shape):
    """Random bfloat16 of either sign, 1/64 to 1/32 in size, made of bits: a normal draw would take long on a host."""
    bits = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    return (bits & 0x807F | 0x3C80).view(jnp.bfloat16)


class RandomCheckpoint:
    """Looks like a checkpoint; weights of layers are drawn on the device when they are read, tables lie on the host."""

    folder = "random weights"

    def __init__(self, model: CausalLM):
        self.shapes = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.skeleton):
            path = names.keys(path)
            for name in names.hf_names(model.config, path):
                self.shapes[name] = leaf.shape[1:] if names.is_stacked(path) else leaf.shape
        self.names = self.shapes.keys()
        self.seeds = {name: seed for seed, name in enumerate(self.shapes)}
        self.tables = {
            name: table(shape)
            for name, shape in self.shapes.items()
            if len(shape) == 2 and "layers" not in name
        }

    def __contains__(self, name):
        return name in self.shapes

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return jnp.dtype(jnp.bfloat16)

    def read(self, name):
        if name in self.tables:
            return self.tables[name]
        weight = draw(jax.random.key(self.seeds[name]), self.shapes[name])
        return jnp.ones_like(weight) if "norm" in name else weight


def random_model(
    shape: str, *, full_finetuning: bool = False, offload_embedding: bool = False
) -> LanguageModel:
    """A model of this shape, loaded as a checkpoint is, and ready."""
    causal_lm = CausalLM(SHAPES[shape])
    params = load_params(
        causal_lm,
        RandomCheckpoint(causal_lm),
        dtype=jnp.dtype(jnp.bfloat16),
        precision=Unpacked() if full_finetuning else None,
        offload_embedding=offload_embedding,
    )
    jax.block_until_ready(params)
    return LanguageModel(
        causal_lm,
        params,
        max_seq_length=2**20,  # no row is cut, however long
        full_finetuning=full_finetuning,
    )


def peak_gb() -> float:
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 1e9


def limit_gb() -> float:
    """What the process may take of the device, as XLA_PYTHON_CLIENT_MEM_FRACTION has it."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 0) / 1e9


class Row(NamedTuple):
    """batch x length x accumulation ~ mean : level of training.remat. With a mean, rows of so many tokens are packed
    with ragged samples that are about so long. A level with "+embedding": its table lies in the host's memory."""

    batch: int
    length: int
    accumulation: int
    mean: int | None
    level: str
    offload_embedding: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        sizes, level = text.split(":")
        sizes, _, mean = sizes.partition("~")
        level, _, offloaded = level.partition("+")
        return cls(*map(int, sizes.split("x")), int(mean) if mean else None, level, offloaded == "embedding")

    def lengths(self) -> list[int]:
        """Of the samples of a step."""
        rows = self.batch * self.accumulation
        if self.mean is None:
            return [self.length] * rows
        count = rows * self.length // self.mean
        lengths = np.random.default_rng(0).integers(self.mean // 8, 2 * self.mean - self.mean // 8, count)
        lengths += (rows * self.length - lengths.sum()) // count
        return lengths.tolist()


def random_ids(row: Row, vocab_size: int) -> list[list[int]]:
    """The samples of a step: every step has all, so that there is one shape."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length).tolist() for length in row.lengths()]


def bare_seconds(trainer: SFTTrainer, steps: int = 6) -> float:
    """Of a step alone, one after the other with the same batch, no loop around: what the trainer cannot undercut."""
    assert trainer.step is not None
    state = init_state(trainer.model.lora or trainer.model.params, optimizer_of(trainer.args, steps)[0])
    batch = jax.device_put(next(trainer.batches())[0])
    for _ in range(2):
        state, metrics = trainer.step(state, trainer.model.params, batch)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = trainer.step(state, trainer.model.params, batch)
    jax.block_until_ready(metrics)
    return (time.perf_counter() - start) / steps


def measure(model: LanguageModel, row: Row, steps: int, bare: bool = False, **settings: Any) -> dict:
    """`settings` are more of SFTConfig's."""
    c = model.causal_lm.config
    lengths = row.lengths()
    samples = [{"input_ids": ids} for ids in random_ids(row, c.vocab_size)]
    config = SFTConfig(
        max_steps=steps, per_device_train_batch_size=len(lengths) // row.accumulation, max_length=max(lengths),
        gradient_accumulation_steps=row.accumulation, gradient_checkpointing=row.level,
        **settings,
    )  # fmt: skip
    trainer = SFTTrainer(model, config, train_dataset=samples)
    trainer.train()
    times = [entry["step_time_sec"] for entry in trainer.log_history]
    # The last has nothing after it to overlap with.
    seconds = statistics.median(times[3:-1]) if len(times) > 4 else None
    peak = peak_gb()
    return {
        **row._asdict(),
        **settings,
        "ran_at": trainer.step.level,
        **(
            {}
            if seconds is None
            else {
                "seconds_per_step": seconds,
                "tokens_per_second": sum(lengths) / seconds,
                "mfu_of_sustained": useful_flops(c, lengths, full=model.full_finetuning)
                / seconds
                / SUSTAINED_FLOPS,
            }
        ),
        "peak_gb": peak,
        **({"bare_seconds_per_step": bare_seconds(trainer)} if bare else {}),
        "first_step_seconds": times[0] + trainer.log_history[0]["compile_seconds"],
        "loss": [entry["loss"] for entry in trainer.log_history],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--full-finetuning", action="store_true", help="train bfloat16 weights, no adapter")
    parser.add_argument("--optim", default=SFTConfig.optim)
    parser.add_argument("--offload-optimizer", action="store_true", help="keep its state on the host")
    parser.add_argument(
        "--bare", action="store_true", help="time steps without a trainer too, for its overhead"
    )
    parser.add_argument("--name", default="sft", help="of the result file")
    args = parser.parse_args()

    enable_cache()
    start = time.perf_counter()
    rows = [(text, Row.parse(text)) for text in args.rows]
    model = random_model(
        args.shape,
        full_finetuning=args.full_finetuning,
        offload_embedding=any(row.offload_embedding for _, row in rows),
    )
    load_seconds = time.perf_counter() - start
    weights_gb = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e9
    print(f"weights: {weights_gb:.2f} GB in {load_seconds:.1f} s; peak {peak_gb():.2f} GB", flush=True)
    model = FastLanguageModel.get_peft_model(
        model, r=args.rank, lora_alpha=16
    )  # which leaves a whole one as it is

    settings = {"optim": args.optim, "offload_optimizer": args.offload_optimizer}
    results = []
    for text, row in rows:
        if not row.offload_embedding:
            model.params["embed_tokens"] = jax.tree.map(on_device, model.params["embed_tokens"])
        try:
            results.append(measure(model, row, args.steps, args.bare, **settings))
            print({k: v for k, v in results[-1].items() if k != "loss"}, flush=True)
        except (jax.errors.JaxRuntimeError, JaxtuneError) as error:
            results.append({"row": text, "error": str(error)[:600]})
            print(results[-1], flush=True)
        record(args.name, results, shape=args.shape, rank=args.rank, weights_gb=weights_gb, load_seconds=load_seconds,
               limit_gb=limit_gb(),
               note="peak_gb is the process's so far: rows run from small to large")  # fmt: skip


if __name__ == "__main__":
    main()
