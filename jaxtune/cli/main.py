"""`jaxtune <command>`: picks the command and turns jaxtune's own errors into one message and exit code 1.

A command is a function whose arguments tyro turns into options and that returns the exit code. Heavy imports belong
inside it, so that `--help` and `--version` answer at once.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import tyro

from jaxtune import log
from jaxtune.cli import sft
from jaxtune.cli.demo import demo
from jaxtune.cli.doctor import doctor
from jaxtune.cli.export import export
from jaxtune.cli.options import options
from jaxtune.errors import JaxtuneError
from jaxtune.version import __version__

COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "doctor": doctor,
    "export": export,
    "options": options,
}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"jaxtune {__version__}")
        return 0
    log.show()
    # Without it transformers tells everyone who has no torch that models are not available: its own.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with _tidy_end():
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS | {"sft": sft.command(arguments[1:] if arguments[:1] == ["sft"] else [])},
                prog="jaxtune",
                description=f"Fine-tunes language models in JAX. Version {__version__} (also: jaxtune --version).",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except JaxtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, by an exception: what is half-written is put away. (A run of training
    takes it over, to keep what it has learnt.)"""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # which alone may ask for that
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
