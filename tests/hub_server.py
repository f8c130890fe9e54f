"""A Hub of our own on loopback: real HTTP, and the endpoints that huggingface_hub 2.4 uses to push and to fetch models.

No package fits: `hf-local-hub` on PyPI is the client of a server that it does not hold, `olah` mirrors the real Hub and takes
no uploads. What is served here was read from huggingface_hub's source (`hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`, `_snapshot_download.py`); Xet is not spoken: clients set HF_HUB_DISABLE_XET.

Everything is content-addressed by sha256, every commit is kept, every exchange is logged with the bytes that its body held, and
faults can be put in: a body that is cut off, a transfer that stalls, a stored byte that changes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".model")
LFS_BYTES = 1 << 20
_BLOCK = 1 << 16
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Entry:
    """A file of a commit: sha256 and size of its content, and whether it is kept as a large file."""

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
    """What happens to the transfer of bodies whose path matches: after `after` bytes it is cut off, or waits for `release`."""

    pattern: str
    after: int
    times: int = 1
    stall: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        url: what HF_ENDPOINT has to be.
        cdn_url: where large files are served, as on the real Hub from another host, to which no token may be sent.
        users: token -> user name.
        approved: users who were given access to gated repositories.
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
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.cdn_url = f"http://localhost:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

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
        self.commit(repo, {path: self.store(path, data) for path, data in (files or {}).items()}, "initial commit", "main")
        return repo

    def store(self, path: str, data: bytes) -> Entry:
        """Keeps a content and returns the entry under which a tree refers to it."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return Entry(sha256, len(data), _is_lfs(path, len(data)))

    def commit(self, repo: Repo, tree: dict[str, Entry], message: str, ref: str) -> str:
        """Adds a commit with exactly `tree` and points `ref` at it."""
        text = json.dumps([repo.refs.get(ref), message, sorted((path, e.sha256) for path, e in tree.items())])
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
            return [exchange for exchange in self.log if exchange.method == method and re.search(pattern, exchange.path)]

    def sent(self) -> int:
        """Returns the bytes of all bodies sent so far."""
        with self.lock:
            return sum(exchange.sent for exchange in self.log)


def _is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES


