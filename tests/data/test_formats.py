"""Every form of dataset that TRL knows becomes the same kind of samples: bos once, eos where a text ends, labels where
the loss is wanted. What cannot be used is an error or one line in the log."""

from itertools import count

import datasets
import numpy as np
import pandas
import pytest

from jaxtune.data.formats import prepare
from jaxtune.data.templates import get_chat_template
from jaxtune.errors import ChatTemplateError, DatasetError, OptionError
from tests.data.tiny_tokenizer import chatml_tokenizer, llama_tokenizer, tiny_tokenizer, trained_text

CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3+3?"},
    {"role": "assistant", "content": "six\n"},
]
CHAT_TEXT = (
    "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    "<|im_start|>user\nand 3+3?<|im_end|>\n<|im_start|>assistant\nsix\n<|im_end|>\n"
)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def chatml():
    return get_chat_template(chatml_tokenizer(), "chatml")


@pytest.fixture
def llama():
    return get_chat_template(llama_tokenizer(), "llama-3.1")


def one(rows, tokenizer, **options):
    (sample,) = prepare(rows, tokenizer, **{"max_length": 512, **options})
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert len(sample.input_ids) == len(sample.labels)
    return sample


def text_of(tokenizer, sample) -> str:
    return tokenizer.decode(sample.input_ids)


class TestText:
    def test_is_trained_on_whole_and_ends_with_eos(self, tokenizer):
        sample = one([{"text": "hello"}], tokenizer)
        assert text_of(tokenizer, sample) == trained_text(tokenizer, sample) == "hello</s>"

    def test_stays_as_it_is_if_that_is_asked_for(self, llama):
        assert text_of(llama, one([{"text": "hello"}], llama)) == "<|begin_of_text|>hello<|eot_id|>"
        assert text_of(llama, one([{"text": "hello"}], llama, add_special_tokens=False)) == "hello"
        pair = one([{"prompt": "a", "completion": "b"}], llama, add_special_tokens=False)
        assert text_of(llama, pair) == "ab" and trained_text(llama, pair) == "b"

    def test_does_not_get_eos_twice(self, tokenizer):
        assert text_of(tokenizer, one([{"text": "hello</s>"}], tokenizer)) == "hello</s>"

    def test_another_column(self, tokenizer):
        assert (
            text_of(tokenizer, one([{"body": "hello", "id": 3}], tokenizer, text_field="body")) == "hello</s>"
        )

    def test_bos_is_there_once_for_plain_text_and_for_rendered_text(self, llama):
        rendered = llama.apply_chat_template(CHAT, tokenize=False)
        plain, chat = prepare([{"text": "hello"}, {"text": rendered}], llama, max_length=None)
        assert text_of(llama, plain) == "<|begin_of_text|>hello<|eot_id|>"
        assert text_of(llama, chat) == rendered

    def test_formatting_func_makes_the_text(self, tokenizer):
        rows = [{"q": "a", "a": "b"}]
        assert text_of(tokenizer, one(rows, tokenizer, formatting_func=lambda r: r["q"] + r["a"])) == "ab</s>"

    def test_formatting_func_may_make_several(self, tokenizer):
        samples = prepare(
            [{"q": "a"}], tokenizer, formatting_func=lambda r: [r["q"], r["q"] * 2], max_length=9
        )
        assert [text_of(tokenizer, sample) for sample in samples] == ["a</s>", "aa</s>"]


