"""What SFTConfig says about the data: which samples there are, in which order, together with which others."""

import dataclasses
import itertools

import datasets
import numpy as np
import pytest
import transformers
import trl

from jaxtune import LanguageModel, SFTConfig, SFTTrainer, get_chat_template, train_on_responses_only
from jaxtune.errors import ChatTemplateError, DatasetError, OptionError
from jaxtune.training import sft
from tests.kit import models, tiny

LENGTHS = np.random.default_rng(0).integers(3, 40, 50).tolist()
ROWS = [
    {"input_ids": np.random.default_rng(n).integers(0, 128, length).tolist()}
    for n, length in enumerate(LENGTHS)
]
CHAT = [
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "is lazy"},
]


@pytest.fixture(scope="module")
def model():
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    return LanguageModel(
        causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm), models.tokenizer(), max_seq_length=64
    )


@pytest.fixture
def chatml():
    return get_chat_template(models.fresh_tokenizer(), "chatml")


def trainer_of(model, rows=ROWS, *, tokenizer=None, eval_dataset=None, **settings):
    return SFTTrainer(
        dataclasses.replace(model),
        SFTConfig(**settings),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        tokenizer=tokenizer,
    )


def epochs(trainer, count=2):
    """The arrays of the first epochs of a run."""
    stream = trainer.batches()
    steps = itertools.islice(stream, count * stream.steps_per_epoch)
    return [{name: array.tolist() for name, array in batch.items()} for batch, _ in steps]


@pytest.fixture(scope="module")
def plain(model):
    return epochs(trainer_of(model))


@pytest.mark.parametrize(
    ("settings", "beside"),
    [
        ({"packing": True}, {}),
        ({"packing_strategy": "bfd_split"}, {"packing": True, "max_length": 16}),
        ({"packing_strategy": "wrapped"}, {"packing": True, "max_length": 16}),
        ({"truncation_mode": "keep_end"}, {"max_length": 16}),
        ({"shuffle_dataset": True}, {}),
        ({"shuffle_dataset": True}, {"packing": True, "packing_strategy": "wrapped"}),
        ({"shuffle_dataset": True}, {"train_sampling_strategy": "sequential"}),
        ({"train_sampling_strategy": "sequential"}, {}),
        ({"data_seed": 1}, {}),
        ({"dataloader_drop_last": True}, {"per_device_train_batch_size": 8}),
    ],
    ids=str,
)
def test_a_setting_changes_the_batches(model, plain, settings, beside):
    before = epochs(trainer_of(model, **beside)) if beside else plain
    assert epochs(trainer_of(model, **beside)) == before, "the same settings give the same batches"
    assert epochs(trainer_of(model, **beside, **settings)) != before


@pytest.mark.parametrize("name", ["group_by_length", "batch_rebalance"])
def test_an_order_by_length_is_random(model, plain, name, caplog):
    caplog.set_level("INFO", "jaxtune")
    assert epochs(trainer_of(model, train_sampling_strategy=name)) == plain
    assert f"SFTConfig: train_sampling_strategy={name!r} is random." in caplog.messages


def test_data_seed_is_of_the_order_alone(model):
    assert epochs(trainer_of(model, seed=5)) == epochs(trainer_of(model, seed=4, data_seed=5))


def ids_by_epoch(trainer, count):
    stream = trainer.batches()
    for _ in range(count):
        yield [i for _, info in itertools.islice(stream, stream.steps_per_epoch) for i in info.sample_ids]


def test_a_sequential_run_follows_the_dataset(model):
    trainer = trainer_of(model, train_sampling_strategy="sequential")
    assert list(ids_by_epoch(trainer, 2)) == [list(range(50))] * 2


