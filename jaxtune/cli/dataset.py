"""What a run learns from, as it is named on the command line: files, or a dataset of the hub."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.errors import DatasetError, OptionError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where the rows come from, and what of them is trained on."""

    dataset: Sequence[str] | str | None = None
    """Files (.jsonl, .json, .csv, .tsv, .parquet), or the id of a dataset on the hub."""
    dataset_config: str | None = None
    """Which configuration of a hub's dataset, where it has several."""
    dataset_split: str = "train"
    """Which split of a hub's dataset; train[:1000] are its first thousand rows."""
    eval_dataset: Sequence[str] | str | None = None
    """What the loss is taken of, during the run as eval_strategy says, or else at its end; files, or an id."""
    eval_split: str = "test"
    """Which split of it, if it is a hub's."""
    chat_template: str | None = None
    """A chat template by its name, for a tokenizer without one, or in place of its own."""
    train_on_responses_only: bool = False
    """Train on the assistant's answers alone, found in the texts by what the chat template puts before them."""

    def load(self, text_field: str = "text") -> tuple[Any, Any]:
        """(rows to train on, rows to evaluate on or None). A column `text_field` is what is meant, if there is one."""
        self._refuse_unused()
        evaluated = None
        if self.eval_dataset is not None:
            evaluated = self._rows("eval_dataset", self.eval_split, text_field)
        return self._rows("dataset", self.dataset_split, text_field), evaluated

    def _rows(self, option: str, split: str, text_field: str) -> Any:
        from jaxtune.cli.conversations import conversations
        from jaxtune.data.files import read_dataset

        names = _names(getattr(self, option))
        if _are_files(names):
            rows = read_dataset(names)
        else:
            _refuse_mistyped(Path(names[0]))
            rows = _from_hub(names[0], self.dataset_config, split)
        return conversations(rows, option, text_field)

    def _refuse_unused(self) -> None:
        """A split or a configuration, where nothing of the hub is named that has them."""
        for name, of in (
            ("dataset_split", [self.dataset]),
            ("eval_split", [self.eval_dataset]),
            ("dataset_config", [self.dataset, self.eval_dataset]),
        ):
            value = getattr(self, name)
            if value != getattr(Data, name) and all(
                named is None or _are_files(_names(named)) for named in of
            ):
                raise OptionError(
                    f"{name}={value!r}, and no dataset of the hub is named that it could be of.",
                    expected="splits and configurations of the hub's datasets; files have none.",
                    fix=f"Leave {name} out, and name the files that are meant.",
                )


def _names(named: Sequence[str] | str) -> list[str]:
    return [named] if isinstance(named, str) else list(named)


def _are_files(names: Sequence[str]) -> bool:
    from jaxtune.data.files import names_files

    return len(names) != 1 or os.path.exists(names[0]) or names_files(names)


def _refuse_mistyped(path: Path) -> None:
    """Rather a file than an id of the hub, if one beside it is called nearly so."""
    hint = nearest(path.name, (each.name for each in path.parent.iterdir())) if path.parent.is_dir() else ""
    if hint:
        raise DatasetError(
            f"there is no file {str(path)!r}.",
            expected="a file with rows, or the id of a dataset on the hub.",
            fix=f"Check the path.{hint}",
        )


def _from_hub(name: str, config: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DatasetError(
            f"the hub's dataset {name!r}, split {split!r}, cannot be loaded: {str(error).rstrip('.')}.",
            expected="a file with rows, or the id of a dataset on the hub.",
            fix="Check the path or the id, its split and its configuration (dataset_config), and the connection; "
            "for one that is gated, set HF_TOKEN.",
        ) from error
