"""Ask the Hugging Face Hub: repeat requests that failed for a moment, and say in one line why others failed."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from gpt2modern.errors import GPT2ModernError

RETRY_S = (1.0, 2.0, 4.0)  # pauses before the second, third and fourth attempt, in seconds


def retried(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return the result of `call` with these arguments, which is repeated while the Hub answers with a status of
    overload (408, 429, 5xx) or the connection breaks. Raises the error of the last attempt.

    The client repeats only transfers of content, not the requests that make repositories, branches and commits."""
    for pause in RETRY_S:
        try:
            return call(*arguments, **options)
        except Exception as error:
            causes, status = _causes_and_status(error)
            # Of the client's HTTP library, httpx or httpx2, the name of the module is all that both have in common.
            is_transport = status is None and any(type(each).__module__.startswith("httpx") for each in causes)
            if not (is_transport or status in (408, 429) or (status or 0) >= 500):
                raise
            time.sleep(pause)
    return call(*arguments, **options)


def files_on_hub(name: str, *, repo_type: str = "model", revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the commit of a repository's `revision` (default: main) and its files by path, with size and, for large
    files, lfs.sha256; ("", {}) if there is no such repository. Raises what the client raises."""
    try:
        info = retried(HfApi().repo_info, name, repo_type=repo_type, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 404:
            raise
        return "", {}
    return info.sha, {each.rfilename: each for each in info.siblings}


@contextlib.contextmanager
def hub_errors(what: str, advice: str) -> Iterator[None]:
    """Raise GPT2ModernError with the message `{what}: {problem of the Hub}; {advice}` for any error of the block."""
    try:
        yield
    except GPT2ModernError:
        raise
    except Exception as error:  # of the network, the token, the name or the disk
        raise GPT2ModernError(f"{what}: {hub_problem(error)}; {advice}") from error


def hub_problem(error: BaseException) -> str:
    """Return one line about a failed request to the Hub: the error, its first cause, the endpoint, and for a refused
    token how to set another one. The user's token is replaced by "hf_..."."""
    causes, status = _causes_and_status(error)
    parts = (f"{type(each).__name__}: {' '.join(str(each).split())}" for each in dict.fromkeys([error, causes[-1]]))
    text = f"{', caused by '.join(parts)} (endpoint {constants.ENDPOINT})"
    if status in (401, 403):
        text += "; run `hf auth login` or set HF_TOKEN to a token with the right to do this"
    return text.replace(token, "hf_...") if (token := get_token()) else text


def _causes_and_status(error: BaseException) -> tuple[list[BaseException], int | None]:
    """Return an error, its cause, the cause of that, and so on, and the first HTTP status among them."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    answers = (getattr(each, "response", None) for each in causes)
    return causes, next((answer.status_code for answer in answers if answer is not None), None)
