"""The error that a user can mend, and warnings: one line each."""

import sys

from tqdm import tqdm


class GPT2ModernError(Exception):
    """A mistake or a failure that the user can mend: the message is one line that says what is wrong and the way out.

    The command line prints it after `error: ` and exits with code 2; Python code catches it.
    """


def warn(message: str) -> None:
    """Print one line on stderr, `warning: ...`, above a progress bar if one is drawn: something failed, the work
    goes on."""
    tqdm.write(f"warning: {' '.join(message.split())}", file=sys.stderr)


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message, or the name of its class where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
