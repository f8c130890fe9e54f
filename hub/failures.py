"""Failures between here and the Hub, each as one line with the next step."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any
from urllib.parse import urlsplit

from codecllm.formats.errors import CodecLLMError, HubError, UnsafePathError, one_line
from codecllm.hub.bounds import bounded, refused

# The system's errors by names of files that no system can have, or that contradict each other.
_OF_NAMES = (
    *(errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR),
)
_SECONDS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
_NUMBER = re.compile("[0-9]{1,6}")
_LOG_IN = "log in ('hf auth login') or set HF_TOKEN"


def check_environment() -> None:
    """Raises HubError where HF_ENDPOINT is no URL, or a limit of time no number of seconds.

    Importing huggingface_hub, or transformers, would raise a ValueError that does not name it.
    """
    for name in _SECONDS:
        text = os.environ.get(name, "0")
        if not _NUMBER.fullmatch(text):
            raise HubError(
                f"{name} is no number of seconds",
                got=ascii(text)[:200],
                expected="a whole number below 1,000,000",
            )
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(endpoint).port  # is read from the text here
    except ValueError as exc:
        raise HubError(
            f"HF_ENDPOINT is no URL ({one_line(exc)})",
            got=ascii(endpoint)[:200],
            expected="for example https://huggingface.co",
        ) from exc


@contextmanager
def one_line_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns the Hub client's exceptions into one HubError with the next step; others pass.

    Every call into huggingface_hub stands in such a block, where answers are bounded (`bounds`).

    What fails inside the client without an exception of its own, such as a KeyError, comes from an
    answer that no Hub gives. Errors of files and memory pass.
    """
    try:
        with bounded():
            yield
    except HubError as exc:
        exc.located(file=repo)
        raise
    except CodecLLMError:
        raise
    except Exception as exc:
        reason = next(
            (reason for cause in _chain(exc) if (reason := explain(cause, revision)) is not None),
            None,
        )
        if reason is None and _is_of_client(exc):
            reason = f"the Hub's answer is not understood ({type(exc).__name__}: {one_line(exc)})"
        if reason is None:
            raise
        raise HubError(reason, file=repo) from exc


@contextmanager
def no_requests(reader: str) -> Iterator[None]:
    """In this block and thread no repository is on the Hub for huggingface_hub: nothing is sent.

    A setting of a model may be the name of another repository for one of the many classes that read
    it, and would let that repository's owner decide what the model computes.

    Args:
        reader: what runs in the block, for the error.

    Raises:
        UnsafePathError: the block fails because a request was not sent.
    """
    unsent: list[Exception] = []
    token = refused.set(unsent)
    try:
        with bounded():
            yield
    except Exception as exc:
        cause: BaseException | None = exc
        while cause is not None and cause not in unsent:
            cause = cause.__cause__ or cause.__context__
        if cause is None or isinstance(exc, CodecLLMError):
            raise
        raise UnsafePathError(
            f"{reader} would ask the Hub for what is not in the model's folder",
            got=one_line(cause),
        ) from exc
    finally:
        refused.reset(token)


def explain(exc: BaseException, revision: str | None) -> str | None:
    """Returns the meaning of an exception of the Hub client for its user.

    None where it is an exception of other code.
    """
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    local = f"not in the local cache{at}, and "
    table: list[tuple[type[BaseException], Callable[[Any], str | None]]] = [
        (errors.GatedRepoError, lambda _: f"gated: ask for access on the Hub, then {_LOG_IN}"),
        (errors.RepositoryNotFoundError, lambda _: f"not found on the Hub (or private: {_LOG_IN})"),
        (errors.RevisionNotFoundError, lambda _: f"no such revision: {revision!r}"),
        (errors.LocalEntryNotFoundError, lambda exc: _explain_missing(exc, local)),
        (errors.OfflineModeIsEnabled, lambda _: local + "offline mode is on (HF_HUB_OFFLINE)"),
        (
            errors.EntryNotFoundError,
            lambda exc: f"the repository has no such file{at}: {_first_line(exc)}",
        ),
        (errors.LocalTokenNotFoundError, lambda _: f"no Hub token: {_LOG_IN}"),
        (errors.HFValidationError, lambda exc: f"not a Hub id: {_first_line(exc)}"),
        (errors.HfHubHTTPError, _explain_status),
        (ConnectionError, _explain_unreachable),
        (TimeoutError, _explain_unreachable),
    ]
    # The order counts: some of these classes are subclasses of later ones.
    for cls, words in table:
        if isinstance(exc, cls):
            return words(exc)
    return (
        _explain_unreachable(exc) if type(exc).__module__.split(".")[0].startswith("http") else None
    )


def _is_of_client(exc: Exception) -> bool:
    """Whether an exception that is none of files or memory went through the Hub client's code."""
    # Without a number it is not of the system: the client says so that a file came incomplete.
    number = getattr(exc, "errno", None)
    if isinstance(exc, MemoryError) or (number is not None and number not in _OF_NAMES):
        return False
    frames = (frame for frame, _ in walk_tb(exc.__traceback__))
    names = (str(frame.f_globals.get("__name__")).split(".")[0] for frame in frames)
    return any(name == "huggingface_hub" or name.startswith("http") for name in names)


def _chain(exc: BaseException) -> Iterator[BaseException]:
    """Yields an exception and its causes.

    An upload's failure comes wrapped in a RuntimeError.
    """
    cause: BaseException | None = exc
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _explain_missing(exc: BaseException, local: str) -> str:
    """Returns why the client looked into its cache only.

    It could not ask the Hub; the cause of the exception says why.
    """
    from huggingface_hub import errors

    for cause in _chain(exc):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return local + "offline mode is on (HF_HUB_OFFLINE)"
        if isinstance(cause, errors.HfHubHTTPError):
            return _explain_status(cause)
    return local + "the Hub cannot be reached"


def _explain_status(exc: Any) -> str:
    response = getattr(exc, "response", None)
    status = getattr(response, "status_code", None)
    # The Hub puts its reason into this header; the text of the exception begins with the URL.
    message = (getattr(response, "headers", None) or {}).get("X-Error-Message") or _first_line(exc)
    message = one_line(message)
    if status == 401:
        return f"the Hub refuses the token, or asks for one ({message}): {_LOG_IN}"
    if status == 403:
        return f"the token may not do this ({message})"
    return f"the Hub answered with an error: {message}"


def _explain_unreachable(exc: BaseException) -> str:
    return f"the Hub cannot be reached, or the connection broke ({type(exc).__name__})"


def _first_line(exc: BaseException) -> str:
    return next(
        (line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__
    )
