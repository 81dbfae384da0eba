"""A run as a YAML file: what is read out of it, and what is said of one that is wrong."""

import pytest
import yaml

from jaxtune.cli import run_file, sections
from jaxtune.cli.sft import DEFAULTS, SECTIONS
from jaxtune.errors import OptionError


@pytest.fixture
def read(tmp_path):
    def of(text):
        (tmp_path / "run.yaml").write_text(text)
        return run_file.read(tmp_path / "run.yaml", SECTIONS)

    return of


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 2e-4", 2e-4),  # a text to YAML 1.1
        ("learning_rate: '2e-4'", 2e-4),
        ("learning_rate: 1", 1),
        ("eval_strategy: no", "no"),  # False to YAML 1.1
        ("output_dir: 2026-11-25", "2026-11-25"),  # a date
        ("output_dir: 007", "007"),
        ("output_dir: null", None),
        ("output_dir: 'null'", "null"),
        ("bias: none", "none"),
        ("max_grad_norm: ~", None),
        ("max_grad_norm:", None),
        ("use_dora: true", True),
        ("load_in_fp8: block", "block"),
        ("load_in_fp8: True", True),
        ("resume_from_checkpoint: true", True),
        ("resume_from_checkpoint: outputs/checkpoint-5", "outputs/checkpoint-5"),
        ("target_modules: [q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("target_modules: .*_proj", ".*_proj"),
        ("layers_to_transform: [0, 2]", [0, 2]),
        ("layers_to_transform: 3", 3),
        ("rank_pattern: {q_proj: 8}", {"q_proj": 8}),
        ("rank_pattern:\n  q_proj: 8", {"q_proj": 8}),
        ("lr_scheduler_kwargs: {num_cycles: 3, a: 0.5, b: x}", {"num_cycles": 3, "a": 0.5, "b": "x"}),
        ("quantization_config: {load_in_4bit: true}", {"load_in_4bit": True}),
        ("dtype: float32", "float32"),
        ("max_length: 512", 512),
        ("torch_dtype: float32", {"dtype": "float32"}),
        ("evaluation_strategy: steps", {"eval_strategy": "steps"}),
    ],
)
def test_values_are_read_by_the_option_s_type(read, line, value):
    (found,) = read(line).values.items()
    expected = value if line.startswith(("torch_", "evaluation")) else {line.split(":")[0]: value}
    assert dict([found]) == expected
    assert type(found[1]) is type(next(iter(expected.values())))


def test_sections_are_headings(read):
    flat = read("r: 8\nlearning_rate: 1e-3\nmodel_name: x").values
    assert read("lora:\n  r: 8\ntraining:\n  learning_rate: 1e-3\nmodel:\n  model_name: x").values == flat


def test_a_section_decides_what_a_name_means(read):
    """max_seq_length is the model's; TRL's older name for max_length where it is said to be the training's."""
    assert read("max_seq_length: 64").values == {"max_seq_length": 64}
    assert read("training: {max_seq_length: 64}").values == {"max_length": 64}


def test_a_file_of_trl_is_read(read):
    values = read("bf16: true\npush_to_hub: false\nwarmup_ratio: 0.03\nuse_liger_kernel: yes").values
    assert values == {"warmup_ratio": 0.03}


def test_every_value_is_written_as_yaml_reads_it(read):
    """By everybody else, too."""
    given = DEFAULTS | {
        "model_name": "x", "learning_rate": 1e-5, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "output_dir": "no",
        "target_modules": ["q_proj"], "layers_to_transform": [1], "dtype": "5", "chat_template": "ä: #",
    }  # fmt: skip
    text = sections.as_file(SECTIONS, given)
    assert read(text).values == {name: value for s in SECTIONS for name, value in s.of(given).items()} | {
        "target_modules": ["q_proj"]
    }
    by_yaml = {name: value for section in yaml.safe_load(text).values() for name, value in section.items()}
    by_yaml["learning_rate"], by_yaml["adam_epsilon"] = 1e-5, 1e-8  # YAML 1.1 wants 1.0e-5
    assert by_yaml == read(text).values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n", ["line 1", "'a'"]),
        ("training:\n  learning_rte: 1e-4", ["line 2", "'learning_rte'", "Did you mean 'learning_rate'"]),
        ("trainin:\n  learning_rate: 1", ["line 1", "Did you mean", "'training'"]),
        ("lora:\n  learning_rate: 1", ["line 2", "section lora", "Put it in the section training"]),
        ("r: 8\n\nlearning_rate: fast", ["line 3", "learning_rate is the text 'fast'", "a number"]),
        ("max_steps: 5.5", ["line 1", "'5.5'", "an integer"]),
        ("max_steps: true", ["'true'", "an integer"]),
        ("use_dora: 1", ["'1'", "true|false"]),
        ("learning_rate:\n- 1", ["learning_rate is a list"]),
        ("rank_pattern:\n  q_proj: 8\n  v_proj: high", ["line 3", "'high'", "an integer"]),
        ("learning_rate: {a: 1}", ["learning_rate is a mapping"]),
        ("r: 8\nr: 9", ["line 2", "r once more", "line 1"]),
        ("r: 8\nlora:\n  r: 9", ["line 3", "line 1"]),
        ("training: {max_length: 5, max_seq_length: 6}", ["max_length once more"]),
        ("", ["holds nothing"]),
        ("# nothing", ["holds nothing"]),
        ("- a", ["holds a list"]),
        ("learning_rate", ["holds the text 'learning_rate'"]),
        (
            "model: org/name",
            ["line 1", "section model is the text 'org/name'", "Did you mean `model_name: org/name`"],
        ),
        ("quantization_config: &a [*a]", ["line 1", "a part of itself"]),
        ("? [a, b]\n: 1", ["a name is a list"]),
        ("lora:", ["section lora is nothing"]),
        ("a: [1\nb: 2", ["line 2", "is not YAML"]),
        ("\tr: 8", ["line 1", "is not YAML"]),
        ("---\nr: 8\n---\nr: 9", ["is not YAML"]),
        ("bf16: true\nbf17: true\n", ["line 2", "'bf17'"]),
        ("push_to_hub: true", ["line 1", "push_to_hub=True"]),
    ],
)
def test_what_is_wrong_is_said_with_its_line(read, text, said):
    with pytest.raises(OptionError) as caught:
        read(text)
    for each in [*said, "run.yaml"]:
        assert each in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "run.yaml").touch()
    with pytest.raises(OptionError, match=r"no file .*run.yml(.|\n)*Did you mean 'run.yaml'"):
        run_file.read(tmp_path / "run.yml", SECTIONS)
    with pytest.raises(OptionError, match="cannot be read"):
        run_file.read(tmp_path, SECTIONS)
    (tmp_path / "run.yaml").write_bytes(b"r: \xff")
    with pytest.raises(OptionError, match="cannot be read"):
        run_file.read(tmp_path / "run.yaml", SECTIONS)
