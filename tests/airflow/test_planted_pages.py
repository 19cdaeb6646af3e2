"""What somebody planted below the results runs no script, in a real browser; genuine pages do."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException
from starlette.requests import Request
from starlette.staticfiles import StaticFiles

from qsens.pipeline.publish import publish, report
from qsens_airflow.pages import make_app
from tests.browser import Watched, chromium
from tests.pipeline import results

COOKIE = ("_token", "right")
MODEL = "models/tiny/layer-analysis"
PLANTED = f"{MODEL}/planted"
EVIL = "https://evil.example"
OLD = "report-0123abcd.js"


def ran(name: str) -> str:
    """Return a script that tells of itself."""
    return f"console.log('RAN {name}')"


def integrity(text: str, kind: str = "sha256") -> str:
    digest = hashlib.new(kind, text.encode("utf-8")).digest()
    return f"{kind}-{base64.b64encode(digest).decode()}"


def own(*path: str) -> str:
    """Return a script of the installed package; neither has a line end or a tag to be changed."""
    text = files(path[0]).joinpath(*path[1:]).read_text(encoding="utf-8")
    assert "\r" not in text
    assert "</script" not in text
    return text


REPORT = own("qsens.report", "templates", "report.js")
PLOTLY = own("plotly", "package_data", "plotly.min.js")
CURRENT = f"report-{hashlib.sha256(REPORT.encode()).hexdigest()[:8]}.js"
ASSETS = {f"{hashlib.sha256(text.encode()).hexdigest()}.js": text for text in (REPORT, PLOTLY)}

# Loaded by the planted pages, by whatever element.
LOADED = {
    f"assets/{OLD}": ran("script of another version"),
    "assets/plotly-99.0.0.min.js": ran("plotly"),
    "planted.js": ran("js"),
    "module.js": ran("module"),
    "planted.json": ran("json"),
    "planted.md": ran("md"),
    "inner.html": f"<script>{ran('frame')}</script>",
    "style.svg": (
        '<x:stylesheet version="1.0" xmlns:x="http://www.w3.org/1999/XSL/Transform">'
        '<x:template match="/"><html xmlns="http://www.w3.org/1999/xhtml"><body><script>'
        f"{ran('xslt')}</script></body></html></x:template></x:stylesheet>"
    ),
}
MARKUP = f"""
<script>{ran("inline")}</script>
<img src="data:," onerror="{ran("handler")}">
<svg onload="{ran("svg in a page")}"></svg>
<script src="planted.js"></script>
<script src="planted.json"></script>
<script src="planted.md"></script>
<script src="assets/{OLD}" data-plotly="assets/plotly-99.0.0.min.js" defer></script>
<script src="assets/{OLD}" data-plotly="assets/plotly-99.0.0.min.js" defer></script>
<script src="assets/plotly-99.0.0.min.js"></script>
<script src="data:text/javascript,{ran("data")}"></script>
<script type="module" src="module.js"></script>
<iframe srcdoc="<script>{ran("srcdoc")}</script>"></iframe>
<iframe src="javascript:{ran("javascript frame")}"></iframe>
<iframe src="inner.html"></iframe>
<object data="drawing.svg"></object>
<script src="{EVIL}/x.js"></script>
<script src="{EVIL}/one.js" crossorigin
  integrity="{integrity(REPORT)} {integrity(ran("/one.js"))}"></script>
<script src="{EVIL}/strong.js" crossorigin
  integrity="{integrity(REPORT)} {integrity(ran("/strong.js"), "sha512")}"></script>