def test_what_does_not_fill_a_batch_is_left_out_of_an_epoch(model):
    """As transformers' loader leaves it out: 50 samples are 6 batches of 8, which are 3 steps of 2."""
    settings = dict(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    trainer = trainer_of(model, **settings, dataloader_drop_last=True)
    assert trainer.batches().steps_per_epoch == 3
    first, second = ids_by_epoch(trainer, 2)
    assert len(set(first)) == len(set(second)) == 48 and set(first) != set(second)
    assert trainer_of(model, **settings).batches().steps_per_epoch == 4
    with pytest.raises(DatasetError, match="there are 5 samples"):
        trainer_of(model, ROWS[:5], per_device_train_batch_size=6, dataloader_drop_last=True).batches()


class TestPacking:
    def test_a_batch_counts_rows(self, model):
        packed = trainer_of(model, packing=True, max_length=64)
        stream = packed.batches()
        lengths = datasets.Dataset.from_list(ROWS)
        rows = len(trl.pack_dataset(lengths, 64, "bfd"))
        assert stream.steps_per_epoch == -(-rows // 8) < trainer_of(model).batches().steps_per_epoch
        assert len(packed.samples) == 50, "samples stay as they are, and so does their order"

    def test_max_length_is_the_model_s_unless_it_is_given(self, model):
        for settings, length in (({}, 64), ({"max_length": 48}, 48)):
            one_row = dict(per_device_train_batch_size=1, gradient_accumulation_steps=1)
            trainer = trainer_of(model, packing=True, packing_strategy="wrapped", **one_row, **settings)
            stream = trainer.batches()
            steps = list(itertools.islice(stream, stream.steps_per_epoch))
            assert len(steps) == -(-sum(LENGTHS) // length)
            assert max(info.num_tokens for _, info in steps) == length

    def test_only_bfd_cuts_off_what_is_longer_than_a_row(self, model):
        def tokens(**settings):
            stream = trainer_of(model, max_length=16, packing=True, **settings).batches()
            return sum(info.num_tokens for _, info in itertools.islice(stream, stream.steps_per_epoch))

        assert tokens() == sum(min(length, 16) for length in LENGTHS)
        assert tokens(packing_strategy="bfd_split") >= sum(LENGTHS) - 50  # single tokens train nothing
        assert tokens(packing_strategy="wrapped") == sum(LENGTHS)

    def test_masks_that_come_after_the_trainer_count(self, model, chatml):
        rows = [{"messages": CHAT}] * 9
        trainer = train_on_responses_only(
            trainer_of(model, rows, tokenizer=chatml, packing=True, max_length=1000)
        )
        stream = trainer.batches()
        assert stream.steps_per_epoch == 1
        assert next(stream)[1].trained_tokens == 9 * trainer.samples[0].num_trained

    @pytest.mark.parametrize(
        ("settings", "packs"),
        [
            ({}, False),
            ({"packing": True}, True),
            ({"packing": True, "eval_packing": False}, False),
            ({"eval_packing": True}, True),
        ],
        ids=str,
    )
    def test_evaluations(self, model, monkeypatch, settings, packs):
        seen = []
        monkeypatch.setattr(sft, "evaluate_all", lambda model, params, lora, sets, size: seen.append(sets))
        trainer = trainer_of(model, eval_dataset={"a": ROWS[:9]}, **settings)
        trainer.evaluate()
        trainer.evaluate(ROWS[:9])
        (own,), (given,) = (sets.values() for sets in seen)
        assert [list(sets) for sets in seen] == [["eval_a"], ["eval"]]
        assert (len(own) < 9) == (len(given) < 9) == packs

    def test_an_evaluation_without_it_cuts_samples_as_ever(self, model):
        settings = dict(packing=True, packing_strategy="wrapped", max_length=8, eval_packing=False)
        trainer = trainer_of(model, eval_dataset=ROWS, **settings)
        assert max(sample.num_tokens for sample in trainer.samples) == max(LENGTHS)
        assert max(sample.num_tokens for sample in trainer.eval_samples) == 8


def trained_text(trainer, samples):
    return [trainer.processing_class.decode(s.input_ids[s.labels != -100]) for s in samples]


class TestMasks:
    """train_on_responses_only holds for whatever is evaluated."""

    def test_of_several_datasets(self, model, chatml):
        sets = {"a": [{"messages": CHAT}], "b": [{"messages": CHAT[:2]}]}
        trainer = trainer_of(model, [{"messages": CHAT}], tokenizer=chatml, eval_dataset=sets)
        train_on_responses_only(trainer)
        assert trained_text(trainer, trainer.eval_samples["b"])[0].strip() == "jumps<|im_end|>"
        assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == {"a": 1, "b": 1}

    def test_of_a_dataset_that_comes_later(self, model, chatml, monkeypatch):
        seen = []
        monkeypatch.setattr(sft, "evaluate_all", lambda model, params, lora, sets, size: seen.append(sets))
        trainer = trainer_of(model, [{"messages": CHAT}], tokenizer=chatml)
        trainer.evaluate([{"messages": CHAT[:2]}])
        train_on_responses_only(trainer).evaluate([{"messages": CHAT[:2]}])
        whole, answer = (trained_text(trainer, sets["eval"])[0] for sets in seen)
        assert "the fox" in whole and answer.strip() == "jumps<|im_end|>"


class TestDatasets:
    def test_rows_as_notebooks_look_at_them(self, model, chatml):
        trainer = trainer_of(
            model, [{"messages": CHAT}] * 3, tokenizer=chatml, eval_dataset=[{"messages": CHAT[:2]}]
        )
        tokenizer, trainer = chatml, train_on_responses_only(trainer)
        assert tokenizer.decode(trainer.train_dataset[2]["input_ids"]).startswith("<|im_start|>user\nthe fox")
        space = tokenizer(" ", add_special_tokens=False).input_ids[0]
        masked = tokenizer.decode([space if x == -100 else x for x in trainer.train_dataset[2]["labels"]])
        assert masked.split() == ["jumps<|im_end|>", "is", "lazy<|im_end|>"]
        assert len(trainer.train_dataset) == 3 and len(trainer.eval_dataset) == 1
        assert trainer.train_dataset.column_names == ["input_ids", "labels"]
        assert trainer.train_dataset["labels"][2] == trainer.train_dataset[2]["labels"]
        assert trainer.train_dataset[1:] == datasets.Dataset.from_list(list(trainer.train_dataset))[1:]
        assert repr(trainer.train_dataset) == "SampleRows(3 rows of input_ids, labels)"
        assert trainer_of(model).eval_dataset is None

    def test_older_scripts_say_so_to_the_trainer(self, model):
        trainer = SFTTrainer(
            model, train_dataset=[{"text": "fox"}], packing=True, dataset_kwargs={"add_special_tokens": False}
        )
        assert (
            trainer.args.packing and trainer.processing_class.eos_token_id not in trainer.samples[0].input_ids
        )


def test_a_sample_is_no_longer_than_the_model_was_loaded_for(model, caplog):
    rows = [{"input_ids": [1] * 100}, {"input_ids": [2] * 30}]
    longest = lambda **settings: max(each.num_tokens for each in trainer_of(model, rows, **settings).samples)
    assert (longest(), longest(max_length=64), longest(max_length=40)) == (64, 64, 40)
    assert not [each for each in caplog.records if each.levelname == "WARNING"]
    assert longest(max_length=4096) == 64
    (line,) = (each.getMessage() for each in caplog.records if each.levelname == "WARNING")
    assert "max_length=4096 is more than the 64 of the model's max_seq_length" in line


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"rows": [{"txt": "a"}]}, "train_dataset: "),
        ({"eval_dataset": [{"txt": "a"}]}, "eval_dataset: "),
        ({"eval_dataset": {"good": ROWS, "bad": [{"txt": "a"}]}}, "eval_dataset['bad']: "),
        ({"eval_dataset": [{"text": "a"}, {"text": None}]}, "eval_dataset: row 1 of the dataset has nothing"),
    ],
)
def test_an_error_says_which_dataset_it_is_of(model, options, place):
    with pytest.raises(DatasetError) as error:
        trainer_of(model, **options)
    assert str(error.value).startswith(place) and error.value.found.startswith(place)