class TestMessages:
    def test_are_rendered_by_the_chat_template_and_trained_on_whole(self, chatml):
        sample = one([{"messages": CHAT}], chatml)
        assert text_of(chatml, sample) == trained_text(chatml, sample) == CHAT_TEXT
        assert sample.input_ids.tolist() == chatml.apply_chat_template(CHAT)["input_ids"]

    def test_bos_is_there_once(self, llama):
        ids = one([{"messages": CHAT}], llama).input_ids.tolist()
        assert ids[0] == llama.bos_token_id and ids.count(llama.bos_token_id) == 1

    def test_assistant_only(self, chatml):
        sample = one([{"messages": CHAT}], chatml, assistant_only_loss=True)
        assert text_of(chatml, sample) == CHAT_TEXT
        assert trained_text(chatml, sample) == "4<|im_end|>…six\n<|im_end|>"

    def test_assistant_only_with_llama(self, llama):
        sample = one([{"messages": CHAT}], llama, assistant_only_loss=True)
        assert trained_text(llama, sample) == "4<|eot_id|>…six<|eot_id|>"

    def test_assistant_only_with_a_marked_template_of_one_s_own(self):
        jinja = (
            "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}\n"
            "{% else %}A:{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
        )
        tokenizer = tiny_tokenizer(chat_template=jinja)
        sample = one([{"messages": CHAT[:2]}], tokenizer, assistant_only_loss=True)
        assert trained_text(tokenizer, sample) == "4</s>"

    def test_options_of_a_row_reach_the_template(self, llama):
        row = {
            "messages": CHAT,
            "tools": '[{"name": "f"}]',
            "chat_template_kwargs": {"date_string": "1 May 2031"},
        }
        text = text_of(llama, one([row], llama, max_length=None))
        assert "Today Date: 1 May 2031" in text and '"name": "f"' in text

    def test_keys_that_are_none_are_absent(self, llama):
        chat = [{"tool_calls": None, "name": None, **message} for message in CHAT]
        assert (
            one([{"messages": chat}], llama).input_ids.tolist()
            == one([{"messages": CHAT}], llama).input_ids.tolist()
        )


PLAIN = {"prompt": "2+2=", "completion": "4"}
TURNS = {"prompt": CHAT[:1], "completion": CHAT[1:2]}


class TestPromptCompletion:
    def test_trains_on_the_completion_and_its_end(self, llama):
        sample = one([PLAIN], llama)
        assert text_of(llama, sample) == "<|begin_of_text|>2+2=4<|eot_id|>"
        assert trained_text(llama, sample) == "4<|eot_id|>"

    def test_trains_on_everything_if_told_so(self, tokenizer):
        assert trained_text(tokenizer, one([PLAIN], tokenizer, completion_only_loss=False)) == "2+2=4</s>"

    def test_conversations(self, chatml):
        sample = one([TURNS], chatml)
        assert text_of(chatml, sample) == CHAT_TEXT[: CHAT_TEXT.index("4<|im_end|>\n") + len("4<|im_end|>\n")]
        assert trained_text(chatml, sample) == "4<|im_end|>\n"

    def test_conversations_and_assistant_only(self, chatml):
        row = {"prompt": CHAT[:1], "completion": CHAT[1:]}
        assert trained_text(chatml, one([row], chatml)).startswith("4<|im_end|>\n<|im_start|>user")
        sample = one([row], chatml, assistant_only_loss=True)
        assert trained_text(chatml, sample) == "4<|im_end|>…six\n<|im_end|>"
        sample = one([{"prompt": CHAT[:2], "completion": CHAT[2:]}], chatml, assistant_only_loss=True)
        assert trained_text(chatml, sample) == "six\n<|im_end|>"

    def test_a_token_across_the_border_is_trained_on_and_said(self, tokenizer, caplog):
        rows = [PLAIN, {"prompt": "the ", "completion": "words"}]
        clean, merged = prepare(rows, tokenizer, max_length=512)
        assert trained_text(tokenizer, clean) == "4</s>"
        assert trained_text(tokenizer, merged) == " words</s>"
        (line,) = caplog.messages
        assert "in 1 of 2 samples (first in row 1)" in line

    def test_a_template_that_rewrites_the_prompt_is_said(self, caplog):
        jinja = (
            "{{ messages | length }}{% for m in messages %}{{ m.content }};{% endfor %}"
            "{% if add_generation_prompt %}>{% endif %}"
        )
        one([TURNS], tiny_tokenizer(chat_template=jinja))
        assert "do not begin with those of the prompt" in caplog.text


