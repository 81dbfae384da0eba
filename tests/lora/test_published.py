"""Adapters as people have published them: each is understood, or refused with the reason. The files are read where
the project keeps them, and are not ours to commit."""

import pytest

from jaxtune.errors import AdapterError
from jaxtune.loading.adapter import read_config
from tests.kit.published import folders

REFUSED = {"adapter-qwen2-7b-lora-demo": "LoRA on embed_tokens"}


@pytest.mark.parametrize("folder", folders("adapter_config.json"), ids=lambda folder: folder.name)
def test_understood_or_refused(folder):
    if folder.name in REFUSED:
        with pytest.raises(AdapterError, match=REFUSED[folder.name]):
            read_config(folder)
        return
    adapter = read_config(folder)
    assert adapter.base
    assert adapter.config.r in (8, 16, 32, 64)
    assert adapter.config.rank_of("model.layers.3.self_attn.q_proj") == adapter.config.r
