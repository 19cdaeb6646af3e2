"""Run one function on many types, each in a child forked from this process. Needs torch.

Whatever is imported here is imported once; what a type breaks, it breaks in its own process.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

MEMORY = 12 << 30


def run_all(
    types: Sequence[str],
    work: Callable[[str], dict[str, Any]],
    *,
    together: int,
    seconds: float,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what ``work`` returns of each type, in the order in which they end.

    One that raises gives ``{"error": ...}``, and so does one that takes too long or too much.

    Args:
        types: The types.
        work: The function; its result must be JSON.
        together: Children at once; each takes one thread.
        seconds: What a child may take.
    """
    waiting, running = list(types), selectors.DefaultSelector()
    while waiting or running.get_map():
        while waiting and len(running.get_map()) < together:
            name = waiting.pop(0)
            child, reader = _fork(name, work, seconds)
            running.register(reader, selectors.EVENT_READ, (name, child, bytearray()))
        for key, _ in running.select(timeout=5):
            name, child, held = key.data
            part = os.read(key.fd, 1 << 16)
            if part:
                held += part
                continue
            running.unregister(key.fd)
            os.close(key.fd)
            os.waitpid(child, 0)
            lost = {"error": "it ended without a word: out of time or memory"}
            yield name, json.loads(bytes(held)) if held else lost


def _fork(name: str, work: Callable[[str], dict[str, Any]], seconds: float) -> tuple[int, int]:
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.close(reader)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        result = work(name)
    except BaseException as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        result = {"error": f"{type(error).__name__}: {first}"}
    result["seconds"] = round(time.monotonic() - started, 1)
    with os.fdopen(writer, "w", encoding="utf-8") as file:
        file.write(json.dumps(result))
    os._exit(0)
