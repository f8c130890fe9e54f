"""Endpoints of `hub_server`: repositories, files with ranges, large uploads, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.hub_server import Entry, Exchange, Fault, HubServer, Repo, is_lfs

_BLOCK = 1 << 16
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class _StopError(Exception):
    """Ends a request with a status; `code` and `message` are the Hub's own error headers."""

    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        super().__init__(status)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
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
            exchange = Exchange(
                self.command,
                self.path,
                self._status,
                self._received,
                self._sent,
                self.headers.get("Range"),
            )
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
        fault = (
            self.hub.take_fault(f"{self.command} {self.path}")
            if data and self.command == "GET"
            else None
        )
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
        self._send(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )

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
        """Returns a repository that the user may see; with `content`, a readable one."""
        user, repo = self.user(), self.hub.repos.get(name)
        owner = name.split("/", maxsplit=1)[0]
        if repo is None or (repo.private and user != owner):
            raise _StopError(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and user != owner and user not in self.hub.approved:
            raise _StopError(
                403 if user else 401, "GatedRepo", f"Access to model {name} is restricted."
            )
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
            raise _StopError(
                403,
                message="You don't have the rights to create a model under the namespace "
                f'"{owner}"',
            )
        url = {"url": f"{self.hub.url}/{name}", "id": name}
        if name in self.hub.repos:
            self._json({**url, "error": "You already created this model repo"}, 409)
            return
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.add_repo(
            name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private)
        )
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
        facts: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": entry.size,
            "oid": self._git_oid(entry),
        }
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
            headers = {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
                "X-Repo-Commit": oid,
            }
            self._json({"error": "Entry not found"}, 404, headers)
            return
        common = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if not entry.lfs:
            self._file(
                self.hub.blobs[entry.sha256], {**common, "ETag": f'"{self._git_oid(entry)}"'}
            )
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
        self._send(
            206,
            data[first : last + 1],
            {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"},
        )

    # Uploads.

    def preupload(self, repo: str, rev: str) -> None:
        found = self.repo_to_write(repo)
        present = found.commits[self.revision(found, rev)]
        answer = []
        for file in json.loads(self._body)["files"]:
            path, entry = file["path"], present.get(file["path"])
            oid = None if entry is None else entry.sha256 if entry.lfs else self._git_oid(entry)
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer, "commitOid": self.revision(found, rev)})

    def lfs_batch(self, repo: str) -> None:
        self.repo_to_write(repo)
        objects = [
            self._lfs_object(item["oid"], item["size"])
            for item in json.loads(self._body)["objects"]
        ]
        self._json(
            {"transfer": "multipart", "objects": objects},
            headers={"Content-Type": "application/vnd.git-lfs+json"},
        )

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
        answer["actions"] = {
            "upload": {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": header}
        }
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
                raise _StopError(
                    412, message="A commit has happened since. Please refresh and try again."
                )
            tree, ref = dict(found.commits[parent]), rev
            for operation in operations:
                self._apply(tree, operation["key"], operation["value"])
            answer: dict[str, Any] = {"success": True}
            if self._query.get("create_pr") == "1":
                found.pull_requests += 1
                ref = f"refs/pr/{found.pull_requests}"
                answer["pullRequestUrl"] = (
                    f"{self.hub.url}/{repo}/discussions/{found.pull_requests}"
                )
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
        errors = (
            []
            if content.startswith("---\n") and "\n---\n" in content[4:]
            else [{"message": "no YAML block"}]
        )
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)


_Action = Callable[..., None]
_ROUTES: list[tuple[str, str, _Action]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{_REPO}", Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/(?P<rev>.+)", Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<rev>.+)", Handler.tree),
    ("POST", f"/api/models/{_REPO}/paths-info/(?P<rev>.+)", Handler.paths_info),
    ("POST", f"/api/models/{_REPO}/branch/(?P<rev>.+)", Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<rev>.+)", Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<rev>.+)", Handler.commit),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", Handler.lfs_part),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", Handler.lfs_complete),
    ("GET|HEAD", r"/cdn/(?P<sha256>[0-9a-f]{64})/(?P<path>.+)", Handler.cdn),
    ("GET|HEAD", rf"/{_REPO}/resolve/(?P<rev>refs/pr/\d+|[^/]+)/(?P<path>.+)", Handler.resolve),
]
