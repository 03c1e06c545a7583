"""Define the exception for errors that the user can fix, and print warnings of one line."""

import sys

from huggingface_hub import constants, get_token
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


def hub_problem(error: Exception) -> str:
    """Return one line about a failed request to the Hub: the error, its first cause, the endpoint, and for a refused
    token how to set another one. The user's token is replaced by "hf_..."."""
    cause = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__
    both = dict.fromkeys([error, cause])
    parts = (f"{type(each).__name__}: {' '.join(str(each).split())}" for each in both)
    text = f"{', caused by '.join(parts)} (endpoint {constants.ENDPOINT})"
    if any(getattr(getattr(each, "response", None), "status_code", None) in (401, 403) for each in both):
        text += "; run `hf auth login` or set HF_TOKEN to a token with the right to do this"
    return text.replace(token, "hf_...") if (token := get_token()) else text
