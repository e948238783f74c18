"""Old images go: all but the one of now, the one before, and those that a container or an unfinished run names."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, STATUS, Platform

CODE = "data-platform/code-core"
SLOTS = 'mutation($count: Int!) { setConcurrencyLimit(concurrencyKey: "duckdb", limit: $count) }'


def tags(host: Any, repository: str) -> dict[str, str]:
    """Give the IDs of a repository's images by tag."""
    listed = host.check_output(f"docker image ls --no-trunc --format '{{{{.Tag}}}} {{{{.ID}}}}' {repository}")
    return dict(line.split() for line in listed.splitlines())


def status(platform: Platform, run: str) -> str:
    """Give the state of a run."""
    return platform.graphql(STATUS, run=run)["runOrError"]["status"]


def build_cache(host: Any) -> str:
    """Give the size of what the build cache holds beside layers of images."""
    sizes = host.check_output("docker system df --format '{{.Type}}={{.Size}}'").splitlines()
    return dict(line.split("=") for line in sizes)["Build Cache"]


@pytest.fixture
def ship(play: Callable[..., int], tmp_path: Path) -> Callable[..., int]:
    """Ship a copy of the code with one more, empty file of this name, and with variables."""
    (core,) = yaml.safe_load((ROOT / "roles/dagster/defaults/main.yml").read_text())["dagster_code_locations"]

    def run(name: str, **variables: object) -> int:
        shutil.copytree(ROOT / core["source"], tmp_path / name, ignore=shutil.ignore_patterns("target", "__pycache__"))
        (tmp_path / name / f"{name}.txt").touch()
        location = core | {"source": str(tmp_path / name)}
        return play("--extra-vars", json.dumps({"dagster_code_locations": [location], **variables}))

    return run


@pytest.fixture
def slots(platform: Platform) -> Iterator[Callable[[int], object]]:
    """Set how many slots the pool has that smoke wants; with none, two runs are started and wait, others are queued."""
    yield lambda count: platform.graphql(SLOTS, count=count)
    platform.graphql(SLOTS, count=1)


@pytest.mark.slow
def test_only_what_something_needs_stays(
    host: Any,
    platform: Platform,
    play: Callable[..., int],
    ship: Callable[..., int],
    slots: Callable[[int], object],
) -> None:
    shared = tags(host, "data-platform/dagster")
    first = tags(host, CODE)["current"]
    host.check_output(f"docker create --name stopped {CODE}:current true")

    ship("second")
    second = tags(host, CODE)["current"]
    assert tags(host, CODE)["previous"] == first != second
    slots(0)
    waiting = [platform.launch("smoke") for _ in range(3)]
    for run in waiting[:2]:
        platform.wait(lambda run=run: status(platform, run), {"STARTED"}, 60)
    assert status(platform, waiting[2]) == "QUEUED"

    assert build_cache(host) != "0B"
    ship("third", retention_build_cache="0")
    assert build_cache(host) == "0B"
    third = tags(host, CODE)["current"]
    assert tags(host, CODE)["previous"] == second
    assert first in tags(host, CODE).values(), "a stopped container names it"

    play()
    found = tags(host, CODE)
    assert (found["current"], found["previous"]) == (first, third)
    assert second in found.values(), "runs in progress and a queued one name it"

    slots(1)
    for run in waiting:
        assert platform.finished(run) == "SUCCESS"
    host.check_output("docker rm stopped")
    finished = "/usr/local/lib/data-platform/finished-runs --hours=0 --days=90 > /dev/null"
    listed = "docker ps --all --quiet --filter label=dagster/run_id"
    platform.wait(lambda: host.check_output(f"{finished} && {listed}"), {""}, 60)  # one may be publishing
    now = "$(docker image ls --filter reference=data-platform/*:current --format '{{.Repository}}:{{.Tag}}')"
    removed = host.check_output(f"/usr/local/lib/data-platform/retention.py {now}").splitlines()
    assert [line.split(":")[0] for line in removed] == [f"removed {CODE}"]
    assert set(tags(host, CODE).values()) == {first, third}
    assert tags(host, "data-platform/dagster") == shared
