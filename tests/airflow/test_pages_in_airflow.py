"""The reports inside a real Airflow: its login, its menu, its policy, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from qsens.pipeline.plan import plan_json
from qsens.pipeline.publish import publish
from qsens.store import Store
from qsens.writing import write_text
from qsens_airflow.local import Components
from qsens_airflow.plans import plan_of_run
from tests.airflow.house import components
from tests.browser import Watched, chromium
from tests.pipeline import results

ROOT = Path(__file__).resolve().parents[2]
RUN = "manual__2030-01-01T00:00:00+00:00"


@dataclass(frozen=True)
class House:
    airflow: Components
    token: str
    sweep: str
    plan: str
    root: Path

    def get(self, path: str, **headers: str) -> httpx.Response:
        # The first page of a process is imported first, beside whatever else the machine does.
        return httpx.get(
            f"{self.airflow.url}{path}", headers=headers, follow_redirects=True, timeout=120
        )

    def cookie(self) -> dict[str, str]:
        return {"name": "_token", "value": self.token, "url": self.airflow.url}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("pages")
    first = results.whole(results.plan(root, day=1), seed=1)
    second = results.whole(results.plan(root, day=2, checkpoint="b"), 1, {results.LAYERS[3]: 5.0})
    for made in (first, second):
        publish(made)
    # As the task `plan` of that run leaves it.
    write_text(plan_of_run(_roots(root), RUN), plan_json(second))
    environment = {
        "QSENS_ROOT": str(ROOT),
        "QSENS_RESULTS": str(root),
        "QSENS_PRESET": "demo-text",
        "QSENS_SCHEDULE": "none",
        "OMP_NUM_THREADS": "1",
    }
    with components(root / ".airflow", environment=environment) as airflow:
        password = json.loads(airflow.password_file.read_text(encoding="utf-8"))[airflow.user]
        answer = httpx.post(
            f"{airflow.url}/auth/token", json={"username": airflow.user, "password": password}
        )
        sweep = Store(second).sweep_dir().relative_to(root).as_posix()
        yield House(airflow, answer.json()["access_token"], sweep, plan_json(second), root)


def _roots(root: Path) -> Any:
    import dataclasses

    from qsens.config import Roots

    return Roots(**{field.name: root for field in dataclasses.fields(Roots)})


def test_only_those_who_logged_in_see_reports(house: House) -> None:
    for path in (
        "/qsens/",
        f"/qsens/files/{house.sweep}/index.html",
        f"/qsens/runs/qsens_sweep/{RUN}",
    ):
        assert house.get(path).status_code == 401, path
        assert house.get(path, Authorization="Bearer wrong").status_code in (401, 403), path
        answer = house.get(path, Authorization=f"Bearer {house.token}")
        assert answer.status_code == 200, path
        assert "connect-src 'none'" in answer.headers["content-security-policy"]


def test_airflow_knows_the_menu_entry_and_the_view(house: House) -> None:
    answer = house.get("/api/v2/plugins", Authorization=f"Bearer {house.token}").json()
    (plugin,) = [entry for entry in answer["plugins"] if entry["name"] == "qsens"]
    views = {view["destination"]: view["href"] for view in plugin["external_views"]}
    assert views == {"nav": "/qsens/", "dag_run": "/qsens/runs/{DAG_ID}/{RUN_ID}"}
    errors = house.get("/api/v2/plugins/importErrors", Authorization=f"Bearer {house.token}")
    assert errors.json()["total_entries"] == 0


def test_reports_draw_their_charts_inside_airflow(house: House) -> None:
    with chromium() as browser:
        watched = Watched(browser)
        watched.context.add_cookies([house.cookie()])
        watched.page.goto(f"{house.airflow.url}/qsens/runs/qsens_sweep/{RUN}")
        assert watched.page.url.endswith(f"/qsens/files/{house.sweep}/index.html")
        watched.scroll()
        drawn = watched.drawn()
        assert set(drawn) == {"drift", "heat", "pareto", "profiles", "sizes"}
        assert all(drawn.values()), drawn
        watched.page.locator("table a", has_text="wint8_afp16").first.click()
        watched.page.locator("h2", has_text="Protect first").wait_for()
        watched.scroll()
        assert all(watched.drawn().values())
        assert watched.errors == []
        assert watched.outside(house.airflow.url) == []
        # The policy holds: a script of the page could not call the API as the user.
        assert (
            watched.page.evaluate("fetch('/api/v2/dags').then(() => 'sent', () => 'refused')")
            == "refused"
        )


def test_a_planted_script_does_not_run_inside_airflow(house: House) -> None:
    planted = house.root / house.sweep / "planted"
    script = "console.log('RAN')"
    for name in ("report-0123abcd.js", "plotly-3.0.1.min.js"):
        write_text(planted / "assets" / name, script)
    write_text(
        planted / "page.html",
        f"<main><script>{script}</script><img src='data:,' onerror=\"{script}\">"
        "<script src='assets/report-0123abcd.js'></script>"
        "<script src='assets/plotly-3.0.1.min.js'></script>"
        '<script src="assets/report-0123abcd.js" data-plotly="x" defer></script></main>',
    )
    write_text(planted / "x.svg", f"<svg xmlns='http://www.w3.org/2000/svg' onload=\"{script}\"/>")
    with chromium() as browser:
        watched = Watched(browser)
        watched.context.add_cookies([house.cookie()])
        told: list[str] = []
        watched.page.on("console", lambda message: told.append(message.text))
        for name in ("page.html", "x.svg"):
            watched.page.goto(f"{house.airflow.url}/qsens/files/{house.sweep}/planted/{name}")
            watched.page.wait_for_timeout(200)
        # The page was there, and each attempt was refused.
        assert len(told) >= 4
        assert "RAN" not in told


def test_the_menu_opens_the_reports_in_a_frame(house: House) -> None:
    with chromium() as browser:
        watched = Watched(browser)
        watched.context.add_cookies([house.cookie()])
        watched.page.goto(f"{house.airflow.url}/plugin/layer-sensitivity")
        frame = watched.page.frame_locator("iframe")
        frame.get_by_role("link", name="tiny").click(timeout=60_000)
        frame.get_by_role("link", name=house.sweep.rpartition("/")[2]).first.click()
        frame.locator("h2", has_text="Protect first").wait_for()
        inner = next(one for one in watched.page.frames if house.sweep in one.url)
        watched.scroll(inner)
        assert all(watched.drawn(inner).values())
        assert watched.outside(house.airflow.url) == []


def test_a_run_shows_its_own_report(house: House) -> None:
    # Its plan fails at once: only that there is such a run matters here, and its plan's place.
    run_id = house.airflow.client.trigger({"no_such_param": 1})
    house.airflow.wait(run_id, seconds=900)
    write_text(plan_of_run(_roots(house.root), run_id), house.plan)
    with chromium() as browser:
        watched = Watched(browser)
        watched.context.add_cookies([house.cookie()])
        address = f"{house.airflow.url}/dags/qsens_sweep/runs/{quote(run_id)}"
        watched.page.goto(f"{address}/plugin/sensitivity-report")
        frame = watched.page.frame_locator("iframe")
        frame.locator("h2", has_text="Protect first").wait_for(timeout=60_000)
        inner = next(one for one in watched.page.frames if house.sweep in one.url)
        watched.scroll(inner)
        assert all(watched.drawn(inner).values())
