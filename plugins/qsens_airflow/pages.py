"""The reports as web pages: files under the results root, read only, for users who logged in.

Pages run in Airflow's origin, with their reader's session, and whoever may write below the results
may have written them: the scripts of this package are all that runs, whatever a page holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

from qsens.config import Roots
from qsens.errors import QsensError, UserError
from qsens.grid import read_plan
from qsens.reading import read_bytes
from qsens.report.assets import Scripts, page_data, script_sources, served, served_scripts
from qsens.report.render import render_html
from qsens.store import PAGE, Store
from qsens_airflow.plans import plan_of_run

DAG_ID = "qsens_sweep"
PAGE_ENTRIES = 100
# Bytes of a page at most, which is held in memory: one with its scripts in it has 5 MB.
MOST_PAGE = 1 << 24
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
}
_SCRIPT_TYPE = "text/javascript; charset=utf-8"
_REPORTS = re.compile(r"(models/[^/]+/layer-analysis|tmp/[^/]+)(/|$)")
_Page = Annotated[int, Query(ge=1, le=1_000_000)]


def make_app(user: Callable[..., Any]) -> FastAPI:
    """Return the app.

    Args:
        user: Airflow's dependency that gives the user or refuses with 401; on every route.
    """
    app = FastAPI(
        title="qsens reports",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(user)],
    )

    def route(path: str) -> Callable[..., Any]:
        return app.api_route(path, methods=["GET", "HEAD"])

    @route("/")
    def models(page: _Page = 1) -> Response:
        """List the models that have reports."""
        root = Roots.from_environment().results
        names = sorted(
            path.parent.name
            for path in root.glob("models/*/layer-analysis")
            if path.is_dir() and _allowed(root, path.relative_to(root).as_posix()) is not None
        )
        links = [(name, f"files/models/{quote(name, safe='')}/layer-analysis/") for name in names]
        return _listing("Layer sensitivity", "Models with reports", links, page)

    @route("/runs/{dag_id}/{run_id:path}")
    def run(request: Request, dag_id: str, run_id: str) -> Response:
        """Lead to the sweep of an Airflow run."""
        roots = Roots.from_environment()
        base = request.scope.get("root_path", "")
        if dag_id != DAG_ID:
            return _note("No sweep", f"This is not a run of {DAG_ID}.", base)
        try:
            plan = read_plan(plan_of_run(roots, run_id))
        except UserError:
            return _note(
                "No plan",
                "This run made no plan of its own: it failed before, has not come so far, or made "
                "the reports of an older sweep again.",
                base,
            )
        index = Store(plan).sweep_dir() / PAGE
        try:
            inside = index.relative_to(roots.results).as_posix()
        except ValueError:
            return _note("Elsewhere", "This run's reports lie outside the results root.", base)
        if _allowed(roots.results, inside) is None:
            return _note("Not yet", "This run has published no report yet.", base)
        return RedirectResponse(f"{base}/files/{quote(inside)}", headers=_HEADERS)

    @route("/assets/{name}")
    def asset(name: str) -> Response:
        """Serve a script of this package; its name is the digest of its content."""
        script = served_scripts().get(name)
        if script is None:
            raise HTTPException(404, "no such script", headers=_HEADERS)
        return Response(script, media_type=_SCRIPT_TYPE, headers=_HEADERS | _FOR_EVER)

    @route("/files/{path:path}")
    def file(request: Request, path: str, page: _Page = 1) -> Response:
        """Serve one file of the reports, or list a directory of them."""
        root = Roots.from_environment().results
        allowed = _allowed(root, path)
        if allowed is None:
            raise HTTPException(404, "no such report", headers=_HEADERS)
        base = request.scope.get("root_path", "")
        if allowed.is_file():
            if allowed.suffix == ".html":
                return _page(allowed, base)
            return FileResponse(allowed, media_type=_TYPES[allowed.suffix], headers=_HEADERS)
        if not path.endswith("/"):
            return RedirectResponse(f"{base}/files/{quote(path)}/", headers=_HEADERS)
        if (allowed / PAGE).is_file():
            return RedirectResponse(PAGE, headers=_HEADERS)
        names = sorted((entry.name for entry in allowed.iterdir()), reverse=True)
        links = []
        for name in names:
            entry = _allowed(root, f"{path}{name}")
            if entry is not None:
                links.append((name, quote(name, safe="") + ("/" if entry.is_dir() else "")))
        return _listing(allowed.name, "Reports, newest first", links, page)

    return app


def _headers(scripts: str) -> dict[str, str]:
    """Return the headers of a page, with the sources of its scripts."""
    return {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src {scripts}; worker-src 'none'; "
            "style-src 'unsafe-inline'; img-src data:; connect-src 'none'; form-action 'none'; "
            "base-uri 'none'; frame-ancestors 'self'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "private, no-cache",
    }


_HEADERS = _headers("'none'")
_FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable"}


def _allowed(root: Path, path: str) -> Path | None:
    """Return a file or directory of the reports, none for anything else.

    A link that leads out of the reports, a dotted name, and one that is no text, count as nothing.
    """
    path = path.rstrip("/")
    head = _REPORTS.match(path)
    if head is None or any(not part or part.startswith(".") for part in path.split("/")):
        return None
    if not path.isprintable() or "\\" in path:
        return None
    try:
        home = (root / head[1]).resolve(strict=True)
        resolved = (root / path).resolve(strict=True)
        top = root.resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    if home != top / head[1] or not resolved.is_relative_to(home):
        return None
    return (
        resolved
        if resolved.is_dir() or (resolved.is_file() and resolved.suffix in _TYPES)
        else None
    )


def _page(path: Path, base: str) -> HTMLResponse:
    """Return a page of the reports, with the scripts of this package and no others."""
    try:
        page = read_bytes(path, most=MOST_PAGE, remedy="Make the reports again.")
    except QsensError as error:
        raise HTTPException(404, error.what, headers=_HEADERS) from error
    return HTMLResponse(served(page, f"{base}/assets"), headers=_headers(script_sources()))


def _listing(title: str, lead: str, links: list[tuple[str, str]], page: int) -> HTMLResponse:
    pages = max(1, -(-len(links) // PAGE_ENTRIES))
    page = min(page, pages)
    shown = links[(page - 1) * PAGE_ENTRIES : page * PAGE_ENTRIES]
    return _html(title=title, lead=lead, links=shown, count=len(links), page=page, pages=pages)


def _note(title: str, text: str, base: str) -> HTMLResponse:
    return _html(
        title=title, lead=text, links=[("All reports", f"{base}/")], count=0, page=1, pages=1
    )


def _html(**context: Any) -> HTMLResponse:
    page = render_html("listing.html", **context, scripts=Scripts(), data=page_data({}))
    return HTMLResponse(page, headers=_HEADERS)
