"""`import jaxtune` is a name and nothing more, and no part of the library needs torch."""

import statistics
import subprocess
import sys

import pytest

import jaxtune
from jaxtune import chat_templates
from tests.kit import models

WITHOUT_TORCH = """
import importlib.machinery, sys

class Absent:
    '''Finds what the ordinary finder finds, except torch: for this process it is not installed.'''
    find = importlib.machinery.PathFinder.find_spec
    find_distributions = importlib.machinery.PathFinder.find_distributions
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split('.')[0] == 'torch' else cls.find(name, path, target)

sys.meta_path = [Absent if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_less_than_a_second():
    timed = "import time; t = time.perf_counter(); import jaxtune; print(time.perf_counter() - t)"
    assert statistics.median(float(python(timed)) for _ in range(5)) < 1.0


def test_import_loads_no_heavy_package():
    loaded = python("import jaxtune, sys; print(*sys.modules)").split()
    assert not {"jax", "torch", "transformers", "numpy"} & set(loaded)


def test_every_public_name_is_there():
    assert set(jaxtune.__all__) <= set(dir(jaxtune))
    for name in jaxtune.__all__:
        assert getattr(jaxtune, name) is not None


def test_chat_templates_has_the_names_that_unsloth_s_scripts_import_from_there():
    assert "standardize_sharegpt" in chat_templates.__all__
    for name in chat_templates.__all__:
        assert getattr(jaxtune, name) is getattr(chat_templates, name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'FastLangaugeModel'"):
        _ = jaxtune.FastLangaugeModel


def test_every_module_imports_without_torch():
    everything = """
import importlib, pkgutil, jaxtune
names = [module.name for module in pkgutil.walk_packages(jaxtune.__path__, 'jaxtune.')]
for name in names:
    importlib.import_module(name)
assert 'torch' not in sys.modules
try:
    import torch
except ModuleNotFoundError:
    print(len(names))
"""
    assert int(python(WITHOUT_TORCH + everything)) > 10


def test_the_whole_path_runs_without_torch(tmp_path):
    """Load, train, generate, save, load again. (Only the checkpoint was made with torch.)"""
    models.save(models.random_llama(num_hidden_layers=1), tmp_path / "base")
    path = f"""
import logging
from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer, get_chat_template
model, tokenizer = FastLanguageModel.from_pretrained({str(tmp_path / "base")!r})
model = FastLanguageModel.get_peft_model(model, r=4)
tokenizer = get_chat_template(tokenizer, "chatml")
rows = [{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}}]}}]
config = SFTConfig(max_steps=1, output_dir={str(tmp_path / "run")!r})
result = SFTTrainer(model, config, train_dataset=rows, tokenizer=tokenizer).train()
assert not logging.root.handlers, "what saves would print every line a second time"
model.save_pretrained({str(tmp_path / "adapter")!r}, tokenizer)
again, _ = FastLanguageModel.from_pretrained({str(tmp_path / "adapter")!r})
assert (again.generate([[5, 6]], max_new_tokens=4) == model.generate([[5, 6]], max_new_tokens=4)).all()
assert "torch" not in sys.modules
print(result.global_step)
"""
    assert python(WITHOUT_TORCH + path) == "1"
