"""Report and comparison in a real browser: do they draw, do they stay silent, do they fit?"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from artefacts_example import (
    example_comparison,
    example_plan,
    example_profile,
    example_recipe,
    example_validation,
)
from playwright.sync_api import Browser, Page, sync_playwright

from se_compress.artifacts import to_json
from se_compress.reporting.comparison_page import render_comparison
from se_compress.reporting.profile_page import render_profile
from se_compress.reporting.report import render_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
CHARTS, COMPARISON_CHARTS, PROFILE_CHARTS = 9, 6, 4

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium on the PATH")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    html = render_report(example_recipe(), example_profile(), example_plan(), example_validation())
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comparison") / "comparison.html"
    path.write_text(render_comparison(example_comparison()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """An open report, and all that it complained of or asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def visit(
    browser: Browser, path: Path, width: int = 1200, scheme: str = "light", charts: int = CHARTS
) -> Visit:
    page = browser.new_page(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    found = Visit(page)
    page.on("console", lambda message: found.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(path.as_uri())
    drawn = f"document.querySelectorAll('.js-plotly-plot .plot-container').length === {charts}"
    page.wait_for_function(drawn, timeout=60_000)
    return found


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_draws_silently_and_fits(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    check_drawing(visit(browser, report, width, scheme), width, CHARTS)


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (400, "dark")])
def test_comparison_draws_silently_and_fits(
    browser: Browser, comparison: Path, width: int, scheme: str
) -> None:
    found = visit(browser, comparison, width, scheme, COMPARISON_CHARTS)
    check_drawing(found, width, COMPARISON_CHARTS)


@pytest.mark.parametrize(("width", "scheme"), [(1200, "dark"), (400, "light")])
def test_profile_draws_silently_and_fits(
    browser: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    path = tmp_path / "profile.html"
    path.write_text(render_profile(example_recipe(), example_profile()), encoding="utf-8")
    check_drawing(visit(browser, path, width, scheme, PROFILE_CHARTS), width, PROFILE_CHARTS)


def check_drawing(found: Visit, width: int, charts: int) -> None:
    page = found.page
    assert page.locator(".plot").count() == charts
    for plot in page.locator(".plot").all():
        assert plot.locator("svg.main-svg").count() >= 1
        assert plot.locator("g.trace, g.hm").count() >= 1
        box = plot.locator("svg.main-svg").first.bounding_box()
        assert box is not None
        assert box["width"] <= width
        assert box["height"] > 150
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert found.complaints == []
    assert [url for url in found.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()


def test_numbers_on_the_page_are_those_of_the_artefacts(browser: Browser, report: Path) -> None:
    page = visit(browser, report).page
    for check in example_validation().checks:
        row = page.locator(f"[data-check={check.name}]")
        values = [float(d.get_attribute("value") or "nan") for d in row.locator("data").all()]
        assert values == [v for v in (check.value, check.limit) if v is not None]
        word = {True: "Passed", False: "Failed", None: "Not run"}[check.passed]
        assert word in row.locator(".state").inner_text()
    assert page.locator("#verdict-title").inner_text() == "Passed"
    page.close()


def test_numbers_of_the_comparison_are_those_of_its_json(
    browser: Browser, comparison: Path
) -> None:
    found = json.loads(to_json(example_comparison()))
    page = visit(browser, comparison, charts=COMPARISON_CHARTS).page
    assert page.locator("#advice-title").inner_text() == f"Ship {found['recommended']}"
    for variant in found["variants"]:
        one = variant["checkpoint"]
        row = page.locator(f"[data-variant={one['name']}]")
        checks = {check["name"]: check["value"] for check in one["checks"]}
        values = [float(d.get_attribute("value") or "nan") for d in row.locator("data").all()]
        assert values == [
            one["size_bytes"],
            one["bits_per_weight"],
            checks["kl_divergence"],
            one["perplexity_result"],
            checks["massive_activation_ratio"],
            checks["sink_decay"],
            checks["repetition"],
        ]
        word = "Passed" if one["published"] else "Rejected"
        assert word in row.locator(".state").inner_text()
        link = row.locator("a").get_attribute("href")
        assert link == f"{one['directory']}/se_compress/report.html"
    page.close()


def test_charts_follow_the_colour_scheme(browser: Browser, report: Path) -> None:
    page = visit(browser, report).page
    fill = "getComputedStyle(document.querySelector('#plot-sinks .xtick text')).fill"
    light = page.evaluate(fill)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{fill} !== '{light}'")
    page.close()


def test_page_prints_on_paper(browser: Browser, report: Path) -> None:
    found = visit(browser, report, scheme="dark")
    assert found.page.pdf(format="A4").startswith(b"%PDF")
    page = found.page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function("document.querySelector('#plot-peaks .main-svg').clientWidth <= 670")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.wait_for_function("document.querySelector('#plot-peaks .main-svg').clientWidth > 670")
    assert found.complaints == []
    page.close()


def test_everything_that_opens_can_be_reached_by_keyboard(browser: Browser, report: Path) -> None:
    page = visit(browser, report).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the verdict"
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.close()
