"""What may happen to the services: all comes back by itself, in time, and nothing that was acknowledged is lost."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import SERVICES, Platform

SERVICE, ENGINE = 15, 30  # seconds until all is ready again
LOADED = {"core": "RepositoryLocation"}
KILL_CLIENT = "kill -KILL $(pgrep --full '^/usr/bin/docker run --name {} ')"
KILL_MAIN = "kill -KILL $(systemctl show --property=MainPID --value {})"
STALE = """
systemctl stop dagster-webserver
docker create --name dagster-webserver $(docker image ls --quiet data-platform/dagster | head -n 1) sleep 1000
systemctl start dagster-webserver
"""
NETWORK = "systemctl stop 'dagster-*'; docker network rm data-platform && systemctl start 'dagster-*' --all"
UPGRADE = """
systemctl reset-failed docker  # three starts a minute are all that Debian's unit allows
DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --reinstall docker.io && systemctl restart docker
"""
slow = pytest.mark.slow
FAULTS = [
    *[pytest.param(f"docker kill {name}", SERVICE, id=f"container of {name} killed") for name in SERVICES],
    *[
        pytest.param(KILL_CLIENT.format(name), SERVICE, id=f"docker client of {name} killed", marks=[slow][:skipped])
        for name, skipped in zip(SERVICES, [1, 0, 1, 1], strict=True)
    ],
    *[
        pytest.param(KILL_MAIN.format(name), SERVICE, id=f"main process of {name} killed", marks=[slow][:skipped])
        for name, skipped in zip(SERVICES, [1, 1, 0, 1], strict=True)
    ],
    pytest.param(f"docker kill {' '.join(SERVICES)}", ENGINE, id="all four containers killed", marks=slow),
    pytest.param(STALE, SERVICE, id="container of the same name"),
    pytest.param(NETWORK, ENGINE, id="network removed", marks=slow),
    pytest.param("systemctl restart docker", ENGINE, id="engine restarted"),
    pytest.param("kill -KILL $(pidof dockerd)", ENGINE, id="engine killed", marks=slow),
    pytest.param("kill -KILL $(pidof dockerd containerd)", ENGINE, id="engine and containerd killed", marks=slow),
    pytest.param(UPGRADE, 2 * ENGINE, id="engine's package installed again, restarted", marks=slow),
]
CHANGED = f"systemctl show --property=InvocationID --value {' '.join(SERVICES)}"
ROWS = """
SELECT count(*) || ' ' || max(number) || ' ' || (SELECT count(*) FROM runs WHERE pipeline_name = 'smoke')
FROM acknowledged
"""


@pytest.fixture(scope="module", autouse=True)
def something_to_lose(platform: Platform) -> None:
    """A table of acknowledged rows, and a warehouse with something in it."""
    platform.postgres("CREATE TABLE IF NOT EXISTS acknowledged (number bigint PRIMARY KEY)")
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"


def state(host: Any, platform: Platform) -> str:
    """Say whether all is ready, or what is not."""
    if host.run(f"systemctl is-active {' '.join(SERVICES)}").stdout.split() != ["active"] * len(SERVICES):
        return "units"
    try:
        return "ready" if platform.locations() == LOADED else "locations"
    except AssertionError:
        return "webserver"


def survived(host: Any, platform: Platform, fault: Callable[[], object]) -> float:
    """Do something to the platform; give the seconds until all is ready again, if it is, and nothing was lost."""
    platform.wait(lambda: state(host, platform), {"ready"}, 60)
    time.sleep(10)
    platform.postgres("INSERT INTO acknowledged SELECT coalesce(max(number), 0) + 1 FROM acknowledged")
    rows, warehouse = platform.postgres(ROWS), platform.duckdb("select * from platform.smoke")
    invocations = host.check_output(CHANGED)
    started = time.monotonic()
    fault()
    platform.wait(lambda: str(host.run(CHANGED).stdout.strip() != invocations), {"True"}, 60)
    platform.wait(lambda: state(host, platform), {"ready"}, 120)
    seconds = time.monotonic() - started
    assert (platform.postgres(ROWS), platform.duckdb("select * from platform.smoke")) == (rows, warehouse)
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"
    assert host.check_output("systemctl --failed --plain --no-legend") == ""
    return seconds


@pytest.mark.parametrize(("command", "budget"), FAULTS)
def test_platform_comes_back_and_nothing_is_lost(
    host: Any,
    platform: Platform,
    record: Callable[..., None],
    command: str,
    budget: int,
    request: pytest.FixtureRequest,
) -> None:
    seconds = survived(host, platform, lambda: host.check_output(command))
    record(next(fault.id for fault in FAULTS if fault.values[0] == command), seconds, "nothing")
    assert seconds <= budget


def test_engine_that_an_operator_stops_stays_so_and_all_comes_back_with_it(
    host: Any, platform: Platform, record: Callable[..., None]
) -> None:
    states: list[str] = []

    def stop_and_start() -> None:
        host.check_output("systemctl stop docker")
        time.sleep(10)
        states.extend(host.run(f"systemctl is-active docker {' '.join(SERVICES)}").stdout.split())
        states.append(host.check_output("systemctl --failed --plain --no-legend"))
        host.check_output("systemctl start docker")

    seconds = survived(host, platform, stop_and_start) - 10
    assert states == ["inactive"] * 5 + [""]
    record("engine stopped, and started", seconds, "nothing")
    assert seconds <= ENGINE


@pytest.mark.slow
def test_all_comes_back_when_the_host_boots(host: Any, platform: Platform, record: Callable[..., None]) -> None:
    boot = ["docker", "restart", "--time=60", host.backend.host]
    seconds = survived(host, platform, lambda: subprocess.run(boot, check=True, capture_output=True))
    record("host booted again", seconds, "nothing")
    assert seconds <= 2 * ENGINE