class TestTokenised:
    def test_is_trained_on_whole(self, tokenizer):
        assert one([{"input_ids": [5, 6, 7]}], tokenizer).labels.tolist() == [5, 6, 7]

    def test_labels_are_taken_as_they_are(self, tokenizer):
        sample = one(
            [{"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "assistant_masks": [1, 1, 1]}], tokenizer
        )
        assert sample.labels.tolist() == [-100, 6, -100]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [-100, -100, 7, -100]),
            ({"completion_only_loss": True}, [-100, -100, 7, -100]),
            ({"completion_only_loss": False}, [-100, 6, 7, -100]),
        ],
    )
    def test_masks_are_combined(self, tokenizer, options, expected):
        row = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]}
        assert one([row], tokenizer, **options).labels.tolist() == expected

    def test_arrays_do_as_well_as_lists(self, tokenizer):
        assert one([{"input_ids": np.array([5, 6])}], tokenizer).input_ids.tolist() == [5, 6]

    def test_formatting_func_is_said_to_be_unused(self, tokenizer, caplog):
        one([{"input_ids": [5, 6]}], tokenizer, formatting_func=lambda row: "never")
        assert "formatting_func is not called" in caplog.text

    @pytest.mark.parametrize(
        ("row", "found"),
        [
            ({"input_ids": [5, 300]}, "token ids from 5 to 300"),
            ({"input_ids": [-1, 5]}, "token ids from -1 to 5"),
            ({"input_ids": [[5, 6]]}, r"shape \(1, 2\)"),
            ({"input_ids": [0.5, 1.5]}, "type float64"),
            ({"input_ids": [5, 6], "labels": [5]}, "1 values in 'labels' and 2"),
        ],
    )
    def test_ids_that_cannot_be(self, tokenizer, row, found):
        with pytest.raises(DatasetError, match=f"row 1 .*{found}"):
            prepare([{**row, "input_ids": [5, 6], "labels": [5, 6]}, row], tokenizer, max_length=9)

    @pytest.mark.parametrize("option", ["completion_only_loss", "assistant_only_loss"])
    def test_a_mask_that_is_asked_for_has_to_be_there(self, tokenizer, option):
        with pytest.raises(DatasetError, match=r"has neither '.*mask.*' nor 'labels'"):
            prepare([{"input_ids": [5, 6]}], tokenizer, max_length=9, **{option: True})


ROWS = [{"text": f"text {n}"} for n in range(3)]


class TestDatasets:
    def test_whatever_holds_rows(self, tokenizer):
        class Indexed:
            def __len__(self):
                return len(ROWS)

            def __getitem__(self, index):
                return ROWS[index % 3]  # never raises IndexError: its length is what ends it

        expected = [sample.input_ids.tolist() for sample in prepare(ROWS, tokenizer, max_length=99)]
        for rows in (iter(ROWS), Indexed(), datasets.Dataset.from_list(ROWS)):
            assert [
                sample.input_ids.tolist() for sample in prepare(rows, tokenizer, max_length=99)
            ] == expected

    def test_conversations_in_a_datasets_dataset(self, chatml):
        chat = [{**CHAT[0], "name": "Ada"}, CHAT[1]]  # struct columns have every key in every message
        dataset = datasets.Dataset.from_list([{"messages": chat}])
        assert text_of(chatml, one(dataset, chatml)) == CHAT_TEXT[: CHAT_TEXT.index("4<|im_end|>\n") + 12]

    def test_more_rows_than_a_chunk(self, tokenizer):
        samples = prepare(({"text": str(n)} for n in range(2003)), tokenizer, max_length=99)
        assert text_of(tokenizer, samples[2001]) == "2001</s>"

    def test_what_is_not_one_split(self, tokenizer):
        with pytest.raises(DatasetError, match="the dataset is a mapping with the keys"):
            prepare({"train": ROWS}, tokenizer, max_length=99)

    def test_a_file(self, tokenizer, tmp_path):
        datasets.Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
        for rows in (tmp_path / "rows.jsonl", str(tmp_path / "rows.jsonl"), [str(tmp_path / "rows.jsonl")]):
            assert [text_of(tokenizer, sample) for sample in prepare(rows, tokenizer, max_length=99)] == [
                "text 0</s>",
                "text 1</s>",
                "text 2</s>",
            ]

    def test_a_pandas_data_frame(self, tokenizer, chatml):
        frame = pandas.DataFrame({"text": ["a", "b"], "n": [1.0, float("nan")]}, index=[7, 7])
        samples = prepare(frame, tokenizer, max_length=99)
        assert [text_of(tokenizer, sample) for sample in samples] == ["a</s>", "b</s>"]
        chats = pandas.DataFrame({"messages": [CHAT, CHAT], "tools": [float("nan"), None]})
        assert text_of(chatml, prepare(chats, chatml, max_length=99)[0]) == CHAT_TEXT
        with pytest.raises(DatasetError, match="row 1 of the dataset has nothing"):
            prepare(pandas.DataFrame({"text": ["a", None]}), tokenizer, max_length=99)

    def test_a_list_of_texts_is_no_list_of_files(self, tokenizer):
        with pytest.raises(DatasetError, match=r"row 0 of the dataset is a str"):
            prepare(["a text", "another"], tokenizer, max_length=99)


