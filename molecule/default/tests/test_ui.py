"""The UI as a person sees it: Debian's Chromium, on the host, with what its pages hold and pictures of them."""

import base64
import json
from typing import Any

import pytest
from conftest import MONTHS, ROOT, Platform

RANGE = {"dagster/asset_partition_range_start": MONTHS[0], "dagster/asset_partition_range_end": MONTHS[-1]}
MARTS = ["delays_by_carrier_route", "delays_by_weather", "on_time_daily", "on_time_monthly"]
REPORTS = ["on_time_report"]
STEPS = ["raw__airlines", "raw__airports", "raw__flights", "raw__weather", "dbt_models", "reports__on_time_report"]
OUTCOME = ["Success", "Errored (0)", "RUN_SUCCESS"]
CHECKS = ["not_null_delays_by_weather_on_time_share", "weather_mart_counts_every_flight_once"]
SHIPPED = ["code version", "revision", "deployed", "deployed by"]
PICTURES = ROOT / ".cache" / "ui"

LAST_RUN = """
{ runsOrError(filter: {pipelineName: "everything", statuses: [SUCCESS]}, limit: 1) {
    ... on Runs { results { runId } } } }
"""

# Opens one page after the other, waits until it holds what is wanted, and takes a picture.
BROWSER = """
import json, sys
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

options = webdriver.ChromeOptions()
for option in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,940"):
    options.add_argument("--" + option)
seen = {}
with webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver")) as browser:
    for name, address, wanted in json.loads(sys.argv[1]):
        browser.get(address)
        text = lambda browser: browser.execute_script("return document.body.innerText")
        try:
            WebDriverWait(browser, 60).until(lambda browser: all(words in text(browser) for words in wanted))
        except TimeoutException:
            pass # the test says what is missing
        seen[name] = [text(browser), browser.get_screenshot_as_base64()]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def run(platform: Platform) -> str:
    """A run that materialised everything."""
    runs = platform.graphql(LAST_RUN)["runsOrError"]["results"]
    if runs:
        return runs[0]["runId"]
    launched = platform.launch("everything", RANGE)
    assert platform.finished(launched) == "SUCCESS"
    return launched


@pytest.fixture(scope="module")
def pages(host: Any, platform: Platform, run: str) -> dict[str, str]:
    """What each page shows; pictures of them are kept."""
    packages = "chromium chromium-driver python3-selenium"
    install = f"apt-get update && apt-get install --yes --no-install-recommends {packages}"
    host.check_output(f"dpkg --status {packages} >/dev/null 2>&1 || {{ {install}; }}")
    ui = f"http://127.0.0.1:{platform.port}"
    wanted = [
        ("marts", f"{ui}/locations/core/asset-groups/marts", [*MARTS, "Materialized"]),
        ("reports", f"{ui}/locations/core/asset-groups/reports", [*REPORTS, "Materialized"]),
        ("run", f"{ui}/runs/{run}", [*STEPS, *OUTCOME]),
        ("location", f"{ui}/locations/core", SHIPPED),
        ("checks", f"{ui}/assets/marts/delays_by_weather?view=checks", ["Checks (5)", *CHECKS]),
    ]
    seen = json.loads(host.check_output("python3 -c %s %s", BROWSER, json.dumps(wanted)))
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, (_, picture) in seen.items():
        (PICTURES / f"{name}.png").write_bytes(base64.b64decode(picture))
    return {name: text for name, (text, _) in seen.items()}


@pytest.mark.parametrize(("page", "names"), [("marts", MARTS), ("reports", REPORTS)])
def test_assets_are_shown_as_materialised(pages: dict[str, str], page: str, names: list[str]) -> None:
    lines = pages[page].splitlines()
    starts = [lines.index(name) for name in names]
    for name, start, end in zip(names, starts, [*starts[1:], None], strict=True):
        assert "Materialized" in lines[start:end], (name, lines)


def test_run_shows_its_steps(pages: dict[str, str]) -> None:
    assert [step for step in STEPS if step not in pages["run"]] == []
    assert set(OUTCOME) <= set(pages["run"].splitlines())


def test_asset_shows_its_checks(pages: dict[str, str]) -> None:
    lines = pages["checks"].splitlines()
    assert [lines[lines.index(check) + 1] for check in CHECKS] == ["Succeeded"] * len(CHECKS)


def test_code_location_shows_what_was_shipped_and_when(host: Any, pages: dict[str, str]) -> None:
    image = host.check_output("docker inspect --format '{{.Config.Image}}' dagster-code")
    assert [shown for shown in [*SHIPPED, image] if shown not in pages["location"]] == []


def test_pictures_are_kept(pages: dict[str, str]) -> None:
    assert {name: (PICTURES / f"{name}.png").read_bytes()[:4] for name in pages} == dict.fromkeys(pages, b"\x89PNG")
