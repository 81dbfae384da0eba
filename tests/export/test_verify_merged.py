"""A merged folder is read back before it bears its name: its bytes, and what each layer computes."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import torch

from jaxtune import FastLanguageModel, add_new_tokens
from jaxtune.errors import AdapterError, ExportError
from jaxtune.export import compressed_folder, hf_folder, merge, merged_4bit
from jaxtune.export.verify import adapter as verify_adapter
from jaxtune.export.verify import packed as verify_packed
from jaxtune.lora.tree import modules
from tests.export.adapted import Adapted
from tests.kit import families, models

SAID = re.compile(r"logits off by (\S+); one part \(.*\) by (\S+), which may be off by (\S+)\.")


def awake(model):
    """With an adapter that changes something, but for its padding, which training leaves alone."""
    rng = np.random.default_rng(0)
    noise = lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(np.float32)
    model.lora = jax.tree.map(np.asarray, model.lora)
    for _, leaves in modules(model.lora):
        if "a" in leaves:
            used = (leaves["a"] != 0).any(axis=-1)
            leaves["b"] = leaves["b"] + noise(leaves["b"]) * used[:, None]
        leaves |= {name: leaf + noise(leaf) for name, leaf in leaves.items() if name not in ("a", "b")}
    return model


def saved(model, folder, caplog, **options):
    """What the log says: by how much the logits are off, by how much a part, by how much it may be."""
    caplog.clear()
    with caplog.at_level("INFO"):
        model.save_pretrained_merged(folder, **options)
    (found,) = filter(None, map(SAID.search, caplog.messages))
    return tuple(map(float, found.groups()))


LOCAL_GLOBAL = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("case", "overrides"), [("gemma3_text", LOCAL_GLOBAL), ("phi4-mini", {}), ("granite", {}), ("olmo2", {})]
)
def test_families_that_differ_from_llama(case, overrides, tmp_path, caplog):
    folder = models.save(families.random_model(case, **overrides), tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    logits, part, bound = saved(
        awake(FastLanguageModel.get_peft_model(model, r=4)), tmp_path / "merged", caplog
    )
    assert bound == 1e-4
    assert max(logits, part) < 2e-5


KINDS = {
    "DoRA, head and embedding whole": {"use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    "rsLoRA, low-rank embedding and head": {
        "use_rslora": True, "target_modules": r".*(q_proj|down_proj|embed_tokens|lm_head)",
    },
    "a head that remains the embedding": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["q_proj"]},
    "biases, some layers, ranks of their own": {
        "bias": "all", "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1],
        "rank_pattern": {"up_proj": 7}, "alpha_pattern": {"k_proj": 11},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind, tmp_path, caplog):
    theirs = models.random_llama(tie_word_embeddings=True, attention_bias=True)
    folder = models.save(theirs, tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    model = awake(FastLanguageModel.get_peft_model(model, r=4, **KINDS[kind]))
    logits, part, bound = saved(model, tmp_path / "merged", caplog)
    assert bound == 1e-4
    assert max(logits, part) < 2e-5


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.031), ("float16", 0.0039)])
def test_sixteen_bits_may_be_off_by_their_rounding(dtype, bound, tmp_path, caplog):
    folder = models.save(models.random_llama().to(getattr(torch, dtype)), tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32")  # trained in 4 bits, merged in 16
    logits, part, allowed = saved(
        awake(FastLanguageModel.get_peft_model(model, r=4)), tmp_path / "merged", caplog
    )
    assert allowed == pytest.approx(bound, rel=0.05)
    assert 0.05 * bound < part < 0.25 * bound
    assert 0.05 * bound < logits < bound


def test_added_tokens_and_a_longer_context(tmp_path, caplog):
    theirs = models.random_llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    folder = models.save(theirs, tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=1024, dtype="float32", load_in_4bit=False
    )
    add_new_tokens(model, tokenizer, ["<new>", "<newer>"])
    model = awake(FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["embed_tokens"]))
    assert max(saved(model, tmp_path / "merged", caplog, tokenizer=tokenizer)[:2]) < 2e-5


def test_a_model_that_was_trained_whole(tmp_path, caplog):
    folder = models.save(models.random_llama().to(torch.bfloat16), tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", full_finetuning=True)
    model.params = jax.tree.map(lambda x: x * 1.01, model.params)
    _, part, bound = saved(model, tmp_path / "merged", caplog)
    assert 0 < part < bound == 0.031


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("verified"), dtype="bfloat16", lora={"use_dora": True})


MISTAKES = {
    "one module is left out": lambda update: (
        dataclasses.replace(update, b=0 * update.b) if update.module.endswith("1.mlp.down_proj") else update
    ),
    "half the scale": lambda update: dataclasses.replace(update, b=update.b / 2),
    "rows in another order": lambda update: dataclasses.replace(update, b=np.roll(update.b, 1, axis=0)),
    "DoRA's lengths are forgotten": lambda update: dataclasses.replace(update, lengths=None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_merge_is_seen(adapted, tmp_path, monkeypatch, mistake):
    added_to = merge.Update.added_to
    monkeypatch.setattr(
        merge.Update, "added_to", lambda update, *rest: added_to(MISTAKES[mistake](update), *rest)
    )
    where = "Layer 1" if "one module" in mistake else r"Layer \d"
    with pytest.raises(
        ExportError, match=rf"{where} of the merged model, read back: the relative error"
    ) as caught:
        adapted.save_merged(tmp_path / "merged")
    assert "verify=False" in caught.value.fix
    assert not list(tmp_path.iterdir())
    adapted.save_merged(tmp_path / "merged", verify=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rms_norm_eps": 0.5}, "of the merged model, read back: the relative error"),
        ({"vocab_size": 383}, "config.json, read back, says of the merged model: {'tokens': 383"),
    ],
)
def test_a_config_that_says_something_else_is_seen(adapted, tmp_path, monkeypatch, settings, said):
    """The folder's own config.json is what its model is built from."""
    as_hf = hf_folder.context.as_hf
    monkeypatch.setattr(hf_folder.context, "as_hf", lambda *given: {**as_hf(*given), **settings})
    with pytest.raises(ExportError, match=re.escape(said)):
        adapted.save_merged(tmp_path / "merged")


