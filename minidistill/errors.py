"""The one exception that means: the input was refused, and the message says what to do."""


class InputError(Exception):
    """Bad input. The message is one line that names the thing and the way out; commands exit with code 2."""
