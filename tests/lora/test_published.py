"""Adapters as people have published them: each is understood. The files are read where the project keeps them, and are
not ours to commit."""

import pytest

from jaxtune.loading.adapter import read_config
from tests.kit.published import folders


@pytest.mark.parametrize("folder", folders("adapter_config.json"), ids=lambda folder: folder.name)
def test_understood(folder):
    adapter = read_config(folder)
    assert adapter.base
    assert adapter.config.r in (8, 16, 32, 64)
    assert adapter.config.rank_of("model.layers.3.self_attn.q_proj") == adapter.config.r