<a href="javascript:{ran("link")}">link</a>
<form action="javascript:{ran("form")}"><button>send</button></form>
"""
PAGES = {
    "markup.html": f"<!doctype html><main>{MARKUP}</main>",
    "base.html": f'<!doctype html><base href="{EVIL}/"><script src="base.js"></script>',
    "drawing.svg": (
        f'<svg xmlns="http://www.w3.org/2000/svg" onload="{ran("svg handler")}">'
        f'<script>{ran("svg")}</script><script href="planted.js"/></svg>'
    ),
    "styled.svg": (
        '<?xml-stylesheet type="text/xsl" href="style.svg"?><svg xmlns="http://www.w3.org/2000/svg"/>'
    ),
}
# All that runs of each page where nothing forbids it.
RUNS = {
    "markup.html": {
        *("inline", "handler", "data", "link", "form", "js", "json", "md", "module"),
        *("plotly", "script of another version", "frame", "srcdoc", "javascript frame"),
        *("svg in a page", "svg", "svg handler", "/x.js", "/one.js", "/strong.js"),
    },
    "base.html": {"/base.js"},
    "drawing.svg": {"svg", "svg handler", "js"},
    "styled.svg": {"xslt"},
}


@dataclass(frozen=True)
class Served:
    """The results behind a login, and the same files where nothing forbids a script.

    Attributes:
        url: Address of the app of the reports.
        open: Address of the planted files without a policy.
        sweep: Directory of a genuine sweep, below the results.
        root: The results.
    """

    url: str
    open: str
    sweep: str
    root: Path

    def file(self, path: str) -> str:
        return f"{self.url}/files/{path}"

    def watch(self, browser: Any, host: str = "127.0.0.1") -> Watched:
        watched = Watched(browser)
        name, value = COOKIE
        watched.context.add_cookies(
            [{"name": name, "value": value, "domain": host, "path": "/", "httpOnly": True}]
        )
        return watched


def user(request: Request) -> None:
    """Refuse who is not logged in, as Airflow's own dependency does."""
    if request.cookies.get(COOKIE[0]) != COOKIE[1]:
        raise HTTPException(401, "log in")


