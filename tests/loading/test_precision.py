"""Which precision is meant: Unsloth's switches, or transformers' `quantization_config`; exactly one."""

import itertools

import pytest
from transformers import BitsAndBytesConfig

from jaxtune.errors import OptionError, UnsupportedModelError
from jaxtune.loading.precision import choose_precision, require_known
from jaxtune.quant import Float8, FourBit, Int8, Unpacked

SWITCHES = [
    ({"load_in_4bit": True}, FourBit("nf4", True)),
    ({"load_in_8bit": True}, Int8()),
    ({"load_in_16bit": True}, Unpacked()),
    ({"load_in_fp8": True}, Float8()),
    ({"load_in_fp8": "block"}, Float8(128)),
]
CONFIGS = [
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, FourBit()),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, FourBit("nf4", False)),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, FourBit("fp4", False)),
    ({"load_in_4bit": True}, FourBit("fp4", False)),
    ({"load_in_8bit": True}, Int8()),
    ({"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, Int8()),
]


@pytest.mark.parametrize(("given", "precision"), SWITCHES)
def test_a_switch(given, precision):
    assert choose_precision(**given) == precision


@pytest.mark.parametrize(("given", "precision"), CONFIGS)
def test_a_config_as_a_dict_or_as_transformers_object(given, precision):
    assert choose_precision(quantization_config=given) == precision
    assert choose_precision(quantization_config=BitsAndBytesConfig(**given)) == precision


def test_nothing_is_the_checkpoints_own_choice_and_no_4bit_is_16():
    assert choose_precision() is None
    assert choose_precision(load_in_4bit=False) == Unpacked()
    assert choose_precision(load_in_4bit=False, load_in_8bit=True) == Int8()


def test_a_4bit_config_may_come_with_the_4bit_switch():
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    assert choose_precision(load_in_4bit=True, quantization_config=config) == FourBit("fp4", False)


PAIRS = [
    {**a, **b}
    for (a, _), (b, _) in itertools.combinations(
        [*SWITCHES, ({"quantization_config": {"load_in_8bit": True}}, None)], 2
    )
    if a.keys() != b.keys()
]


@pytest.mark.parametrize("given", PAIRS, ids=lambda given: " and ".join(given))
def test_two_are_an_error(given):
    with pytest.raises(OptionError, match="one precision"):
        choose_precision(**given)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"load_in_fp8": "tensor"}, "'tensor'"),
        (
            {
                "quantization_config": {
                    "load_in_4bit": True,
                    "llm_int8_skip_modules": ["lm_head", "down_proj"],
                }
            },
            "llm_int8_skip_modules with 'down_proj'",
        ),
        ({"quantization_config": {}}, "load_in_4bit=False and load_in_8bit=False"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}}, "'int4'"),
    ],
)
def test_what_is_none(given, word):
    with pytest.raises(OptionError, match=word):
        choose_precision(**given)


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4"])
def test_other_quantised_checkpoints_are_refused_by_name(method, tmp_path):
    with pytest.raises(UnsupportedModelError, match=method):
        require_known({"quantization_config": {"quant_method": method}}, tmp_path)


def test_or_by_all_that_they_say(tmp_path):
    """As MLX's, which name no method."""
    with pytest.raises(UnsupportedModelError, match=r'quantised already \(\{"group_size": 64, "bits": 4\}\)'):
        require_known({"quantization_config": {"group_size": 64, "bits": 4}}, tmp_path)
