"""Bounds of what a Hub may answer, and how long it may take, while a call of ours runs.

huggingface_hub sends most requests without a limit of time, unpacks answers of any size, sleeps as
long as it is told, and makes paths of its cache from headers. Its documented hook, a factory of the
client, is for the whole process and closes the connections of other threads. So hooks are put into
its client, and taken out again behind the last call of ours. Meanwhile they hold for requests that
other code of the process sends through huggingface_hub, too. Transfers of hf_xet are its own.

This is the one file with private names of huggingface_hub.
"""

from __future__ import annotations

import os
import re
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any, Protocol
from urllib.parse import unquote

from codecllm.formats import limits
from codecllm.formats.errors import HubError, UnsupportedEnvironmentError
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.strict_json import CONFIG_BYTES

SEND_SECONDS = 300
"""Longest silence of a Hub behind a request that sends something: it may check gigabytes first.

For other requests it is HF_HUB_DOWNLOAD_TIMEOUT of the environment, or 10 seconds.
"""

ANSWER_SECONDS = 300
"""Longest time in which an answer that is no file arrives."""

ANSWER_BYTES = 32 << 20
"""Longest answer that is no file, unpacked; 100,000 names of files take 8 MiB."""

MOST_ANSWERS = 10_000
"""Answers about repositories that one call reads; one lists up to 1,000 files."""

WAIT_SECONDS = 300
"""Longest time that a Hub may ask for before the next request; its windows have 5 minutes."""

COMMIT = re.compile(r"[0-9a-f]{40}")
"""The name of a commit."""

_CONTENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{7,199}")
"""An ETag or another name of content: huggingface_hub makes a file of its cache of it."""

_SMALL = {MANIFEST_NAME: limits.MANIFEST_BYTES, "config.json": CONFIG_BYTES}
"""Limits of files that are read before others are fetched."""

refused: ContextVar[list[Exception] | None] = ContextVar("refused", default=None)
"""Errors of the requests that this thread did not send; None where it may send them."""

_FILE = re.compile(r"/resolve/[^/]+/(.+)")
_NUMBER = re.compile(r"[0-9]{1,15}")
_PIECE_BYTES = 1 << 20
_ABOUT = "codecllm"  # of a request's extensions, which stay with it over redirects


class _Client(Protocol):
    """What is used of a client of httpx, or of the library in its place."""

    event_hooks: dict[str, list[Any]]


class Bounds:
    """The hooks of a client, and what they remember of one or more calls."""

    def __init__(self) -> None:
        """Begins to count."""
        self._answers = 0
        self._sizes: dict[str, tuple[str, int | None]] = {}
        self._clients: list[_Client] = []

    def equip(self, client: _Client) -> None:
        """Puts the hooks into a client."""
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], self.before],
            "response": [*hooks["response"], self.behind],
        }
        self._clients.append(client)

    def release(self) -> None:
        """Takes the hooks out of all clients."""
        for client in self._clients:
            client.event_hooks = {
                kind: [hook for hook in hooks if hook not in (self.before, self.behind)]
                for kind, hooks in client.event_hooks.items()
            }
        self._clients = []

    def before(self, request: Any) -> None:
        """Gives a request its limits of time, and asks for an answer as it is, or in gzip.

        Raises:
            RepositoryNotFoundError: in a block of `no_requests`.
        """
        from huggingface_hub import constants

        errors = refused.get()
        if errors is not None:
            errors.append(_not_found(request))
            raise errors[-1]
        asks = request.method in ("GET", "HEAD") or request.url.path.endswith("/paths-info/")
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT if asks else SEND_SECONDS
        times = request.extensions.get("timeout") or {}
        names = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {
            name: seconds if times.get(name) is None else times[name] for name in names
        }
        known = self._sizes.get(str(request.url))
        match = _FILE.search(unquote(request.url.path))
        if known is None and match is not None and "/api/models/" not in request.url.path:
            known = match[1], None
        # Of other encodings a few bytes may unpack to gigabytes at once.
        request.headers["Accept-Encoding"] = "gzip" if known is None else "identity"
        request.extensions.setdefault(_ABOUT, known)

    def behind(self, response: Any) -> None:
        """Checks an answer, and reads it at once, within bounds, unless it is a file.

        Raises:
            HubError: it is beyond a bound, or huggingface_hub would make unsafe paths of it.
        """
        request = response.request
        known = request.extensions.get(_ABOUT)
        _check_wait(response)
        if known is not None:
            _check_headers(response, known[0])
        if request.method == "HEAD":
            self._remember(response, known)
            return
        is_file = known is not None and response.status_code in (200, 206)
        most: int | None = ANSWER_BYTES
        if known is not None and is_file:
            most = _SMALL.get(known[0]) if known[1] is None else known[1]
        _bound(response, most, None if is_file else ANSWER_SECONDS)
        if is_file:
            return
        if request.method == "GET":
            self._answers += 1
            if self._answers > MOST_ANSWERS:
                raise HubError("the Hub's answers have no end", expected=f"at most {MOST_ANSWERS}")
        response.read()
        if response.status_code == 200:
            _check_json(response)

    def _remember(self, response: Any, known: tuple[str, int | None] | None) -> None:
        """Keeps the size that the Hub states of a file, for the request of its content."""
        if known is None or response.status_code >= 400:
            return
        headers = response.headers
        text = headers.get("X-Linked-Size")
        location = headers.get("Location")
        if text is None and location is None:
            text = headers.get("Content-Length")
        size = None if text is None else int(text)
        most = _SMALL.get(known[0])
        if size is not None and most is not None and size > most:
            raise HubError(f"{known[0]} is too long", got=size, expected=f"at most {most}")
        url = response.request.url
        for place in {str(url), str(url.join(location or ""))}:
            self._sizes[place] = known[0], size


