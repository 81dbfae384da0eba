"""The model card of everything that is saved: what the hub reads in it, how to load it, how it was trained."""

import dataclasses

import pytest
import yaml

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer
from jaxtune.api import without_weights
from jaxtune.export import card
from jaxtune.export.card import CARD_FILE, OURS, Card
from jaxtune.lora.config import LoraConfig
from jaxtune.reporting.last_run import LastRun
from tests.export.adapted import Adapted

BASE = "somebody/Base-1B"
RUN = LastRun("sft", {"steps": "60", "mean loss": "1.2345"})


def head_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    ("form", "library", "relation", "usage"),
    [
        (card.ADAPTER, "peft", "adapter", 'AutoPeftModelForCausalLM.from_pretrained("me/tuned")'),
        (card.MODEL, "transformers", "finetune", 'AutoModelForCausalLM.from_pretrained("me/tuned")'),
        (card.GGUF, "gguf", "finetune", "llama-cli -m Base-1B.Q8_0.gguf\nollama create tuned -f Modelfile"),
        (card.GGUF_ADAPTER, "gguf", "adapter", "llama-cli -m base.gguf --lora Base-1B.Q8_0.gguf"),
    ],
    ids=["adapter", "merged", "gguf", "gguf adapter"],
)
def test_what_the_hub_reads_and_how_to_load_it(form, library, relation, usage):
    made = Card(
        form, "me/tuned", BASE, lora=LoraConfig(), run=RUN, files=["Base-1B.Q8_0.gguf"], tags=["mine"], datasets=["a/b"]
    )  # fmt: skip
    assert head_of(str(made)) == {
        "base_model": BASE,
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["jaxtune", "lora", "sft", "mine"],
        "datasets": ["a/b"],
    }
    assert usage in str(made) and f"[{BASE}](https://huggingface.co/{BASE})" in str(made)


def test_the_hub_s_own_reader_takes_it():
    from huggingface_hub import ModelCard

    read = ModelCard(str(Card(card.ADAPTER, "me/tuned", BASE)))
    assert (read.data.base_model, read.data.library_name) == (BASE, "peft")
    assert read.text.lstrip().startswith(OURS)


def test_settings_that_are_not_the_default_and_the_run():
    config = LoraConfig(
        r=8, lora_alpha=4, use_rslora=True, rank_pattern={"q_proj": 2}, modules_to_save=("lm_head",)
    )
    text = str(Card(card.ADAPTER, "tuned", BASE, lora=config, run=LastRun("grpo", {"a | b": "c | d"})))
    for row in (
        "| rank | 8 |", "| alpha | 4 |", "| trained whole | lm_head |", "| ranks of their own | `q_proj` 2 |",
        "| scaled by | alpha / sqrt(rank) (rsLoRA) |", r"| a \| b | c \| d |",
    ):  # fmt: skip
        assert row in text
    assert "dropout" not in text and "DoRA" not in text


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"a | b": "c | d", "pattern": r"`.*\.(q|k)_proj`", "rate": "1e-4, linear", "empty": "", "rank": "9"},
        {"folder": "C:\\x\\", "escaped": r"q\|k"},
    ],
)
def test_a_run_is_read_back(tmp_path, facts):
    made = Card(card.ADAPTER, "tuned", BASE, lora=LoraConfig(), run=LastRun("grpo", facts))
    made.write(tmp_path)
    assert card.read_run(tmp_path) == made.run
    edited = "| Benchmark | Score |\n| :--- | ---: |\n| MMLU | 61.2 |\n"
    for text in (f"{made}\n## Evaluation\n\n{edited}", str(made).replace("## Use", f"{edited}\n## Use")):
        (tmp_path / CARD_FILE).write_text(text.replace("| method |", "|  method   |"))
        assert card.read_run(tmp_path) == made.run
    (tmp_path / CARD_FILE).write_bytes(str(made).replace("## Use", "für").encode("latin-1"))
    assert card.read_run(tmp_path) == made.run
    made._replace(run=None).write(tmp_path)
    assert card.read_run(tmp_path) is None
    (tmp_path / CARD_FILE).write_text(str(made).replace(OURS, ""))
    assert card.read_run(tmp_path) is None


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("---\nlicense: mit\nlicense_link: LICENSE\n---\n# Base", {"license": "mit"}),
        (
            "---\r\nlicense: other\r\nlicense_name: own\r\nlicense_link: https://a.b/c\r\n---\r\n",
            {"license": "other", "license_name": "own", "license_link": "https://a.b/c"},
        ),
        ("# Without a head\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        (None, {}),
    ],
)
def test_the_license_is_the_base_s(tmp_path, theirs, ours):
    if theirs is not None:
        (tmp_path / CARD_FILE).write_text(theirs, newline="")
    head = Card(card.MODEL, "me/tuned", BASE, base_folder=tmp_path).head()
    assert {name: value for name, value in head.items() if name.startswith("license")} == ours


