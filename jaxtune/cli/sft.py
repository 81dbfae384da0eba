"""`jaxtune sft`: fine-tunes a model on a dataset, from the command line or from a file, and leaves the adapter.

Its options are those of `from_pretrained`, `get_peft_model` and SFTConfig, read out of these, with what names the data.
`train` reads from top to bottom as a script of yours would.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxtune import assets
from jaxtune.cli import declared, report, run_file, sections
from jaxtune.cli.dataset import Data
from jaxtune.cli.run_file import RunFile
from jaxtune.cli.sections import Values
from jaxtune.errors import JaxtuneError, OptionError
from jaxtune.folders import refuse_strangers
from jaxtune.log import counted

if TYPE_CHECKING:
    from jaxtune.training import SFTConfig, SFTTrainer

MODEL, LORA, DATA, TRAINING = SECTIONS = sections.sections(
    known=("model",),
    model=declared.read("jaxtune.api", "FastLanguageModel.from_pretrained"),
    lora=declared.read("jaxtune.api", "FastLanguageModel.get_peft_model"),
    data=declared.read("jaxtune.cli.dataset", "Data"),
    training=declared.read("jaxtune.training.sft_config", "SFTConfig"),
)
DEFAULTS: Values = {**sections.defaults(SECTIONS), "output_dir": "outputs"}
EMBEDDED: Values = {
    "model_name": str(assets.TINY),
    "max_seq_length": 128,
    "dataset": str(assets.HERE / "json_train.jsonl"),
    "train_on_responses_only": True,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "max_steps": 60,
    "learning_rate": 2e-3,
    "logging_steps": 5,
}
"""A first run, for those who name neither a model nor a dataset: about a minute on two CPU cores."""


def command(arguments: Sequence[str]) -> Callable[..., int]:
    """`jaxtune sft` with these arguments. What its defaults are depends on them: they may name a file."""
    path = _value_of("--config", arguments)
    file = RunFile(Path(), {}, {}) if path is None else run_file.read(Path(path).expanduser(), SECTIONS)
    asks_help = bool({"-h", "--help"} & set(arguments))
    named = {*file.values, *map(_option, arguments)}
    is_first_run = not asks_help and named.isdisjoint(("model_name", "dataset", "print_config"))
    default = DEFAULTS | (EMBEDDED if is_first_run else {}) | file.values
    options_type = sections.options_type(SECTIONS, default)

    def sft(
        run: Annotated[options_type, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")],  # type: ignore[valid-type]
        config: Path | None = None,
        print_config: bool = False,
        dry_run: bool = False,
    ) -> int:
        """Fine-tunes a model and leaves its adapter; with no model and no dataset, the embedded ones, in a minute.

        Args:
            run: Everything else.
            config: A YAML file with any of these options; what stands on the command line goes before it.
            print_config: Print the whole run as such a file, and do nothing else; what is not named yet is null.
            dry_run: Load and tokenise, show a sample and how many steps there are, and train nothing.

        Returns:
            0.
        """
        given = sections.parsed(run)
        try:
            if print_config:
                _settings(given)  # which refuses what would be no run
                print(sections.as_file(SECTIONS, given), end="")
                return 0
            _require(given)
            if is_first_run:
                report.say("The embedded model learns to answer in JSON: no model and no dataset were named.")
            return train(given, dry_run, again=shlex.join(["jaxtune", "sft", *arguments]))
        except JaxtuneError as error:
            raise file.locate(error, given) from error

    return sft


def train(given: Mapping[str, Any], dry_run: bool, again: str) -> int:
    """`again` is the command that runs this."""
    from jaxtune.api import FastLanguageModel
    from jaxtune.data.masking import train_on_responses_only
    from jaxtune.data.templates import get_chat_template
    from jaxtune.training import SFTTrainer

    folder = Path(given["output_dir"]).expanduser()
    args = _settings({**given, "output_dir": str(folder)})
    data = Data(**DATA.of(given))
    if not any(folder.glob("checkpoint-*")):  # now, not when a large model is loaded
        refuse_strangers(folder, marker="metrics.jsonl")
    train_dataset, eval_dataset = data.load(args.dataset_text_field)
    if not (args.resume_from_checkpoint or dry_run):
        report.used(folder)

    model, tokenizer = FastLanguageModel.from_pretrained(**MODEL.of(given))
    wants_adapter = sections.as_file([LORA], given) != sections.as_file([LORA], DEFAULTS)
    if model.lora is None or wants_adapter:  # one that is there is trained on as it is
        model = FastLanguageModel.get_peft_model(model, **LORA.of(given))
    if data.chat_template is not None:
        tokenizer = get_chat_template(tokenizer, data.chat_template)
    trainer = SFTTrainer(
        model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, tokenizer=tokenizer
    )
    if data.train_on_responses_only:
        trainer = train_on_responses_only(trainer)
    if dry_run:
        trainer.preview()
        steps = args.total_steps(trainer.batches().steps_per_epoch)
        print(f"{counted(len(trainer.samples), 'sample')}, {counted(steps, 'step')}; nothing was trained")
        return 0

    try:
        trainer.train()
    except KeyboardInterrupt:
        if trainer.log_history:
            trainer.save_model()
            report.trained(folder, trainer.log_history)
        if _can_go_on(trainer):
            resume = "" if "--resume-from-checkpoint" in again else " --resume-from-checkpoint True"
            report.say(f"To go on: {again}{resume}")
        raise
    trainer.save_model()
    report.trained(folder, trainer.log_history)
    if eval_dataset is not None and args.eval_strategy == "no":
        report.evaluated(trainer.evaluate())
    report.what_next(folder)
    return 0


def _can_go_on(trainer: "SFTTrainer") -> bool:
    """Whether an interrupted run has a step left, and a checkpoint of its own to take it from."""
    state, keeper = trainer.state, trainer.keeper
    has_checkpoint = keeper is not None and keeper.last_checkpoint is not None
    return has_checkpoint and state is not None and state.global_step < state.max_steps


def _settings(given: Mapping[str, Any]) -> "SFTConfig":
    from jaxtune.training import SFTConfig

    return SFTConfig(**TRAINING.of(given))


def _require(given: Mapping[str, Any]) -> None:
    """What a run from the command line cannot do without."""
    for name, example in (
        ("model_name", str(assets.TINY)),
        ("dataset", "data.jsonl"),
        ("output_dir", "outputs"),
    ):
        if given[name] is None:
            raise OptionError(
                f"there is no {name}.",
                expected="a model, a dataset, and a folder for the adapter; without a model and a dataset, the "
                "embedded model is trained on embedded data.",
                fix=f"Pass --{name.replace('_', '-')}, or fill it in in the file: {example} for example.",
            )


def _option(argument: str) -> str:
    """Which one it names: `--model-name=x` -> model_name."""
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What stands behind it, in either form."""
    for index, argument in enumerate(arguments):
        name, is_joined, value = argument.partition("=")
        if name == option:
            return value if is_joined else next(iter(arguments[index + 1 :]), None)
    return None
