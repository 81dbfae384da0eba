"""What all configs have in common."""

import dataclasses
import inspect

import pytest

from jaxtune import GRPOConfig, SFTConfig


@pytest.mark.parametrize("config", [SFTConfig, GRPOConfig])
def test_every_field_is_documented_where_it_is_declared(config):
    sources = [inspect.getsource(each) for each in config.__mro__ if dataclasses.is_dataclass(each)]
    for field in dataclasses.fields(config):
        name = f"\n    {field.name}: "
        (source,) = [source for source in sources if name in source]
        after = source.split(name, 1)[1]
        assert after.split("\n", 2)[1].strip().startswith('"""'), field.name
