"""Adapters as people have published them: each is understood. The files are read where the project keeps them, and are
not ours to commit."""

from pathlib import Path

import pytest

from jaxtune.loading.adapter import read_config

PUBLISHED = sorted((Path(__file__).parents[3] / "shared/fixtures/published").glob("adapter-*"))


if not PUBLISHED:
    print("no published adapters in ../shared: the test over them has no cases")


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_understood(folder):
    adapter = read_config(folder)
    assert adapter.base
    assert adapter.config.r in (8, 16, 32, 64)
    assert adapter.config.rank_of("model.layers.3.self_attn.q_proj") == adapter.config.r
