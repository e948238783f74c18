"""Runs as processes of their code server, which is the other choice."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import MONTHS, Platform

CONTAINERS = "docker ps --all --quiet --filter label=dagster/run_id"


@pytest.fixture
def processes(play: Callable[..., int]) -> Iterator[Callable[[], int]]:
    """Play with the other choice; afterwards all is as before."""
    yield lambda: play("--extra-vars", "dagster_run_isolation=process")
    play()


@pytest.mark.slow
def test_runs_may_be_processes_of_their_code_server(
    host: Any, platform: Platform, processes: Callable[[], int]
) -> None:
    months = {"dagster/asset_partition_range_start": MONTHS[0], "dagster/asset_partition_range_end": MONTHS[-1]}
    runs = [platform.launch("everything", months) for _ in range(3)]
    with pytest.raises(AssertionError, match=r"runs are in\s+progress on .* in\s+containers\s+of\s+their\s+own"):
        processes()
    assert {platform.finished(run) for run in runs} == {"SUCCESS"}
    platform.wait(lambda: host.check_output("docker ps --quiet --filter label=dagster/run_id"), {""}, 60)
    assert processes() > 0
    assert processes() == 0
    assert not host.file("/etc/systemd/system/data-platform-engine.service").exists
    before = host.check_output(CONTAINERS)
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"
    assert host.check_output(CONTAINERS) == before
    mounts = host.check_output("docker inspect --format '{{json .Mounts}}' dagster-daemon dagster-webserver")
    assert "data-platform-engine" not in mounts
