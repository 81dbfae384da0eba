"""The README's code runs as it is printed."""

import re
from pathlib import Path

import pytest

from jaxtune import assets

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Both blocks, one after the other, in an empty folder; only the numbers of steps are lowered."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    code = "\n".join(blocks)
    assert code.count("max_steps=60") == 2
    folder = tmp_path_factory.mktemp("readme")
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code.replace("max_steps=60", "max_steps=2"), names)
    return folder, names


def test_the_readmes_code_runs(ran):
    folder, names = ran
    assert names["logits"].shape[-1] == 2048
    for file in ("adapter/adapter_config.json", "merged/model.safetensors", "model_gguf/tiny.Q4_K_M.gguf"):
        assert (folder / file).is_file()


def test_its_data_is_what_it_says():
    assert set(assets.rows("json_train")[0]) == {"messages"}
    assert set(assets.rows("addition_train")[0]) == {"prompt", "answer"}


def test_its_links_are_there():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link
