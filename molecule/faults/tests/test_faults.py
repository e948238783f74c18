"""What may happen while runs work and wait: each ends in success, itself or by its retry, and nothing is lost."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from conftest import ROOT, SERVICES, Platform
from test_runs import CONTAINER, TERMINATE, messages, retries, running, started, status

slow = pytest.mark.slow
UNITS = [*SERVICES, "dagster-code-workload", "data-platform-engine"]
LOADED = {"core": "RepositoryLocation", "workload": "RepositoryLocation"}
JOURNAL = "/var/lib/data-platform/dagster/journal"
SCHEDULE = {"scheduleName": "minutely", "repositoryName": "__repository__", "repositoryLocationName": "workload"}
START = """
mutation($s: ScheduleSelector!) { startSchedule(scheduleSelector: $s) { __typename ... on PythonError { message } } }
"""
KILL_RUN = "kill -KILL $(docker top data-platform-run-{run} -eo pid | tail -n 1)"


HEAD = """# What was inflicted on runs, and what they came to

Written by the scenario `faults` (`DATA_PLATFORM_TESTS='slow or not slow' molecule test -s faults`): {}.

Each time there were in progress: a run of 25 s, a run that commits to DuckDB all the while, 20 short runs that wait for
a place among six, and a schedule that ticks each minute. The columns are seconds, until all services were ready and
until all runs had succeeded, themselves or by a retry; and whether what DuckDB and PostgreSQL had acknowledged, the
pool's slots, the ticks, and the containers of runs were as they should be. The full disk met one run that writes alone:
it fails, says why, and the next one succeeds.

| fault | ready | succeeded | DuckDB | PostgreSQL | pool | ticks | containers |
|---|---|---|---|---|---|---|---|
"""
VERSIONS = (
    "from importlib.metadata import version; print(*(f'{name} {version(name)}' for name in ('dagster', 'duckdb')))"
)


@dataclass
class Workload:
    """Runs that are in progress and that wait, and what they are to come to."""

    platform: Platform
    patient: str
    writer: str
    waiting: list[str]

    @property
    def runs(self) -> list[str]:
        """All of them."""
        return [self.patient, self.writer, *self.waiting]


def ready(host: Any, platform: Platform) -> str:
    """Say whether all is ready, or what is not."""
    if host.run(f"systemctl is-active {' '.join(UNITS)}").stdout.split() != ["active"] * len(UNITS):
        return "units"
    try:
        return "ready" if platform.locations() == LOADED else "locations"
    except AssertionError:
        return "webserver"


def ended(platform: Platform, run: str) -> tuple[str, str]:
    """Give the newest of a run and the runs that tried it again, and its state."""
    while again := retries(platform, run):
        run = again[0]["runId"]
    return run, status(platform, run)


def succeeds(platform: Platform, run: str, seconds: int = 240) -> None:
    """Assert that a run ends in success, itself or by a retry."""
    deadline = time.monotonic() + seconds
    while (last := ended(platform, run))[1] != "SUCCESS":
        assert time.monotonic() < deadline, f"{run} came to {last} in {seconds} s"
        time.sleep(1)


def invariants(host: Any, workload: Workload) -> None:
    """Assert what must hold after whatever happened.

    Raises:
        AssertionError: A run is lost, or a row, a tick, a slot, a unit.
    """
    platform = workload.platform
    for run in workload.runs:
        succeeds(platform, run)
    platform.wait(
        lambda: platform.postgres(
            "SELECT count(*) FROM runs WHERE status IN ('STARTING', 'STARTED', 'CANCELING', 'QUEUED')"
        )[0],
        {"0"},
        120,
    )
    acknowledged = {tuple(line.split()) for line in host.check_output("cat %s", JOURNAL).splitlines()}
    tables = [
        {(writer, str(number)) for writer, number in platform.duckdb(f"select * from workload.{table}")}
        for table in ("left_hand", "right_hand")
    ]
    assert tables[0] == tables[1], "half a transaction"
    assert acknowledged <= tables[0], f"lost: {acknowledged - tables[0]}"
    check = "docker exec dagster-postgres pg_amcheck --username=postgres --install-missing --all"
    assert host.check_output(check) == ""
    platform.wait(
        lambda: platform.postgres("SELECT count(*) FROM concurrency_slots WHERE run_id IS NOT NULL")[0], {"0"}, 30
    )
    doubled = (
        "SELECT count(*) FROM (SELECT 1 FROM job_ticks GROUP BY selector_id, timestamp HAVING count(*) > 1) AS twice"
    )
    assert platform.postgres(doubled) == ["0"]
    finished = set(platform.postgres("SELECT run_id FROM runs WHERE status IN ('SUCCESS', 'FAILURE', 'CANCELED')"))
    alive = host.check_output(
        "docker ps --filter label=dagster/run_id --format '{{.Label \"dagster/run_id\"}}'"
    ).split()
    assert not finished & set(alive)
    assert ready(host, platform) == "ready"
    assert host.check_output("systemctl --failed --plain --no-legend") == ""


def keep(config: pytest.Config, host: Any, name: str, ready: float, succeeded: float) -> None:
    """Write what a fault came to into docs/faults.md, where all are inflicted, and not the few of each day.

    Args:
        config: Pytest's, which knows what was asked for.
        host: The host.
        name: What was inflicted.
        ready: Seconds until all services were ready.
        succeeded: Seconds until all runs had succeeded.
    """
    if config.option.markexpr == "not slow":
        return
    file = ROOT / "docs/faults.md"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.endswith(" kept |")}
    rows[name] = f"| {name} | {ready:.1f} | {succeeded:.0f} | {' | '.join(['kept'] * 5)} |"
    versions = host.check_output("docker exec dagster-code python -c %s", VERSIONS)
    engine = host.check_output("docker version --format '{{.Server.Version}}'")
    told = f"{datetime.now(tz=UTC):%Y-%m-%d}, {os.cpu_count()} processors, Docker {engine}, {versions}"
    file.write_text(HEAD.format(told) + "\n".join(rows.values()) + "\n")


@pytest.fixture(scope="module", autouse=True)
def ticking(platform: Platform) -> None:
    """A schedule that ticks each minute."""
    assert platform.graphql(START, s=SCHEDULE)["startSchedule"]["__typename"] == "ScheduleStateResult"


@pytest.fixture
def workload(host: Any, platform: Platform) -> Iterator[Workload]:
    """Two runs in progress, and twenty short ones that were launched at once."""
    platform.wait(lambda: ready(host, platform), {"ready"}, 60)
    patient = platform.launch("patient", location="workload", config={"wait": {"seconds": 25}})
    writer = platform.launch("writer", location="workload", config={"write": {"transactions": 60, "pause": 0.2}})
    started(platform, patient)
    started(platform, writer)
    waiting = [platform.launch("patient", location="workload", config={"wait": {"seconds": 0.1}}) for _ in range(20)]
    yield Workload(platform, patient, writer, waiting)


CUT = """
own=/proc/$(docker inspect --format '{{.State.Pid}}' dagster-daemon)/ns/net
nsenter --net=$own nft 'add table inet cut; add chain inet cut out { type filter hook output priority 0; }
    add rule inet cut out tcp dport 5432 drop'
