"""A model hub on loopback: repositories in folders, with whatever may go wrong."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants


@functools.lru_cache
def _digest(file: Path, modified: int) -> str:
    """SHA-256 of a version of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Asked:
    """One request: where it went, which bytes it asked for, whether with a token."""

    path: str
    range: str | None
    token: str | None


# Changes an answer: from the request to (status, headers, body), or None to leave it.
Trouble = Callable[[Asked], tuple[int, dict[str, str], bytes] | None]


@dataclass
class Hub:
    """What the server has, does, and saw.

    `commits` maps revisions of a repository to folders; `gated` needs the token;
    `redirect` sends readers of weights to another address, as the hub does.
    """

    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_secret"
    redirect: bool = True
    signature: str = "1"
    trouble: Trouble | None = None
    cut: Callable[[Asked], int | None] | None = None
    asked: list[Asked] = field(default_factory=list)
    bytes_sent: int = 0
    address: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repository: str, folder: Path, revision: str = "main") -> str:
        """Serve a folder as a repository; return the commit of this revision."""
        commit = hashlib.sha1(f"{repository}{folder}".encode()).hexdigest()
        known = self.commits.setdefault(repository, {})
        known[revision] = known[commit] = folder
        return commit

    def answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        """What the hub says to a request."""
        if self.trouble and (odd := self.trouble(asked)):
            return odd
        path, _, query = asked.path.partition("?")
        parts = unquote(path).strip("/").split("/")
        if parts[0] == "cdn":
            if query != f"signature={self.signature}":
                return 403, {}, b"expired"
            return self._part(asked, Path("/", *parts[1:]))
        if parts[:2] == ["api", "models"]:
            repository, rest = "/".join(parts[2:4]), parts[4:]
            revision = rest[1] if rest[:1] == ["revision"] else "main"
            return self._info(repository, revision)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve(asked, "/".join(parts[:2]), parts[3], parts[4:])
        return 404, {}, b""

    def _info(self, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        if name not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if revision not in self.commits[name]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        folder = self.commits[name][revision]
        files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
        commit = next(
            c for c, f in self.commits[name].items() if f == folder and len(c) == 40
        )
        info = {"id": name, "modelId": name, "sha": commit, "siblings": files}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _resolve(
        self, asked: Asked, name: str, revision: str, rest: list[str]
    ) -> tuple[int, dict[str, str], bytes]:
        if name in self.gated and asked.token != f"Bearer {self.token}":
            status = 401 if asked.token is None else 403
            return status, {"X-Error-Code": "GatedRepo"}, b""
        if name not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        folder = self.commits[name][revision]
        file = folder.joinpath(*rest)
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        commit = {
            "X-Repo-Commit": next(
                c
                for c, at in self.commits[name].items()
                if at == folder and len(c) == 40
            )
        }
        if self.redirect and file.suffix == ".safetensors":
            where = f"{self.address}/cdn{file}?signature={self.signature}"
            linked = _digest(file, file.stat().st_mtime_ns)
            headers = {"Location": where, "X-Linked-ETag": f'"{linked}"', **commit}
            return 302, {**headers, "X-Linked-Size": str(file.stat().st_size)}, b""
        status, headers, body = self._part(asked, file)
        return status, {**headers, **commit}, body

    def _part(self, asked: Asked, file: Path) -> tuple[int, dict[str, str], bytes]:
        size = file.stat().st_size
        headers = {"ETag": f'"{_digest(file, file.stat().st_mtime_ns)}"'}
        if asked.range is None:
            return 200, headers, file.read_bytes()
        first, _, last = asked.range.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last), size - 1)
        if start >= size:
            return 416, {"Content-Range": f"bytes */{size}"}, b""
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        with file.open("rb") as stream:
            stream.seek(start)
            return 206, headers, stream.read(end + 1 - start)

    def ranges(self) -> list[tuple[int, int]]:
        """First and last byte of every range of a file of weights that was sent."""
        return [
            (int(first), int(last))
            for asked in self.asked
            if asked.range and (asked.path.startswith("/cdn") or not self.redirect)
            for first, last in [asked.range.removeprefix("bytes=").split("-")]
        ]


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's client ask this address."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *given: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            headers = self.headers
            asked = Asked(self.path, headers.get("Range"), headers.get("Authorization"))
            status, more, body = hub.answer(asked)
            sent = body
            if hub.cut and (limit := hub.cut(asked)) is not None:
                sent = body[:limit]
            with hub._lock:
                hub.asked.append(asked)
                hub.bytes_sent += len(sent)
            if self.command == "HEAD":  # says where it would go, and goes not
                more.pop("Location", None)
                status = 200 if status == 302 else status
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **more}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(sent)
            self.close_connection = len(sent) < len(body)

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *given: Any) -> None:
            """A reader that has seen enough hangs up: nothing to print."""

    server = Server(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