# The annotation is read where it was made.
user.__annotations__["request"] = Request


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results: a genuine sweep, and what was planted beside it."""
    root = tmp_path_factory.mktemp("results")
    publish(results.whole(results.plan(root, day=1), seed=1))
    for name, text in (LOADED | PAGES).items():
        (root / PLANTED / name).parent.mkdir(parents=True, exist_ok=True)
        (root / PLANTED / name).write_text(text, encoding="utf-8")
    return root


@contextmanager
def serving(root: Path, prefix: str) -> Iterator[Served]:
    """Serve the app as Airflow mounts it: below a path of its own, and that of its base URL."""
    app = FastAPI(root_path=prefix)
    app.mount("/qsens", make_app(user))
    app.mount("/open", StaticFiles(directory=root / PLANTED))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSENS_ROOT", str(root))
        patch.setenv("QSENS_RESULTS", str(root))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        start = f"http://127.0.0.1:{port}{prefix}"
        (sweep,) = (root / MODEL / "sweeps").iterdir()
        yield Served(f"{start}/qsens", f"{start}/open", f"{MODEL}/sweeps/{sweep.name}", root)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with serving(root, "") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def listen(watched: Watched) -> tuple[list[str], list[str]]:
    """Return what scripts tell from now on, and what is asked of elsewhere, which answers."""
    told: list[str] = []
    asked: list[str] = []

    def answer(route: Any) -> None:
        asked.append(route.request.url)
        route.fulfill(
            content_type="text/javascript",
            headers={"Access-Control-Allow-Origin": "*"},
            body=ran(route.request.url.removeprefix(EVIL)),
        )

    def hear(message: Any) -> None:
        if message.text.startswith("RAN "):
            told.append(message.text.removeprefix("RAN "))

    watched.page.on("console", hear)
    watched.context.route(f"{EVIL}/**", answer)
    return told, asked


def visit(watched: Watched, address: str) -> None:
    """Open a planted page, and use what waits for a click."""
    watched.page.goto(address)
    for waits in ("a", "button"):
        for element in watched.page.locator(waits).all():
            element.click()


def test_nothing_that_was_planted_runs(browser: Any, served: Served) -> None:
    watched = served.watch(browser)
    told, asked = listen(watched)
    for name in PAGES:
        visit(watched, served.file(f"{PLANTED}/{name}"))
        # What a click has asked for comes after it.
        watched.page.wait_for_timeout(200)
    assert told == []
    assert asked == []
    for attempt in (
        "() => import('./module.js')",
        "() => navigator.serviceWorker.register('planted.js')",
        "() => new Promise((yes, no) => { const w = new Worker('planted.js'); w.onerror = no; })",
        "() => fetch('/')",
    ):
        watched.page.goto(served.file(f"{PLANTED}/markup.html"))
        with pytest.raises(Exception, match=r"policy|Policy|Failed to|Event|eval"):
            watched.page.evaluate(attempt)
    watched.context.close()


def test_where_nothing_forbids_it_all_of_it_would_run(browser: Any, served: Served) -> None:
    watched = served.watch(browser)
    told, _ = listen(watched)
    for name, runs in RUNS.items():
        told.clear()
        visit(watched, f"{served.open}/{name}")
        last = time.monotonic() + 60
        while set(told) != runs and time.monotonic() < last:
            watched.page.wait_for_timeout(50)
        assert set(told) == runs
    watched.context.close()


@pytest.mark.parametrize(
    ("prefix", "host"),
    [("", "127.0.0.1"), ("/air/flow", "localhost")],
    ids=["at the root", "below a path, by another name"],
)
def test_genuine_pages_draw_with_the_scripts_of_the_package(
    browser: Any, root: Path, prefix: str, host: str
) -> None:
    with serving(root, prefix) as served:
        url = served.url.replace("127.0.0.1", host)
        watched = served.watch(browser, host)
        watched.page.goto(f"{url}/files/{served.sweep}/index.html")
        watched.scroll()
        drawn = watched.drawn()
        assert set(drawn) == {"heat", "pareto", "profiles", "sizes"}
        assert all(drawn.values()), drawn
        assert watched.page.locator("table th button").count() > 0
        scripts = {address for address in watched.requests if address.endswith(".js")}
        assert scripts == {f"{url}/assets/{name}" for name in ASSETS}
        assert watched.errors == []
        watched.context.close()


def test_a_page_that_is_one_file_draws_as_well(browser: Any, served: Served) -> None:
    target = served.root / MODEL / "single"
    shutil.copytree(served.root / served.sweep, target)
    report(target, single_file=True)
    watched = served.watch(browser)
    watched.page.goto(served.file(f"{MODEL}/single/index.html"))
    watched.scroll()
    assert all(watched.drawn().values())
    assert watched.errors == []
    watched.context.close()


def test_a_planted_file_with_the_name_of_our_script_is_not_what_runs(
    browser: Any, served: Served
) -> None:
    assets = served.root / "models" / "tiny" / "layer-analysis" / "assets"
    genuine = {path: path.read_bytes() for path in assets.iterdir()}
    assert CURRENT in {path.name for path in genuine}
    try:
        for path in genuine:
            path.write_text(ran("planted"), encoding="utf-8")
        watched = served.watch(browser)
        told, _ = listen(watched)
        watched.page.goto(served.file(f"{served.sweep}/index.html"))
        watched.scroll()
        assert all(watched.drawn().values())
        assert told == []
        watched.context.close()
    finally:
        for path, data in genuine.items():
            path.write_bytes(data)


def test_pages_of_another_version_are_shown_without_scripts(browser: Any, served: Served) -> None:
    page = (served.root / served.sweep / "index.html").read_text(encoding="utf-8")
    assert CURRENT in page
    older = served.root / served.sweep / "older.html"
    older.write_text(page.replace(CURRENT, OLD), encoding="utf-8")
    watched = served.watch(browser)
    watched.page.goto(served.file(f"{served.sweep}/older.html"))
    assert watched.page.locator(".banner", has_text="another version of qsens").count() == 1
    assert watched.page.locator("h2", has_text="Protect first").count() == 1
    assert not [address for address in watched.requests if address.endswith(".js")]
    assert watched.errors == []
    watched.page.goto(served.file(f"{served.sweep}/index.html"))
    assert watched.page.locator(".banner", has_text="another version").count() == 0
    watched.context.close()


def hostile() -> str:
    """Return a page whose author loads our scripts by hand, with data of their own."""
    ours, plotly = ASSETS
    bad = f'<img src=\'data:,\' onerror="{ran("name")}"><a href="javascript:{ran("href")}">x</a>'
    figure = {"traces": [{"type": "scatter", "y": [1, 2]}], "layout": {"title": {"text": bad}}}
    line = {"name": bad, "values": [0.1, 0.2]}
    data = {
        "charts": {
            "profile": {"depths": [0, 1], "lines": [line, line]},
            "constructor": figure,
            "__proto__": figure,
        },
        "tables": {"rows": [[bad, bad]]},
    }
    text = json.dumps(data).replace("<", "\\u003c")
    return f"""<!doctype html><meta charset="utf-8">
