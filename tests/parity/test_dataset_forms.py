"""Rows that TRL converts become the samples of what it converts them to."""

import pytest
import trl

from jaxtune import get_chat_template
from jaxtune.data.formats import prepare
from tests.data.tiny_tokenizer import chatml_tokenizer

CHAT = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_conversations(keys):
    tokenizer = get_chat_template(chatml_tokenizer(), "chatml")
    row = {"conversations": [dict(zip(keys, message, strict=True)) for message in CHAT]}
    (sample,) = prepare([row], tokenizer, max_length=None)
    (expected,) = prepare([trl.maybe_convert_to_chatml(row)], tokenizer, max_length=None)
    assert sample.input_ids.tolist() == expected.input_ids.tolist()
    assert sample.labels.tolist() == expected.labels.tolist()
