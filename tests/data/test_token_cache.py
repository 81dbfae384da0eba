"""Tokens that were kept are those that would be made now, or they are not used."""

import os
import time
from itertools import chain

import numpy as np
import pytest

from jaxtune.data import formats, readers, token_cache
from jaxtune.data.formats import prepare
from jaxtune.data.templates import get_chat_template
from jaxtune.data.token_cache import default_folder
from tests.data.tiny_tokenizer import chatml_tokenizer, tiny_tokenizer

CHUNK = 4
TEXTS = [{"text": f"text {n}"} for n in range(10)]  # two chunks, and two rows
CHATS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
    for n in range(8)
]
ODD_CHATS = [{"messages": [{"role": ("usr", "user")[n % 2], "content": "q"}]} for n in range(8)]
PAIRS = [{"prompt": f"the {n} ", "completion": "words" if n % 2 else ""} for n in range(8)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_ROWS", CHUNK)


@pytest.fixture
def encoded(monkeypatch):
    """How many texts were given to the tokenizer."""
    counts = []
    encode = readers.encoding.encode_verbatim
    monkeypatch.setattr(
        readers.encoding, "encode_verbatim", lambda t, texts: counts.append(len(texts)) or encode(t, texts)
    )
    return counts


@pytest.fixture
def chatml():
    return get_chat_template(chatml_tokenizer(), "chatml")


def prepared(rows, tokenizer, cache, **options):
    samples = prepare(rows, tokenizer, **{"max_length": 99, **options}, cache=cache)
    return [(sample.input_ids.tolist(), sample.labels.tolist()) for sample in samples]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (TEXTS, {}),
        (CHATS, {}),
        (CHATS, {"assistant_only_loss": True}),
        (ODD_CHATS, {}),
        (PAIRS, {}),
        (PAIRS, {"completion_only_loss": False}),
        (CHATS, {"max_length": 7}),
        ([{"text": ""}] * 4 + TEXTS, {}),
    ],
)
def test_the_second_time_has_the_same_samples_and_says_the_same(rows, options, chatml, tmp_path, caplog):
    expected = prepared(rows, chatml, None, **options)
    without = caplog.messages[:]
    caplog.clear()
    assert prepared(rows, chatml, tmp_path, **options) == expected
    assert caplog.messages == without
    caplog.clear()
    assert prepared(iter(rows), chatml, tmp_path, **options) == expected
    assert caplog.messages == without
    samples = prepare(rows, chatml, max_length=99, cache=tmp_path)
    assert samples[0].input_ids.dtype == samples[0].labels.dtype == np.int32


def test_only_chunks_that_are_new_or_short_are_tokenised(tmp_path, encoded, caplog):
    caplog.set_level("INFO", "jaxtune")
    tokenizer = tiny_tokenizer()
    prepared(TEXTS, tokenizer, tmp_path)
    assert encoded == [4, 4, 2]
    encoded.clear()
    prepared([*TEXTS[:4], {"text": "new"}, *TEXTS[5:]], tiny_tokenizer(), tmp_path)
    assert encoded == [4, 2]
    assert f"the tokens of 4 of 8 rows come from {tmp_path}" in caplog.messages


def test_max_length_does_not_matter(chatml, tmp_path, encoded):
    prepared(CHATS, chatml, tmp_path)
    encoded.clear()
    prepared(CHATS, chatml, tmp_path, max_length=5)
    assert encoded == []