def test_so_it_does_where_only_an_evaluation_asks_for_it(model):
    with pytest.raises(DatasetError, match="eval_dataset: the dataset has no rows"):
        trainer_of(model).evaluate([])


class TestTokenizer:
    def text_of(self, model, rows, tokenizer, **settings):
        (sample,) = trainer_of(model, rows, tokenizer=tokenizer, **settings).samples
        return tokenizer.decode(sample.input_ids)

    def test_eos_and_pad(self, model):
        tokenizer = models.fresh_tokenizer()
        rows = [{"text": "the fox"}]
        assert self.text_of(model, rows, tokenizer) == "the fox<|end|>"
        changed = dict(eos_token="<|im_end|>", pad_token="<|begin|>")
        assert self.text_of(model, rows, tokenizer, **changed) == "the fox<|im_end|>"
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|begin|>")
        with pytest.raises(OptionError, match="eos_token='<im_end>' is not in") as caught:
            self.text_of(model, rows, tokenizer, eos_token="<im_end>")
        assert "Did you mean '<|im_end|>'" in caught.value.fix
        with pytest.raises(OptionError, match="pad_token without a tokenizer"):
            trainer_of(dataclasses.replace(model, tokenizer=None), pad_token="<|end|>")

    def test_a_template_from_a_file_or_a_tokenizer(self, model, tmp_path, chatml):
        rows, plain = [{"messages": CHAT[:2]}], models.fresh_tokenizer()
        with pytest.raises(ChatTemplateError, match="no chat template"):
            self.text_of(model, rows, plain)
        path = tmp_path / "short.jinja"
        path.write_text("{% for message in messages %}{{ message.content }};{% endfor %}")
        assert self.text_of(model, rows, plain, chat_template_path=path) == "the fox;jumps;"
        chatml.save_pretrained(tmp_path / "other")
        text = self.text_of(model, rows, plain, chat_template_path=str(tmp_path / "other"))
        assert text == chatml.apply_chat_template(CHAT[:2], tokenize=False)
        assert (plain.chat_template, plain.eos_token) == (chatml.chat_template, "<|im_end|>")

    def test_a_template_that_cannot_be_had(self, model, tmp_path, chatml):
        rows = [{"messages": CHAT[:2]}]
        for path in (tmp_path / "none.jinja", tmp_path / "none"):
            with pytest.raises(OptionError, match="cannot be read"):
                self.text_of(model, rows, models.fresh_tokenizer(), chat_template_path=path)
        chatml.add_tokens([transformers.AddedToken("<turn>", special=True)])
        chatml.chat_template = "<turn>" + chatml.chat_template
        chatml.save_pretrained(tmp_path / "other")
        with pytest.raises(ChatTemplateError, match=r"needs the tokens \['<turn>'\]") as caught:
            self.text_of(model, rows, models.fresh_tokenizer(), chat_template_path=tmp_path / "other")
        assert "add_new_tokens" in caught.value.fix


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"packing_strategy": "ffd"}, "'bfd'"),
        ({"packing": "bfd"}, "True or False"),
        ({"eval_packing": 2}, "True, False or None"),
        ({"truncation_mode": "keep_stat"}, "'keep_start'"),
        ({"train_sampling_strategy": "sorted"}, "one of random, sequential"),
        ({"data_seed": 1.5}, "a whole number"),
        ({"dataset_kwargs": {"add_special_token": False}}, "some of add_special_tokens"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(OptionError, match=words):
        SFTConfig(**settings)


def test_names_without_effect_are_accepted_with_one_line(caplog):
    with caplog.at_level("INFO", "jaxtune"):
        SFTConfig(pad_to_multiple_of=8, group_by_length=True, dataset_kwargs={"skip_prepare_dataset": True})
    assert caplog.messages == [
        "SFTConfig: pad_to_multiple_of has no effect in jaxtune.",
        "SFTConfig: group_by_length has no effect in jaxtune.",
        "SFTConfig: skip_prepare_dataset in dataset_kwargs has no effect in jaxtune.",
    ]