class TestStreams:
    """What has no length is read once, row by row, and its errors name the row too."""

    def test_a_generator(self, tokenizer):
        samples = prepare((row for row in ROWS), tokenizer, max_length=99)
        assert [text_of(tokenizer, sample) for sample in samples] == [
            "text 0</s>",
            "text 1</s>",
            "text 2</s>",
        ]

    def test_a_datasets_iterable_dataset(self, tokenizer):
        stream = datasets.IterableDataset.from_generator(lambda: iter(ROWS)).map(
            lambda row: {"text": row["text"] * 2}
        )
        samples = prepare(stream, tokenizer, max_length=99)
        assert text_of(tokenizer, samples[2]) == "text 2text 2</s>"

    def test_a_column_that_is_missing_far_behind(self, tokenizer):
        stream = ({"text": "a"} if row != 70_000 else {"txt": "a"} for row in count())
        with pytest.raises(DatasetError, match="row 70000 of the dataset has no 'text'; it has"):
            prepare(stream, tokenizer, max_length=99)
        assert next(stream) == {"text": "a"}  # endless, and not read to an end that it does not have

    def test_an_empty_one(self, tokenizer):
        with pytest.raises(DatasetError, match="no rows"):
            prepare(iter([]), tokenizer, max_length=99)


class TestConversations:
    """`conversations`, ShareGPT's column, as TRL reads it: `from` and `value` are `role` and `content`."""

    SHAREGPT = ({"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"})

    def test_from_and_value(self, chatml):
        expected = one([{"messages": CHAT[:2]}], chatml, assistant_only_loss=True)
        for chat in (self.SHAREGPT, CHAT[:2]):
            sample = one([{"conversations": list(chat)}], chatml, assistant_only_loss=True)
            assert sample.input_ids.tolist() == expected.input_ids.tolist()
            assert sample.labels.tolist() == expected.labels.tolist()

    def test_human_and_gpt_are_roles_of_few_templates(self, chatml):
        row = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
        with pytest.raises(
            DatasetError, match="row 1 of the dataset has messages from 'gpt' and 'human'"
        ) as error:
            prepare([{"conversations": CHAT}, row], chatml, max_length=99)
        assert "standardize_sharegpt" in error.value.fix
        mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
        sample = one([row], get_chat_template(chatml, "chatml", mapping))
        assert text_of(chatml, sample) == CHAT_TEXT[: CHAT_TEXT.index("<|im_start|>user\nand")]

    def test_so_they_are_in_messages(self, chatml):
        chat = [{"role": "human", "content": "2+2?"}, {"role": "gpt", "content": "4"}]
        with pytest.raises(DatasetError, match="row 0 of the dataset has messages from 'gpt' and 'human'"):
            prepare([{"messages": chat}], chatml, max_length=99)

    def test_all_roles_that_need_other_names_are_named(self, chatml):
        chat = [{"from": "robot", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
        for column in ("conversations", "messages"):
            with pytest.raises(DatasetError, match="messages from 'gpt' and 'robot', roles") as error:
                prepare([{column: chat}], chatml, max_length=99)
            assert "standardize_sharegpt" in error.value.fix

    @pytest.mark.parametrize("form", ["messages", "completion"])
    def test_a_role_that_the_template_writes_without_knowing_it_is_said_once(self, chatml, form, caplog):
        odd = [CHAT[0], {"role": "assitant", "content": "4"}]
        rows = [{"messages": CHAT}, {"messages": odd}, {"messages": odd}]
        if form == "completion":
            rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:2]} for r in rows]
        assert len(prepare(rows, chatml, max_length=512)) == 3
        (line,) = (each for each in caplog.messages if "role" in each)
        assert line == (
            "the chat template does not name the role 'assitant' (first in row 1), and may write turns that no model "
            "has seen. Did you mean 'assistant'?"
        )

    def test_the_usual_roles_and_the_template_s_own_need_no_word(self, chatml, caplog):
        tool = {"role": "tool", "content": "4"}
        prepare([{"messages": [*CHAT, tool]}], chatml, max_length=512)
        chatml.chat_template = "{% if messages[0].role == 'critic' %}C:{% endif %}" + chatml.chat_template
        prepare([{"messages": [{"role": "critic", "content": "bad"}]}], chatml, max_length=512)
        assert not caplog.messages

    @pytest.mark.parametrize(
        "row",
        [{"messages": [{"role": 5, "content": "a"}]}, {"conversations": [{"from": ["user"], "value": "a"}]}],
    )
    def test_a_role_is_a_name(self, chatml, row):
        """A template would write whatever it is."""
        with pytest.raises(DatasetError, match="row 0 of the dataset has a message whose role is"):
            prepare([row], chatml, max_length=99)

    def test_a_text_that_was_made_of_them_comes_first(self, chatml):
        assert text_of(chatml, one([{"conversations": CHAT, "text": "a"}], chatml)) == "a<|im_end|>"

    def test_alpaca_s_columns_are_not_guessed_at(self, chatml):
        with pytest.raises(DatasetError, match="columns") as error:
            prepare([{"instruction": "Add.", "input": "", "output": "4"}], chatml, max_length=99)
        assert "to_sharegpt" in error.value.fix

    @pytest.mark.parametrize("rows", [[], datasets.Dataset.from_list([])])
    def test_an_empty_dataset(self, tokenizer, rows):
        with pytest.raises(DatasetError, match="no rows"):
            prepare(rows, tokenizer, max_length=99)


