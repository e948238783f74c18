"""What only a machine with a kernel of its own can show: cgroup v2 in force, a boot, and a power cut.

The tests stand in their order: limits first, while a run gets as far as its dbt build, then the cut in the middle of
it, then a boot.
"""

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SERVICES, Platform, environment

NAME = "data-platform-vm"
DIRECTORY = Path("~/.cache/data-platform/lab", NAME).expanduser()
BOOT = 900
ACTIVE = f"systemctl is-active {' '.join(SERVICES)}"
BUILDING = "pgrep --full '[d]bt build' && grep -Eqrs 'of [0-9]+ START' /var/lib/data-platform/run-scratch"
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
MEMORY = 700 * 1024**2
CUT_FILE = "/var/lib/data-platform/warehouse/cut.duckdb"
POSTGRES = (
    "docker exec --interactive dagster-postgres psql --quiet --tuples-only --no-align --username=postgres dagster"
)
DUCKDB = f"docker exec --interactive dagster-code python -c {{program}} {CUT_FILE}"
DUCKDB_PROGRAM = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1])
for line in sys.stdin:
    print(*connection.execute(line).fetchone(), flush=True)
"""
CREATE = "create table acknowledged (number integer);"
INSERT = "insert into acknowledged values ({}) returning number;"


def answer(host: Any, command: str) -> str:
    """Give what the host answers, empty while it does not."""
    try:
        return host.run(command).stdout
    except RuntimeError:
        return ""


def wait_until_ready(host: Any, before: str, started: float, record: Callable[..., None], what: str) -> None:
    """Wait until the host has booted again and all services are ready with nobody's help; record how long it took."""
    while answer(host, BOOT_ID).strip() in ("", before):
        assert time.monotonic() - started < BOOT, "the host does not come back"
        time.sleep(2)
    record(f"{what}: ssh answers", time.monotonic() - started)
    while (states := answer(host, ACTIVE).split()) != ["active"] * len(SERVICES):
        assert time.monotonic() - started < BOOT, dict(zip(SERVICES, states, strict=False))
        time.sleep(2)
    record(f"{what}: all services are ready", time.monotonic() - started)


def inspected(host: Any, name: str) -> dict[str, Any]:
    """Give what Docker says of a container."""
    return json.loads(host.check_output("docker inspect %s", name))[0]


def of_processes(host: Any, name: str, file: str) -> list[str]:
    """Give what the kernel says of each process of a container; some end while they are asked."""
    ask = "for process in $(docker top %s -o pid | tail -n +2); do cat /proc/$process/%s 2>/dev/null; done; true"
    answers = host.check_output(ask, name, file).splitlines()
    assert answers
    return answers


def cgroup(host: Any, name: str) -> str:
    """Give the directory of a container's cgroup, below that of the slice."""
    return f"/sys/fs/cgroup/dagster.slice/docker-{inspected(host, name)['Id']}.scope"


