"""Errors that say `verify=False`, as one would in Python, say `--no-verify` in the shell."""

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping

from jaxtune.errors import JaxtuneError


@contextlib.contextmanager
def errors(flags: Mapping[str, str]) -> Iterator[None]:
    """Whatever jaxtune raises inside has the shell's `flags` for the options that Python calls so."""
    try:
        yield
    except JaxtuneError as error:
        error.found, error.expected, error.fix = (
            with_flags(text, flags) for text in (error.found, error.expected, error.fix)
        )
        raise


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    """Names without a value are options only where they could be no words."""

    def in_shell(option: re.Match) -> str:
        name, quoted, word = option.group("name", "quoted", "word")
        flag = flags[name]
        if word == "False":
            return f"--no-{flag.removeprefix('--')}"
        value = quoted[1:-1] if quoted else word
        return flag if value in (None, "True") else f"{flag} {shlex.quote(value)}"

    names, no_words = ("|".join(each) for each in (flags, (name for name in flags if "_" in name)))
    outside_paths = r"(?<![\w/?&.-])"
    value = r"(?:(?P<quoted>'[^']*'|\"[^\"]*\")|(?P<word>-?\w+)|(?=[\s.,:;)]|$))"
    text = re.sub(rf"{outside_paths}(?P<name>{names})={value}", in_shell, text)
    return re.sub(rf"{outside_paths}({no_words})(?![\w/=])", lambda option: flags[option[1]], text)
