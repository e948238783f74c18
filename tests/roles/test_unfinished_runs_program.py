"""The program that tells which runs have not ended, with a stand-in for the engine; Molecule has the real one."""

import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT, module_at


@pytest.mark.parametrize(
    ("arguments", "states"),
    [
        (["--in-progress"], {"STARTING", "STARTED", "CANCELING"}),
        ([], {"STARTING", "STARTED", "CANCELING", "NOT_STARTED", "QUEUED", "MANAGED"}),
    ],
)
@pytest.mark.parametrize("status", [0, 1])
def test_the_daemon_s_container_is_asked(
    arguments: list[str], states: set[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = module_at(ROOT / "roles/dagster/files/unfinished_runs.py")
    asked: list[list[str]] = []

    def answer(command: list[str], check: bool) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", answer)
    assert program.main(arguments) == status
    ((*start, code), given) = (asked[0][:6], asked[0][6:])
    assert start == ["docker", "exec", "dagster-daemon", "python", "-c"]
    compile(code, "PROGRAM", "exec")
    assert set(given) == states
