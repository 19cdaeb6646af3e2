"""Fetches from a hub whose answers are damaged; a line of JSON for each that went wrong.

    python -m tests.tools.fuzz_hub DIRECTORY SEED SECONDS

A program of its own: what it took is measured.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

from qsens.config import Roots
from qsens.engine.host_memory import most_memory
from qsens.tools.fetch import fetch_model
from tests.pipeline.fuzz import change, text_of, wrong
from tests.tools.hub_server import COMMIT, Repository

WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
HEADER = b'{"a":{"dtype":"U8","shape":[2000],"data_offsets":[0,2000]}}'
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    INDEX: json.dumps({"weight_map": {"a": WEIGHTS}}).encode(),
    WEIGHTS: struct.pack("<Q", len(HEADER)) + HEADER + bytes(range(250)) * 8,
}
LARGEST = 64 << 20
# On a machine that is busy, too.
LEAST = 25
BOMB = gzip.compress(bytes(LARGEST))
PLACES = [
    "",
    "/",
    "//",
    "?",
    "ftp://127.0.0.1/",
    "file:///etc/passwd",
    "http://",
    "http://a..b/",
    "http://[::1",
    "http://127.0.0.1:1/",
    "http://127.0.0.1:99999/",
    "http://\u00e4/",
    "\x00",
    "x" * 9000,
]
NUMBERS = ["0", "1", "-1", "44", "9" * 18, "9" * 400, "x", "", "1, 2", "0x10", "1.5"]


def damaged(name: str, body: bytes, rng: random.Random) -> Iterator[bytes]:
    """Return an answer as it goes over the wire, with something wrong in it."""
    kind = rng.randrange(9)
    status = rng.choice([200] * 6 + [206, 204, 301, 302, 307, 304, 401, 403, 404, 416, 429, 503])
    headers = {"Content-Length": str(len(body))}
    if kind == 0:
        headers["Content-Length"] = rng.choice(NUMBERS)
    elif kind == 1:
        del headers["Content-Length"]
    elif kind == 2:
        headers["Content-Encoding"] = rng.choice(["gzip", "br", "deflate", "zstd", "x", "identity"])
        body = rng.choice([BOMB, body, gzip.compress(body)])
        headers["Content-Length"] = str(len(body))
    elif kind == 3:
        place = rng.choice([*PLACES, f"/owner/tiny/resolve/{COMMIT}/{name}"])
        headers["Location"] = place
        status = rng.choice([301, 302, 303, 307, 308, 200])
    elif kind == 4:
        first, last, total = (rng.choice([*NUMBERS, str(len(body))]) for _ in range(3))
        headers["Content-Range"] = rng.choice([f"bytes {first}-{last}/{total}", "bytes */9", "x"])
        status = rng.choice([206, 200, 416])
    elif kind == 5:
        headers = {"Transfer-Encoding": rng.choice(["chunked", "chunked", "gzip", "x, chunked"])}
    elif kind == 6:
        body = body[: rng.randrange(len(body) + 1)]
    elif kind == 7:
        headers["X-Error-Code"] = rng.choice(["GatedRepo", "RepoNotFound", "EntryNotFound", "x"])
        headers["Retry-After"] = rng.choice(NUMBERS)
        status = rng.choice([401, 403, 404, 429, 500])
    text = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    if kind == 8:
        text += rng.choice(["no header\r\n", "a" * 200_000 + ": b\r\n", "a: \x01\r\n", "\r\n\r\n"])
    yield f"HTTP/1.1 {status} x\r\n{text}\r\n".encode("utf-8", "surrogatepass")
    if "Transfer-Encoding" in headers:
        length = rng.choice([b"%x", b"-%x", b"%xz", b"ffffffff%x"]) % len(body)
        yield length + b"\r\n" + body + b"\r\n"
    else:
        yield body
    if rng.random() < 0.2:
        block = bytes(1 << 20)
        for _ in range(LARGEST >> 20):
            yield b"100000\r\n%s\r\n" % block if "Transfer-Encoding" in headers else block
    if "Transfer-Encoding" in headers and rng.random() < 0.7:
        yield b"0\r\n\r\n"


class Hub:
    """A hub that answers one name otherwise than it should."""

    def __init__(self) -> None:
        self.repository = Repository("owner/tiny", FILES)
        self.rng = random.Random(0)
        self.name = ""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def next(self, rng: random.Random) -> None:
        """Choose what is wrong."""
        self.rng = rng
        self.name = rng.choice(["listing", "listing", *FILES, ""])
        self.listing = json.dumps(self.repository.listed()).encode()
        if self.name == "listing" and rng.random() < 0.7:
            listed = self.repository.listed()
            while rng.random() < 0.7:
                changed = change(listed, rng)
                listed = changed if isinstance(changed, dict) else listed
            self.listing = text_of(listed, rng)
            self.name = ""

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                name = "listing" if path.startswith("/api/") else path.rsplit("/", 1)[-1]
                body = hub.listing if name == "listing" else FILES.get(name, b"")
                try:
                    if name == hub.name:
                        for piece in damaged(name, body, hub.rng):
                            self.wfile.write(piece)
                    else:
                        head = f"HTTP/1.1 200 x\r\nContent-Length: {len(body)}\r\n\r\n"
                        self.wfile.write(head.encode() + body)
                except OSError:  # whoever asked has heard enough
                    pass

        return Handler


def largest(directory: Path) -> int:
    """Return the size of the largest file below a directory."""
    return max((path.stat().st_size for path in directory.rglob("*") if path.is_file()), default=0)


def main(directory: Path, seed: int, seconds: float) -> None:
    """Go on until the time is over; print what was wrong, then how many were tried."""
    directory.mkdir(parents=True, exist_ok=True)
    configs = Roots.from_environment().configs
    hub = Hub()
    # What the environment would say, had the port been known.
    constants.ENDPOINT = f"http://127.0.0.1:{hub.server.server_port}"
    constants.HF_HUB_DOWNLOAD_TIMEOUT = 1
    constants.HF_HUB_OFFLINE = False
    end, tried, fetched = time.monotonic() + seconds, 0, 0
    slowest = 0.0
    while time.monotonic() < end or tried < LEAST:
        rng = random.Random(f"{seed}-{tried}")
        hub.next(rng)
        tried += 1
        work = directory / str(tried)
        roots = Roots(root=work, results=work, configs=configs)

        def fetch() -> None:
            nonlocal fetched
            fetch_model("owner/tiny", work / "out", roots=roots)  # noqa: B023
            fetched += 1

        started = time.monotonic()
        signal.alarm(20)
        said = wrong(fetch)
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - started)
        # A listing may say more than there is; no more comes than that.
        kept = largest(work)
        if kept > max(map(len, FILES.values())):
            said = said or f"{kept} bytes are kept"
        there = {path.name: path.read_bytes() for path in (work / "out").glob("[!q]*")}
        if there and any(FILES.get(name) != content for name, content in there.items()):
            said = said or f"not as published: {sorted(there)}"
        if said:
            print(json.dumps({"seed": f"{seed}-{tried - 1}", "name": hub.name, "said": said}))
        shutil.rmtree(work)
    counts = {"tried": tried, "fetched": fetched}
    print(json.dumps({**counts, "bytes": most_memory(), "seconds": slowest}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
