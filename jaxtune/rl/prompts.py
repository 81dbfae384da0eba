"""From dataset rows to prompts: tokenised, cut to length, with the columns that reward functions ask for; and the order
in which a run goes through them."""

from collections.abc import Iterator
from itertools import batched, count
from typing import Any, NamedTuple

from jaxtune.data.batches import epoch_order
from jaxtune.data.encoding import encode_texts, encode_verbatim, render_chat
from jaxtune.data.rows import Row, bad_row, iterate_rows, messages_field, template_options, text_field
from jaxtune.errors import DatasetError, nearest
from jaxtune.log import get_logger

log = get_logger(__name__)

OF_THE_ROLLOUT = ("prompt", "completion", "completion_ids")
"""Columns that reward functions do not get from the dataset."""


class Prompt(NamedTuple):
    ids: list[int]
    prompt: str | list[Row]
    """As it stood in the dataset: text or messages."""
    columns: dict[str, Any]
    """The row's other columns."""


def read_prompts(dataset: Any, tokenizer: Any, max_length: int) -> list[Prompt]:
    """Every row's prompt. A plain prompt is tokenised as it is; a conversation is rendered, up to where the assistant
    is to go on. What is longer than `max_length` keeps its end."""
    rows = list(iterate_rows(dataset))
    first = rows[0]
    if "prompt" not in first:
        raise DatasetError(
            f"the dataset has the columns {list(first)}: no 'prompt'.",
            expected="a column `prompt`, of texts or of lists of messages.",
            fix=f"Rename the column that holds the prompts.{nearest('prompt', first)}",
        )
    if taken := {"prompts", "completions"} & set(first):
        raise DatasetError(
            f"the dataset has the columns {sorted(taken)}.",
            expected="other names: reward functions get the rollout's prompts and completions under these.",
            fix="Rename or remove these columns.",
        )
    prompts: list[Any]
    if isinstance(first["prompt"], str):
        prompts = [text_field(row, index, "prompt") for index, row in enumerate(rows)]
        ids = encode_texts(tokenizer, prompts)
    else:
        prompts = [messages_field(row, index, "prompt") for index, row in enumerate(rows)]
        texts = (_render(tokenizer, prompts[i], row, i) for i, row in enumerate(rows))
        ids = encode_verbatim(tokenizer, list(texts))
    if [] in ids:
        raise bad_row(ids.index([]), "has a prompt without tokens", "a text", "Correct or remove that row.")
    if cut := sum(len(each) > max_length for each in ids):
        log.warning("%d of %d prompts are cut to their last %d tokens", cut, len(ids), max_length)
    return [
        Prompt(ids[i][-max_length:], prompts[i], {k: v for k, v in row.items() if k not in OF_THE_ROLLOUT})
        for i, row in enumerate(rows)
    ]


def _render(tokenizer: Any, messages: list[Row], row: Row, index: int) -> str:
    """Ends with the opening of the assistant's turn, or within the turn that the assistant has begun."""
    if not messages:
        raise bad_row(index, "has no message in 'prompt'", "at least one", "Correct or remove that row.")
    begun = messages[-1].get("role") == "assistant"
    options = {"add_generation_prompt": not begun, "continue_final_message": begun}
    return render_chat(
        tokenizer, messages, what=f"row {index} of the dataset", **options, **template_options(row, index)
    )


def steps(prompts: list[Prompt], prompts_per_step: int, seed: int) -> Iterator[list[Prompt]]:
    """Endless, in an order of its own every epoch. All steps are equally large: where an epoch's end does not fill one,
    it goes on with the next epoch."""
    order = (i for epoch in count() for i in epoch_order(len(prompts), seed, epoch).tolist())
    for members in batched(order, prompts_per_step):
        yield [prompts[member] for member in members]
