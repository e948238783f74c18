"""The program that removes what finished runs leave, with a stand-in for the engine; Molecule has the real one."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, module_at

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
NEVER = "0001-01-01T00:00:00Z"


def ago(hours: float) -> str:
    return (NOW - timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%S.123456789Z")


CONTAINERS = {
    "works": f"i1 works true {ago(99)} {NEVER}",
    "ended": f"i2 ended false {ago(99)} {ago(1)}",
    "old": f"i3 old false {ago(99)} {ago(25)}",
    "stillborn": f"i4 stillborn false {ago(25)} {NEVER}",
}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The program, a host with four containers, and scratch directories, one of which has none."""
    program = module_at(ROOT / "roles/retention/files/finished_runs.py")
    program.asked = []

    def run(*command: str) -> str:
        program.asked.append(command[1:])
        answers = {"ls": "\n".join(CONTAINERS), "inspect": "\n".join(CONTAINERS.values())}
        return answers.get(command[2] if command[1] == "container" else "", '{"runs": 1, "events": 2, "printed": 3}\n')

    monkeypatch.setattr(program, "run", run)
    monkeypatch.setattr(program, "SCRATCH", tmp_path)
    for name in (*CONTAINERS, "gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spill").touch()
    return program


def later(hours: float) -> datetime:
    """Give a moment after the directories of the test were made."""
    return datetime.now(tz=UTC) + timedelta(hours=hours)


def test_containers_go_some_hours_after_their_end(program: ModuleType) -> None:
    assert program.retain(24, False, NOW)["containers"] == 2
    assert program.asked[-1] == ("rm", "--volumes", "i3", "i4")


def test_scratch_directories_go_with_their_containers(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "containers", lambda: [("i1", "works", True, NOW), ("i2", "ended", False, later(2))])
    assert program.retain(24, False, later(2)) == {"containers": 0, "scratch": 3}
    assert sorted(os.listdir(program.SCRATCH)) == ["ended", "works"]


def test_directory_whose_container_is_about_to_be_made_stays(program: ModuleType) -> None:
    assert program.retain(24, False, datetime.now(tz=UTC))["scratch"] == 0
    assert "gone" in os.listdir(program.SCRATCH)


def test_dry_run_only_counts(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--dry-run", "--hours=24", "--days=90"]) == 0
    assert capsys.readouterr().out.startswith('Would remove {"containers": ')
    assert not [asked for asked in program.asked if asked[0] == "rm"]
    assert program.asked[-1][-1] == "--dry-run"
    assert len(os.listdir(program.SCRATCH)) == 5


def test_failure_is_a_sentence(
    program: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: str) -> str:
        raise program.Failure("'docker exec' failed: no such container")

    monkeypatch.setattr(program, "run", refuse)
    assert program.main(["--hours=24", "--days=90"]) == 1
    assert capsys.readouterr().err == "'docker exec' failed: no such container\n"