def _not_found(request: Any) -> Exception:
    """Returns the client's exception for a repository that is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    library = type(request).__module__.partition(".")[0]
    response = import_module(library).Response(404, request=request)
    return RepositoryNotFoundError(
        f"no request is sent meanwhile: {request.url}", response=response
    )


def _check_wait(response: Any) -> None:
    """Refuses to sleep for hours: huggingface_hub sleeps as long as these headers say."""
    headers = response.headers
    waits = re.findall(r"^\s*(\d+)\s*$|;\s*t\s*=\s*(\d+)", headers.get("Retry-After", ""))
    waits += re.findall(r"()\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))
    for digits in (one or other for one, other in waits):
        if len(digits) > 9 or int(digits) > WAIT_SECONDS:
            raise HubError(
                "the Hub asks to wait too long",
                got=f"{digits[:20]} s",
                expected=f"at most {WAIT_SECONDS} s",
            )


def _check_headers(response: Any, file: str) -> None:
    """Refuses headers of a file of which huggingface_hub makes other paths and sizes than meant."""
    headers = response.headers
    for name, value, form in (
        ("ETag", _content_of(response), _CONTENT),
        ("X-Repo-Commit", headers.get("X-Repo-Commit"), COMMIT),
        ("X-Linked-Size", headers.get("X-Linked-Size"), _NUMBER),
        ("Content-Length", headers.get("Content-Length"), _NUMBER),
    ):
        if value is not None and form.fullmatch(value) is None:
            raise HubError(f"{_shown(file)}: the Hub's {name} is none", got=ascii(value)[:80])


def _content_of(response: Any) -> str | None:
    """Returns the name of the content that huggingface_hub takes from a response, or None."""
    headers, request = response.headers, response.request
    etag = headers.get("X-Linked-Etag") or headers.get("ETag")
    # Without one the client says so itself.
    if request.method != "HEAD" or response.status_code >= 400 or etag is None:
        return None
    leads_to = request.url.join(headers.get("Location", ""))
    is_moved = response.has_redirect_location and leads_to.host == request.url.host
    if is_moved and "X-Linked-Etag" not in headers:
        return None  # of a renamed repository: the client asks there
    return str(etag.removeprefix("W/").strip('"'))


def _check_json(response: Any) -> None:
    """Refuses commits and names of content that are none; other faults are found by the client."""
    try:
        data = response.json()
    except (ValueError, RecursionError):
        return
    if isinstance(data, dict) and not COMMIT.fullmatch(str(data.get("sha", "0" * 40))):
        raise HubError("the Hub names no commit", got=ascii(data["sha"])[:80])
    for entry in data if isinstance(data, list) else ():
        if not isinstance(entry, dict):
            continue
        large = entry.get("lfs")
        for value in (entry.get("oid"), large.get("oid") if isinstance(large, dict) else None):
            if isinstance(value, str) and not _CONTENT.fullmatch(value):
                file = _shown(str(entry.get("path")))
                raise HubError(f"{file}: the Hub's oid is none", got=ascii(value)[:80])


def _shown(file: str) -> str:
    return ascii(file)[1:-1][:200]


def _bound(response: Any, most: int | None, seconds: float | None) -> None:
    """Has a response yield at most `most` bytes, unpacked in pieces, in `seconds`.

    Raises:
        HubError: it has an encoding that was not asked for.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip"):
        raise HubError("the Hub's answer has a wrong encoding", got=ascii(encoding)[:80])
    if encoding == "gzip":
        # It is unpacked here: the client would do it without a bound.
        for name in ("Content-Encoding", "Content-Length"):
            response.headers.pop(name, None)
    library = type(response).__module__.partition(".")[0]
    response.stream = _stream_class(library)(response.stream, encoding == "gzip", most, seconds)


