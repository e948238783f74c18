"""Readers get snapshots: complete, read-only, one for a burst of runs, the last few kept."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import duckdb
import pytest
from conftest import query

FILES = ["state.json", "warehouse.duckdb"]
HOLD = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(defs: dg.Definitions, tmp_path: Path) -> SimpleNamespace:
    """A warehouse of its own with a table, and what publishes it."""
    from data_platform import publishing, sensors
    from data_platform.resources import Published, Warehouse

    file, directory = tmp_path / "warehouse" / "warehouse.duckdb", tmp_path / "published"
    file.parent.mkdir()
    warehouse = Warehouse(path=str(file), memory_limit="1GB", scratch=str(tmp_path))
    write(file, 1)
    published = Published(path=str(directory), kept=2)
    publish = lambda: publishing.publish(warehouse, directory, 2)  # noqa: E731
    return SimpleNamespace(
        file=file, directory=directory, publish=publish, warehouse=warehouse, published=published,
        publishing=publishing, sensors=sensors,
    )  # fmt: skip


def write(file: Path, number: int) -> None:
    """Commit a number, which stays in DuckDB's journal until the next checkpoint."""
    with duckdb.connect(file) as connection:
        connection.execute("create table if not exists numbers (number integer)")
        connection.execute("insert into numbers values (?)", [number])


def numbers(file: Path) -> list[int]:
    """Give the numbers of a DuckDB file."""
    return [number for (number,) in query(file, "from numbers order by all")]


def test_snapshot_holds_what_was_committed(place: SimpleNamespace) -> None:
    snapshot = place.publish()
    link = place.directory / "warehouse.duckdb"
    assert (link.readlink(), numbers(link)) == (Path(snapshot.name), [1])
    assert snapshot.bytes == link.stat().st_size
    assert snapshot == place.publishing.newest(place.directory)
    assert oct(link.stat().st_mode & 0o777) == "0o640"


def test_what_a_killed_writer_committed_is_in_the_snapshot(place: SimpleNamespace) -> None:
    program = (
        "import duckdb, os, sys; connection = duckdb.connect(sys.argv[1]); "
        "connection.execute('insert into numbers values (2)'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", program, place.file])
    assert Path(f"{place.file}.wal").exists()
    place.publish()
    assert numbers(place.directory / "warehouse.duckdb") == [1, 2]


def test_publishing_leaves_the_warehouse_in_the_state_it_names(place: SimpleNamespace) -> None:
    for number in (2, 3):
        snapshot = place.publish()
        assert place.publishing.state_of(place.file) == snapshot.state
        assert place.publish().state == snapshot.state
        write(place.file, number)
        assert place.publishing.state_of(place.file) != snapshot.state


def test_the_last_are_kept_and_what_was_left_unfinished_is_not(place: SimpleNamespace) -> None:
    place.directory.mkdir()
    (place.directory / "warehouse-20000101T000000.000000Z.duckdb.part").touch()
    (place.directory / "warehouse.duckdb.part").symlink_to("nowhere")
    names = [place.publish().name for _ in range(4)]
    assert sorted(os.listdir(place.directory)) == sorted([*FILES, *names[-2:]])


def test_reader_keeps_the_snapshot_that_it_opened(place: SimpleNamespace) -> None:
    place.publish()
    with duckdb.connect(place.directory / "warehouse.duckdb", read_only=True) as reader:
        for number in (2, 3, 4):
            write(place.file, number)
            place.publish()
        assert reader.execute("from numbers").fetchall() == [(1,)]
    assert numbers(place.directory / "warehouse.duckdb") == [1, 2, 3, 4]


def test_full_disk_leaves_what_was_published(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = place.publish()
    monkeypatch.setattr(place.publishing, "CLONE", 0)
    monkeypatch.setattr(place.publishing, "KEPT_FREE", 1 << 40)
    with pytest.raises(place.publishing.NoRoomError, match=rf"{place.file} needs 0 MiB.*{place.directory} has \d+ MiB"):
        place.publish()
    assert place.publishing.newest(place.directory) == before
    assert sorted(os.listdir(place.directory)) == sorted([*FILES, before.name])
    assert numbers(place.directory / "warehouse.duckdb") == [1]


def test_warehouse_that_is_held_is_not_published(place: SimpleNamespace) -> None:
    from data_platform.resources import WarehouseError

    with subprocess.Popen([sys.executable, "-c", HOLD, place.file], stdin=-1, stdout=-1) as holder:
        holder.stdout.readline()
        with pytest.raises(WarehouseError):
            place.publish()
    assert place.publishing.newest(place.directory) is None


def evaluate(place: SimpleNamespace, instance: dg.DagsterInstance) -> Any:
    """Evaluate the sensor; give the request for a run or the reason why there is none."""
    context = dg.build_sensor_context(instance)
    return place.sensors.changed_warehouse(context, warehouse=place.warehouse, published=place.published)


def add_run(
    instance: dg.DagsterInstance, defs: dg.Definitions, job: str, status: dg.DagsterRunStatus, **tags: str
) -> str:
    """Put a run into the database."""
    run = instance.create_run_for_job(defs.resolve_job_def(job), status=status, tags=tags)
    return run.run_id


@pytest.fixture
def runs(defs: dg.Definitions) -> Any:
    """An instance without runs, and what adds one."""
    with dg.instance_for_test() as instance:
        yield SimpleNamespace(instance=instance, add=lambda *words, **tags: add_run(instance, defs, *words, **tags))


def test_sensor_launches_for_a_change_alone(place: SimpleNamespace, runs: Any) -> None:
    assert isinstance(evaluate(place, runs.instance), dg.RunRequest)
    place.publish()
    assert "holds what the warehouse holds" in evaluate(place, runs.instance).skip_message
    write(place.file, 2)
    assert isinstance(evaluate(place, runs.instance), dg.RunRequest)
    place.file.unlink()
    assert "no warehouse yet" in evaluate(place, runs.instance).skip_message


def test_sensor_waits_for_the_end_of_a_burst_but_not_for_ever(place: SimpleNamespace, runs: Any) -> None:
    place.publish()
    write(place.file, 2)
    run = runs.add("smoke", dg.DagsterRunStatus.STARTED)
    assert "1 runs are in progress or wait" in evaluate(place, runs.instance).skip_message
    note = place.directory / "state.json"
    old = {**json.loads(note.read_text()), "at": (datetime.now(UTC) - timedelta(seconds=301)).isoformat()}
    note.write_text(json.dumps(old))
    assert isinstance(evaluate(place, runs.instance), dg.RunRequest)
    place.publish()
    write(place.file, 3)
    runs.instance.delete_run(run)
    assert isinstance(evaluate(place, runs.instance), dg.RunRequest)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (dg.DagsterRunStatus.STARTED, "is on its way"),
        (dg.DagsterRunStatus.SUCCESS, "published it"),
    ],
)
def test_sensor_launches_once(place: SimpleNamespace, runs: Any, status: dg.DagsterRunStatus, reason: str) -> None:
    request = evaluate(place, runs.instance)
    runs.add("publish_warehouse", status, **request.tags)
    assert reason in evaluate(place, runs.instance).skip_message
