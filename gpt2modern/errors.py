"""Define the exception for errors that the user can fix, and print warnings of one line."""

import sys

from tqdm import tqdm


class GPT2ModernError(Exception):
    """Report a mistake or failure that the user can fix. The message says in one line what is wrong and how to fix it.

    The command line prints it after `error: ` and exits with code 2. Code that calls this package can catch it.
    """


def warn(message: str) -> None:
    """Print `warning: ` and `message` as one line on stderr, without damaging a progress bar. The program continues."""
    tqdm.write(f"warning: {' '.join(message.split())}", file=sys.stderr)


def first_line(error: Exception) -> str:
    """Return the first line of the message of `error`, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
