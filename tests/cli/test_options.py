"""The options that sources declare are those that there are; the committed table is the one that they make."""

import dataclasses
import inspect
from pathlib import Path

import pytest

import jaxtune
from jaxtune.cli import declared
from jaxtune.cli.declared import REQUIRED
from jaxtune.cli.main import main
from jaxtune.errors import OptionError
from jaxtune.options import ANY

TABLE = Path(__file__).parents[2] / "docs" / "options.md"
SURFACE = {each.title: each for each in declared.read_all()}


def real(title):
    """What a title names."""
    first, *rest = title.split(".")
    found = getattr(jaxtune, first)
    for name in rest:
        found = getattr(found, name)
    return found


def test_what_mirrors_is_found():
    assert {
        "FastLanguageModel.from_pretrained", "FastLanguageModel.get_peft_model", "GRPOConfig", "GRPOTrainer",
        "LanguageModel.generate", "SFTConfig", "SFTTrainer",
    } <= set(SURFACE)  # fmt: skip


@pytest.mark.parametrize("title", SURFACE)
def test_names_and_defaults_are_the_real_ones(title):
    """The sources are read, not imported: here both are, and compared."""
    parameters = dict(inspect.signature(inspect.unwrap(real(title))).parameters)
    parameters.pop("self", None)
    if dataclasses.is_dataclass(real(title)):
        of_fields = {field.name: field.default for field in dataclasses.fields(real(title))}
        assert list(of_fields) == list(parameters)
    expected = {
        name: REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in parameters.items()
    }
    assert {name: option.default for name, option in SURFACE[title].options.items()} == expected


@pytest.mark.parametrize("title", SURFACE)
def test_every_option_has_a_meaning(title):
    """Fields are documented where they are declared, arguments in their function's `Args:`."""
    options = SURFACE[title].options.values()
    assert [option.name for option in options if not option.meaning] == []


@pytest.mark.parametrize("title", ["SFTConfig", "GRPOConfig"])
def test_names_without_effect_are_accepted(title):
    for name, neutral in SURFACE[title].without_effect.items():
        value = object() if neutral is ANY else neutral[0] if isinstance(neutral, tuple) else neutral
        assert real(title)(**{name: value}) == real(title)()


@pytest.mark.parametrize("title", ["SFTConfig", "GRPOConfig"])
def test_other_names_are_accepted(title):
    options, config = SURFACE[title].options, real(title)
    for other, name in SURFACE[title].aliases.items():
        assert config(**{other: options[name].default}) == config()


def test_the_table_is_what_the_sources_make(capsys):
    assert main(["options"]) == 0
    assert capsys.readouterr().out == TABLE.read_text(), (
        "docs/options.md is of other sources: jaxtune options > docs/options.md"
    )


@pytest.mark.parametrize("name", ["FastLanguageModel.get_peft_model", "get_peft_model"])
def test_one_name_s_table(name, capsys):
    assert main(["options", name]) == 0
    shown = capsys.readouterr().out
    assert shown in TABLE.read_text()
    assert "| `r` | `16` |" in shown
    assert "SFTConfig" not in shown


def test_a_mistyped_name(capsys):
    assert main(["options", "SFTConfg"]) == 1
    assert "Did you mean 'SFTConfig'?" in capsys.readouterr().err


def test_an_unknown_option_s_error_is_short_and_says_where_the_list_is():
    with pytest.raises(OptionError, match="learning_rte") as caught:
        jaxtune.SFTConfig(learning_rte=1)
    assert "Did you mean 'learning_rate'" in caught.value.fix
    assert "jaxtune options SFTConfig" in caught.value.expected
    assert len(str(caught.value)) < 300


def test_a_name_without_effect_may_be_mistyped_too():
    with pytest.raises(OptionError, match="Did you mean 'dataloader_pin_memory'"):
        jaxtune.SFTConfig(dataloader_pin_memry=True)