@cache
def _stream_class(library: str) -> Any:
    """Returns the class of bounded streams for httpx, or the library in its place."""
    base: Any = import_module(library).SyncByteStream

    class Bounded(base):  # type: ignore[misc]
        """A stream of an answer that ends in an error beyond its bounds."""

        def __init__(
            self, stream: Any, packed: bool, most: int | None, seconds: float | None
        ) -> None:
            self._stream = stream
            self._unpack = zlib.decompressobj(wbits=31) if packed else None
            self._most, self._seconds = most, seconds

        def __iter__(self) -> Iterator[bytes]:
            began, total = time.monotonic(), 0
            for block in self._stream:
                for piece in self._pieces(block):
                    total += len(piece)
                    if self._most is not None and total > self._most:
                        raise HubError(
                            "the Hub's answer is too long", expected=f"at most {self._most} bytes"
                        )
                    yield piece
                if self._seconds is not None and time.monotonic() - began > self._seconds:
                    raise HubError(f"the Hub's answer takes more than {self._seconds} s")

        def _pieces(self, block: bytes) -> Iterator[bytes]:
            if self._unpack is None:
                yield block
                return
            try:
                while block:
                    yield self._unpack.decompress(block, _PIECE_BYTES)
                    block = self._unpack.unconsumed_tail
            except zlib.error as exc:
                raise HubError(f"the Hub's answer is no gzip ({exc})") from exc

        def close(self) -> None:
            self._stream.close()

    return Bounded


class _Shared:
    """The bounds of the calls that run now, in all threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0
        self.bounds = Bounds()
        self.factory: Any = None
        self.own_factory: Any = None

    def enter(self) -> None:
        import huggingface_hub
        from huggingface_hub.utils import _http

        with self.lock:
            if not hasattr(_http, "_GLOBAL_CLIENT_FACTORY") or not hasattr(_http, "_GLOBAL_CLIENT"):
                raise UnsupportedEnvironmentError(
                    "this huggingface_hub keeps its client in another place",
                    got=huggingface_hub.__version__,
                    expected="1.0 to 2.4",
                )
            self.calls += 1
            if self.calls > 1:
                return
            bounds, factory = Bounds(), _http._GLOBAL_CLIENT_FACTORY

            def make() -> Any:
                client = factory()
                bounds.equip(client)
                return client

            self.bounds, self.factory, self.own_factory = bounds, factory, make
            _http._GLOBAL_CLIENT_FACTORY = make
            if _http._GLOBAL_CLIENT is not None:
                bounds.equip(_http._GLOBAL_CLIENT)

    def leave(self) -> None:
        with self.lock:
            self.calls -= 1
            if self.calls == 0:
                self.restore()

    def restore(self) -> None:
        from huggingface_hub.utils import _http

        self.bounds.release()
        # Another thread may have set one of its own meanwhile.
        if _http._GLOBAL_CLIENT_FACTORY is self.own_factory:
            _http._GLOBAL_CLIENT_FACTORY = self.factory


_shared = _Shared()


def _begin_anew() -> None:
    """In a child process no call of ours runs, and nobody would release a held lock."""
    global _shared
    if _shared.calls:
        _shared.restore()
    _shared = _Shared()


os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def bounded() -> Iterator[None]:
    """Bounds what a Hub answers to huggingface_hub in this block."""
    shared = _shared
    shared.enter()
    try:
        yield
    finally:
        shared.leave()
