"""A device that is too small says so before a weight is read, and what would fit."""

import jax
import pytest

from jaxtune import FastLanguageModel
from jaxtune.errors import DeviceMemoryError
from jaxtune.loading import load
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.loading.plan import Leaf
from jaxtune.loading.room import require_room
from jaxtune.quant import FourBit, Unpacked, abstract
from tests.kit import models

GB = 10**9
LINEAR = (32, 14336, 4096)  # 1.88 billion weights: 3.8 GB in 16 bits, 1.9 in 8, 1.0 in 4


class Device:
    device_kind = "NVIDIA Test"

    def __init__(self, limit, used=0):
        self.stats = {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self):
        return self.stats


def leaves(format):
    table = jax.ShapeDtypeStruct((1000, 4096), "bfloat16")
    path = ("layers", 0, 0, "mlp", "up_proj", "weight")
    return [Leaf(("embed_tokens", "weight"), table, []), Leaf(path, abstract(LINEAR, "bfloat16", format), [])]


@pytest.mark.parametrize(
    ("format", "free", "said"),
    [
        (Unpacked(), 3 * GB, ["need 3.8 GB", "3.0 GB free of 80.0 GB", "8bit=True (1.9 GB)", "4bit=True (1.0 GB)"]),
        (Unpacked(), 1.5 * GB, ["What fits: load_in_4bit=True (1.0 GB)."]),
        (FourBit(), 0.5 * GB, ["need 1.0 GB", "has 0.5 GB free", "Nothing of this model fits"]),
    ],
)  # fmt: skip
def test_too_small(format, free, said):
    with pytest.raises(DeviceMemoryError) as caught:
        require_room(leaves(format), Device(80 * GB, 80 * GB - int(free)), in_flight=0)
    for words in said:
        assert words in str(caught.value)


def test_it_is_asked_before_a_weight_is_read(tmp_path, monkeypatch):
    folder = models.save(models.random_llama(), tmp_path / "model")
    small = Device(10**8)
    monkeypatch.setattr(load, "require_room", lambda leaves, _, **how: require_room(leaves, small, **how))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(DeviceMemoryError, match=r"need .* GB, and NVIDIA Test has 0\.1 GB free"):
        FastLanguageModel.from_pretrained(folder)


def test_large_enough_or_unknown():
    require_room(leaves(Unpacked()), Device(4 * GB), in_flight=0)
    require_room(leaves(Unpacked()), jax.devices("cpu")[0], in_flight=0)
