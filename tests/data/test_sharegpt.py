"""`standardize_sharegpt`: conversations under whatever names become messages that chat templates can render."""

import datasets
import pandas
import pytest

from jaxtune import standardize_data_formats, standardize_sharegpt
from jaxtune.errors import DatasetError, OptionError

ASKED = {"from": "human", "value": "2+2?"}
ANSWERED = {"from": "gpt", "value": "4"}
STANDARD = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
ROW = {"conversations": [ASKED, ANSWERED], "id": 7}


def standard(*messages, **options):
    (row,) = standardize_sharegpt([{"conversations": list(messages)}], **options)
    return row["conversations"]


def test_sharegpt():
    assert standardize_sharegpt([ROW]) == [{"conversations": STANDARD, "id": 7}]
    assert ROW["conversations"] == [ASKED, ANSWERED]  # the dataset that was given stays as it was


@pytest.mark.parametrize("kind", [datasets.Dataset, datasets.IterableDataset])
def test_a_dataset_stays_what_it_is(kind):
    dataset = datasets.Dataset.from_list([ROW])
    dataset = dataset if kind is datasets.Dataset else dataset.to_iterable_dataset()
    changed = standardize_sharegpt(dataset)
    assert isinstance(changed, kind)
    assert list(changed) == [{"conversations": STANDARD, "id": 7}]


def test_both_names_are_one_function():
    assert standardize_data_formats is standardize_sharegpt


def test_the_column_keeps_its_name():
    assert standardize_sharegpt([{"messages": [ASKED, ANSWERED]}]) == [{"messages": STANDARD}]


def test_messages_that_are_standard_already():
    assert standard(*STANDARD) == STANDARD


def test_keys_with_other_names_are_told_apart_by_the_roles():
    assert standard({"says": "2+2?", "who": "input"}, {"says": "4", "who": "output"}) == STANDARD


def test_system_and_tool():
    system, tool = {"from": "system", "value": "s"}, {"role": "tool", "content": "4"}
    assert standard(system, tool) == [{"role": "system", "content": "s"}, tool]


def test_what_else_a_message_has_is_kept_and_none_is_absent():
    assert standard({**ASKED, "weight": 0, "name": None}) == [{**STANDARD[0], "weight": 0}]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert standard(calls) == [{"role": "assistant", "tool_calls": [{"name": "f"}]}]


def test_aliases_of_one_s_own():
    assert standard({"from": "Q", "value": "2+2?"}, ANSWERED, aliases_for_user=["Q"]) == STANDARD


def test_num_proc_has_no_effect(caplog):
    caplog.set_level("INFO", "jaxtune")
    assert standardize_sharegpt([ROW], num_proc=2)
    assert "num_proc has no effect" in caplog.text


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([{"from": "alien", "value": "x"}], "a message from 'alien'"),
        ([{"text": "x"}], r"keys \['text'\]"),
        ([{"a": "x", "b": "y"}], r"keys \['a', 'b'\]"),
        ("text", "a str in 'conversations'"),
    ],
)
def test_what_cannot_be_read_names_its_row(messages, found):
    with pytest.raises(DatasetError, match=f"row 1 of the dataset has .*{found}"):
        standardize_sharegpt([ROW, {"conversations": messages}])
    with pytest.raises(DatasetError, match="row 1 of the dataset has no 'conversations'"):
        standardize_sharegpt([ROW, {"id": 7}])


def test_a_dataset_without_conversations():
    with pytest.raises(DatasetError, match=r"has the columns \['conversation'\]") as error:
        standardize_sharegpt([{"conversation": [ASKED]}])
    assert "to_sharegpt" in error.value.fix and "Did you mean 'conversations'" in error.value.fix


def test_what_is_not_one_split():
    with pytest.raises(DatasetError, match=r"a mapping with the keys \['train'\]"):
        standardize_sharegpt(datasets.DatasetDict(train=datasets.Dataset.from_list([ROW])))
    for dataset, found in [
        (iter([ROW]), "is a list_iterator"),
        ([], "has no rows"),
        (["text"], "is a list of str"),
    ]:
        with pytest.raises(DatasetError, match=found):
            standardize_sharegpt(dataset)
    with pytest.raises(DatasetError, match="is a DataFrame") as error:
        standardize_sharegpt(pandas.DataFrame([ROW]))
    assert 'to_dict("records")' in error.value.fix


def test_aliases_that_contradict_one_another():
    with pytest.raises(OptionError, match="'human' stands for 'user' and for 'assistant'"):
        standardize_sharegpt([ROW], aliases_for_assistant=["human"])
    with pytest.raises(OptionError, match="is the string 'bot'"):
        standardize_sharegpt([ROW], aliases_for_assistant="bot")
