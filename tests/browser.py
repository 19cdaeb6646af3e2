"""A real browser that notes what a page says, asks for and gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Any]:
    """Give the browser; skip the test where it is not installed."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"no browser at {CHROMIUM}")
    with sync.sync_playwright() as playwright:
        # Without a sandbox of its own: it may run as root.
        started = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


class Watched:
    """A page, with its errors and the addresses that it asked for."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": WIDE} | options))
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._said)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def scroll(self, frame: Any = None) -> None:
        """Go through the whole page, so that every chart comes into view, and wait for them."""
        target = frame or self.page
        target.evaluate(
            """async () => {
                for (const figure of document.querySelectorAll("figure[data-chart]")) {
                    figure.scrollIntoView();
                    const end = Date.now() + 20000;
                    while (!figure.querySelector(".main-svg") && Date.now() < end)
                        await new Promise((done) => setTimeout(done, 30));
                }
                scrollTo(0, 0);
            }"""
        )

    def drawn(self, frame: Any = None) -> dict[str, int]:
        """Return how many marks each chart has drawn: points, or the picture of a heat map."""
        found = (frame or self.page).evaluate(
            """() => {
                const marks = ".scatterlayer .point, .heatmaplayer image";
                return Object.fromEntries(Array.from(
                    document.querySelectorAll("figure[data-chart]"),
                    (figure) => [figure.dataset.chart, figure.querySelectorAll(marks).length]));
            }"""
        )
        return dict(found)

    def outside(self, start: str) -> list[str]:
        """Return the addresses asked for that do not begin with ``start``."""
        return [
            url for url in self.requests if not url.startswith((start, "data:", "about:", "blob:"))
        ]