class TestLength:
    def test_the_start_is_kept(self, tokenizer, caplog):
        caplog.set_level("INFO", "jaxtune")
        samples = prepare([{"text": "abcdef"}, {"text": "ab"}], tokenizer, max_length=4)
        assert [text_of(tokenizer, sample) for sample in samples] == ["abcd", "ab</s>"]
        assert caplog.messages == ["1 of 2 samples are cut to max_length=4 tokens"]

    def test_a_sample_whose_completion_is_cut_off_is_dropped_and_said(self, tokenizer, caplog):
        rows = [{"prompt": "long prompt", "completion": "x"}, {"prompt": "p", "completion": "x"}]
        assert len(prepare(rows, tokenizer, max_length=5)) == 1
        assert caplog.messages == [
            "dropped 1 of 2 samples: what max_length=5 leaves of them has no token to train on"
        ]

    def test_if_that_is_every_sample_it_is_an_error(self, tokenizer):
        with pytest.raises(DatasetError, match="none of the 1 samples has a token to train on") as error:
            prepare([{"prompt": "long prompt", "completion": "x"}], tokenizer, max_length=5)
        assert "1 lose all of theirs to max_length=5" in error.value.found
        assert "Raise max_length" in error.value.fix

    def test_or_the_end_with_its_labels(self, tokenizer, llama, caplog):
        caplog.set_level("INFO", "jaxtune")
        rows = [{"prompt": "long prompt", "completion": "x"}, {"prompt": "p", "completion": "long one"}]
        samples = prepare(rows, tokenizer, max_length=5, truncation_mode="keep_end")
        assert [text_of(tokenizer, sample) for sample in samples] == ["mptx</s>", " one</s>"]
        assert [trained_text(tokenizer, sample) for sample in samples] == ["x</s>", " one</s>"]
        assert caplog.messages == ["2 of 2 samples are cut to max_length=5 tokens"]
        assert text_of(llama, one([{"text": "abcdef"}], llama, max_length=3, truncation_mode="keep_end")) == (
            "ef<|eot_id|>"
        ), "of bos too, only the end is kept"

    def test_a_length_of_one_leaves_nothing_to_predict(self, tokenizer):
        with pytest.raises(OptionError, match="max_length is 1"):
            prepare([{"text": "a"}], tokenizer, max_length=1)


