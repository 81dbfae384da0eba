"""A merged folder is, to transformers, the 16-bit base with the adapter; what a merge leaves alone keeps its bytes."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from jaxtune import get_chat_template
from jaxtune.export import ahead, merge
from jaxtune.export.hf_folder import parse_size
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.lora.tree import modules
from tests.export.adapted import Adapted, logits_of_folder
from tests.kit.compare import assert_close, relative_rms

SETTINGS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "sharded": {"max_shard_size": "200KB"},
}


@pytest.fixture(scope="module")
def sharded_bf16(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("bf16"), dtype="bfloat16", max_shard_size="200KB")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_transformers_sees_base_plus_adapter(tmp_path, settings):
    adapted = Adapted(tmp_path, **settings)
    merged = logits_of_folder(adapted.save_merged(tmp_path / "merged"))
    assert relative_rms(merged, logits_of_folder(adapted.base)) > 1e-2, "the adapter must matter"
    assert_close(merged, adapted.logits, 1e-4, "against jaxtune's base + adapter")
    assert_close(merged, adapted.peft_logits, 1e-4, "against PEFT's")
    stored = Checkpoint(tmp_path / "merged").names
    assert stored == Checkpoint(adapted.base).names
    assert ("lm_head.weight" in stored) is not settings.get("tie_word_embeddings", False)


def test_sixteen_bits_are_rounded_once(sharded_bf16, tmp_path):
    folder = sharded_bf16.save_merged(tmp_path / "merged")
    merged, base = Checkpoint(folder), Checkpoint(sharded_bf16.base)
    config = sharded_bf16.model.causal_lm.lora_config
    expected = {}
    for path, ab in modules(sharded_bf16.model.lora):
        for name, a, b in zip(
            sharded_bf16.model.module_names(path), *map(np.asarray, (ab["a"], ab["b"])), strict=True
        ):
            weight = base.read(f"{name}.weight").astype(np.float64)
            expected[f"{name}.weight"] = weight + config.scale * b.astype(np.float64) @ a.astype(np.float64)
    assert len(expected) == 14
    for name in base.names:
        assert merged.dtype(name) == base.dtype(name)
        if name not in expected:
            assert merged.read(name).tobytes() == base.read(name).tobytes(), name
            continue
        # Half a unit in the last of 8 binary digits; the sum in float32 may fall on the other side of a tie.
        error = np.abs(merged.read(name).astype(np.float64) - expected[name])
        assert (error <= 2.0**-8 * 1.001 * np.abs(expected[name]) + 1e-7).all(), name
        one_rounding = expected[name].astype(np.float32).astype(base.dtype(name))
        assert (merged.read(name) == one_rounding).mean() > 0.999


def test_shards_are_the_originals(sharded_bf16, tmp_path):
    folder = sharded_bf16.save_merged(tmp_path / "merged")
    index, theirs = (read_json(at / "model.safetensors.index.json") for at in (folder, sharded_bf16.base))
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"] == theirs["weight_map"]
    assert index["metadata"] == theirs["metadata"]
    for shard in set(index["weight_map"].values()):
        with safe_open(folder / shard, "pt") as ours, safe_open(sharded_bf16.base / shard, "pt") as original:
            assert set(ours.keys()) == set(original.keys())
            assert ours.metadata() == original.metadata()


def test_a_smaller_shard_size_splits_anew(sharded_bf16, tmp_path):
    folder = sharded_bf16.save_merged(tmp_path / "merged", max_shard_size="100KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > len(list(sharded_bf16.base.glob("*.safetensors")))
    one = sharded_bf16.save_merged(tmp_path / "one")
    np.testing.assert_array_equal(logits_of_folder(folder), logits_of_folder(one))


@pytest.mark.parametrize(
    ("given", "size"), [(17, 17), ("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("300", 300)]
)
def test_shard_sizes_are_read_as_transformers_reads_them(given, size):
    assert parse_size(given) == size


def test_without_a_tokenizer_the_originals_files_are_copied(sharded_bf16, tmp_path):
    ours, theirs = files(sharded_bf16.save_merged(tmp_path / "merged")), files(sharded_bf16.base)
    assert ours.keys() == theirs.keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert ours[name] == theirs[name]
    assert AutoConfig.from_pretrained(tmp_path / "merged").to_dict() == AutoConfig.from_pretrained(
        sharded_bf16.base
    ).to_dict() | {"_name_or_path": str(tmp_path / "merged")}


def test_a_given_tokenizer_is_saved_as_trained(sharded_bf16, tmp_path):
    (sharded_bf16.base / "tokenizer.model").write_bytes(b"sentences")
    tokenizer = get_chat_template(AutoTokenizer.from_pretrained(sharded_bf16.base), "chatml")
    folder = sharded_bf16.save_merged(tmp_path / "merged", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token == "<|im_end|>"
    # transformers and vLLM stop where this file says, so the end of a turn has to be in it.
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [1, tokenizer.eos_token_id]
    assert (folder / "tokenizer.model").read_bytes() == b"sentences"
    (sharded_bf16.base / "tokenizer.model").unlink()


def test_the_end_of_a_turn_goes_into_the_config_where_there_is_no_generation_config(tmp_path):
    adapted = Adapted(tmp_path)
    (adapted.base / "generation_config.json").unlink()
    tokenizer = get_chat_template(adapted.tokenizer, "chatml")
    folder = adapted.save_merged(tmp_path / "merged", tokenizer=tokenizer)
    assert read_json(folder / "config.json")["eos_token_id"] == [1, tokenizer.eos_token_id]
    assert not (folder / "generation_config.json").exists()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_what_the_weights_are(sharded_bf16, tmp_path, key):
    path = sharded_bf16.base / "config.json"
    before = path.read_text()
    config = read_json(path)
    del config["dtype"]
    path.write_text(json.dumps({**config, key: "float32", "quantization_config": {"quant_method": "x"}}))
    folder = sharded_bf16.save_merged(tmp_path / "merged")
    path.write_text(before)
    assert read_json(folder / "config.json") == {**config, key: "bfloat16"}


def test_no_adapter_gives_the_base(tmp_path):
    adapted = Adapted(tmp_path, adapter=False)
    folder = adapted.save_merged(tmp_path / "merged")
    ours, theirs = Checkpoint(folder), Checkpoint(adapted.base)
    assert all(ours.read(name).tobytes() == theirs.read(name).tobytes() for name in theirs.names)


def test_an_earlier_merge_is_replaced_whole(sharded_bf16, tmp_path):
    single = Adapted(tmp_path / "other", seed=1)
    tokenizer = get_chat_template(single.tokenizer, "chatml")
    folder = single.save_merged(tmp_path / "merged", tokenizer=tokenizer)
    sharded_bf16.save_merged(folder)
    # Otherwise model.safetensors would win over the index, and the template over the tokenizer's own.
    assert files(folder) == files(sharded_bf16.save_merged(tmp_path / "fresh"))


def test_memory_holds_a_few_tensors(tmp_path, monkeypatch):
    adapted = Adapted(tmp_path, num_hidden_layers=24, hidden_size=256, intermediate_size=512, vocab_size=512)
    whole = sum(path.stat().st_size for path in adapted.base.glob("*.safetensors"))
    largest = 512 * 256 * 4
    monkeypatch.setattr(ahead, "AHEAD", largest)
    monkeypatch.setattr(merge, "AT_ONCE", largest // 16)
    _ = [np.asarray(leaf) for _, ab in modules(adapted.model.lora) for leaf in ab.values()]
    adapted.save_merged(tmp_path / "warm")
    with Checkpoint(adapted.base) as base:
        layer = sum(4 * np.prod(base.shape(name)) for name in base.names if ".layers.0." in name)
    tracemalloc.start()
    try:
        adapted.save_merged(tmp_path / "merged", verify=False)
        merged_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        adapted.save_merged(tmp_path / "merged")
        verified_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        adapted.save_gguf(tmp_path / "out", "q8_0")
        gguf_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert whole > 25 * largest
    assert merged_peak < 6 * largest
    assert verified_peak < 6 * largest + 2 * layer, "one of the base, one of the merge"
    assert gguf_peak < 10 * largest


def test_torch_and_numpy_agree_on_the_file(sharded_bf16, tmp_path):
    folder = sharded_bf16.save_merged(tmp_path / "merged")
    checkpoint = Checkpoint(folder)
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no mapping
                ours = torch.from_numpy(checkpoint.read(name).astype(np.float32))
                assert torch.equal(opened.get_tensor(name).float(), ours)
