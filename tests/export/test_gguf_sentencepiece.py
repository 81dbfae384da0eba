"""Tokenizers of SentencePiece models: llama.cpp cuts texts as they do."""

import gguf
import pytest
from tokenizers import normalizers, pre_tokenizers

from jaxtune.errors import UnsupportedModelError
from jaxtune.export.gguf.sentencepiece import merge_scores
from jaxtune.export.gguf.vocab import model_name, vocabulary
from tests.export.adapted import Adapted
from tests.export.byte_level import NASTY
from tests.export.llama_cpp import LlamaCpp
from tests.export.sentence_piece import BYTES, SPECIALS, VOCAB, sentence_piece


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    return Adapted(folder, adapter=False, vocab_size=VOCAB, num_hidden_layers=1)


def differences(tokenizer, file, texts):
    llama_cpp = LlamaCpp(file)
    both = {text: (llama_cpp.tokenize(text), tokenizer(text)["input_ids"]) for text in texts}
    return {text: ids for text, ids in both.items() if ids[0] != ids[1]}


@pytest.mark.parametrize("kind", ["gemma", "llama 2"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(tiny_llama, tmp_path, kind):
    tokenizer = sentence_piece(kind)
    (file,) = tiny_llama.save_gguf(tmp_path / "out", tokenizer=tokenizer)
    assert not differences(tokenizer, file, NASTY)


def test_a_space_before_everything_that_begins_with_none(tiny_llama, tmp_path):
    """Where a text begins with a space, llama.cpp puts another before it, as SentencePiece does."""
    tokenizer = sentence_piece("always")
    (file,) = tiny_llama.save_gguf(tmp_path / "out", tokenizer=tokenizer)
    assert set(differences(tokenizer, file, NASTY)) == {text for text in NASTY if text.startswith(" ")}


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_spaces_after_special_tokens_are_theirs_in_a_phi_3(tiny_llama, tmp_path):
    tokenizer = sentence_piece("first", strip=["<think>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHAT
    (file,) = tiny_llama.save_gguf(tmp_path / "out", tokenizer=tokenizer, name="somebody/mine")
    assert gguf.GGUFReader(file).fields["general.name"].contents() == "mine (phi-3)"
    # llama.cpp strips ASCII's spaces, tokenizers all.
    texts = [f"<|im_start|>{text}<|im_end|>\n<|im_start|> \n x" for text in NASTY if text[:1] != "\u00a0"]
    assert tokenizer("<|im_start|> \na")["input_ids"] == tokenizer("<|im_start|>a")["input_ids"]
    assert not differences(tokenizer, file, texts)


def test_spaces_that_llama_cpp_cannot_give_to_a_token(caplog):
    assert model_name(sentence_piece("first"), "mine") == "mine"
    assert model_name(sentence_piece("first"), "my-Phi-3") == "my-phi 3"
    assert not caplog.messages
    assert model_name(sentence_piece("first", strip=["<|im_end|>"]), "mine") == "mine"
    assert "spaces beside <|im_end|>" in caplog.text


def test_a_space_before_the_first_word_only(tiny_llama, tmp_path):
    """Which llama.cpp has no word for: what stands after special tokens, or without them, is right."""
    tokenizer = sentence_piece("first")
    special, plain = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>", "The test of words"
    (file,) = tiny_llama.save_gguf(tmp_path / "out", tokenizer=tokenizer)
    assert set(differences(tokenizer, file, [special, plain])) == {special}
    tokenizer.chat_template = CHAT
    (file,) = tiny_llama.save_gguf(tmp_path / "chat", tokenizer=tokenizer)
    assert set(differences(tokenizer, file, [special, plain])) == {plain}


def test_the_vocabulary():
    found = vocabulary(sentence_piece("gemma"), VOCAB)
    tokens, types, scores = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    kinds = {name: [tokens[n] for n, kind in enumerate(types) if kind == gguf.TokenType[name]] for name in
             ("UNKNOWN", "CONTROL", "USER_DEFINED", "BYTE", "UNUSED")}  # fmt: skip
    assert kinds["UNKNOWN"] == ["<unk>"]
    assert kinds["CONTROL"] == SPECIALS[1:]
    assert kinds["USER_DEFINED"] == ["<think>"]
    assert kinds["BYTE"] == BYTES
    assert kinds["UNUSED"][-1] == f"[PAD{VOCAB - 1}]"
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert found["tokenizer.ggml.add_space_prefix"] is False
    assert len(scores) == VOCAB
    assert {scores[n] for n, kind in enumerate(types) if kind == gguf.TokenType.UNUSED} == {-10000}


def test_scores_are_the_order_of_what_merges_make():
    vocab = {token: n for n, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "<x>"])}
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert merge_scores(merges, vocab, {"<x>"}) == {"ab": 0, "bc": -1, "abc": -2}


def test_runs_of_one_character_may_share_a_score():
    merges = [("a", "b"), ("_", "_"), ("__", "__"), ("__", "_"), ("___", "_"), ("_", "__"), ("_", "___")]
    vocab = {token: n for n, token in enumerate(["a", "b", "_", "ab", "__", "___", "____"])}
    assert merge_scores(merges, vocab, set()) == {"ab": 0, "__": -1, "___": -2, "____": -2}


@pytest.mark.parametrize(
    ("merges", "reason"),
    [
        ([("a", "b"), ("b", "c"), ("ab", "c")], "'a' and 'bc' are not merged, though 'abc' is a token"),
        ([("ab", "c"), ("a", "b"), ("b", "c"), ("a", "bc")], "the merges that make 'ab' do not follow"),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(merges, reason):
    vocab = {token: n for n, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    with pytest.raises(UnsupportedModelError, match=reason):
        merge_scores(merges, vocab, set())


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "\u2581")]), None),
        (normalizers.Replace(" ", "\u2581"), pre_tokenizers.Split("\u2581", "merged_with_next")),
        (None, None),
    ],
    ids=["changes letters", "cuts words", "leaves spaces"],
)
def test_what_changes_or_cuts_a_text_otherwise_is_refused(normalizer, pre_tokenizer):
    tokenizer = sentence_piece("gemma")
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    with pytest.raises(UnsupportedModelError, match="no SentencePiece model: it makes"):
        vocabulary(tokenizer, VOCAB)
