"""Last of all: the platform is taken off, and comes back with its data, even if plays are killed on the way."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import SERVICES, WAREHOUSE, Platform

STATE = """
docker image ls --filter reference=data-platform/*:current --format '{{.Repository}}' | sort
docker container ls --all --format '{{.Names}} {{.Image}} {{.State}}' | grep -v data-platform-run- | sort
docker info --format '{{json .Labels}}'
docker network ls --format '{{.Name}}' | sort
systemctl list-unit-files --state=enabled --plain --no-legend | sort
systemctl --failed --plain --no-legend
dpkg-query --show --showformat '${Package} ${db:Status-Abbrev}\\n' | sort
find /etc/data-platform /etc/docker /usr/local -printf '%p %M %U %G\\n' | sort
find /var/lib/data-platform -maxdepth 1 -printf '%p %M %U %G\\n' | sort
cd /etc; find data-platform docker systemd/system -type f | sort | xargs sha256sum
find /var/tmp /tmp -name 'data-platform*'
"""
RUNS = "select count(*) from runs where pipeline_name = 'smoke'"
ROWS = "select count(*) from platform.smoke"

KILLS = [
    ("docker : Install the packages", 2.0, True),
    ("images : Build the root file system", 4.0, True),
    ("images : Import it", 0.3, False),
    ("images : Build the last", 8.0, False),
    ("postgres : Hand the clients theirs", 0.0, False),
    ("dagster : Configure Dagster", 1.0, True),
    ("service : Remove services that are no longer described", 3.0, True),
]
"""Name of the task, seconds into it, and whether what it runs on the host is killed as well (a lost connection);
otherwise Ansible's worker, and what it runs on the host, go on to the end of their task."""


@pytest.fixture(scope="module")
def state(host: Any) -> Iterator[Callable[[], str]]:
    """Describe the host."""
    yield lambda: host.check_output("bash -c %s", STATE)


def containers(host: Any) -> dict[str, str]:
    """Give the IDs of the services' containers."""
    return {name: host.check_output("docker inspect --format '{{.Id}}' %s", name) for name in SERVICES}


@pytest.mark.slow
def test_change_killed_before_its_restart_reaches_the_services(
    host: Any, play: Callable[..., int], kill: Callable[..., None]
) -> None:
    changed = ["--extra-vars", '{"dagster_config": {"concurrency": {"runs": {"max_concurrent_runs": 7}}}}']
    running = containers(host)
    kill("service : Remove services that are no longer described", 0.0, True, *changed)
    assert play(*changed) > 0
    after = containers(host)
    assert {name for name in SERVICES if after[name] != running[name]} == set(SERVICES) - {"dagster-postgres"}


@pytest.mark.slow
def test_engine_settings_killed_before_their_restart_reach_the_engine(
    host: Any, play: Callable[..., int], kill: Callable[..., None]
) -> None:
    changed = ["--extra-vars", '{"docker_daemon_options": {"log-driver": "local", "debug": true}}']
    kill("docker : Keep what the network's neighbours send", 0.0, True, *changed)
    play(*changed)
    assert host.check_output("docker info --format '{{.Debug}}'") == "true"
    play()
    assert host.check_output("docker info --format '{{.Debug}}'") == "false"


def test_configuration_edited_by_hand_is_put_right_and_reloaded(
    host: Any, play: Callable[..., int], state: Callable[[], str]
) -> None:
    before = state()
    host.check_output("sed -i 's/granularity: op/granularity: run/' /etc/data-platform/dagster/dagster.yaml")
    host.check_output("systemctl restart dagster-daemon")
    assert play() > 0
    assert state() == before


@pytest.mark.parametrize("kills", [[], pytest.param(KILLS, marks=pytest.mark.slow)], ids=["undisturbed", "killed"])
def test_platform_that_is_taken_off_comes_back_with_its_data(
    host: Any,
    platform: Platform,
    play: Callable[..., int],
    kill: Callable[..., None],
    state: Callable[[], str],
    kills: list[tuple[str, float, bool]],
) -> None:
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"
    before, runs, rows = state(), platform.postgres(RUNS), platform.duckdb(ROWS)

    for _ in range(4):
        platform.launch("publish_warehouse")
    assert play(playbook="playbooks/remove.yml") > 0
    assert play(playbook="playbooks/remove.yml") == 0
    assert host.check_output("docker ps --all --quiet; docker image ls --quiet; docker volume ls --quiet") == ""
    assert host.run("ls /etc/systemd/system /usr/local/bin | grep -E 'dagster|data-platform'").stdout == ""
    assert host.check_output("find /etc/data-platform -type f") == "/etc/data-platform/secrets/postgres"
    assert host.file(WAREHOUSE).is_file

    if kills:
        host.check_output("apt-get purge --quiet --yes --autoremove docker.io && rm -rf /etc/docker /var/lib/docker/*")
    for task, seconds, lost in kills:
        kill(task, seconds, lost)
    play()
    assert state() == before
    assert (platform.postgres(RUNS), platform.duckdb(ROWS)) == (runs, rows)


def test_data_are_named_and_go_when_that_is_said(
    host: Any, play: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    places = [f"/var/lib/data-platform/{name}" for name in ("landing", "postgres", "warehouse")]
    places += ["/etc/data-platform/secrets"]
    assert play("--extra-vars=remove_data=true", playbook="playbooks/remove.yml") > 0
    named, removed = capsys.readouterr().out.split("These data go:")[1].split("TASK [Remove them]")
    assert [place for place in places if place not in named] == []
    assert "changed: [" in removed
    assert host.run("ls -d /var/lib/data-platform /etc/data-platform").stdout == ""
