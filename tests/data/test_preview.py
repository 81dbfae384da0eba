"""`preview` shows a sample's tokens, and which of them are trained on."""

import numpy as np
import pytest

from jaxtune.data.formats import prepare
from jaxtune.data.preview import pieces, preview
from jaxtune.data.sample import IGNORED, Sample
from jaxtune.data.templates import get_chat_template
from tests.data.tiny_tokenizer import chatml_tokenizer, tiny_tokenizer
from tests.kit import models

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "hé"}]


@pytest.fixture
def chatml():
    return get_chat_template(chatml_tokenizer(), "chatml")


@pytest.fixture
def sample(chatml):
    (sample,) = prepare([{"messages": CHAT}], chatml, max_length=None, assistant_only_loss=True)
    return sample


def sample_of(tokenizer, text, context):
    """The text, whose first tokens are context."""
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    return Sample(ids, np.where(np.arange(len(ids)) < context, IGNORED, ids).astype(np.int32))


def test_without_colours_marks_stand_around_what_is_trained_on(sample, chatml):
    legend, *text = preview(sample, chatml, colour=False).split("\n")
    assert legend == "26 tokens, 4 trained on: ⟦trained on⟧, context; ¦ between tokens"
    assert text == [
        "<|im_start|>¦u¦s¦e¦r¦↵",
        "¦a¦b¦<|im_end|>¦↵",
        "¦<|im_start|>¦a¦s¦s¦i¦s¦t¦a¦n¦t¦↵",
        "⟦h¦é¦<|im_end|>⟧↵",
        "",
    ]


def test_in_colours_trained_tokens_are_black_on_greens_and_others_grey(chatml):
    legend, text = preview(sample_of(chatml, "abcd", 2), chatml, colour=True).split("\n")
    assert "4 tokens, 2 trained on: \x1b[30;42mtrained on\x1b[0m, \x1b[37mcontext\x1b[0m" in legend
    assert text == "\x1b[37ma\x1b[0m\x1b[90mb\x1b[0m\x1b[30;42mc\x1b[0m\x1b[30;102md\x1b[0m"


def test_a_background_ends_with_its_line(chatml):
    text = preview(sample_of(chatml, "a\nb", 0), chatml, colour=True)
    for line in text.split("\n"):
        assert line.endswith(("\x1b[0m", "apart"))


@pytest.mark.parametrize("text", ["héé 🙂🙂 x\n\n w", "  two  spaces ", "x🙂"])
@pytest.mark.parametrize("make", [tiny_tokenizer, models.fresh_tokenizer])
def test_the_pieces_are_the_text(make, text):
    tokenizer = make()
    sample = sample_of(tokenizer, text, 0)
    shown = list(pieces(sample, tokenizer))
    assert "".join(piece.text for piece in shown) == tokenizer.decode(sample.input_ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in shown)


def test_half_a_character_that_is_trained_on_is_told_from_the_other_half():
    tokenizer = tiny_tokenizer()
    shown = list(pieces(sample_of(tokenizer, "xé", 2), tokenizer))
    assert shown == [("x", False), ("\N{REPLACEMENT CHARACTER}", False), ("é", True)]


def test_the_first_token_is_never_trained_on(chatml):
    assert preview(sample_of(chatml, "ab", 0), chatml, colour=False).endswith("\na⟦b⟧")


def test_what_a_terminal_would_obey_is_escaped(chatml):
    text = preview(sample_of(chatml, "a\x1b[31m\r\t", 0), chatml, colour=False)
    assert "\x1b" not in text and "\\x1b" in text and "\\r" in text and "\\t" in text


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_are_for_terminals(sample, chatml, monkeypatch, terminal, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert ("\x1b[" in preview(sample, chatml)) == coloured


def test_an_empty_sample(chatml):
    empty = np.zeros(0, dtype=np.int32)
    assert preview(Sample(empty, empty), chatml, colour=False).startswith("0 tokens, 0 trained on")
