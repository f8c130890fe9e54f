"""A Hub on loopback: real HTTP, with huggingface_hub's endpoints for pushes and fetches.

No package fits: `hf-local-hub` on PyPI is the client of a server that it does not hold, `olah`
mirrors the real Hub and takes no uploads. The endpoints (`hub_endpoints`) were read from
huggingface_hub's source (`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`,
`_snapshot_download.py`); Xet is not spoken: clients set HF_HUB_DISABLE_XET.

Everything is content-addressed by sha256, every commit is kept, every exchange is logged with the
bytes that its body held, and faults can be put in: a body that is cut off, a transfer that stalls,
a stored byte that changes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".model")
LFS_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A file of a commit: sha256 and size of its content; `large` for a large file's storage."""

    sha256: str
    size: int
    lfs: bool


@dataclass
class Repo:
    """A repository: refs lead to commits, a commit holds every file of its tree."""

    private: bool = False
    gated: bool = False
    card_data: dict[str, Any] | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0


@dataclass(frozen=True)
class Exchange:
    """One request as the server saw it; `received` and `sent` are bytes of bodies."""

    method: str
    path: str
    status: int
    received: int
    sent: int
    range: str | None


@dataclass
class Fault:
    """Cuts off or stops matching bodies after `after` bytes; a stop lasts until `release`."""

    pattern: str
    after: int
    times: int = 1
    stall: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        url: the value for HF_ENDPOINT.
        cdn_url: where large files are served, as on the real Hub from another host, to which no
            token may be sent.
        users: token -> user name.
        approved: users with access to gated repositories.
        repos: repositories by name.
        blobs: contents by sha256.
        log: every exchange so far.
        part_bytes: large files above this size are uploaded in parts of it.
    """

    def __init__(self, *, part_bytes: int = 1 << 20) -> None:
        self.users: dict[str, str] = {"hf_writer": "user", "hf_reader": "reader"}
        self.approved: set[str] = set()
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.log: list[Exchange] = []
        self.faults: list[Fault] = []
        self.part_bytes = part_bytes
        self.lock = threading.RLock()
        from tests.hub_endpoints import Handler

        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.cdn_url = f"http://localhost:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for fault in self.faults:
            fault.release.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, *, token: str | None = None, cache: str | None = None) -> dict[str, str]:
        """Returns the variables under which a client process talks to this server only."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        if token is not None:
            variables["HF_TOKEN"] = token
        if cache is not None:
            variables["HF_HOME"] = cache
        return variables

    def add_repo(self, name: str, files: dict[str, bytes] | None = None, **options: Any) -> Repo:
        """Makes a repository with one commit."""
        repo = self.repos[name] = Repo(**options)
        self.commit(
            repo,
            {path: self.store(path, data) for path, data in (files or {}).items()},
            "initial commit",
            "main",
        )
        return repo

    def store(self, path: str, data: bytes) -> Entry:
        """Keeps a content and returns the entry under which a tree refers to it."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return Entry(sha256, len(data), is_lfs(path, len(data)))

    def commit(self, repo: Repo, tree: dict[str, Entry], message: str, ref: str) -> str:
        """Adds a commit with exactly `tree` and points `ref` at it."""
        text = json.dumps(
            [repo.refs.get(ref), message, sorted((path, e.sha256) for path, e in tree.items())]
        )
        oid = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[oid], repo.messages[oid], repo.refs[ref] = tree, message, oid
        return oid

    def entry(self, name: str, path: str, ref: str = "main") -> Entry:
        """Returns a file's entry."""
        repo = self.repos[name]
        return repo.commits[repo.refs[ref]][path]

    def tamper(self, name: str, path: str, byte: int) -> None:
        """Flips one bit of a stored content; the server goes on saying its old sha256."""
        sha256 = self.entry(name, path).sha256
        data = bytearray(self.blobs[sha256])
        data[byte] ^= 1
        self.blobs[sha256] = bytes(data)

    def fault(self, pattern: str, *, after: int, times: int = 1, stall: bool = False) -> Fault:
        """Puts a fault in; see `Fault`."""
        made = Fault(pattern, after, times, stall)
        self.faults.append(made)
        return made

    def take_fault(self, path: str) -> Fault | None:
        """Returns the fault that this transfer meets, and counts it."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def exchanges(self, method: str, pattern: str) -> list[Exchange]:
        """Returns the logged exchanges of a method whose path matches."""
        with self.lock:
            return [
                exchange
                for exchange in self.log
                if exchange.method == method and re.search(pattern, exchange.path)
            ]

    def sent(self) -> int:
        """Returns the bytes of all bodies sent so far."""
        with self.lock:
            return sum(exchange.sent for exchange in self.log)


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub keeps a file of this name and size as a large file."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES
