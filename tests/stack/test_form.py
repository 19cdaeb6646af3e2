"""The form of the DAG, as a person fills it in: in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from tests.stack.stack import Stack

SECONDS = 900


@pytest.fixture(scope="module")
def page(stack: Stack) -> Iterator[Page]:
    """A page of Debian's Chromium, logged in."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium")
    if browser is None:
        pytest.fail("the form needs Debian's package: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1400, "height": 1700})
        page.set_default_timeout(60_000)
        page.goto(f"{stack.url}/auth/login/")
        page.fill("input[name=username]", "admin")
        page.fill("input[name=password]", stack.password)
        page.click("input[type=submit]")
        yield page
        chromium.close()


def opened(page: Page, stack: Stack) -> Locator:
    """Open the form."""
    page.goto(f"{stack.url}/dags/qsens_sweep")
    page.get_by_role("button", name="Trigger Dag").click()
    form = page.get_by_role("dialog")
    form.locator("input[name=element_quant_pair]").first.wait_for(state="attached")
    return form


def choose(page: Page, form: Locator, param: str, values: list[str]) -> list[str]:
    """Choose values by clicking; return what the form then holds."""
    held = form.locator(f"input[name=element_{param}]")
    box = held.first.locator("xpath=ancestor::*[.//input[@role='combobox']][1]")
    for value in values:
        box.get_by_role("combobox").click()
        page.get_by_role("option", name=re.compile(rf"^{value}\b")).click()
    return [entry.get_attribute("value") or "" for entry in held.all()]


def test_pairs_are_chosen_by_clicking_and_the_run_is_green(
    page: Page, stack: Stack, tmp_path: Path
) -> None:
    form = opened(page, stack)
    # Every setting explains itself.
    assert "Precision pairs to sweep." in form.inner_text()
    pairs = ["wint8_afp16", "wfp8_afp8"]
    assert choose(page, form, "quant_pair", pairs) == pairs
    assert choose(page, form, "size", ["small"]) == ["small"]
    picture = page.screenshot(path=tmp_path / "form.png")
    assert len(picture) > 20_000
    form.get_by_role("button", name="Trigger", exact=True).click()
    page.wait_for_url(re.compile(r"/dags/qsens_sweep/runs/[^/]+"))
    found = re.search(r"/runs/([^/?]+)", page.url)
    assert found is not None
    run_id = unquote(found[1])
    assert stack.wait(run_id, seconds=SECONDS) == "success"
    names = {task.name for task in stack.client.tasks(run_id) if task.task_id == "cell.score"}
    assert names == {"cell.score [wfp8_afp8 · small]", "cell.score [wint8_afp16 · small]"}
    assert stack.leftovers() == []


def test_what_is_no_pair_cannot_be_chosen(page: Page, stack: Stack) -> None:
    form = opened(page, stack)
    box = form.get_by_label("Select one or multiple values").first
    box.click()
    box.fill("wfp7_afp7")
    page.get_by_text("No options").wait_for()
    assert page.get_by_role("option").count() == 0