class _StopError(Exception):
    """Ends a request with a status; `code` and `message` are the Hub's own error headers."""

    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        super().__init__(status)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing goes to the terminal: `HubServer.log` holds everything."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self._received = self._sent = 0
        self._status = 0
        parts = urllib.parse.urlsplit(self.path)
        self._query = dict(urllib.parse.parse_qsl(parts.query))
        path = urllib.parse.unquote(parts.path)
        try:
            self._body = self._read_body()
            for method, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    action(self, **match.groupdict())
                    break
            else:
                raise _StopError(404, message=f"no such endpoint: {self.command} {path}")
        except _StopError as stop:
            self._fail(stop)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        finally:
            exchange = Exchange(self.command, self.path, self._status, self._received, self._sent, self.headers.get("Range"))
            with self.hub.lock:
                self.hub.log.append(exchange)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return self._read_chunked()
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.take_fault(f"{self.command} {self.path}") if length else None
        body = bytearray()
        while len(body) < length:
            limit = fault.after if fault is not None else length
            block = self.rfile.read(min(_BLOCK, length - len(body), max(1, limit - len(body))))
            if not block:
                raise ConnectionResetError
            body += block
            self._received = len(body)
            if fault is not None and len(body) >= fault.after:
                self._suffer(fault)
                fault = None
        return bytes(body)

    def _read_chunked(self) -> bytes:
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        self._received = len(body)
        return bytes(body)

    def _suffer(self, fault: Fault) -> None:
        """Cuts the connection off, or waits until the test lets it go on."""
        self.wfile.flush()
        fault.reached.set()
        if fault.stall:
            fault.release.wait(120)
            return
        self.close_connection = True
        raise ConnectionResetError

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        fault = self.hub.take_fault(f"{self.command} {self.path}") if data and self.command == "GET" else None
        self._status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None:
            self.wfile.write(data[: fault.after])
            self._sent = len(data[: fault.after])
            self._suffer(fault)
            data = data[fault.after :]
        self.wfile.write(data)
        self._sent += len(data)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _fail(self, stop: _StopError) -> None:
        headers = {"X-Error-Message": stop.message} if stop.message else {}
        if stop.code is not None:
            headers["X-Error-Code"] = stop.code
        self._json({"error": stop.message}, stop.status, headers)

    # Who asks, and what they may do.

    def user(self) -> str | None:
        """Returns the user of the request's token, None without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.hub.users:
            raise _StopError(401, message="Invalid credentials in Authorization header")
        return self.hub.users[token]

    def repo_to_read(self, name: str, *, content: bool = False) -> Repo:
        """Returns a repository that the user may see; with `content` one whose files they may read."""
        user, repo = self.user(), self.hub.repos.get(name)
        owner = name.split("/", maxsplit=1)[0]
        if repo is None or (repo.private and user != owner):
            raise _StopError(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and user != owner and user not in self.hub.approved:
            raise _StopError(403 if user else 401, "GatedRepo", f"Access to model {name} is restricted.")
        return repo

    def repo_to_write(self, name: str) -> Repo:
        """Returns a repository that the user may change."""
        user = self.user()
        if user is None:
            raise _StopError(401, message="Invalid username or password.")
        repo = self.repo_to_read(name)
        if user != name.split("/", maxsplit=1)[0]:
            raise _StopError(403, message="You don't have write access to this repository")
        return repo

    def revision(self, repo: Repo, revision: str) -> str:
        """Returns the commit to which a revision leads."""
        revision = urllib.parse.unquote(revision)
        oid = repo.refs.get(revision) or (revision if revision in repo.commits else None)
        if oid is None:
            raise _StopError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    # Repositories.

    def create(self) -> None:
        user, request = self.user(), json.loads(self._body)
        if user is None:
            raise _StopError(401, message="Invalid username or password.")
        owner = request.get("organization") or user
        name = f"{owner}/{request['name']}"
        if owner != user:
            raise _StopError(403, message=f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = {"url": f"{self.hub.url}/{name}", "id": name}
        if name in self.hub.repos:
            self._json({**url, "error": "You already created this model repo"}, 409)
            return
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.add_repo(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
        self._json(url)

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise _StopError(401, message="Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": [], "auth": {}})

    def info(self, repo: str, rev: str = "main") -> None:
        found = self.repo_to_read(repo)
        oid = self.revision(found, rev)
        facts = {
            "id": repo,
            "modelId": repo,
            "sha": oid,
            "private": found.private,
            "gated": "manual" if found.gated else False,
            "cardData": found.card_data,
            "pipeline_tag": (found.card_data or {}).get("pipeline_tag"),
            "siblings": [{"rfilename": path} for path in sorted(found.commits[oid])],
        }
        self._json(facts)

    def tree(self, repo: str, rev: str) -> None:
        found = self.repo_to_read(repo, content=True)
        files = found.commits[self.revision(found, rev)]
        self._json([self._tree_entry(path, entry) for path, entry in sorted(files.items())])

    def paths_info(self, repo: str, rev: str) -> None:
        found = self.repo_to_read(repo, content=True)
        files = found.commits[self.revision(found, rev)]
        wanted = urllib.parse.parse_qs(self._body.decode())["paths"]
        self._json([self._tree_entry(path, files[path]) for path in wanted if path in files])

    def _tree_entry(self, path: str, entry: Entry) -> dict[str, Any]:
        facts: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": self._git_oid(entry)}
        if entry.lfs:
            facts["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
        return facts

    def _git_oid(self, entry: Entry) -> str:
        data = b"pointer to " + entry.sha256.encode() if entry.lfs else self.hub.blobs[entry.sha256]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def branch(self, repo: str, rev: str) -> None:
        found = self.repo_to_write(repo)
        if rev in found.refs:
            self._json({"error": "Reference already exists"}, 409)
            return
        found.refs[rev] = found.refs["main"]
        self._json({})

    # Files.

    def resolve(self, repo: str, rev: str, path: str) -> None:
        found = self.repo_to_read(repo, content=True)
        oid = self.revision(found, rev)
        entry = found.commits[oid].get(path)
        if entry is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid}
            self._json({"error": "Entry not found"}, 404, headers)
            return
        common = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if not entry.lfs:
            self._file(self.hub.blobs[entry.sha256], {**common, "ETag": f'"{self._git_oid(entry)}"'})
            return
        linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        location = f"{self.hub.cdn_url}/cdn/{entry.sha256}/{urllib.parse.quote(path)}"
        self._send(302, b"", {**common, **linked, "Location": location})

    def cdn(self, sha256: str, path: str) -> None:
        if self.headers.get("Authorization"):
            raise _StopError(400, message="a token was sent to the CDN")
        self._file(self.hub.blobs[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def _file(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, data, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if first > last:
            raise _StopError(416, message="Requested range not satisfiable")
        self._send(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # Uploads.

    def preupload(self, repo: str, rev: str) -> None:
        found = self.repo_to_write(repo)
        present = found.commits[self.revision(found, rev)]
        answer = []
        for file in json.loads(self._body)["files"]:
            path, entry = file["path"], present.get(file["path"])
            oid = None if entry is None else entry.sha256 if entry.lfs else self._git_oid(entry)
            mode = "lfs" if _is_lfs(path, file["size"]) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer, "commitOid": self.revision(found, rev)})

    def lfs_batch(self, repo: str) -> None:
        self.repo_to_write(repo)
        objects = [self._lfs_object(item["oid"], item["size"]) for item in json.loads(self._body)["objects"]]
        self._json({"transfer": "multipart", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def _lfs_object(self, oid: str, size: int) -> dict[str, Any]:
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid in self.hub.blobs:
            return answer
        if size <= self.hub.part_bytes:
            answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}}
            return answer
        parts = -(-size // self.hub.part_bytes)
        header = {str(part): f"{self.hub.url}/lfs/{oid}/{part}" for part in range(1, parts + 1)}
        header["chunk_size"] = str(self.hub.part_bytes)
        answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": header}}
        return answer

    def lfs_put(self, oid: str) -> None:
        self._keep(oid, self._body)
        self._send(200, b"", {"ETag": '"whole"'})

    def lfs_part(self, oid: str, part: str) -> None:
        with self.hub.lock:
            self.hub.parts[oid, int(part)] = self._body
        self._send(200, b"", {"ETag": f'"{hashlib.md5(self._body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self._body)["parts"]]
        with self.hub.lock:
            data = b"".join(self.hub.parts.pop((oid, number)) for number in numbers)
        self._keep(oid, data)
        self._json({})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise _StopError(422, message="content does not match its sha256")
        with self.hub.lock:
            self.hub.blobs[oid] = data

    def commit(self, repo: str, rev: str) -> None:
        found = self.repo_to_write(repo)
        header, *operations = (json.loads(line) for line in self._body.splitlines())
        with self.hub.lock:
            parent = self.revision(found, rev)
            if header["value"].get("parentCommit") not in (None, parent):
                raise _StopError(412, message="A commit has happened since. Please refresh and try again.")
            tree, ref = dict(found.commits[parent]), rev
            for operation in operations:
                self._apply(tree, operation["key"], operation["value"])
            answer: dict[str, Any] = {"success": True}
            if self._query.get("create_pr") == "1":
                found.pull_requests += 1
                ref = f"refs/pr/{found.pull_requests}"
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{found.pull_requests}"
            oid = self.hub.commit(found, tree, header["value"]["summary"], ref)
        self._json({**answer, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def _apply(self, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "deletedFile":
            del tree[path]
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise _StopError(400, message=f"LFS object {value['oid']} was never uploaded")
            tree[path] = Entry(value["oid"], len(self.hub.blobs[value["oid"]]), lfs=True)
        elif key == "file":
            tree[path] = self.hub.store(path, base64.b64decode(value["content"]))
        else:
            raise _StopError(400, message=f"unknown operation {key}")

    def validate_yaml(self) -> None:
        content = json.loads(self._body)["content"]
        errors = [] if content.startswith("---\n") and "\n---\n" in content[4:] else [{"message": "no YAML block"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)


_Action = Callable[..., None]
_ROUTES: list[tuple[str, str, _Action]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/(?P<rev>.+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<rev>.+)", _Handler.tree),
    ("POST", f"/api/models/{_REPO}/paths-info/(?P<rev>.+)", _Handler.paths_info),
    ("POST", f"/api/models/{_REPO}/branch/(?P<rev>.+)", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<rev>.+)", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<rev>.+)", _Handler.commit),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", _Handler.lfs_part),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", _Handler.lfs_complete),
    ("GET|HEAD", r"/cdn/(?P<sha256>[0-9a-f]{64})/(?P<path>.+)", _Handler.cdn),
    ("GET|HEAD", rf"/{_REPO}/resolve/(?P<rev>refs/pr/\d+|[^/]+)/(?P<path>.+)", _Handler.resolve),
]
