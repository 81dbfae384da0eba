"""From dataset rows to `Sample`s: `prepare` recognises the form of a dataset as TRL does, tokenises it, truncates it,
and says in one line each what it dropped, cut or doubts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.data import readers
from jaxtune.data.readers import Chunk, Encoded, Reading
from jaxtune.data.rows import Row, iterate_rows
from jaxtune.data.sample import Sample
from jaxtune.data.token_cache import TokenCache
from jaxtune.errors import DatasetError, OptionError, nearest
from jaxtune.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = get_logger(__name__)

CHUNK_ROWS = 1000  # enough for the tokenizer to use its cores, little enough to hold the texts in memory

TRUNCATION_MODES = ("keep_start", "keep_end")

KNOWN_FORMS = "`text`, `messages` or `conversations`, `prompt` with `completion`, or `input_ids`"


def prepare(
    rows: Any,
    tokenizer: "Tokenizer",
    *,
    text_field: str = "text",
    formatting_func: Callable[[Row], str | list[str]] | None = None,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    add_special_tokens: bool = True,
    vocab_size: int | None = None,
    cache: Path | None = None,
) -> list[Sample]:
    """Tokenised samples of a dataset, in its order.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset`, a pandas `DataFrame`, a list of dicts or another iterable of
            them, or files: a path, or several (`jaxtune.data.files.read_dataset` says which formats).
        tokenizer: of transformers; its chat template renders conversations.
        text_field: the column with plain text.
        formatting_func: makes the text (or several) of a row; takes the place of every column but `input_ids`.
        max_length: longer samples keep `max_length` tokens; None keeps all.
        truncation_mode: which tokens these are, the first ("keep_start") or the last ("keep_end").
        completion_only_loss: train on the completion only. None: where the data says what that is (a `prompt` with a
            `completion`, or a `completion_mask`).
        assistant_only_loss: train only on what the assistant wrote in conversations.
        add_special_tokens: whether plain texts are given what the tokenizer begins texts with, and its eos at the end,
            where they do not have them already. Conversations have what their template writes.
        vocab_size: token ids that the model knows; None takes the tokenizer's.
        cache: a folder to keep the tokens of large datasets in, for the next time; None keeps nothing.
    """
    if max_length is not None and max_length < 2:
        raise OptionError(
            f"max_length is {max_length}.",
            expected="at least 2: one token, and one to predict from it; or None for no limit.",
            fix="Set max_length (max_seq_length) to what memory allows, 2048 for example.",
        )
    if vocab_size is None:
        vocab_size = len(tokenizer)
    reading = Reading(
        tokenizer,
        text_field,
        formatting_func,
        completion_only_loss,
        assistant_only_loss,
        add_special_tokens,
        vocab_size,
    )
    samples, seen = [], _Tally()
    kept = TokenCache(cache, reading) if cache is not None else None
    for encoded in _read(iterate_rows(rows), reading, kept):
        whole = Sample(encoded.ids, encoded.labels)
        sample = whole
        if max_length is not None and whole.num_tokens > max_length:
            kept_tokens = (None, max_length) if truncation_mode == "keep_start" else (-max_length, None)
            sample = whole.cut(*kept_tokens)
        seen.count(encoded, whole, sample)
        if sample.num_trained:
            samples.append(sample)
    if kept is not None:
        kept.close()
    seen.report(len(samples), max_length)
    if not samples:
        raise seen.nothing_left(max_length)
    return samples


@dataclass
class _Tally:
    """What happened to the samples on the way, to be said once and not once for each."""

    total: int = 0
    empty: int = 0
    cut: int = 0
    cut_off: int = 0  # of these, those that have nothing left to train on
    moved_borders: list[int] = field(default_factory=list)  # rows
    odd_roles: dict[str, int] = field(default_factory=dict)  # and the first row of each

    def count(self, encoded: Encoded, whole: Sample, sample: Sample) -> None:
        self.total += 1
        self.empty += not whole.num_tokens
        self.cut += sample is not whole
        self.cut_off += sample is not whole and bool(whole.num_trained and not sample.num_trained)
        if encoded.border_moved:
            self.moved_borders.append(encoded.row)
        if encoded.odd_role:
            self.odd_roles.setdefault(encoded.odd_role, encoded.row)

    def report(self, kept: int, max_length: int | None) -> None:
        if self.cut:
            log.info("%d of %d samples are cut to max_length=%d tokens", self.cut, self.total, max_length)
        if self.empty:
            log.warning("dropped %d of %d samples: they are empty", self.empty, self.total)
        if self.cut_off:
            log.warning(
                "dropped %d of %d samples: what max_length=%d leaves of them has no token to train on",
                self.cut_off,
                self.total,
                max_length,
            )
        if untrained := self.total - self.empty - self.cut_off - kept:
            log.warning("dropped %d of %d samples: no token in them is trained on", untrained, self.total)
        if self.moved_borders:
            log.warning(
                "in %d of %d samples (first in row %d) the tokens of prompt + completion do not begin with those of "
                "the prompt alone, so where the loss begins is approximate: a space between them belongs to the "
                "completion, not to the prompt",
                len(self.moved_borders),
                self.total,
                self.moved_borders[0],
            )
        if self.odd_roles:
            log.warning(
                "the chat template does not name the role %s, and may write turns that no model has seen.%s",
                ", ".join(f"{role!r} (first in row {row})" for role, row in self.odd_roles.items()),
                "".join(nearest(role, readers.USUAL_ROLES) for role in self.odd_roles),
            )

    def nothing_left(self, max_length: int | None) -> DatasetError:
        if self.empty == self.total:
            return DatasetError(
                f"all {self.total} samples of the dataset are empty.",
                expected="rows with text.",
                fix="Check the columns' contents, and what formatting_func returns.",
            )
        counts = f"{self.empty} are empty"
        fix = "Look at one row: is there an assistant turn or a completion in it, or is every label -100?"
        if self.cut_off:
            counts += f", {self.cut_off} lose all of theirs to max_length={max_length}"
            fix = "Raise max_length: prompts alone fill it. Or keep the ends of samples: truncation_mode='keep_end'."
        return DatasetError(
            f"none of the {self.total} samples has a token to train on ({counts}).",
            expected="labels other than -100 after the first token of at least one sample.",
            fix=fix,
        )


def _read(rows: Iterator[Row], reading: Reading, cache: TokenCache | None) -> Iterator[Encoded]:
    read = None
    for chunk in batched(enumerate(rows), CHUNK_ROWS):
        read = read or _reader_for(chunk[0][1], reading)
        # What is less than a chunk, or tokens already, is read in a moment.
        if cache is None or len(chunk) < CHUNK_ROWS or read is readers.read_tokenised:
            yield from read(chunk, reading)
        else:
            yield from cache.read(chunk, read)


def _reader_for(row: Row, reading: Reading) -> Callable[[Chunk, Reading], Iterator[Encoded]]:
    """The reader for datasets with this first row. Refuses loss options that such a dataset cannot honour."""
    if "input_ids" in row:
        if reading.formatting_func is not None:
            log.warning(
                "formatting_func is not called: the dataset is tokenised already (it has `input_ids`)"
            )
        return readers.read_tokenised
    if reading.formatting_func is not None:
        _refuse(
            reading, "is plain text made by formatting_func", "completion_only_loss", "assistant_only_loss"
        )
        return readers.read_text
    if "prompt" in row and "completion" in row:
        if not isinstance(row["prompt"], str):
            return readers.read_chat_prompt_completion
        _refuse(reading, "holds plain prompts and completions", "assistant_only_loss")
        return readers.read_prompt_completion
    if "messages" in row:
        _refuse(reading, "holds whole conversations", "completion_only_loss")
        return readers.read_messages
    if reading.text_field in row:
        _refuse(reading, "holds plain text", "completion_only_loss", "assistant_only_loss")
        return readers.read_text
    if "conversations" in row:  # after the text: whoever rendered the conversations means that
        _refuse(reading, "holds whole conversations", "completion_only_loss")
        return readers.read_conversations
    raise _no_known_column(list(row), reading.text_field)


def _refuse(reading: Reading, data: str, *options: str) -> None:
    forms = {
        "completion_only_loss": "a dataset with `prompt` and `completion`",
        "assistant_only_loss": "a dataset with conversations: `messages`, or `prompt` and `completion` as messages",
    }
    for option in options:
        if getattr(reading, option):
            raise DatasetError(
                f"{option}=True, but the dataset {data}.",
                expected=f"{forms[option]}, which says what to train on.",
                fix=f"Bring the dataset to that form, or leave {option} out. For text that a chat template wrote, "
                "`train_on_responses_only(trainer)` finds the answers.",
            )


def _no_known_column(columns: list[str], text_field: str) -> DatasetError:
    pair = {"prompt", "completion"}
    halves = pair & set(columns)
    if halves and text_field == "text":
        (there,), (missing,) = halves, pair - halves
        hint = next((hint for column in columns if (hint := nearest(column, [missing]))), "")
        return DatasetError(
            f"the dataset has the columns {columns}: {there!r} without {missing!r}.",
            expected=f"{KNOWN_FORMS}.",
            fix=f"Add the {missing} of every row, or rename the column that holds it.{hint}",
        )
    wanted = ["text", "messages", "conversations", *sorted(pair), "input_ids"]
    # A column that was named by hand was mistyped there; otherwise it is the dataset's columns that are.
    pairs = [(text_field, columns)] if text_field != "text" else [(column, wanted) for column in columns]
    hint = next((hint for name, known in pairs if (hint := nearest(name, known))), "")
    if {"instruction", "output"} <= set(columns):
        hint = (
            ' For `instruction`, `input` and `output`: `to_sharegpt(dataset, "{instruction}[[\\n{input}]]")`.'
        )
    return DatasetError(
        f"the dataset has the columns {columns}: no {text_field!r}, and no other form that is known.",
        expected=f"{KNOWN_FORMS}.",
        fix="Name the column of the text (dataset_text_field), pass formatting_func, or rename the columns."
        + hint,
    )
