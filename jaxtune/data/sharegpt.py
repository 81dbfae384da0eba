"""Conversations as they are collected, ShareGPT's `from` and `value` for one, brought to `role` and `content` with the
roles that chat templates know."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.data.rows import Row, bad_row, messages_field
from jaxtune.data.tables import column_among, map_rows
from jaxtune.errors import OptionError
from jaxtune.options import ANY, mirrors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

KEYS = (("role", "content"), ("from", "value"))
"""What collections of conversations call the two, most usual first."""

_OTHER_ROLES = ("tool", "developer")  # chat templates know them under no other names


@mirrors({"batch_size": ANY, "num_proc": ANY})
def standardize_sharegpt(
    dataset: Any,
    tokenizer: "Tokenizer | None" = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
) -> Any:
    """The dataset with its conversations as messages of `role` and `content`, whatever they were called.

    Args:
        dataset: a `datasets.Dataset` or a list of dicts, with a column `conversations` or `messages`, which keeps its
            name. What else a message has (a name, a weight) it keeps.
        tokenizer: accepted as Unsloth accepts it; texts are the same for every tokenizer.
        aliases_for_system: what the dataset may call the one who sets the task. Such a message becomes `system`.
        aliases_for_user: what it may call the one who asks.
        aliases_for_assistant: what it may call the one who answers.
    """
    roles = _roles(system=aliases_for_system, user=aliases_for_user, assistant=aliases_for_assistant)
    fix = "Rename the column of the conversations; `to_sharegpt` makes one out of columns such as `instruction`."
    column = column_among(dataset, ("conversations", "messages"), fix)

    def change(row: Row, index: int) -> dict[str, Any]:
        return {column: list(_standard(messages_field(row, index, column), index, roles))}

    return map_rows(dataset, change, description="Bringing conversations to role and content")


standardize_data_formats = standardize_sharegpt
"""Unsloth's newer name of the same function."""


def with_standard_keys(message: Row) -> Row:
    """A message with `role` and `content` for `from` and `value`, and the same role: TRL's reading of ShareGPT."""
    names = {"from": "role", "value": "content"}
    return {names.get(key, key): value for key, value in message.items() if value is not None}


def _roles(**aliases: Sequence[str]) -> dict[str, str]:
    roles: dict[str, str] = {role: role for role in _OTHER_ROLES}
    for role, names in aliases.items():
        if isinstance(names, str):
            raise OptionError(
                f"aliases_for_{role} is the string {names!r}.",
                expected="a list of names.",
                fix=f"Write aliases_for_{role}=[{names!r}].",
            )
        for name in names:
            if roles.setdefault(name, role) != role:
                raise OptionError(
                    f"{name!r} stands for {roles[name]!r} and for {role!r}.",
                    expected="every alias in one of the lists.",
                    fix="Take it out of the other.",
                )
    return roles


def _standard(messages: list[Row], index: int, roles: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    # In a column of structs every message has every key, None where it was absent.
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in present:
        role_key, content_key = _keys(message, present, index, roles)
        if message[role_key] not in roles:
            raise bad_row(
                index,
                f"has a message from {message[role_key]!r}",
                f"one of {sorted(roles)}",
                "Rename it in the data, or add it to standardize_sharegpt's aliases_for_system, aliases_for_user or "
                "aliases_for_assistant.",
            )
        others = {key: value for key, value in message.items() if key not in (role_key, content_key)}
        content = {"content": message[content_key]} if content_key in message else {}
        yield {"role": roles[message[role_key]], **content, **others}


def _keys(message: Row, messages: Sequence[Row], index: int, roles: Mapping[str, str]) -> tuple[str, str]:
    """Under which key a message has its role, and under which its content: those that are usual, or else of two keys
    that all messages of the row have, the one under which they have nothing but roles, and the other."""
    for role, content in KEYS:
        if role in message and (content in message or len(message) > 1):
            return role, content
    if len(message) == 2 and all(other.keys() == message.keys() for other in messages):
        names = [key for key in message if all(other[key] in roles for other in messages)]
        if len(names) == 1:
            return names[0], next(key for key in message if key != names[0])
    raise bad_row(
        index,
        f"has a message with the keys {sorted(message)}",
        "`role` and `content`, `from` and `value`, or two others, one of which holds the roles",
        "Rename the keys, or correct that row.",
    )