class Writer:
    """Writes rows one by one, and keeps outside the host a journal of those that the database acknowledged.

    Args:
        command: What takes a statement a line on the host, and prints its result once it is committed.
        journal: File on the controller.
    """

    def __init__(self, command: str, journal: Path) -> None:
        """Start to write."""
        variables = yaml.safe_load((ROOT / "molecule/vm/inventory/hosts.yml").read_text())["data_platform"]["hosts"][
            NAME
        ]
        ssh = ["ssh", "-p", str(variables["ansible_port"]), "-i", variables["ansible_ssh_private_key_file"]]
        ssh += [*shlex.split(variables["ansible_ssh_common_args"]), f"root@{variables['ansible_host']}", command]
        self.journal = journal
        self.process = subprocess.Popen(ssh, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.thread = threading.Thread(target=self.write)
        self.thread.start()

    def write(self) -> None:
        """Write until the host is gone."""
        with self.journal.open("w") as journal:
            for number in range(1_000_000):
                try:
                    print(INSERT.format(number), file=self.process.stdin, flush=True)
                except OSError:
                    return
                if self.process.stdout.readline().strip() != str(number):
                    return
                print(number, file=journal, flush=True)
                time.sleep(0.5)  # the run and dbt want the processors too

    def acknowledged(self) -> list[int]:
        """Give the rows that were acknowledged."""
        return [int(line) for line in self.journal.read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def everything(platform: Platform) -> str:
    """A run of all that there is, which is in its dbt build after a while."""
    return platform.launch("everything", {"dagster/partition": "2013-01-01", "dagster/max_retries": "0"})


def test_cgroup_v2_is_in_force(host: Any) -> None:
    assert host.check_output("stat --file-system --format=%T /sys/fs/cgroup") == "cgroup2fs"
    assert inspected(host, "dagster-code")["HostConfig"]["Memory"] == MEMORY
    assert int(host.check_output("cat %s/memory.max", cgroup(host, "dagster-code"))) == MEMORY


@pytest.mark.parametrize("name", SERVICES)
def test_processes_live_under_the_slice(host: Any, name: str) -> None:
    expected = "0::" + cgroup(host, name).removeprefix("/sys/fs/cgroup")
    assert set(of_processes(host, name, "cgroup")) == {expected}


@pytest.mark.parametrize("name", SERVICES)
def test_kernel_short_of_memory_takes_a_container_before_the_engine(host: Any, name: str) -> None:
    engine = int(host.check_output("cat /proc/$(pgrep --exact dockerd)/oom_score_adj"))
    values = set(map(int, of_processes(host, name, "oom_score_adj")))
    assert engine < min(values)


def test_what_exceeds_its_memory_is_killed_inside_and_only_it(host: Any, platform: Platform) -> None:
    events = f"awk '$1 == \"oom_kill\" {{ print $2 }}' {cgroup(host, 'dagster-code')}/memory.events"
    before = {name: inspected(host, name)["State"]["Pid"] for name in SERVICES}
    kills = int(host.check_output(events))
    killed = host.run("docker exec dagster-code python -c %s", "b'x' * (2 << 30)")
    assert killed.rc == 128 + signal.SIGKILL
    assert int(host.check_output(events)) == kills + 1
    assert {name: inspected(host, name)["State"]["Pid"] for name in SERVICES} == before
    assert host.check_output(ACTIVE).split() == ["active"] * len(SERVICES)
    assert platform.locations() == {"core": "RepositoryLocation"}


def test_services_and_all_acknowledged_rows_survive_a_power_cut(
    host: Any, platform: Platform, everything: str, record: Callable[..., None], tmp_path: Path
) -> None:
    platform.postgres(CREATE)
    create = f"import duckdb; duckdb.connect({CUT_FILE!r}).execute({CREATE!r})"
    host.check_output("docker exec dagster-code python -c %s", create)
    platform.wait(lambda: str(host.run("pgrep --full '[d]bt build'").rc), {"0"}, BOOT)
    writers = {
        "PostgreSQL": Writer(POSTGRES, tmp_path / "postgres"),
        "DuckDB": Writer(DUCKDB.format(program=shlex.quote(DUCKDB_PROGRAM)), tmp_path / "duckdb"),
    }
    platform.wait(lambda: str(host.run(BUILDING).rc), {"0"}, BOOT)
    before = host.check_output(BOOT_ID)
    for name, writer in writers.items():
        assert writer.acknowledged(), f"{name} has acknowledged nothing"
    assert host.run(BUILDING).rc == 0

    os.kill(int((DIRECTORY / "pid").read_text()), signal.SIGKILL)
    for writer in writers.values():
        writer.process.wait(60)
        writer.thread.join(60)
    started = time.monotonic()
    command = ["ansible-playbook", "--inventory=molecule/vm/inventory", "molecule/vm/create.yml"]
    subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, check=True)
    wait_until_ready(host, before, started, record, "power cut")

    kept = {
        "PostgreSQL": [int(row) for row in platform.postgres("select number from acknowledged")],
        "DuckDB": [number for (number,) in platform.duckdb("select number from acknowledged", CUT_FILE)],
    }
    for name, writer in writers.items():
        acknowledged = writer.acknowledged()
        assert set(acknowledged) <= set(kept[name])
        assert len(kept[name]) <= len(acknowledged) + 1, "of what was not acknowledged, the last row alone may be there"
        lost = f"none of the {len(acknowledged)} rows that {name} acknowledged"
        record("power cut: rows are looked at", time.monotonic() - started, lost)

    assert platform.locations() == {"core": "RepositoryLocation"}
    assert platform.duckdb("select count(*) > 0 from raw.airlines") == [[True]]
    assert platform.finished(everything, BOOT) == "FAILURE", "the run that died with the host was not found"
    record("power cut: the run that died is found", time.monotonic() - started)


def test_services_come_back_after_a_boot(host: Any, platform: Platform, record: Callable[..., None]) -> None:
    before, started = host.check_output(BOOT_ID), time.monotonic()
    answer(host, "systemctl reboot")
    wait_until_ready(host, before, started, record, "reboot")
    assert platform.locations() == {"core": "RepositoryLocation"}
    assert platform.finished(platform.launch("smoke"), BOOT) == "SUCCESS"
    record("reboot: a run has succeeded", time.monotonic() - started)