def spoiled(monkeypatch, spoil):
    """Weights change between writing and reading."""
    write = hf_folder.write_safetensors

    def spoiling(path, *rest):
        write(path, *rest)
        path.write_bytes(spoil(path.read_bytes()))

    monkeypatch.setattr(hf_folder, "write_safetensors", spoiling)


FLAWS = {
    "a bit": (lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:], "has other bytes than were written"),
    "another name": (lambda data: data.replace(b"1.mlp.up_proj", b"1.mlp.uq_proj"), "1.mlp.up_proj.weight is absent"),
    "another shape": (lambda data: data.replace(b"[256,128]", b"[128,256]"), r"is bfloat16 \[128, 256\]"),
    "another dtype": (lambda data: data.replace(b'"BF16"', b'"F16" '), "is float16"),
}  # fmt: skip


@pytest.mark.parametrize("flaw", FLAWS)
def test_weights_that_changed_after_they_were_written(adapted, tmp_path, monkeypatch, flaw):
    spoil, said = FLAWS[flaw]
    spoiled(monkeypatch, spoil)
    with pytest.raises(ExportError, match=said):
        adapted.save_merged(tmp_path / "merged")
    assert not list(tmp_path.iterdir()), "what failed bears no name"
    adapted.save_merged(tmp_path / "merged", verify=False)


@pytest.fixture(scope="module")
def in_four_bits(tmp_path_factory):
    folder = models.save(
        models.random_llama(hidden_size=160, num_hidden_layers=1), tmp_path_factory.mktemp("base")
    )
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32")
    return model, awake(FastLanguageModel.get_peft_model(model, r=4))


def test_a_merge_in_four_bits(in_four_bits, tmp_path, caplog):
    """Rows of 160, which blocks of 64 cross, are among them."""
    with caplog.at_level("INFO"):
        in_four_bits[1].save_pretrained_merged(tmp_path / "merged", save_method="merged_4bit")
    assert "12 weights, read back: the packed arrays that were written." in caplog.messages
    (said,) = (line for line in caplog.messages if "as 4 bits allow" in line)
    assert 0.5 < float(re.search(r"at most (\S+) of the bound", said)[1]) <= 1


