"""`jaxtune export`: adapters from anywhere, and whole models, without loading any weights."""

import json
import os
import shutil
import signal

import gguf
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import jaxtune.api
from jaxtune.cli.export import FLAGS
from jaxtune.cli.in_shell import with_flags
from jaxtune.cli.main import main
from jaxtune.export import hf_folder
from jaxtune.export.gguf import folder as gguf_folder
from jaxtune.export.gguf.sizes import LLAMA_8B, sizes
from tests.export.adapted import Adapted, logits_of_folder, torch_logits
from tests.kit import models
from tests.kit.compare import assert_close
from tests.kit.disk import files_of_at_most


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("export"), dtype="bfloat16", num_hidden_layers=1)


@pytest.fixture(scope="module")
def of_peft(made, tmp_path_factory):
    """An adapter that PEFT made, with what a merge of it gives."""
    base = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings)
    folder = tmp_path_factory.mktemp("peft")
    adapted.save_pretrained(folder)
    return folder, torch_logits(adapted)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to be in; and weights that cannot be loaded."""

    def loaded(*_, **__):
        raise AssertionError("an export has no need of that")

    monkeypatch.setattr(jaxtune.api, "load_params", loaded)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, code=0):
    assert main(["export", *map(str, arguments)]) == code


def tensors(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def test_an_adapter_of_pefts_as_a_merged_folder(of_peft, here, capsys):
    folder, expected = of_peft
    run(folder, "--to", "merged_16bit", "--output-dir", "merged")
    assert_close(logits_of_folder(here / "merged"), expected, 2e-2)
    assert "merged/" in capsys.readouterr().out


def test_an_adapter_of_pefts_as_gguf(of_peft, here, capsys):
    """As of the merged folder, which is exported as a model."""
    run(of_peft[0], "--to", "gguf", "--quantization-method", "q4_k_m", "bf16", "--output-dir", "mine")
    names = [f"base.{method}.gguf" for method in ("Q4_K_M", "BF16")]
    assert {path.name for path in (here / "mine_gguf").iterdir()} == {"Modelfile", "README.md", *names}
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    run(of_peft[0], "--to", "merged_16bit")
    merged = next(path for path in here.iterdir() if path.name.endswith("-merged_16bit"))
    run(merged, "--quantization-method", "bf16", "--output-dir", "again_gguf")
    (again,) = (here / "again_gguf").glob("*.gguf")
    for name, tensor in tensors(here / "mine_gguf" / names[1]).items():
        np.testing.assert_array_equal(tensor.data, tensors(again)[name].data)


def test_a_whole_model(made, here):
    run(made.base, "--quantization-method", "f16", "--max-shard-size", "200KB", "--output-dir", "out")
    files = sorted((here / "out_gguf").glob("*.gguf"))
    assert files[0].name == f"base.F16-00001-of-{len(files):05d}.gguf"
    assert len(files) > 1


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    base = Adapted(folder, num_hidden_layers=1, adapter=False, vocab_size=len(models.tokenizer()))
    jaxtune.add_new_tokens(base.model, base.tokenizer, ["<new>"])
    model = jaxtune.FastLanguageModel.get_peft_model(base.model, r=4)
    model.save_pretrained(folder / "adapter", base.tokenizer)
    return folder / "adapter", np.asarray(model.params["embed_tokens"]["weight"])


def test_an_adapter_with_tokens_of_its_own(with_tokens, here):
    """Its folder has the embedding and the tokenizer that go with them."""
    adapter, embedding = with_tokens
    run(adapter, "--to", "merged_16bit", "--output-dir", "merged")
    merged = AutoModelForCausalLM.from_pretrained(here / "merged")
    np.testing.assert_array_equal(merged.get_input_embeddings().weight.detach(), embedding)
    assert AutoTokenizer.from_pretrained(here / "merged").convert_tokens_to_ids("<new>") == len(embedding) - 1


def test_the_adapter_again(of_peft, here):
    run(of_peft[0], "--to", "lora", "--output-dir", "adapter")
    ours, theirs = (peft.load_peft_weights(str(path)) for path in (here / "adapter", of_peft[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_place_for_the_base(made, of_peft, here, capsys):
    adapter = shutil.copytree(of_peft[0], here / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    moved = {**settings, "base_model_name_or_path": "nowhere/at-all/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(moved))
    run("adapter", "--output-dir", "out", code=1)
    assert "nowhere/at-all/base" in capsys.readouterr().err
    run("adapter", "--base-model", made.base, "--output-dir", "out")
    assert (here / "out_gguf" / "base.Q8_0.gguf").is_file()


def test_a_wrong_base(of_peft, here, capsys):
    other = models.save(models.random_llama(hidden_size=64, num_hidden_layers=1), here / "other")
    run(of_peft[0], "--base-model", other, "--output-dir", "out", code=1)
    said = capsys.readouterr().err
    assert "has the shape" in said
    assert "Traceback" not in said
    assert [path.name for path in here.iterdir()] == ["other"]


WRONG = {
    "no model": ([], "No model was named"),
    "an unknown kind": (["base", "--to", "merged_16bits"], "Did you mean 'merged_16bit'"),
    "an unknown method": (["base", "--quantization-method", "q4km"], "Did you mean 'q4_k_m'"),
    "a method that needs more": (["base", "--quantization-method", "iq1_s"], "without an importance matrix"),
    "a method of another kind": (
        ["base", "--to", "lora", "--quantization-method", "q8_0"], "--quantization-method with --to lora"
    ),
    "an importance matrix of another kind": (
        ["base", "--to", "merged_16bit", "--imatrix-file", "x"], "--imatrix-file with --to merged_16bit"
    ),
    "no such folder": (["./base"], "There is no folder './base'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_said_at_once(case, here, capsys):
    arguments, said = WRONG[case]
    run(*arguments, code=1)
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert said in shown
    assert not list(here.iterdir())


def test_a_base_for_a_model_that_has_none(made, capsys):
    run(made.base, "--base-model", made.base, code=1)
    said = capsys.readouterr().err
    assert f"--base-model {made.base}, and {made.base} is no adapter" in said
    assert "Leave --base-model out." in said


@pytest.mark.parametrize("to", ["gguf", "merged_16bit"])
def test_a_full_disk(made, here, capsys, to):
    with files_of_at_most(50_000):
        run(made.adapter, "--to", to, "--output-dir", "out", code=1)
    assert "failed" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_a_scheduler_that_wants_its_machine_back(made, here, monkeypatch):
    def ends(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(hf_folder, "verify_tensors", ends)
    with pytest.raises(SystemExit) as ended:
        run(made.adapter, "--to", "merged_16bit", "--output-dir", "out")
    assert ended.value.code == 128 + signal.SIGTERM
    assert not list(here.iterdir())


@pytest.mark.parametrize(("to", "name"), [("gguf", "out_gguf"), ("merged_16bit", "out"), ("lora", "out")])
def test_somebody_else_s_folder(made, here, capsys, to, name):
    (here / name).mkdir()
    (here / name / "thesis.tex").touch()
    run(made.adapter, "--to", to, "--output-dir", "out", code=1)
    assert "holds files that are not ours (thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in here.rglob("*")] == [name, "thesis.tex"]


def test_a_file_that_is_not_what_was_written(made, here, capsys, monkeypatch):
    write = gguf_folder.write_gguf

    def spoiling(path, *rest):
        write(path, *rest)
        path.write_bytes(path.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(gguf_folder, "write_gguf", spoiling)
    run(made.adapter, "--output-dir", "out", code=1)
    assert "has other bytes than were written" in capsys.readouterr().err
    assert not list(here.iterdir())
    run(made.adapter, "--output-dir", "out", "--no-verify")


def test_the_list(made, capsys, caplog):
    """Of Llama 3.1 8B as docs/export.md has it; of a model, without naming each of its rows that no block fills."""
    run("--list")
    shown = capsys.readouterr().out
    assert "Llama 3.1 8B" in shown
    row = next(line for line in shown.splitlines() if "q4_k_m" in line)
    assert "4.89" in row
    assert "4.9 GB" in row
    assert "also quantized, q4_k" in row
    assert all(
        method in shown for method in ("merged_16bit", "merged_4bit", "lora", "with --imatrix-file only")
    )
    run(made.adapter, "--list")
    shown = capsys.readouterr().out
    assert str(made.adapter) in "".join(shown.split())
    assert not caplog.messages


def test_a_listed_size_is_the_file_s(made, here):
    run(made.base, "--quantization-method", "q4_k_m", "--output-dir", "out")
    found = sizes(made.model.causal_lm.config)["q4_k_m"].nbytes
    read = tensors(here / "out_gguf" / "base.Q4_K_M.gguf")
    assert found == sum(tensor.n_bytes for name, tensor in read.items() if "rope_freqs" not in name)
    assert sizes(LLAMA_8B)["f32"].nbytes == 4 * 8_030_261_248


@pytest.mark.parametrize(
    ("in_python", "in_shell"),
    [
        (
            "Name it: original_model='org/name', or a folder.",
            "Name it: --original-model org/name, or a folder.",
        ),
        ("original_model='my model' and dequantize=True.", "--original-model 'my model' and --dequantize."),
        ('Use quantization_method="bf16" or "f32".', 'Use --quantization-method bf16 or "f32".'),
        ("set HF_TOKEN or pass token=.", "set HF_TOKEN or pass --token."),
        ("verify=False writes it; save_method=1 is none.", "--no-verify writes it; --to 1 is none."),
        ("Leave base_model out.", "Leave --base-model out."),
        ("max_seq_length=-1.", "--max-seq-length -1."),
        *[
            (same, same)
            for same in (
                "Set max_tokens=5 and verify == 3.",
                "/data/token=abc/base_model/m",
                "https://hub/x?token=hf_",
                "base_model_name_or_path",
                "the token",
                "quantization_method=['a', 'b']",
            )
        ],
    ],
)
def test_options_are_called_what_the_shell_calls_them(in_python, in_shell):
    assert with_flags(in_python, FLAGS) == in_shell
