"""A script may pass what TRL's and transformers' configs and trainers take: with their defaults, names are accepted,
whether or not they mean something here. What is refused even so is listed, with the reason."""

import dataclasses
import inspect

import pytest
import transformers
import trl

from jaxtune import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from jaxtune.errors import OptionError

FIT = {GRPOConfig: {"per_device_train_batch_size": 8}}
"""What the other defaults go with: as many completions as a group has."""
REFUSED = {
    GRPOConfig: {
        "save_strategy": "a GRPO run is not saved yet, and a script should not believe that it is",
        "save_steps": "likewise",
    },
}


def defaults(config):
    """What a config's fields are unless they are given, before its own checks resolve them."""
    return {
        field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config)
        if field.init and (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
    }


@pytest.mark.parametrize(("ours", "theirs"), [(SFTConfig, trl.SFTConfig), (GRPOConfig, trl.GRPOConfig)])
def test_every_field_is_accepted_with_its_default(ours, theirs):
    fields = defaults(theirs)
    assert defaults(transformers.TrainingArguments).keys() <= fields.keys()
    refused = set()
    for name, value in fields.items():
        try:
            ours(**{**FIT.get(ours, {}), name: value})
        except OptionError:
            refused.add(name)
    assert refused == REFUSED.get(ours, {}).keys()
    together = {name: value for name, value in fields.items() if name not in refused}
    ours(**{**together, "activation_checkpointing": False})


OLDER = {
    "evaluation_strategy": "no", "max_seq_length": 512, "logging_dir": "logs", "overwrite_output_dir": True,
    "save_safetensors": True, "no_cuda": False, "dataset_batch_size": 1000, "use_liger": True,
    "include_tokens_per_second": True, "fp16_opt_level": "O1", "half_precision_backend": "auto",
}  # fmt: skip
"""Names of earlier releases, which scripts still have."""


@pytest.mark.parametrize("name", OLDER)
def test_older_names_are_accepted(name):
    assert name not in defaults(trl.SFTConfig)
    SFTConfig(**{name: OLDER[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deepspeed", "zero3.json"),
        ("fsdp", "full_shard"),
        ("full_determinism", True),
        ("push_to_hub", True),
        ("auto_find_batch_size", True),
    ],
)
def test_what_would_change_something_is_refused(name, value):
    with pytest.raises(OptionError, match=f"{name}=.*does not support"):
        SFTConfig(**{name: value})


@pytest.mark.parametrize(("ours", "theirs"), [(SFTTrainer, trl.SFTTrainer), (GRPOTrainer, trl.GRPOTrainer)])
def test_every_argument_of_a_trainer_is_accepted(ours, theirs):
    """What is wrong with an empty call is found behind the names."""
    arguments = inspect.signature(theirs.__init__).parameters.values()
    given = {each.name: each.default for each in arguments if each.default is not inspect.Parameter.empty}
    with pytest.raises(OptionError, match="was given NoneType"):
        ours(model=None, **given)


def test_an_unknown_name_is_answered_with_the_names_that_mean_something():
    with pytest.raises(OptionError) as caught:
        SFTConfig(logging_step=1)
    assert "Did you mean 'logging_steps'" in caught.value.fix
    assert "`jaxtune options SFTConfig`" in caught.value.expected
    with pytest.raises(OptionError, match="Did you mean 'ddp_timeout'"):
        SFTConfig(ddp_time_out=1)