def test_packed_weights_as_they_are(in_four_bits, tmp_path, monkeypatch):
    model, _ = in_four_bits
    monkeypatch.setattr(verify_packed.layout, "from_bitsandbytes", lambda flat, shape, zero: flat ^ 1)
    with pytest.raises(ExportError, match=r"model\.layers\.0\.\S+, read back, is not what was written"):
        model.save_pretrained(tmp_path / "packed")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "packed", verify=False)


def test_four_bits_of_other_weights(in_four_bits, tmp_path, monkeypatch):
    """They come back as they were packed, but are not those of the merge."""
    _, model = in_four_bits
    load_params = merged_4bit.load_params

    def turned(*arguments, **options):
        params = load_params(*arguments, **options)
        projection = params["layers"][0][0]["mlp"]["down_proj"]
        turned_around = lambda leaf: leaf[:, ::-1] if leaf.ndim == 3 else leaf
        projection["weight"] = jax.tree.map(turned_around, projection["weight"])
        return params

    monkeypatch.setattr(merged_4bit, "load_params", turned)
    with pytest.raises(
        ExportError, match=r"down_proj\.weight, read back, is off by .* times what 4 bits allow"
    ):
        model.save_pretrained_merged(tmp_path / "merged", save_method="merged_4bit")
    assert not list(tmp_path.iterdir())
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_4bit", verify=False)


@pytest.mark.parametrize("scheme", ["fp8_dynamic", "w8a16", "w4a16"])
def test_compressed_tensors(adapted, tmp_path, monkeypatch, caplog, scheme):
    save = lambda **options: adapted.model.save_pretrained_merged(
        tmp_path / "out", save_method=scheme, **options
    )
    with caplog.at_level("INFO"):
        save()
    (said,) = (line for line in caplog.messages if "of a half step" in line)
    assert said.startswith("14 linears, read back: the nearest codes")
    assert 0.5 < float(re.search(r"at most (\S+) of a half step", said)[1]) <= 1
    codes_of = compressed_folder.codes_of
    monkeypatch.setattr(compressed_folder, "codes_of", lambda *given: codes_of(*given)[:, ::-1])
    with pytest.raises(ExportError, match=r"read back, is off by \S+ times what its \d bits allow"):
        save()
    save(verify=False)


def test_an_adapter(adapted, tmp_path, monkeypatch, caplog):
    with caplog.at_level("INFO"):
        adapted.model.save_pretrained(tmp_path / "adapter")
    assert any("The adapter, read back: its settings and" in line for line in caplog.messages)
    read = verify_adapter.read_file

    def changed(path):
        tensors = read(path)
        name = next(iter(tensors))
        return {**tensors, name: tensors[name] + np.float32(1e-6)}

    monkeypatch.setattr(verify_adapter, "read_file", changed)
    with pytest.raises(
        ExportError, match=r"The adapter, read back: base_model\.model\.\S+ is not what was written"
    ):
        adapted.model.save_pretrained(tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    adapted.model.save_pretrained(tmp_path / "again", verify=False)


def test_an_adapter_that_diverged(adapted, tmp_path):
    """Nobody could load it, us included."""
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), adapted.model.lora)
    model = dataclasses.replace(adapted.model, lora=broken)
    with pytest.raises(
        AdapterError, match=r"read back: base_model\.model\.\S+ holds NaN.*\n.*\n.*verify=False"
    ):
        model.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "adapter", verify=False)


def test_an_adapter_whose_settings_changed(adapted, tmp_path, monkeypatch):
    dumps = json.dumps
    monkeypatch.setattr(
        json, "dumps", lambda value, **options: dumps(value, **options).replace('"r": 4', '"r": 5')
    )
    with pytest.raises(ExportError, match=r"adapter_config\.json, read back, means LoraConfig\(r=5"):
        adapted.model.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
