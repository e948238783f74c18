"""New settings of the engine wait for the runs in progress, since a restart would end these."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, STATUS, Platform

SLOW = """
import time
import dagster as dg

@dg.op
def wait() -> None:
    time.sleep(200)

@dg.job
def slow() -> None:
    wait()

defs = dg.Definitions(jobs=[slow])
"""


def engine(host: Any) -> str:
    """Give the engine's process."""
    return host.check_output("systemctl show docker --property=MainPID --value")


@pytest.fixture
def change(platform: Platform, play: Callable[..., int], tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Play with one more location, which has a slow job; with a change of the engine's settings where that is said."""
    (core,) = yaml.safe_load((ROOT / "roles/dagster/defaults/main.yml").read_text())["dagster_code_locations"]
    (tmp_path / "slow.py").write_text(SLOW)
    locations = [core, {"name": "slow", "source": str(tmp_path), "module": "slow"}]
    settings = {"log-driver": "local", "shutdown-timeout": 20}

    def run(*arguments: str, changed: bool = True, **variables: object) -> int:
        variables |= {"dagster_code_locations": locations} | ({"docker_daemon_options": settings} if changed else {})
        return play("--extra-vars", json.dumps(variables), *arguments)

    run(changed=False)
    yield run
    play()


@pytest.mark.slow
def test_engine_restarts_once_the_runs_in_progress_have_ended(
    host: Any, platform: Platform, change: Callable[..., int]
) -> None:
    before = engine(host)
    run = platform.launch("slow", location="slow")
    platform.wait(lambda: platform.graphql(STATUS, run=run)["runOrError"]["status"], {"STARTED"}, 60)

    change("--check", docker_restart_patience=3600)
    with pytest.raises(AssertionError) as refused:
        change(docker_restart_patience=5)
    said = " ".join(str(refused.value).split())
    assert "The engine was not restarted for its new settings (docker_daemon_options), because after 5 s" in said
    assert f"{run} STARTED" in said
    assert engine(host) == before
    assert platform.graphql(STATUS, run=run)["runOrError"]["status"] == "STARTED"

    assert change(docker_restart_patience=300) > 0
    assert engine(host) != before
    assert platform.graphql(STATUS, run=run)["runOrError"]["status"] == "SUCCESS"
