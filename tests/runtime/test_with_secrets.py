"""The program that gives secrets to a command, run as a unit runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PACKAGES

SECRETS = {"TOKEN": "sesame $HOME \"'\\ é\nnext", "EMPTY": "", "KEPT": "over"}
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"
BROKEN = {
    "empty": b"",
    "cut short": b'{"TOKEN": "sesame"',
    "a list": b'["sesame"]',
    "a text": b'"sesame"',
    "not a text at all": b'{"TOKEN": "sesame\xff"}',
}


def run(file: Path, *command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command with the secrets in a file."""
    return subprocess.run(
        [sys.executable, "-m", "data_platform_runtime.with_secrets", file, *command],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGES), "PYTHONDONTWRITEBYTECODE": "1", "KEPT": "under"},
        capture_output=True,
        check=False,
        **options,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with secrets."""
    file = tmp_path / "core.json"
    file.write_text(json.dumps(SECRETS))
    return file


def test_command_finds_the_secrets_in_its_environment(file: Path) -> None:
    environment = json.loads(run(file, sys.executable, "-c", SHOW).stdout)
    assert environment == environment | SECRETS | {"PATH": os.environ["PATH"]}


def test_values_of_other_kinds_are_texts(file: Path) -> None:
    file.write_text('{"PORT": 5432, "RATIO": 0.5}')
    environment = json.loads(run(file, sys.executable, "-c", SHOW).stdout)
    assert environment == environment | {"PORT": "5432", "RATIO": "0.5"}


def test_secrets_are_on_no_command_line(file: Path) -> None:
    assert run(file, "sh", "-c", "cat /proc/$$/cmdline").stdout == b"sh\0-c\0cat /proc/$$/cmdline\0"


@pytest.mark.parametrize("status", [0, 1, 7])
def test_exit_status_passes_through(status: int, file: Path) -> None:
    assert run(file, "sh", "-c", f"exit {status}").returncode == status


def test_command_takes_the_programs_place(file: Path) -> None:
    assert run(file, "sh", "-c", "kill -TERM $$").returncode == -15


def test_input_and_output_are_the_commands(file: Path) -> None:
    sent = bytes(range(256)) * 1000
    result = run(file, "sh", "-c", "tee /dev/stderr", input=sent)
    assert (result.stdout, result.stderr) == (sent, sent)


@pytest.mark.parametrize("content", [None, *BROKEN])
def test_secrets_that_cannot_be_read_are_told_in_one_sentence(content: str | None, file: Path) -> None:
    file.unlink()
    if content:
        file.write_bytes(BROKEN[content])
    marker = file.with_name("started")
    result = run(file, "touch", str(marker))
    reason = "it holds no JSON object of names and values" if content else "No such file or directory"
    assert result.stderr.decode() == f"The secrets in {file} cannot be read ({reason}): run the playbook again.\n"
    assert (result.returncode, result.stdout, marker.exists()) == (1, b"", False)
