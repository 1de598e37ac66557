"""A hub on loopback: what huggingface_hub asks for when it downloads, makes a repository and commits to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "verySecretTokenOfATest0123456789"  # what this hub takes


@dataclass
class Stub:
    """The state of a hub.

    Attributes:
      repos: {owner/name: {commit: {path: bytes}}}.
      refs: {owner/name: {branch or tag: commit}}.
      private: repositories that ask for the token.
      requests: of (method, path) in order.
      breaks: {file: how many bytes of its next answer are sent before the connection is closed}.
      refused: parts of paths that are answered with status 413.
      echo: whether errors repeat the Authorization header, as no server should.
      down: whether every request is answered with status 500.
    """

    endpoint: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    echo: bool = False
    refused: tuple[str, ...] = ()
    down: bool = False

    def add(self, repo: str, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Commits these files alone; the commit."""
        content = json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in sorted(files.items())})
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = dict(files)
        self.refs.setdefault(repo, {})[ref] = commit
        return commit

    def newest(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][self.refs[repo]["main"]]

    def commit_of(self, repo: str, revision: str) -> str | None:
        found = self.refs[repo].get(revision, revision)
        return found if found in self.repos[repo] else None


@contextmanager
def hub() -> Iterator[Stub]:
    stub = Stub()

    class Handler(_Handler):
        hub = stub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    hub: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self._body()
        if self.hub.down:
            return self._error(500, "Down", "the hub is down")
        if any(part in path for part in self.hub.refused):
            return self._error(413, "", "too large")
        if path == "/api/validate-yaml":  # of a card
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/blobs/"):  # where a large file is sent to; no header tells who sends it
            self.hub.blobs[path.removeprefix("/blobs/")] = body
            return self._send(200, b"")
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch)", self._batch),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if found := re.fullmatch(pattern, path):
                repo, revision, *rest = found.groups()
                return self._open(repo, revision or "main", answer, body, *rest)
        return self._error(404, "", f"no such path: {path}")

    def _open(self, repo: str, revision: str, answer: Any, body: bytes, *rest: str) -> None:
        sent = self.headers.get("Authorization", "")
        if sent and sent != f"Bearer {TOKEN}":
            return self._error(401, "", "Invalid credentials in Authorization header")
        if repo not in self.hub.repos or (repo in self.hub.private and not sent):
            return self._error(404 if sent else 401, "RepoNotFound", "Repository not found")
        if answer in (self._preupload, self._commit, self._batch) and not sent:
            return self._error(401, "", "a token is needed to write")
        if answer == self._batch:
            return self._batch(repo, body)
        commit = self.hub.commit_of(repo, revision)
        if commit is None and self.hub.repos[repo]:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return answer(repo, commit or "", body, *rest)

    def _info(self, repo: str, commit: str, body: bytes) -> None:
        siblings = [{"rfilename": path} for path in self.hub.repos[repo].get(commit, {})]
        self._json({"id": repo, "modelId": repo, "sha": commit or "0" * 40, "private": False, "siblings": siblings})

    def _tree(self, repo: str, commit: str, body: bytes) -> None:
        files = self.hub.repos[repo].get(commit, {})
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        )

    def _file(self, repo: str, commit: str, body: bytes, file: str) -> None:
        data = self.hub.repos[repo][commit].get(file)
        if data is None:
            return self._error(404, "EntryNotFound", f"no {file}", commit)
        start = 0
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(f"{file} {asked}")
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and file in self.hub.breaks:
            headers["Content-Length"] = str(len(data) - start)
            self._head(206 if start else 200, headers)
            self.wfile.write(data[start : start + self.hub.breaks.pop(file)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self._send(206 if start else 200, data[start:], headers)

    def _create(self, asked: dict[str, Any]) -> None:
        sent = self.headers.get("Authorization", "")
        if sent != f"Bearer {TOKEN}":
            return self._error(401, "", "Invalid credentials in Authorization header")
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.hub.repos:
            return self._json({"url": f"{self.hub.endpoint}/{repo}"}, 409)
        self.hub.repos[repo], self.hub.refs[repo] = {}, {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        return self._json({"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def _preupload(self, repo: str, commit: str, body: bytes) -> None:
        large = (".safetensors", ".npz")
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def _batch(self, repo: str, body: bytes) -> None:
        objects = [
            {
                "oid": o["oid"],
                "size": o["size"],
                "actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{o['oid']}"}},
            }
            for o in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, commit: str, body: bytes) -> None:
        files = dict(self.hub.repos[repo].get(commit, {}))
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        made = self.hub.add(repo, files)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made}", "commitOid": made, "hookOutput": ""})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _error(self, status: int, code: str, message: str, commit: str = "") -> None:
        if self.hub.echo:
            message = f"{message}; you sent {self.headers.get('Authorization')}"
        headers = {"X-Error-Code": code, "X-Error-Message": message} | ({"X-Repo-Commit": commit} if commit else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": str(len(data)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
