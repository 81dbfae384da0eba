"""`to_sharegpt`: a conversation out of each row of a table, or out of several."""

import datasets
import pytest

from jaxtune import standardize_sharegpt, to_sharegpt
from jaxtune.errors import DatasetError, OptionError

ALPACA = [
    {"instruction": "Add.", "input": "2, 2", "output": "4"},
    {"instruction": "Greet.", "input": "", "output": "Hello"},
]
MERGED = "{instruction}[[\nInput: {input}]]"


def question(prompt, **columns):
    (row,) = to_sharegpt([{**columns, "output": "x"}], merged_prompt=prompt)
    return row["conversations"][0]["value"]


def test_a_question_from_columns_and_its_answer():
    assert to_sharegpt(ALPACA, merged_prompt=MERGED) == [
        {
            "conversations": [
                {"from": "human", "value": "Add.\nInput: 2, 2"},
                {"from": "gpt", "value": "4"},
            ]
        },
        {"conversations": [{"from": "human", "value": "Greet."}, {"from": "gpt", "value": "Hello"}]},
    ]


def test_a_dataset_stays_one():
    made = to_sharegpt(datasets.Dataset.from_list(ALPACA), merged_prompt=MERGED, conversation_extension=2)
    assert isinstance(made, datasets.Dataset) and made.column_names == ["conversations"]
    assert list(made) == to_sharegpt(ALPACA, merged_prompt=MERGED, conversation_extension=2)


def test_a_stream_stays_one():
    made = to_sharegpt(datasets.Dataset.from_list(ALPACA).to_iterable_dataset(), merged_prompt=MERGED)
    assert isinstance(made, datasets.IterableDataset)
    assert list(made) == to_sharegpt(ALPACA, merged_prompt=MERGED)


def test_conversations_that_are_there_already_are_replaced():
    rows = [{**row, "conversations": "old"} for row in ALPACA]
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        for made in (to_sharegpt(dataset), to_sharegpt(dataset, remove_unused_columns=False)):
            assert made[0]["conversations"][1] == {"from": "gpt", "value": "4"}


def test_without_a_merged_prompt_the_question_is_a_column():
    (row, _) = to_sharegpt(ALPACA)
    assert row["conversations"][0]["value"] == "Add."
    (row,) = to_sharegpt([{"q": "a", "a": "b"}], merged_column_name="q", output_column_name="a")
    assert [turn["value"] for turn in row["conversations"]] == ["a", "b"]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_columns_may_be_kept(kind):
    options = dict(merged_column_name="asked", remove_unused_columns=False, conversation_extension=2)
    row = to_sharegpt(kind(ALPACA), merged_prompt=MERGED, **options)[0]
    assert row.items() >= {**ALPACA[0], "asked": "Add.\nInput: 2, 2"}.items()
    assert len(row["conversations"]) == 4


@pytest.mark.parametrize("empty", [None, "", "  ", float("nan")])
def test_an_optional_section_is_dropped_where_a_column_of_it_is_empty(empty):
    assert question("Of[[ {a} and {b}]], what?", a=empty, b="y") == "Of, what?"
    assert question("Of[[ {a} and {b}]], what?", a="x", b="y") == "Of x and y, what?"


def test_numbers_are_texts_and_zero_is_not_empty():
    assert question("[[{n} of ]]{m}", n=0, m=2.5) == "0 of 2.5"


def test_braces_that_are_meant_as_such():
    assert question("{{{n}}} {{n}}", n=1) == "{1} {n}"


def test_what_a_row_says_is_not_read_as_a_field():
    assert question("{a}[[{b}]]", a="{b} [[", b="{a}") == "{b} [[{a}"


def test_names_of_columns_may_have_anything_but_braces_in_them():
    assert question("{Age (years): a.b!r}", **{"Age (years): a.b!r": 3}) == "3"


FIFTY = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(50)]


class TestSeveralRowsInOneConversation:
    def chats(self, count, **options):
        made = to_sharegpt(FIFTY, conversation_extension=count, **options)
        return [[turn["value"] for turn in row["conversations"]] for row in made]

    def test_each_row_begins_one_and_is_in_as_many_as_are_joined(self):
        chats = self.chats(3)
        assert [chat[:2] for chat in chats] == [[f"q{n}", f"a{n}"] for n in range(50)]
        for chat in chats:
            assert len(chat) == 6 and len(set(chat)) == 6
            assert [answer[1:] for answer in chat[1::2]] == [asked[1:] for asked in chat[0::2]]
        for n in range(50):
            assert sum(f"q{n}" in chat for chat in chats) == 3

    def test_which_ones_depends_on_random_state_alone(self):
        assert self.chats(3) == self.chats(3) != self.chats(3, random_state=1)

    @pytest.mark.parametrize("count", [0, -1, 51, "2", None])
    def test_more_than_there_are(self, count):
        with pytest.raises(OptionError, match=f"is {count!r}, and the dataset has 50 rows"):
            self.chats(count)

    def test_of_a_stream(self):
        stream = datasets.Dataset.from_list(FIFTY).to_iterable_dataset()
        with pytest.raises(OptionError, match="the dataset is a stream"):
            to_sharegpt(stream, conversation_extension=2)


def test_then_standardised():
    (row, _) = standardize_sharegpt(to_sharegpt(ALPACA))
    assert row["conversations"] == [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "4"},
    ]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"instruction": None, "output": "x"}, "nothing in 'instruction'"),
        ({"instruction": ["a"], "output": "x"}, "a list in 'instruction'"),
        ({"instruction": "a", "output": None}, "nothing in 'output'"),
        ({"output": "x"}, "no 'instruction'; it has"),
    ],
)
def test_a_row_without_its_texts_is_named(row, found):
    with pytest.raises(DatasetError, match=f"row 2 of the dataset has {found}"):
        to_sharegpt([*ALPACA, row])


def test_columns_that_are_not_there():
    with pytest.raises(DatasetError, match="names the column 'instrution'") as error:
        to_sharegpt(ALPACA, merged_prompt="{instrution}")
    assert "Did you mean 'instruction'" in error.value.fix
    with pytest.raises(DatasetError, match="has the columns") as error:
        to_sharegpt(ALPACA, output_column_name="outptu")
    assert "output_column_name" in error.value.fix


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("no column", "names no column"),
        ("{input", "a single '{'"),
        ("{input}}", "a single '}'"),
        ("{}", "a single '{'"),
        ("{input}[[ text ]]", r"\[\[ text \]\] of merged_prompt has no column"),
        ("{input} [[", r"a single '\[\['"),
    ],
)
def test_a_prompt_that_cannot_be_meant(prompt, found):
    with pytest.raises(OptionError, match=found):
        to_sharegpt(ALPACA, merged_prompt=prompt)