<script src="/qsens/assets/{ours}" integrity="{integrity(REPORT)}" defer
  data-plotly="{EVIL}/data.js" data-plotly-integrity="{integrity(ran("/data.js"))}"></script>
<script src="/qsens/assets/{plotly}" integrity="{integrity(PLOTLY)}"></script>
<figure data-chart="profile"><div class="controls"></div><div class="plot"></div></figure>
<figure data-chart="constructor"><div class="controls"></div><div class="plot"></div></figure>
<table data-sort data-rest="rows"><thead><tr><th>one</th><th>two</th></tr></thead></table>
<script type="application/json" id="data">{text}</script>
"""


def test_hostile_data_is_text_to_our_scripts(browser: Any, served: Served) -> None:
    path = served.root / PLANTED / "hostile.html"
    page = hostile()
    path.write_text(page, encoding="utf-8")
    without = served.root / PLANTED / "loads.html"
    without.write_text(page.replace(integrity(PLOTLY), "none"), encoding="utf-8")
    watched = served.watch(browser)
    told, asked = listen(watched)
    watched.page.goto(served.file(f"{PLANTED}/hostile.html"))
    profile = watched.page.locator("figure[data-chart=profile]")
    profile.locator(".main-svg").first.wait_for()
    # What is drawn is laid out by our script, never by the page's data.
    assert watched.page.locator("figure[data-chart=constructor] .main-svg").count() == 0
    assert watched.page.locator("img, .plot a").count() == 0
    assert html.unescape(profile.locator(".legendtext").first.text_content()).startswith("<img")
    # A planted page cannot have our script load another plotly.
    watched.page.goto(served.file(f"{PLANTED}/loads.html"))
    profile.get_by_text(f"needs the script {EVIL}/data.js").wait_for()
    assert told == []
    assert asked == []
    watched.context.close()


def test_scripts_are_behind_the_login_and_kept_by_one_reader(served: Served) -> None:
    for name, text in ASSETS.items():
        address = f"{served.url}/assets/{name}"
        assert httpx.get(address).status_code == 401
        answer = httpx.get(address, cookies=dict([COOKIE]))
        assert answer.status_code == 200
        assert answer.text == text
        assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
        assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
        assert answer.headers["x-content-type-options"] == "nosniff"
        head = httpx.head(address, cookies=dict([COOKIE]))
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(text.encode("utf-8")))
    for other in (CURRENT, "0" * 64 + ".js", "..%2ffiles", ""):
        answer = httpx.get(f"{served.url}/assets/{other}", cookies=dict([COOKIE]))
        assert answer.status_code in (404, 405), other
        assert "location" not in answer.headers
