"""The README's code runs as it is printed."""

import re
from pathlib import Path

from tests.kit import models

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    """Both blocks, one after the other; only the model's name, its template and the number of steps are put in."""
    folder = models.save(models.random_llama(num_hidden_layers=1), tmp_path / "model")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    code = "\n".join(blocks)
    for printed, ours in {
        "path/or/hub-id": str(folder),
        "llama-3.1": "chatml",
        "max_steps=60": "max_steps=2",
    }.items():
        assert printed in code
        code = code.replace(printed, ours)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape[-1] == models.VOCAB
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
