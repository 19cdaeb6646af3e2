"""A model hub on this machine: one repository, served as the real one does, and its CDN."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "5f" * 20


@dataclass
class Repository:
    """What the hub holds, how it misbehaves, and what it was asked.

    Attributes:
        name: ``owner/name``.
        files: Content by name.
        token: The token that opens it; open to all when empty.
        gated: Whether its owner's consent is missing.
        declared: Sizes that are told instead of the real ones.
        cut: By name: the connection ends after so many bytes of the file, once.
        stall: By name: after so many bytes nothing more comes until ``release``.
        corrupt: Names whose content is sent with another first byte, once each.
        status: Answer every request with this status.
        replies: By name, or ``listing``: answers a request to the hub in place of it; what it
            returns false for is answered as ever.
        asked: ``(server, path, headers)`` of every request for a repository or a file.
        sent: Bytes of each file that were sent.
    """

    name: str
    files: dict[str, bytes]
    token: str = ""
    gated: bool = False
    declared: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    status: int | None = None
    replies: dict[str, Callable[[BaseHTTPRequestHandler], bool]] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def listed(self) -> dict[str, Any]:
        """Return the hub's description, with the digests of the content."""
        siblings = []
        for name, content in self.files.items():
            size = self.declared.get(name, len(content))
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": blob}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": siblings}


@contextmanager
def serving(repository: Repository) -> Iterator[str]:
    """Serve a repository while the context lasts; return the hub's address."""
    cdn = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repository, "cdn", ""))
    behind = f"http://127.0.0.1:{cdn.server_port}"
    hub = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repository, "hub", behind))
    for server in (cdn, hub):
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{hub.server_port}"
    finally:
        repository.release.set()
        for server in (hub, cdn):
            server.shutdown()
            server.server_close()


def _handler(repository: Repository, role: str, cdn: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            headers = {key.lower(): value for key, value in self.headers.items()}
            if "/owner/" in path or role == "cdn":  # huggingface_hub asks for more of its own
                repository.asked.append((role, path, headers))
            wanted = "listing" if path.startswith("/api/") else path.rsplit("/", 1)[-1]
            reply = repository.replies.get(wanted) if role == "hub" else None
            if reply is not None and self._replied(reply):
                return
            if repository.status is not None:
                self._say(repository.status)
            elif role == "cdn":
                self._file(path.removeprefix("/blob/"))
            elif not self._may_read(headers):
                return
            elif path.startswith(f"/api/models/{repository.name}/revision/"):
                if path.rsplit("/", 1)[-1] not in ("main", "v1", COMMIT):
                    self._say(404, {"X-Error-Code": "RevisionNotFound"})
                else:
                    self._say(200, body=json.dumps(repository.listed()).encode())
            elif path.startswith(f"/{repository.name}/resolve/{COMMIT}/"):
                name = path.rsplit("/", 1)[-1]
                if name.endswith(".safetensors"):
                    where = f"{cdn}/blob/{name}?X-Signature=do-not-print-me"
                    self._say(302, {"Location": where})
                else:
                    self._file(name)
            else:
                self._say(404, {"X-Error-Code": "RepoNotFound"})

        def _replied(self, reply: Callable[[BaseHTTPRequestHandler], bool]) -> bool:
            try:
                done = reply(self)
            except OSError:  # whoever asked has heard enough
                done = True
            self.close_connection = done
            return done

        def _may_read(self, headers: dict[str, str]) -> bool:
            if repository.gated:
                self._say(403, {"X-Error-Code": "GatedRepo"})
                return False
            wanted = f"Bearer {repository.token}"
            if repository.token and headers.get("authorization") != wanted:
                self._say(401, {"X-Error-Code": "RepoNotFound"})
                return False
            return True

        def _file(self, name: str) -> None:
            content = repository.files[name]
            if name in repository.corrupt:
                repository.corrupt.remove(name)
                content = bytes([content[0] ^ 1]) + content[1:]
            given = self.headers.get("Range")
            start = int(given.removeprefix("bytes=").split("-")[0]) if given else 0
            self.send_response(206 if given else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if given:
                total = len(content)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.end_headers()
            end = repository.cut.pop(name, len(content))
            pause = repository.stall.pop(name, None)
            if pause is not None:
                end = pause
            self.wfile.write(content[start:end])
            self.wfile.flush()
            repository.sent[name] = repository.sent.get(name, 0) + end - start
            if pause is not None:
                repository.stalled.set()
                repository.release.wait(60)
            if end < len(content):
                self.close_connection = True

        def _say(
            self, status: int, headers: dict[str, str] | None = None, body: bytes = b""
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
