"""A tiny base on disk with an adapter that is awake, and the logits of "base + adapter" by jaxtune and by PEFT."""

import functools
from pathlib import Path

import jax
import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

from jaxtune import FastLanguageModel
from jaxtune.export.gguf.folder import save_gguf
from jaxtune.export.merge import Trained
from jaxtune.export.merged_folder import save_merged_16bit
from tests.kit import models

IDS = np.random.default_rng(0).integers(5, 300, (2, 100)).astype(np.int32)


class Adapted:
    """`model` is ours, with params in float32 whatever the files hold."""

    def __init__(
        self, folder: Path, *, dtype="float32", max_shard_size="5GB", adapter=True, lora=None, **overrides
    ):
        theirs = models.random_llama(**overrides).to(getattr(torch, dtype))
        self.base = models.save(theirs, folder / "base", max_shard_size=max_shard_size)
        self.model, self.tokenizer = FastLanguageModel.from_pretrained(
            self.base, dtype="float32", load_in_4bit=False
        )
        if adapter:
            self.model = FastLanguageModel.get_peft_model(self.model, r=4, lora_alpha=6, **(lora or {}))
            rng = np.random.default_rng(0)
            self.model.lora = jax.tree.map(
                lambda x: np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(np.float32), self.model.lora
            )
            self.adapter = folder / "adapter"
            self.model.save_pretrained(self.adapter)

    @property
    def _trained(self) -> Trained:
        lm = self.model.causal_lm
        return Trained(self.base, lm.config, lm.module_names, self.model.lora, lm.lora_config)

    def save_merged(self, folder: Path, **options) -> Path:
        save_merged_16bit(folder, self._trained, **options)
        return folder

    def save_gguf(self, folder: Path, method: str | list[str] = "f32", **options) -> list[Path]:
        settings = {"tokenizer": self.tokenizer, "name": "somebody/Tiny-Llama", **options}
        return save_gguf(folder, self._trained, quantization_method=method, **settings)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        apply = jax.jit(self.model.causal_lm.apply)
        return np.asarray(apply(self.model.params, self.model.lora, IDS))

    @functools.cached_property
    def peft_logits(self) -> np.ndarray:
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return torch_logits(peft.PeftModel.from_pretrained(base, self.adapter))


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS).long()).logits.float().numpy()


def logits_of_folder(folder: Path) -> np.ndarray:
    return torch_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