def test_a_row_is_named_by_its_place_in_this_dataset(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    prepared(PAIRS[4:], tokenizer, tmp_path)
    prepared([{"prompt": "a", "completion": "b"}] * 4 + PAIRS[4:], tokenizer, tmp_path)
    assert "(first in row 1)" in caplog.messages[0] and "(first in row 5)" in caplog.messages[1]


CHANGES = {
    "the rows": lambda rows, tokenizer: ([*rows[:3], {**rows[3], "tools": "[]"}], {}),
    "the chat template": lambda rows, tokenizer: (
        setattr(tokenizer, "chat_template", "{{ messages }}"),
        (rows, {}),
    )[1],
    "a special token": lambda rows, tokenizer: (setattr(tokenizer, "eos_token", "<|im_start|>"), (rows, {}))[
        1
    ],
    "the vocabulary": lambda rows, tokenizer: (tokenizer.add_tokens(["q1"]), (rows, {}))[1],
    "how special tokens are read": lambda rows, tokenizer: (
        setattr(tokenizer, "split_special_tokens", True),
        (rows, {}),
    )[1],
    "a setting": lambda rows, tokenizer: (rows, {"assistant_only_loss": True}),
    "the model's vocabulary": lambda rows, tokenizer: (rows, {"vocab_size": 1000}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change, chatml, tmp_path):
    rows = CHATS[:4]
    prepared(rows, chatml, tmp_path)
    rows, options = change(rows, chatml)
    assert len(list(tmp_path.iterdir())) == 1
    assert prepared(rows, chatml, tmp_path, **options) == prepared(rows, chatml, None, **options)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_change_of_the_code_is_noticed(chatml, tmp_path, monkeypatch):
    prepared(CHATS[:4], chatml, tmp_path)
    monkeypatch.setattr(token_cache, "_code", lambda: "other")
    prepared(CHATS[:4], chatml, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


class TestWhatIsNotKept:
    def test_tokens(self, chatml, tmp_path):
        prepared([{"input_ids": [5, 6]}] * 4, chatml, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_what_a_function_makes(self, chatml, tmp_path):
        for ending in "ab":
            samples = prepared(TEXTS, chatml, tmp_path, formatting_func=lambda row, e=ending: row["text"] + e)
            assert chatml.decode(samples[0][0]) == f"text 0{ending}<|im_end|>"
        assert not list(tmp_path.iterdir())

    def test_what_depends_on_the_date(self, tmp_path):
        tokenizer = tiny_tokenizer(chat_template="{{ strftime_now('%Y') }}{{ messages[0].content }}")
        prepared(CHATS, tokenizer, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_rows_whose_content_cannot_be_told(self, chatml, tmp_path):
        prepared([{**row, "image": object()} for row in CHATS], chatml, tmp_path)
        assert not list(tmp_path.iterdir())


class TestTheFolder:
    def test_is_the_user_s_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_folder() == tmp_path / "jaxtune" / "tokens"

    @pytest.mark.parametrize(
        "damage", [lambda content: content[:-50], lambda content: b"", lambda content: b"x"]
    )
    def test_a_damaged_file_is_made_again_and_said(self, chatml, tmp_path, damage, caplog):
        expected = prepared(CHATS[:4], chatml, tmp_path)
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        assert prepared(CHATS[:4], chatml, tmp_path) == expected
        assert "cannot be read" in caplog.text
        assert len(file.read_bytes()) == len(whole)

    def test_a_folder_that_cannot_be_made_is_said_once(self, chatml, tmp_path, caplog):
        (tmp_path / "file").touch()
        assert prepared(CHATS, chatml, tmp_path / "file") == prepared(CHATS, chatml, None)
        (line,) = caplog.messages
        assert "tokens are not kept" in line

    def test_nothing_half_written_is_left(self, chatml, tmp_path, monkeypatch):
        def interrupted(*args, **arrays):
            raise KeyboardInterrupt

        monkeypatch.setattr(token_cache.np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepared(CHATS, chatml, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_it_keeps_to_its_limit_and_what_was_used_last(self, chatml, tmp_path, monkeypatch):
        prepared(CHATS[:4], chatml, tmp_path)
        (used,) = tmp_path.iterdir()
        prepared(CHATS[4:], chatml, tmp_path)
        (unused,) = set(tmp_path.iterdir()) - {used}
        for file in (used, unused):
            os.utime(file, (time.time() - 1000,) * 2)
        monkeypatch.setattr(token_cache, "LIMIT", int(2.5 * used.stat().st_size))
        prepared(list(chain(CHATS[:4], TEXTS[:0], CHATS[2:6])), chatml, tmp_path)
        assert used.exists() and not unused.exists()
        assert len(list(tmp_path.iterdir())) == 2
