"""Loading a tokenizer: a pad token that is not the eos token wherever the vocabulary has one, and clear errors."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from jaxtune.errors import ConfigError, ModelNotFoundError
from jaxtune.loading.tokenizer import load_tokenizer

REPOSITORY_ROOT = Path(__file__).parents[2]


def write_tokenizer(folder: Path, *specials: str, **settings: str) -> Path:
    """A word tokenizer of a few words with these special tokens; `settings` go into tokenizer_config.json."""
    tokenizer = Tokenizer(WordLevel({"hello": 0, "world": 1, "unknown": 2}, unk_token="unknown"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_text_becomes_ids_and_text_again(tmp_path: Path):
    tokenizer = load_tokenizer(
        write_tokenizer(tmp_path, "<eos>", "<pad>", eos_token="<eos>", pad_token="<pad>")
    )
    assert tokenizer("hello world<eos>")["input_ids"] == [0, 1, 3]
    assert tokenizer.decode([0, 1, 3], skip_special_tokens=True) == "hello world"


class TestPadToken:
    def test_a_published_one_is_kept(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        folder = write_tokenizer(tmp_path, "<eos>", "<pad>", "<mine>", eos_token="<eos>", pad_token="<mine>")
        assert load_tokenizer(folder).pad_token == "<mine>"
        assert not caplog.records

    @pytest.mark.parametrize(
        "specials, chosen",
        [
            (["<eos>", "<unk>"], "<unk>"),
            (["<eos>", "<unk>", "<pad>"], "<pad>"),
            (["<eos>", "<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"),
            (
                ["<eos>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"],
                "<|finetune_right_pad_id|>",
            ),
        ],
    )
    def test_a_missing_one_is_chosen_from_the_vocabulary(
        self, specials: list[str], chosen: str, tmp_path: Path
    ):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path, *specials, eos_token="<eos>"))
        assert tokenizer.pad_token == chosen
        assert tokenizer.pad_token_id == tokenizer.get_vocab()[chosen] != tokenizer.eos_token_id
        assert len(tokenizer) == 3 + len(specials)

    @pytest.mark.parametrize(
        "free", ["<unused7>", "[unused0]", "<|reserved_special_token_12|>", "<SPECIAL_20>", "<|extra_3|>"]
    )
    def test_one_that_is_eos_is_replaced_by_a_token_left_free(self, free: str, tmp_path: Path):
        folder = write_tokenizer(tmp_path, "<eos>", "<unk>", free, eos_token="<eos>", pad_token="<eos>")
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.pad_token, tokenizer.eos_token) == (free, "<eos>")

    def test_a_token_without_a_row_or_of_the_template_is_not_free(self, tmp_path: Path):
        folder = write_tokenizer(
            tmp_path,
            "<eos>",
            "<unused0>",
            "<unused1>",
            "<pad>",
            eos_token="<eos>",
            chat_template="a<unused0>b",
        )
        assert load_tokenizer(folder).pad_token == "<pad>"
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": "<eos>", "chat_template": "a<unused0>b", "image_token": "<pad>",
                        "tokenizer_class": "PreTrainedTokenizerFast"})
        )  # fmt: skip
        assert load_tokenizer(folder, vocab_size=6).pad_token == "<unused1>"

    def test_a_candidate_that_is_the_eos_token_is_not_chosen(self, tmp_path: Path):
        folder = write_tokenizer(tmp_path, "<pad>", "<unk>", eos_token="<pad>")
        assert load_tokenizer(folder).pad_token == "<unk>"

    @pytest.mark.parametrize("settings", [{}, {"pad_token": "<eos>"}], ids=["none to choose", "published so"])
    def test_padding_with_eos_is_said_in_one_line(
        self, settings: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        folder = write_tokenizer(tmp_path, "<eos>", eos_token="<eos>", **settings)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert "'<eos>'" in record.message and "masks, not token ids" in record.message

    def test_neither_pad_nor_eos_is_an_error(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="neither a pad token nor an end-of-text token"):
            load_tokenizer(write_tokenizer(tmp_path))


class TestTheModelsPart:
    def test_a_missing_eos_is_the_models(self, tmp_path: Path):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path, "<end>", "<pad>"), eos_token_id=3)
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end>", "<pad>")
        named = load_tokenizer(write_tokenizer(tmp_path, "<end>", "<eos>", eos_token="<eos>"), eos_token_id=3)
        assert named.eos_token == "<eos>"

    def test_a_missing_bos_stays_missing(self, tmp_path: Path):
        assert load_tokenizer(write_tokenizer(tmp_path, "<eos>", eos_token="<eos>")).bos_token is None

    def test_an_eos_that_the_tokenizer_does_not_have_is_none(self, tmp_path: Path):
        folder = write_tokenizer(tmp_path, "<pad>", pad_token="<pad>")
        assert load_tokenizer(folder, eos_token_id=99).eos_token is None

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_the_side_of_padding_stays_as_published(self, side: str, tmp_path: Path):
        settings = {"eos_token": "<eos>", "padding_side": side}
        tokenizer = load_tokenizer(write_tokenizer(tmp_path, "<eos>", "<pad>", **settings))
        assert tokenizer.padding_side == side
        mask = tokenizer(["hello", "hello world"], padding=True)["attention_mask"]
        assert mask == [[0, 1] if side == "left" else [1, 0], [1, 1]]

    def test_every_token_needs_a_row(self, tmp_path: Path):
        folder = write_tokenizer(tmp_path, "<eos>", "<pad>", "<new>", eos_token="<eos>")
        load_tokenizer(folder, vocab_size=6)
        with pytest.raises(
            ConfigError, match=r"1 tokens .* embedding of 5 rows .* '<new>' with id 5"
        ) as caught:
            load_tokenizer(folder, vocab_size=5)
        assert "add_new_tokens" in caught.value.fix

    def test_but_not_those_of_an_absent_modality(self, tmp_path: Path):
        folder = write_tokenizer(
            tmp_path, "<eos>", "<pad>", "<image>", eos_token="<eos>", image_token="<image>"
        )
        assert load_tokenizer(folder, vocab_size=5).pad_token == "<pad>"


class TestErrors:
    def test_no_folder(self, tmp_path: Path):
        with pytest.raises(ModelNotFoundError, match="no folder"):
            load_tokenizer(tmp_path / "gone")

    def test_no_tokenizer_files(self, tmp_path: Path):
        (tmp_path / "tokenizer_config.json").write_text("{}")
        with pytest.raises(ModelNotFoundError, match="has no tokenizer files") as caught:
            load_tokenizer(tmp_path)
        assert "tokenizer.json" in caught.value.expected

    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_broken_file(self, file: str, tmp_path: Path):
        write_tokenizer(tmp_path, "<eos>", eos_token="<eos>")
        (tmp_path / file).write_text('{"version": ')
        with pytest.raises(ConfigError, match="cannot be loaded"):
            load_tokenizer(tmp_path)

    def test_code_that_comes_with_a_tokenizer_is_not_run(self, tmp_path: Path):
        own = {"AutoTokenizer": ["mine.Mine", None]}
        write_tokenizer(tmp_path, "<eos>", eos_token="<eos>", tokenizer_class="Mine", auto_map=own)
        (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
        with pytest.raises(ConfigError, match="cannot be loaded"):
            load_tokenizer(tmp_path)


def test_it_works_without_torch_and_imports_transformers_only_when_called(tmp_path: Path):
    code = (
        "import sys; sys.modules['torch'] = None\n"  # makes `import torch` fail, and transformers not find it
        "from jaxtune.loading.tokenizer import load_tokenizer\n"
        "assert 'transformers' not in sys.modules\n"
        "assert load_tokenizer(sys.argv[1])('hello')['input_ids'] == [0]\n"
    )
    folder = str(write_tokenizer(tmp_path, "<eos>", eos_token="<eos>"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, folder],
        cwd=REPOSITORY_ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
