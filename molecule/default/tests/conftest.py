"""What the checks of a live platform share."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SERVICES = ["dagster-postgres", "dagster-code", "dagster-daemon", "dagster-webserver"]
PORT = 3001
WAREHOUSE = "/var/lib/data-platform/warehouse/warehouse.duckdb"
MONTHS = [f"2013-{month:02}-01" for month in range(1, 13)]
FINISHED = {"SUCCESS", "FAILURE", "CANCELED"}

LOCATIONS = """
{ workspaceOrError { ... on Workspace { locationEntries {
    name loadStatus locationOrLoadError { __typename ... on PythonError { message } } } } } }
"""
LAUNCH = """
mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }
"""
STATUS = """
query($run: ID!) { runOrError(runId: $run) { ... on Run { status stats { ... on RunStatsSnapshot { stepsFailed } } } } }
"""
QUERY = """
import duckdb, json, sys, time
for attempt in range(100):
    try:
        connection = duckdb.connect(sys.argv[1], read_only=True)
        break
    except duckdb.IOException:
        time.sleep(0.2)
print(json.dumps(connection.execute(sys.argv[2]).fetchall()))
"""


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marker means."""
    config.addinivalue_line("markers", "slow: left to make test-all")


class Platform:
    """The platform under test, asked over GraphQL from its own host."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.port = int(host.check_output("docker port dagster-webserver 3001/tcp").splitlines()[0].rsplit(":", 1)[1])

    def graphql(self, query: str, **variables: object) -> dict[str, Any]:
        """Give the data of the answer to one request; no second try."""
        body = json.dumps({"query": query, "variables": variables})
        answer = self.host.run(
            "curl --silent --show-error --fail --max-time 60 --header 'Content-Type: application/json' --data %s %s",
            body,
            f"http://127.0.0.1:{self.port}/graphql",
        )
        assert answer.rc == 0, answer.stderr
        content = json.loads(answer.stdout)
        assert "errors" not in content, content
        return content["data"]

    def locations(self) -> dict[str, str]:
        """Give what each code location loaded to."""
        entries = self.graphql(LOCATIONS)["workspaceOrError"]["locationEntries"]
        return {entry["name"]: (entry["locationOrLoadError"] or {}).get("__typename") for entry in entries}

    def launch(
        self, job: str, tags: dict[str, str] | None = None, location: str = "core", config: dict[str, Any] | None = None
    ) -> str:
        """Launch a job of a location, with configuration of its ops; give the run's ID."""
        selector = {"jobName": job, "repositoryName": "__repository__", "repositoryLocationName": location}
        params = {
            "selector": selector,
            "mode": "default",
            "runConfigData": {"ops": {op: {"config": values} for op, values in (config or {}).items()}}
            if config
            else {},
            "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in (tags or {}).items()]},
        }
        launched = self.graphql(LAUNCH, params=params)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return launched["run"]["runId"]

    def finished(self, run: str, seconds: int = 180) -> str:
        """Give the status that the run ends with."""
        return self.wait(lambda: self.graphql(STATUS, run=run)["runOrError"]["status"], FINISHED, seconds)

    def wait(self, ask: Callable[[], str], wanted: set[str], seconds: int) -> str:
        """Ask until the answer is one of ``wanted``."""
        deadline = time.monotonic() + seconds
        while (answer := ask()) not in wanted:
            assert time.monotonic() < deadline, f"still {answer} after {seconds} s"
            time.sleep(0.5)
        return answer

    def duckdb(self, query: str, file: str = WAREHOUSE) -> list[list[Any]]:
        """Give the rows of a query to a database in the warehouse's directory, once no run has it open."""
        return json.loads(self.host.check_output("docker exec dagster-code python -c %s %s %s", QUERY, file, query))

    def postgres(self, query: str, database: str = "dagster") -> list[str]:
        """Give the rows of a query to the metadata database, or to another one of its server, as its administrator."""
        return self.host.check_output(
            "docker exec dagster-postgres psql --username=postgres --dbname=%s --tuples-only --no-align --command=%s",
            database,
            query,
        ).splitlines()

    def ticked(self, since: float) -> list[int]:
        """Give the minutes since the epoch that schedules launched a run for, after a moment in seconds."""
        minutes = self.postgres(
            "select extract(epoch from value::timestamptz)::int / 60 from run_tags "
            f"where key = '.dagster/scheduled_execution_time' and value::timestamptz > to_timestamp({since}) order by 1"
        )
        return [int(minute) for minute in minutes]


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Iterator[Callable[..., None]]:
    """Take note of what was done, how many seconds it took, and what was lost; printed as a table in the end."""
    rows: list[tuple[str, float, str]] = []
    yield lambda fault, seconds, lost="": rows.append((fault, seconds, lost))
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n| fault | seconds until ready | lost |\n|---|---|---|")
        for fault, seconds, lost in rows:
            print(f"| {fault} | {seconds:.1f} | {lost} |")


@pytest.fixture(scope="module")
def platform(host: Any) -> Platform:
    """The platform under test."""
    return Platform(host)


def environment() -> dict[str, str]:
    """Give the environment that plays run in."""
    return {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_FORCE_COLOR": "false",  # Molecule asks for colours, in which no sentence is found
        "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
    }


@pytest.fixture(scope="module")
def inventory(pytestconfig: pytest.Config) -> str:
    """The inventory of the host under test."""
    return str(Path(pytestconfig.getoption("ansible_inventory")).resolve())


@pytest.fixture(scope="module")
def play(inventory: str) -> Callable[..., int]:
    """Run a playbook on the host under test, with further arguments; prints its output, gives how much it changed."""

    def run(*arguments: str, playbook: str = "playbooks/site.yml") -> int:
        command = ["ansible-playbook", f"--inventory={inventory}", playbook, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)
        return sum(map(int, re.findall(r"changed=(\d+)", done.stdout)))

    return run


@pytest.fixture
def kill(inventory: str, host: Any) -> Callable[..., None]:
    """Start a play, and kill it some seconds into a task.

    If the connection is ``lost``, what it runs on the host is killed as well; otherwise Ansible's worker, and what it
    runs on the host, go on to the end of their task.
    """

    def run(
        task: str,
        seconds: float,
        lost: bool,
        *arguments: str,
        playbook: str = "playbooks/site.yml",
        on_the_host: str = "python3|apt-get|mmdebstrap|dpkg",
    ) -> None:
        process = subprocess.Popen(
            ["ansible-playbook", f"--inventory={inventory}", playbook, *arguments],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert process.stdout
        output = ""
        while f"TASK [{task}" not in (line := process.stdout.readline()):
            output += line
            assert line, f"The play ended before '{task}':\n{output}"
        time.sleep(seconds)
        assert process.poll() is None, f"The play ended before it was killed in '{task}'."
        os.kill(process.pid, signal.SIGKILL)
        if lost:
            subprocess.run(["pkill", "-KILL", "-f", f"ansible-playbook --inventory={inventory}"], check=False)
            host.run("pkill -KILL -f %s", on_the_host)
        process.communicate()

    return run
