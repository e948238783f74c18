"""The locks are what their inputs ask for, and pin every file that may be installed."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

IMAGE = "roles/images/files/dagster"
LOCKS = sorted(path for folder in (ROOT / "requirements", ROOT / IMAGE) for path in folder.glob("*.txt"))
PROMISES = [
    (f"{IMAGE}/requirements.txt", "duckdb<2"),
    (f"{IMAGE}/requirements.txt", "sqlalchemy<2.1"),
    (f"{IMAGE}/requirements.txt", "dbt-core<1.12"),
    (f"{IMAGE}/requirements.txt", "dagster==1.13.*"),
    (f"{IMAGE}/requirements.txt", "psycopg2-binary>=2"),
    ("requirements/controller.txt", "ansible-core==2.19.*"),
]


def lock_commands() -> dict[str, list[str]]:
    """What `make lock` would run, by the lock that it writes."""
    plan = subprocess.run(["make", "--dry-run", "lock"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line) for line in plan.splitlines() if line.startswith("uv pip compile")]
    return {command[command.index("-o") + 1]: command for command in commands}


def entries(lock: Path) -> list[str]:
    """Give each entry of a lock as one line."""
    text = lock.read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]


def versions(lock: Path) -> dict[str, Version]:
    names = [re.match(r"([\w.-]+)==(\S+)", entry).groups() for entry in entries(lock)]
    return {name: Version(version) for name, version in names}


def test_every_input_has_a_lock() -> None:
    inputs = {str(path.relative_to(ROOT).with_suffix(".txt")) for lock in LOCKS for path in lock.parent.glob("*.in")}
    assert inputs == set(lock_commands()) == {str(lock.relative_to(ROOT)) for lock in LOCKS}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_lock_is_what_its_input_asks_for(lock: Path, tmp_path: Path) -> None:
    command = [word for word in lock_commands()[str(lock.relative_to(ROOT))] if word != "--upgrade"]
    command[command.index("-o") + 1] = str(tmp_path / lock.name)
    for options in (["--offline"], []):  # what uv has in its cache mostly does, and takes a second
        shutil.copy(lock, tmp_path)
        result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            break
    assert result.returncode == 0, result.stderr
    assert (tmp_path / lock.name).read_text() == lock.read_text(), "run `make lock`"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_lock_pins_versions_and_hashes_and_no_index(lock: Path) -> None:
    assert entries(lock)
    assert [line for line in entries(lock) if not re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}\b", line)] == []
    assert re.findall(r"\w+://|--(?:extra-)?index|--find-links", lock.read_text()) == []


@pytest.mark.parametrize(("lock", "promise"), PROMISES)
def test_lock_keeps_a_promise(lock: str, promise: str) -> None:
    asked = Requirement(promise)
    assert asked.specifier.contains(versions(ROOT / lock)[asked.name])


def test_dagsters_libraries_belong_to_its_version() -> None:
    locked = versions(ROOT / IMAGE / "requirements.txt")
    core = locked["dagster"]
    wanted = {
        name: f"0.{core.minor + 16}.{core.micro}" for name in ("dagster-dbt", "dagster-docker", "dagster-postgres")
    }
    wanted |= {name: str(core) for name in ("dagster-graphql", "dagster-pipes", "dagster-shared", "dagster-webserver")}
    assert {name: str(locked[name]) for name in wanted} == wanted