class TestNothingToTrainOn:
    def test_empty_samples_are_dropped_and_said_once(self, tokenizer, caplog):
        rows = [{"text": "a"}, {"text": ""}, {"text": " \n"}]
        assert len(prepare(rows, tokenizer, max_length=99)) == 1
        assert caplog.messages == ["dropped 2 of 3 samples: they are empty"]

    @pytest.mark.parametrize(
        ("full", "empty"),
        [
            ({"messages": CHAT}, {"messages": []}),
            ({"prompt": "a", "completion": "b"}, {"prompt": "", "completion": ""}),
            ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, {"prompt": [], "completion": []}),
            ({"input_ids": [5, 6]}, {"input_ids": []}),
        ],
    )
    def test_in_every_form(self, chatml, full, empty):
        assert len(prepare([empty, full], chatml, max_length=99)) == 1

    def test_nothing_but_empty_samples(self, tokenizer):
        with pytest.raises(DatasetError, match="all 2 samples of the dataset are empty"):
            prepare([{"text": ""}, {"text": ""}], tokenizer, max_length=99)

    def test_the_first_token_alone_is_nothing_to_train_on(self, tokenizer):
        with pytest.raises(DatasetError, match=r"no.* token to train on"):
            prepare([{"input_ids": [5, 6], "labels": [5, -100]}], tokenizer, max_length=99)

    def test_a_sample_without_an_assistant_is_dropped(self, chatml, caplog):
        samples = prepare(
            [{"messages": CHAT[:1]}, {"messages": CHAT}], chatml, max_length=99, assistant_only_loss=True
        )
        assert len(samples) == 1
        assert caplog.messages == ["dropped 1 of 2 samples: no token in them is trained on"]

    def test_a_mask_that_hides_everything_is_an_error(self, chatml):
        with pytest.raises(DatasetError, match=r"no.* token to train on"):
            prepare([{"messages": CHAT[:1]}], chatml, max_length=99, assistant_only_loss=True)