sleep 30
nsenter --net=$own nft delete table inet cut
"""


def exceed_memory(host: Any, workload: Workload) -> None:
    """Have one more run, which the kernel kills for its memory beside the others."""
    platform = workload.platform
    run = platform.launch("greedy", {"dagster/priority": "1"}, location="workload")
    assert platform.finished(run, 120) == "FAILURE"
    assert "exceeded its memory limit of 600m" in messages(platform, run)


def cancel_writer(host: Any, workload: Workload) -> None:
    """Cancel the run that holds the pool, while another one waits for it."""
    platform, cancelled = workload.platform, workload.writer
    config = {"write": {"transactions": 3}}
    workload.writer = platform.launch("writer", {"dagster/priority": "1"}, location="workload", config=config)
    assert platform.postgres("SELECT run_id FROM concurrency_slots WHERE run_id IS NOT NULL") == [cancelled]
    assert platform.graphql(TERMINATE, run=cancelled)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    assert platform.finished(cancelled, 40) == "CANCELED"
    assert not running(host, cancelled)


FAULTS = [
    *[
        pytest.param(f"docker kill {name}", id=f"{name} killed", marks=[slow][: name != "dagster-daemon"])
        for name in SERVICES
    ],
    pytest.param("systemctl kill --signal=KILL data-platform-engine", id="proxy killed", marks=slow),
    pytest.param(
        "systemctl stop data-platform-engine; sleep 30; systemctl start data-platform-engine", id="proxy down for 30 s"
    ),
    pytest.param(KILL_RUN.replace("{run}", "{patient}"), id="process of a run killed", marks=slow),
    pytest.param(f"docker kill {CONTAINER.format('{patient}')}", id="container of a run killed"),
    pytest.param(KILL_RUN.replace("{run}", "{writer}"), id="writer killed in mid-transaction"),
    pytest.param(
        f"docker kill {CONTAINER.format('{patient}')} dagster-code-workload", id="run and code server killed together"
    ),
    *[
        pytest.param(
            f"systemctl stop dagster-postgres; sleep {seconds}; systemctl start dagster-postgres",
            id=f"PostgreSQL down for {seconds} s",
            marks=[slow][: seconds != 8],
        )
        for seconds in (1, 8, 30)
    ],
    pytest.param("systemctl restart docker", id="engine restarted"),
    pytest.param(
        "for time in 1 2 3 4 5; do systemctl restart dagster-code-workload; done",
        id="code server restarted 5 times",
        marks=slow,
    ),
    pytest.param(CUT, id="network between daemon and PostgreSQL cut for 30 s"),
    pytest.param(exceed_memory, id="too much memory in another run", marks=slow),
    pytest.param(cancel_writer, id="run that holds the pool cancelled"),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_no_run_is_lost(
    host: Any,
    workload: Workload,
    record: Callable[..., None],
    pytestconfig: pytest.Config,
    fault: str | Callable[..., None],
) -> None:
    began = time.monotonic()
    if isinstance(fault, str):
        named = fault.replace("{patient}", workload.patient).replace("{writer}", workload.writer)
        host.check_output("sh -c %s", named)
    else:
        fault(host, workload)
    inflicted = time.monotonic()
    workload.platform.wait(lambda: ready(host, workload.platform), {"ready"}, 120)
    seconds = time.monotonic() - inflicted
    invariants(host, workload)
    name = next(known.id for known in FAULTS if known.values[0] == fault)
    everything = time.monotonic() - began
    record(name, seconds, f"nothing; all runs after {everything:.0f} s")
    keep(pytestconfig, host, name, seconds, everything)
