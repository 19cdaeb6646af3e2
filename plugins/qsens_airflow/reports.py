"""Published reports on a loopback port: for people who run everything on their own machine."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, unquote, urlsplit

_INDEX = "models/*/layer-analysis/index.html"


class ReportsHandler(SimpleHTTPRequestHandler):
    """Serves what is published below a results root, and nothing else that lies there."""

    def send_head(self) -> Any:
        """Send the start page, a report, or 404."""
        parts = [part for part in unquote(urlsplit(self.path).path).split("/") if part]
        if not parts:
            return self._start_page()
        published = parts[0] == "tmp" or parts[0::2][:2] == ["models", "layer-analysis"]
        if not published or any(part.startswith(".") for part in parts):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> None:
        """Refuse: a report links to what belongs to it."""
        self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: who reads a report is nobody's matter."""

    def _start_page(self) -> None:
        results = Path(self.directory)
        pages = [page.relative_to(results).as_posix() for page in sorted(results.glob(_INDEX))]
        links = "".join(
            f'<li><a href="/{quote(page)}">{html.escape(page.split("/")[1])}</a></li>'
            for page in pages
        )
        body = f"<ul>{links}</ul>" if links else "<p>Nothing is published yet.</p>"
        page = f'<!doctype html><html lang="en"><title>qsens</title><h1>Reports</h1>{body}</html>'
        content = page.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextlib.contextmanager
def serving(results: Path) -> Iterator[str]:
    """Serve the reports below ``results`` while the context lasts; yield their address."""
    handler = partial(ReportsHandler, directory=str(results))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