class TestErrors:
    def test_no_known_column(self, tokenizer):
        with pytest.raises(DatasetError, match=r"columns \['mesages', 'id'\]") as error:
            prepare([{"mesages": CHAT, "id": 1}], tokenizer, max_length=99)
        assert "Did you mean 'messages'" in error.value.fix

    @pytest.mark.parametrize(
        ("row", "missing", "hint"),
        [
            ({"prompt": "a"}, "completion", ""),
            ({"prompt": CHAT[:1], "completions": CHAT[1:2]}, "completion", " Did you mean 'completion'?"),
            ({"completion": "b", "id": 1}, "prompt", ""),
        ],
    )
    def test_half_of_a_pair(self, tokenizer, row, missing, hint):
        with pytest.raises(DatasetError, match=f"' without '{missing}'") as error:
            prepare([row], tokenizer, max_length=99)
        assert error.value.fix == (
            f"Add the {missing} of every row, or rename the column that holds it.{hint}"
        )

    def test_a_text_field_that_is_not_there(self, tokenizer):
        with pytest.raises(DatasetError, match="no 'bdy'") as error:
            prepare([{"body": "hello"}], tokenizer, text_field="bdy", max_length=99)
        assert "Did you mean 'body'" in error.value.fix

    @pytest.mark.parametrize(
        ("good", "bad", "found"),
        [
            ({"text": "a"}, {"text": None}, r"nothing \(None\) in 'text'"),
            ({"text": "a"}, {"text": 3}, "a int in 'text'"),
            ({"text": "a"}, {"body": "a"}, r"no 'text'; it has \['body'\]"),
            ({"text": "a"}, "a", "is a str"),
            ({"messages": CHAT}, {"messages": "hello"}, "a str in 'messages'"),
            ({"messages": CHAT}, {"messages": ["hello"]}, "a list in 'messages'"),
            ({"messages": CHAT}, {"messages": CHAT, "tools": "{"}, "'tools' that is not JSON"),
            (
                {"prompt": "a", "completion": "b"},
                {"prompt": "a", "completion": CHAT},
                "a list in 'completion'",
            ),
            (
                {"prompt": CHAT, "completion": CHAT},
                {"prompt": CHAT, "completion": "b"},
                "a str in 'completion'",
            ),
        ],
    )
    def test_a_row_of_another_form_is_named(self, chatml, good, bad, found):
        with pytest.raises(DatasetError, match=f"row 1 .*{found}"):
            prepare([good, bad], chatml, max_length=99)

    def test_a_conversation_in_the_text_column(self, chatml):
        with pytest.raises(DatasetError, match="A conversation belongs in a column `messages`"):
            prepare([{"text": CHAT}], chatml, max_length=99)

    @pytest.mark.parametrize("returned", [None, 3, [None]])
    def test_a_formatting_func_that_returns_no_text(self, tokenizer, returned):
        with pytest.raises(DatasetError, match=r"row 0 .*formatting_func return"):
            prepare([{"q": "a"}], tokenizer, formatting_func=lambda row: returned, max_length=99)

    @pytest.mark.parametrize(
        ("row", "options"),
        [
            ({"text": "a"}, {"completion_only_loss": True}),
            ({"text": "a"}, {"assistant_only_loss": True}),
            ({"q": "a"}, {"completion_only_loss": True, "formatting_func": lambda row: "a"}),
            ({"messages": CHAT}, {"completion_only_loss": True}),
            ({"prompt": "a", "completion": "b"}, {"assistant_only_loss": True}),
        ],
    )
    def test_a_loss_that_the_form_cannot_tell(self, chatml, row, options):
        with pytest.raises(DatasetError, match="_only_loss=True, but the dataset"):
            prepare([row], chatml, max_length=99, **options)

    def test_assistant_only_where_the_template_does_not_tell(self):
        tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
        with pytest.raises(ChatTemplateError, match="does not mark what the assistant writes"):
            prepare([{"messages": CHAT}], tokenizer, max_length=99, assistant_only_loss=True)

    def test_conversations_without_a_chat_template(self, tokenizer):
        with pytest.raises(ChatTemplateError, match="no chat template") as error:
            prepare([{"messages": CHAT}], tokenizer, max_length=99)
        assert "get_chat_template" in error.value.fix

    @pytest.mark.parametrize(
        ("messages", "found"),
        [
            ([{"from": "user", "value": "hi"}], r"message 0 has only the keys \['from', 'value'\]"),
            ([CHAT[0], {"role": "assistant", "tool_calls": [1]}], r"message 1 has only .*'tool_calls'\]"),
            ([{"role": "user", "content": 3}], r"messages have the keys \['content', 'role'\]"),
        ],
    )
    def test_messages_that_the_template_cannot_render_are_named(self, chatml, messages, found):
        with pytest.raises(
            ChatTemplateError, match=f"failed on row 1 of the dataset, whose {found}: "
        ) as error:
            prepare([{"messages": CHAT}, {"messages": messages}], chatml, max_length=99)
        assert "standardize_sharegpt" in error.value.fix

    @pytest.mark.parametrize(
        ("message", "lack"),
        [
            ({"role": "user"}, "no 'content'"),
            ({"role": "user", "content": None, "name": "Ada"}, r"nothing \(None\) in 'content'"),
            ({"role": "assistant", "content": None, "tool_calls": None}, r"nothing \(None\) in 'content'"),
            ({"from": "user"}, "no 'value'"),
        ],
    )
    @pytest.mark.parametrize("column", ["messages", "conversations"])
    def test_a_message_that_says_nothing(self, llama, message, lack, column):
        """A template that trims the content would write an empty turn."""
        with pytest.raises(DatasetError, match=f"row 1 of the dataset has {lack} in message 2 of '{column}'"):
            prepare([{column: CHAT}, {column: [*CHAT[:2], message]}], llama, max_length=99)

    def test_a_message_may_be_empty_or_a_call_alone(self):
        tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
        chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
        assert text_of(tokenizer, one([{"messages": chat}], tokenizer)) == "[][]"
