"""The warehouse: a full disk loses nothing, many writers at once succeed, and readers never wait."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import WAREHOUSE, Platform
from test_faults import JOURNAL, Workload, invariants, keep, ready
from test_runs import started, status

FOLDER = WAREHOUSE.rpartition("/")[0]
PUBLISHED = "/var/lib/data-platform/published"
FILL = f"{FOLDER}/fill"
OWN_DISK = f"""
systemctl stop dagster-code dagster-code-workload
mkdir /var/tmp/aside && find {FOLDER} -mindepth 1 -exec mv --target-directory=/var/tmp/aside {{}} +
mount -t tmpfs -o size=48m,mode=0700,uid=10001,gid=10001 warehouse {FOLDER}
systemctl start dagster-code dagster-code-workload
"""
FORMER_DISK = f"""
systemctl stop dagster-code dagster-code-workload
umount {FOLDER}
find /var/tmp/aside -mindepth 1 -exec mv --target-directory={FOLDER} {{}} +
rmdir /var/tmp/aside
truncate --no-create --size=0 {JOURNAL}
systemctl start dagster-code dagster-code-workload
"""
READER = f"""
import duckdb, json, pathlib, time
reads, longest, seen = 0, 0.0, set()
while not pathlib.Path("/tmp/enough").exists():
    began = time.monotonic()
    with duckdb.connect("{PUBLISHED}/warehouse.duckdb", read_only=True) as connection:
        left, right = (
            connection.execute(f"select count(*) from workload.{{table}}").fetchone()[0]
            for table in ("left_hand", "right_hand")
        )
    assert left == right, f"half a transaction was published: {{left}} and {{right}}"
    reads, longest = reads + 1, max(longest, time.monotonic() - began)
    seen.add(pathlib.Path("{PUBLISHED}/warehouse.duckdb").readlink().name)
    time.sleep(0.05)
print(json.dumps([reads, longest, len(seen)]))
"""


@pytest.fixture
def own_disk(host: Any) -> Iterator[None]:
    """Give the warehouse a small file system of its own."""
    host.check_output("sh -ec %s", OWN_DISK)
    yield
    host.check_output("sh -ec %s", FORMER_DISK)


@pytest.mark.usefixtures("own_disk")
def test_full_disk_is_named_and_loses_nothing(host: Any, platform: Platform, pytestconfig: pytest.Config) -> None:
    host.check_output("truncate --no-create --size=0 %s", JOURNAL)
    write = {"write": {"transactions": 100_000}}
    run = platform.launch("writer", location="workload", config=write)
    started(platform, run)
    platform.wait(lambda: str(host.run(f"test -s {JOURNAL}").rc), {"0"}, 30)
    host.run(f"dd if=/dev/zero of={FILL} bs=64k")
    assert platform.finished(run, 120) == "FAILURE"
    said = f"SELECT count(*) > 0 FROM event_logs WHERE run_id = '{run}' AND event LIKE '%No space left on device%'"
    assert platform.postgres(said) == ["t"]
    host.check_output(f"rm {FILL}")
    freed = time.monotonic()
    platform.wait(lambda: ready(host, platform), {"ready"}, 60)
    seconds = time.monotonic() - freed
    assert int(host.check_output(f"wc --lines < {JOURNAL}")) > 0
    again = platform.launch("writer", location="workload", config={"write": {"transactions": 3}})
    assert platform.finished(again) == "SUCCESS"
    everything = time.monotonic() - freed
    invariants(host, Workload(platform, again, again, []))
    keep(pytestconfig, host, "warehouse's disk full, and freed", seconds, everything)


@pytest.mark.slow
def test_fifty_writers_at_once_and_a_reader(host: Any, platform: Platform) -> None:
    config = {"write": {"transactions": 3}}
    assert platform.finished(platform.launch("writer", location="workload", config=config)) == "SUCCESS"
    assert platform.finished(platform.launch("publish_warehouse")) == "SUCCESS"
    reader = "docker exec --detach dagster-code-workload sh -c 'python -c \"$0\" > /tmp/read 2>&1' %s"
    host.check_output(reader, READER)
    began = time.monotonic()
    writers, smokes, publishing = [], [], []
    for number in range(50):
        writers.append(platform.launch("writer", location="workload", config=config))
        if number % 10 == 9:
            smokes.append(platform.launch("smoke"))
            publishing.append(platform.launch("publish_warehouse"))
    for smoke in smokes:
        assert platform.finished(smoke, 120) == "SUCCESS"
    left = sum(status(platform, run) != "SUCCESS" for run in writers)
    assert left > 0, "smoke finishes while writers wait"
    for run in writers + publishing:
        assert platform.finished(run, 400) == "SUCCESS"
    seconds = time.monotonic() - began
    host.check_output("docker exec dagster-code-workload touch /tmp/enough; sleep 3")
    reads, longest, snapshots = json.loads(host.check_output("docker exec dagster-code-workload cat /tmp/read"))
    print(
        f"50 writers, 5 smokes: {seconds:.0f} s; {reads} reads, the longest {longest:.2f} s, of {snapshots} snapshots"
    )
    assert reads > seconds
    assert snapshots > 2
    assert longest < 2
