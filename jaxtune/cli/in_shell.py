"""What errors say of options in Python, as the shell has it: `verify=False` is `--no-verify`."""

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping

from jaxtune.errors import JaxtuneError


@contextlib.contextmanager
def errors(flags: Mapping[str, str]) -> Iterator[None]:
    """Those that are raised inside name options by their flags."""
    try:
        yield
    except JaxtuneError as error:
        error.found, error.expected, error.fix = (
            with_flags(text, flags) for text in (error.found, error.expected, error.fix)
        )
        raise


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    def in_shell(option: re.Match) -> str:
        name, quoted, word = option.group("name", "quoted", "word")
        flag = flags[name]
        if word == "False":
            return f"--no-{flag.removeprefix('--')}"
        value = quoted[1:-1] if quoted else word
        return flag if value in (None, "True") else f"{flag} {shlex.quote(value)}"

    return re.sub(
        rf"\b(?P<name>{'|'.join(flags)})=(?:(?P<quoted>'[^']*'|\"[^\"]*\")|(?P<word>\w+))?", in_shell, text
    )
