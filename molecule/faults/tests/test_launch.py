"""How long runs take from their launch, and where the time goes; printed, not asserted."""

import statistics
import time
from typing import Any

import pytest
from conftest import Platform

pytestmark = pytest.mark.slow
EVENTS = """
SELECT dagster_event_type || ' ' || extract(epoch FROM timestamp) FROM event_logs
WHERE run_id = '{}' AND dagster_event_type IS NOT NULL ORDER BY id
"""
PARTS = [
    ("queue", "PIPELINE_ENQUEUED", "PIPELINE_STARTING"),
    ("container", "PIPELINE_STARTING", "ENGINE_EVENT"),
    ("import and code", "ENGINE_EVENT", "PIPELINE_START"),
    ("step", "PIPELINE_START", "STEP_SUCCESS"),
    ("end", "STEP_SUCCESS", "PIPELINE_SUCCESS"),
]


def parts(platform: Platform, run: str) -> dict[str, float]:
    """Give the seconds that each part of a run took, by what Dagster wrote down of it, and the second of its end."""
    times: dict[str, float] = {}
    for event, seconds in (line.split() for line in platform.postgres(EVENTS.format(run))):
        times.setdefault(event, float(seconds))
    return {"ended": times["PIPELINE_SUCCESS"], **{name: times[end] - times[begin] for name, begin, end in PARTS}}


def test_launch_of_smoke(host: Any, platform: Platform) -> None:
    whole, each = [], []
    for number in range(20):
        time.sleep(1 + 0.05 * number)  # not in step with the queue
        began = float(host.check_output("date +%s.%N"))
        run = platform.launch("smoke")
        assert platform.finished(run) == "SUCCESS"
        taken = parts(platform, run)
        whole.append(taken.pop("ended") - began)
        each.append(taken)
    medians = {name: statistics.median(taken[name] for taken in each) for name, _, _ in PARTS}
    shares = ", ".join(f"{name} {seconds:.2f}" for name, seconds in medians.items())
    print(f"smoke, median of 20: {statistics.median(whole):.2f} s ({min(whole):.2f} to {max(whole):.2f}): {shares}")


@pytest.mark.parametrize("location", ["core", "workload"])
def test_twenty_launches_at_once(host: Any, platform: Platform, location: str) -> None:
    began = time.monotonic()
    job, config = ("smoke", None) if location == "core" else ("patient", {"wait": {"seconds": 0.0}})
    runs = [platform.launch(job, location=location, config=config) for _ in range(20)]
    for run in runs:
        assert platform.finished(run, 300) == "SUCCESS"
    print(f"20 runs of {job} at once: {time.monotonic() - began:.0f} s")
