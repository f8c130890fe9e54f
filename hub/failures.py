"""What can go wrong between here and the Hub, as one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from codecllm.formats.errors import CodecLLMError, HubError

_LOG_IN = "log in ('hf auth login') or set HF_TOKEN"


@contextmanager
def one_line_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns the Hub client's exceptions into one HubError that says what to do; everything else passes."""
    try:
        yield
    except CodecLLMError:
        raise
    except Exception as exc:
        reason = next(
            (reason for cause in _chain(exc) if (reason := explain(cause, revision)) is not None),
            None,
        )
        if reason is None:
            raise
        raise HubError(reason, file=repo) from exc


def explain(exc: BaseException, revision: str | None) -> str | None:
    """Returns what an exception of the Hub client means for its user, or None where it is not one."""
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
    for cls, words in table:
        if isinstance(exc, cls):
            return words(exc)
    return (
        _explain_unreachable(exc) if type(exc).__module__.split(".")[0].startswith("http") else None
    )


def _chain(exc: BaseException) -> Iterator[BaseException]:
    """Yields an exception and those behind it: an upload's failure comes wrapped in a RuntimeError."""
    seen: BaseException | None = exc
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _explain_missing(exc: BaseException, local: str) -> str:
    """The client looked into its cache because the Hub could not be asked; the cause says why not."""
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
    said = (getattr(response, "headers", None) or {}).get("X-Error-Message") or _first_line(exc)
    if status == 401:
        return f"the Hub refuses the token, or asks for one ({said}): {_LOG_IN}"
    if status == 403:
        return f"the token may not do this ({said})"
    return f"the Hub answered with an error: {said}"


def _explain_unreachable(exc: BaseException) -> str:
    return f"the Hub cannot be reached, or the connection broke ({type(exc).__name__})"


def _first_line(exc: BaseException) -> str:
    return next(
        (line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__
    )
