"""The errors that a user can mend, the exit codes of every command, and checks of arguments."""

import sys
from collections.abc import Iterable
from numbers import Integral
from types import TracebackType
from typing import Any

DONE, REFUSED, DIVERGED, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143


class InputError(Exception):
    """Bad input. The message is one line that names the thing and the way out, whatever the thing's name holds."""

    exit_code = REFUSED

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class Stopped(InputError):
    """What ends a command midway from outside, such as a full disk. After its message it is said how to resume."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which Slurm, Kubernetes and torchrun end a program: what Ctrl-C closes and removes, this does too."""


class NonFiniteLoss(InputError):
    """A loss, its gradient or what the model draws became nan or infinite: the run cannot continue as it is set."""

    exit_code = DIVERGED


def printable(text: str) -> str:
    """Text for a terminal, in one line: control characters, bytes that are no UTF-8 and the like are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_integers(**given: object) -> None:
    """InputError: one of the arguments is not an integer."""
    for name, value in given.items():
        if not isinstance(value, Integral):
            raise InputError(f"{name} must be an integer, not {shown(value)}")


def shown(value: object) -> str:
    """A value for a message: its repr in one line, cut off where it is long."""
    return f"{' '.join(repr(value).split()):.60}"


def one_each(given: Any, count: int | None, what: str, kind: Any, words: str) -> list[Any]:
    """A list of `count` items from one for all or one each; count None: any number. words: the kind, for messages."""
    if isinstance(given, kind):
        return [given] * (count or 1)
    items = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(item, kind) for item in items):
        raise InputError(f"{what} must be {words}, one or a list of them, not {shown(given)}")
    if count not in (None, len(items)):
        raise InputError(f"{len(items)} {what} for {count} prompts: give one for all, or one each")
    return items


def exit_if_interrupted(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A sys.excepthook for Ctrl-C before a command has begun, while PyTorch is imported: one line, no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted before anything was done: run the same command again", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == ["-m"]:
    # what Python says while it starts `python -m minidistill.X`, to which this is imported first
    sys.excepthook = exit_if_interrupted
