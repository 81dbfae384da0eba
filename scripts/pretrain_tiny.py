"""Pretrains the embedded model (jaxtune/assets/tiny) from nothing, on the world of tiny_world.py: minutes on a GPU.

    python scripts/pretrain_tiny.py --out jaxtune/assets/tiny

A Llama of 3.5 million weights with a byte-level BPE of 2,048 tokens. Every task is learnt as well as it goes, but
addition only until it is right about every second time, so that reinforcement has something to improve: from then on
its problems are left out, but for a few that keep it from being forgotten. Accuracy by task goes to training.json.
"""

import argparse
import functools
import json
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors.numpy import save_file
from tiny_world import FACTS, TALK, TASKS, WORDS, casually, draw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxtune.data.templates import TEMPLATES
from jaxtune.inference.generate import generate
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM
from jaxtune.models.config import LayerKind, ModelConfig, RopeConfig
from jaxtune.training.losses import next_token_loss, trained_tokens

VOCAB = 2048
TEMPLATE = next(template for template in TEMPLATES if template.name == "chatml").jinja
END, PAD, OPEN, CLOSE = SPECIALS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's splitting rule: every digit is a token of its own, which addition needs, and llama.cpp knows it by name.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = ModelConfig(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2, head_dim=64,
    rms_norm_eps=1e-5, tie_word_embeddings=True, layers=(LayerKind(),) * 5, ropes=(RopeConfig(theta=10000.0),),
    max_position=1024,
)  # fmt: skip
ROWS, LENGTH = 128, 256
BAND = (0.45, 0.62)
"""Held-out addition is to end here."""


def train_tokenizer(rng: random.Random) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for pair in TALK for text in pair]
    texts += [text for asked in FACTS for fact in asked for text in (fact.question, fact.answer, fact.short)]
    texts += [text for _ in range(20000) for text in draw(rng.choice(TASKS), rng)]
    # Words in every spelling, with and without the space before, and pieces of others to fill the vocabulary.
    texts += [form for word in WORDS for form in (word, f" {word}", word.upper(), word.capitalize())] * 5
    texts += ["".join(rng.choice("etaoinshrdlucmfwypvbgkjqxz") for _ in range(3)) for _ in range(30000)]
    backend.train_from_iterator(texts, trainer)
    assert backend.get_vocab_size() == VOCAB
    return backend


def question_text(question: str) -> str:
    return f"{OPEN}user\n{question}{CLOSE}\n{OPEN}assistant\n"


def make_batch(encode: Callable, rng: random.Random, weights: dict[str, float]) -> dict[str, np.ndarray]:
    """ROWS rows of conversations end to end. Questions are trained on too: a model that has learnt nothing but answers
    by heart is sure of everything, and hard to teach anything else."""
    tasks = rng.choices(list(weights), list(weights.values()), k=ROWS * LENGTH // 12)
    batch = {
        name: np.zeros((ROWS, LENGTH), np.int32) for name in ("tokens", "labels", "segment_ids", "positions")
    }
    batch["labels"].fill(-100)
    row = start = segment = 0
    for ask, answer in (
        encode(casually(question, rng), answer) for question, answer in (draw(task, rng) for task in tasks)
    ):
        ids = ask + answer
        if start + len(ids) > LENGTH:
            row, start, segment = row + 1, 0, 0
            if row == ROWS:
                break
        end, segment = start + len(ids), segment + 1
        batch["tokens"][row, start:end] = ids
        batch["labels"][row, start : end - 1] = ids[1:]
        batch["segment_ids"][row, start:end] = segment
        batch["positions"][row, start:end] = np.arange(len(ids))
        start = end
    return batch


def init_params(model: CausalLM, key: jax.Array) -> dict:
    def leaf(path, spec):
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(spec.shape, jnp.float32)
        return 0.02 * jax.random.normal(
            jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()) % 2**31), spec.shape
        )

    return jax.tree_util.tree_map_with_path(leaf, model.skeleton)


def accuracy(model, params, tokenizer, task: str, count: int = 256) -> float:
    """Greedy answers that are right to the letter; addition on problems that were never trained on."""
    rng = random.Random(f"evaluate {task}")
    pairs = [draw(task, rng, held_out=True) for _ in range(count)]
    prompts = [tokenizer.encode(question_text(q), add_special_tokens=False).ids for q, _ in pairs]
    stop = tokenizer.token_to_id(CLOSE)
    answers = generate(model, params, None, prompts, max_new_tokens=40, stop_ids=[stop])
    right = [tokenizer.decode(a).strip() == answer for a, (_, answer) in zip(answers, pairs, strict=True)]
    return sum(right) / count


def save(out: Path, params, tokenizer: Tokenizer, record: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        path = names.keys(path)
        each = leaf if names.is_stacked(path) else [leaf]
        for name, one in zip(names.hf_names(CONFIG, path), each, strict=True):
            tensors[name] = np.ascontiguousarray(one.astype(ml_dtypes.bfloat16))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": ids[END], "eos_token_id": ids[CLOSE],
        "pad_token_id": ids[PAD], "initializer_range": 0.02, "use_cache": True, "dtype": "bfloat16",
    }  # fmt: skip
    special = {"bos_token": END, "eos_token": CLOSE, "pad_token": PAD}
    files = {
        "config.json": config,
        "generation_config.json": {f"{k}_id": ids[v] for k, v in special.items()},
        "tokenizer_config.json": {
            **special, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024,
            "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
        },
        "training.json": record,
    }  # fmt: skip
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer.save(str(out / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer(rng)

    @functools.cache
    def encode(question: str, answer: str) -> tuple[list[int], list[int]]:
        texts = question_text(question), f"{answer}{CLOSE}\n"
        ask, reply = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        return ask, reply

    model = CausalLM(CONFIG)
    params = init_params(model, jax.random.key(args.seed))
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 200, args.steps, 2e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))
    state = optimizer.init(params)
    loss = next_token_loss(model)

    @jax.jit
    def step(params, state, batch):
        def mean(params):
            half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
            return loss(None, half, batch) / trained_tokens(batch).astype(jnp.float32)

        value, grads = jax.value_and_grad(mean)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    weights = dict.fromkeys(TASKS, 1.0) | {"facts": 2.0, "styles": 3.0}
    started, history = time.perf_counter(), []
    for number in range(1, args.steps + 1):
        params, state, value = step(params, state, make_batch(encode, rng, weights))
        if number % 50 == 0 or number == args.steps:
            add = accuracy(model, params, tokenizer, "addition")
            # A thermostat: as many problems as it takes to stay in the band.
            weights["addition"] = 1.0 if add < BAND[0] else 0.1 if add < BAND[1] else 0.0
            history.append({"step": number, "loss": float(value), "addition": add})
            print(history[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
            in_band = BAND[0] <= add <= BAND[1]
            if number > args.steps // 2 and in_band:
                others = {
                    task: accuracy(model, params, tokenizer, task) for task in TASKS if task != "addition"
                }
                record = {"accuracy": {"addition": add, **others}, "step": number, "history": history,
                          "seconds": time.perf_counter() - started, "device": jax.devices()[0].device_kind}  # fmt: skip
                print(record["accuracy"], flush=True)
                save(args.out, params, tokenizer, record)


if __name__ == "__main__":
    main()