def test_a_base_that_is_a_folder_is_named_and_not_linked(tmp_path):
    text = str(Card(card.MODEL, "me/tuned", str(tmp_path)))
    assert "base_model" not in head_of(text) and f"`{tmp_path.name}`, fine-tuned." in text
    assert str(tmp_path) not in text


def test_what_was_not_trained():
    assert "base_model_relation" not in Card(card.MODEL, "me/same", BASE, is_trained=False).head()
    assert Card(card.GGUF, "me/same", BASE, is_trained=False).head()["base_model_relation"] == "quantized"
    assert "fine-tuned" not in str(Card(card.GGUF, "me/same", BASE, is_trained=False))


def test_what_else_has_to_be_installed():
    made = Card(card.MODEL, "me/tuned", BASE)
    assert "It takes `pip install bitsandbytes`." in str(made._replace(needs="bitsandbytes"))
    assert "pip install" not in str(made)


def test_an_adapter_s_card_stays_when_a_gguf_comes_beside_it(tmp_path):
    adapted = Adapted(tmp_path)
    adapted.model.save_pretrained_ggml(tmp_path / "adapter")
    assert head_of((tmp_path / "adapter" / CARD_FILE).read_text())["library_name"] == "peft"
    adapted.model.save_pretrained_ggml(tmp_path / "alone")
    assert head_of((tmp_path / "alone" / CARD_FILE).read_text())["library_name"] == "gguf"


def test_a_card_of_somebody_else_s_stays(tmp_path):
    Card(card.MODEL, "one", BASE).write(tmp_path)
    Card(card.MODEL, "two", BASE).write(tmp_path)
    assert "# two" in (tmp_path / CARD_FILE).read_text()
    edited = (tmp_path / CARD_FILE).read_text().replace(f"{OURS}\n", "")
    (tmp_path / CARD_FILE).write_text(edited)
    Card(card.MODEL, "three", BASE).write(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == edited


def test_every_folder_has_one(tmp_path):
    """With what the run that trained the model was; a fresh adapter has none behind it."""
    made = Adapted(tmp_path)
    model, tokenizer = made.model, made.tokenizer
    assert "steps" not in (made.adapter / CARD_FILE).read_text()
    rows = [{"text": "the quick brown fox"}] * 4
    args = SFTConfig(max_steps=2, learning_rate=1e-3, optim="sgd", output_dir=tmp_path / "run", save_steps=1)
    SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    model.save_pretrained(tmp_path / "tuned", tags="mine")
    model.save_pretrained_merged(tmp_path / "merged", datasets=["a/b"])
    (gguf,) = model.save_pretrained_gguf(tmp_path / "tuned")
    (added,) = model.save_pretrained_ggml(tmp_path / "added")
    (also,) = model.save_pretrained_gguf(tmp_path / "also", save_method="lora", quantization_method="f32")
    folders = [tmp_path / "tuned", tmp_path / "merged", gguf.parent, added.parent, also.parent]
    cards = [(folder / CARD_FILE).read_text() for folder in folders]
    assert [head_of(text)["library_name"] for text in cards] == [
        "peft",
        "transformers",
        "gguf",
        "gguf",
        "gguf",
    ]
    for text in cards:
        assert "sft" in head_of(text)["tags"]
        assert (
            "| rank | 4 |" in text and "| steps | 2 |" in text and "| learning rate | 0.001, linear" in text
        )
        assert "| trained on weights in | float32 |" in text
    assert "mine" in head_of(cards[0])["tags"] and head_of(cards[1])["datasets"] == ["a/b"]
    assert added.name in cards[3] and gguf.name in cards[2] and "F32" in also.name
    assert (tmp_path / "run" / "checkpoint-1" / CARD_FILE).is_file()
    for folder in (tmp_path / "tuned", tmp_path / "merged"):  # so that what is exported later says it too
        assert without_weights(folder).last_run == model.last_run
    loaded, _ = FastLanguageModel.from_pretrained(tmp_path / "merged")
    assert loaded.last_run == model.last_run
    assert FastLanguageModel.get_peft_model(loaded).last_run is None
    again = dataclasses.replace(model, last_run=None)
    again.save_pretrained(tmp_path / "tuned")
    assert "steps" not in (tmp_path / "tuned" / CARD_FILE).read_text()
