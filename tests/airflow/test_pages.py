"""The app of the reports by itself: what it serves, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib.resources import files
from pathlib import Path

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from qsens.report.assets import linked
from qsens_airflow.pages import MOST_PAGE, make_app

LOGGED_IN = {"Authorization": "Bearer right"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QSENS_ROOT", str(tmp_path))
    monkeypatch.setenv("QSENS_RESULTS", str(tmp_path / "results"))
    analysis = tmp_path / "results" / "models" / "tiny" / "layer-analysis"
    for name, text in {
        "index.html": "<p>index</p>",
        "assets/report-0123abcd.js": "1",
        "assets/plotly-3.0.1.min.js": "1",
        "assets/other.js": "evil",
        "weight/run/per-layer-sensitivity.md": "# x",
        "weight/run/x_quant_manifest.json": "{}",
        "weight/run/state.safetensors": "tensors",
        "weight/run/.sweep": "id",
    }.items():
        (analysis / name).parent.mkdir(parents=True, exist_ok=True)
        (analysis / name).write_text(text, encoding="utf-8")
    (tmp_path / "results" / "models" / "tiny" / "secret.json").write_text("secret")
    (tmp_path / "secret.json").write_text("secret")
    return tmp_path


@pytest.fixture
def client(root: Path) -> TestClient:
    from starlette.requests import Request

    def user(request: Request) -> str:
        if request.headers.get("authorization") != LOGGED_IN["Authorization"]:
            raise HTTPException(401, "log in")
        return "user"

    # The dependency's annotation is read where it was made.
    user.__annotations__["request"] = Request
    return TestClient(make_app(user), headers=LOGGED_IN)


BASE = "/files/models/tiny/layer-analysis"


def scripts() -> list[bytes]:
    """The two scripts of the installed packages."""
    return [
        (files("qsens.report") / "templates" / "report.js").read_bytes(),
        (files("plotly") / "package_data" / "plotly.min.js").read_bytes(),
    ]


def rules(policy: str) -> dict[str, set[str]]:
    found = [rule.split() for rule in policy.split(";")]
    return {name: set(sources) for name, *sources in found}


def test_reports_are_served_with_a_policy(client: TestClient) -> None:
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in scripts()]
    ours = {f"'sha256-{digest}'" for digest in digests}
    none = {"'none'"}
    for path, kind, allowed in (
        ("/", "text/html; charset=utf-8", none),
        (f"{BASE}/", "text/html; charset=utf-8", ours),
        (f"{BASE}/index.html", "text/html; charset=utf-8", ours),
        (f"{BASE}/assets/", "text/html; charset=utf-8", none),
        (f"{BASE}/weight/run/per-layer-sensitivity.md", "text/plain; charset=utf-8", none),
        (f"{BASE}/weight/run/x_quant_manifest.json", "application/json", none),
        ("/runs/other/manual", "text/html; charset=utf-8", none),
    ):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind), path
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = rules(answer.headers["content-security-policy"])
        assert policy["script-src"] == allowed, path
        for rule in ("default-src", "worker-src", "connect-src", "form-action", "base-uri"):
            assert policy[rule] == none, path
        assert not {"frame-src", "object-src", "child-src", "script-src-elem"} & set(policy)
        # An opaque origin would lose the cookie that every route asks for.
        assert "sandbox" not in policy
    assert client.get(f"{BASE}").url.path == f"{BASE}/index.html"


def test_scripts_come_from_the_package_alone(client: TestClient, root: Path) -> None:
    analysis = root / "results" / "models" / "tiny" / "layer-analysis"
    (analysis / "page.html").write_text(f"<main>{linked(analysis, analysis / 'assets').link}")
    made = [path.name for path in (analysis / "assets").iterdir()]
    assert len(made) == 5
    for name in made:
        assert client.get(f"{BASE}/assets/{name}").status_code == 404, name
    page = client.get(f"{BASE}/page.html").text
    for text in scripts():
        address = f"/assets/{hashlib.sha256(text).hexdigest()}.js"
        assert page.count(f'"{address}"') == 1
        assert client.get(address).content == text


def test_a_page_that_no_memory_should_hold_is_refused(client: TestClient, root: Path) -> None:
    page = root / "results" / "models" / "tiny" / "layer-analysis" / "large.html"
    with page.open("wb") as file:
        file.truncate(MOST_PAGE + 1)
    answer = client.get(f"{BASE}/large.html")
    assert answer.status_code == 404
    assert f"at most {MOST_PAGE} are read" in answer.json()["detail"]


def test_head_answers_as_get_without_a_body(client: TestClient) -> None:
    asked = {
        "/": "/",
        "/runs/{dag_id}/{run_id:path}": "/runs/other/manual",
        "/assets/{name}": f"/assets/{hashlib.sha256(scripts()[0]).hexdigest()}.js",
        "/files/{path:path}": f"{BASE}/index.html",
    }
    app = client.app
    assert isinstance(app, FastAPI)
    assert {route.path for route in app.routes if isinstance(route, APIRoute)} == set(asked)
    more = (BASE, f"{BASE}/", f"{BASE}/weight/", f"{BASE}/weight/run/x_quant_manifest.json", "/x")
    for path in (*asked.values(), *more):
        get = client.get(path, follow_redirects=False)
        head = client.head(path, follow_redirects=False)
        assert (head.status_code, head.headers) == (get.status_code, get.headers), path
        assert head.content == b""
    assert client.head("/", headers={"Authorization": ""}).status_code == 401


def test_every_route_needs_a_login(client: TestClient) -> None:
    for path in (
        "/",
        f"{BASE}/index.html",
        f"{BASE}/none",
        "/runs/qsens_sweep/manual",
        "/runs/x/y",
    ):
        assert client.get(path, headers={"Authorization": ""}).status_code == 401, path
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        f"{BASE}/weight/run/state.safetensors",
        f"{BASE}/weight/run/.sweep",
        f"{BASE}/assets/other.js",
        f"{BASE}/assets/report-0123abcd.js",
        f"{BASE}/assets/plotly-3.0.1.min.js",
        "/assets/report-0123abcd.js",
        f"/assets/{'0' * 64}.js",
        "/assets/..%2ffiles",
        f"{BASE}/%2e%2e/secret.json",
        f"{BASE}/..%2f..%2f..%2fsecret.json",
        f"{BASE}/..%5csecret.json",
        f"{BASE}//etc/passwd",
        f"{BASE}/x%00.html",
        "/files/models/tiny/secret.json",
        "/files/models/tiny",
        "/files//etc/passwd",
        "/files/%2fetc%2fpasswd",
        "/files/.plans/x/plan.json",
        f"{BASE}/{'n' * 10_000}.html",
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "secret" not in answer.text


def test_links_out_of_the_reports_are_not_followed(client: TestClient, root: Path) -> None:
    analysis = root / "results" / "models" / "tiny" / "layer-analysis"
    (analysis / "out.json").symlink_to(root / "secret.json")
    (analysis / "up").symlink_to(root, target_is_directory=True)
    (analysis / "in.html").symlink_to(analysis / "index.html")
    (root / "results" / "models" / "linked").symlink_to(root, target_is_directory=True)
    (root / "layer-analysis").mkdir()
    (root / "layer-analysis" / "x.html").write_text("secret")
    assert client.get(f"{BASE}/out.json").status_code == 404
    assert client.get(f"{BASE}/up/secret.json").status_code == 404
    assert client.get("/files/models/linked/layer-analysis/x.html").status_code == 404
    assert client.get(f"{BASE}/in.html").status_code == 200


def test_names_that_are_no_text_are_left_out(client: TestClient, root: Path) -> None:
    results = os.fsencode(root / "results")
    for name in (b"bad\xff", b"a\nb"):
        os.makedirs(os.path.join(results, b"models", name, b"layer-analysis"))
        os.makedirs(os.path.join(results, b"models", b"tiny", b"layer-analysis", b"more", name))
    for path in ("/", f"{BASE}/more/"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.text.count("<li>") == (path == "/")


def test_large_directories_are_paged_and_names_are_text(client: TestClient, root: Path) -> None:
    sweeps = root / "results" / "models" / "tiny" / "layer-analysis" / "sweeps"
    for number in range(250):
        (sweeps / f"2030{number:04d}").mkdir(parents=True)
    (sweeps / '<img src=x onerror="alert(1)">').mkdir()
    first = client.get(f"{BASE}/sweeps/").text
    assert first.count("<li>") == 100
    assert "20300249" in first
    assert "<img" not in first
    assert "Page 1 of 3" in first
    last = client.get(f"{BASE}/sweeps/?page=3").text
    assert last.count("<li>") == 51
    assert "20300000" in last
    assert client.get(f"{BASE}/sweeps/?page=0").status_code == 422


def test_a_run_leads_to_its_sweep_or_says_why_not(client: TestClient, root: Path) -> None:
    assert "not a run of qsens_sweep" in client.get("/runs/other/manual__1").text
    text = client.get("/runs/qsens_sweep/manual__2030-01-01T00:00:00+00:00").text
    assert "no plan of its own" in text
    assert "<script>alert" not in client.get("/runs/%3Cscript%3Ealert/x").text
    assert os.environ["QSENS_RESULTS"] == str(root / "results")
