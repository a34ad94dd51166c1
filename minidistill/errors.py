"""The errors that a user can mend, and the exit codes of every command."""

import sys
from types import TracebackType

DONE, REFUSED, DIVERGED, INTERRUPTED = 0, 2, 3, 130


class InputError(Exception):
    """Bad input. The message is one line that names the thing and the way out."""

    exit_code = REFUSED


class NonFiniteLoss(InputError):
    """A loss, its gradient or what the model draws became nan or infinite: the run cannot continue as it is set."""

    exit_code = DIVERGED


def exit_if_interrupted(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A sys.excepthook for Ctrl-C before a command has begun, while PyTorch is imported: one line, no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted before anything was done: run the same command again", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == [
    "-m"
]:  # what Python says while it starts `python -m minidistill.X`, to which this is imported first
    sys.excepthook = exit_if_interrupted
