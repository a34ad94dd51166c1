"""The errors that a user can mend, and the exit codes of every command."""

DONE, REFUSED, DIVERGED, INTERRUPTED = 0, 2, 3, 130


class InputError(Exception):
    """Bad input. The message is one line that names the thing and the way out."""

    exit_code = REFUSED


class NonFiniteLoss(InputError):
    """A loss, its gradient or what the model draws became nan or infinite: the run cannot continue as it is set."""

    exit_code = DIVERGED
