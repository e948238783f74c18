"""What is done to a dbt project when the image of its location is built."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from data_platform_runtime import prepare_dbt

PROJECT = Path(__file__).parents[2] / "code" / "data-platform" / "core" / "processing" / "dbt"
STAND_IN = f"""#!{sys.executable} -IS
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=calls)
sys.exit(7 if sys.argv[4] in (here / "fails").read_text() else 0)
"""


class Dbt:
    """A stand-in for dbt, which fails where it is told to and writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        """Make it in ``folder``."""
        self.folder = folder
        folder.mkdir()
        (folder / "dbt").write_text(STAND_IN)
        (folder / "dbt").chmod(0o755)
        self.fails("")

    def fails(self, command: str) -> None:
        """Say which command fails."""
        (self.folder / "fails").write_text(command)

    @property
    def calls(self) -> list[tuple[str, dict[str, str]]]:
        """Give the commands that it was given, each with its environment."""
        file = self.folder / "calls"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [(arguments[3], environment) for arguments, environment in lines]


@pytest.fixture
def dbt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dbt:
    """A stand-in for dbt that comes first on the path."""
    stand_in = Dbt(tmp_path / "bin")
    monkeypatch.setenv("PATH", os.pathsep.join([str(stand_in.folder), os.environ["PATH"]]))
    return stand_in


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with packages, which the image is told of."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "packages.yml").touch()
    monkeypatch.setenv("DBT_PROJECT", str(project))
    return project


@pytest.mark.parametrize(
    ("files", "wanted", "profiles"),
    [
        ([], ["parse"], False),
        (["packages.yml"], ["deps", "parse"], False),
        (["dependencies.yml"], ["deps", "parse"], False),
        (["packages.yml", "dependencies.yml", "profiles.yml"], ["deps", "parse"], True),
        (["profiles.yml", "package-lock.yml"], ["parse"], True),
    ],
)
def test_dbt_does_what_the_projects_files_ask_for(
    files: list[str], wanted: list[str], profiles: bool, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).touch()
    where = ["--project-dir", str(tmp_path), *(["--profiles-dir", str(tmp_path)] if profiles else [])]
    start = ["dbt", "--quiet", "--log-path", "/tmp"]
    assert prepare_dbt.commands(tmp_path) == [[*start, command, *where] for command in wanted]


@pytest.mark.parametrize("value", [None, ""])
def test_location_without_dbt_needs_none(value: str | None, dbt: Dbt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DBT_PROJECT", raising=False)
    if value is not None:
        monkeypatch.setenv("DBT_PROJECT", value)
    assert prepare_dbt.main() == 0
    assert dbt.calls == []


def test_dbt_finds_the_locations_environment(dbt: Dbt, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE", "test")
    monkeypatch.setenv("DBT_ENVIRONMENT", '{"STAGE": "production", "THREADS": 4}')
    assert prepare_dbt.main() == 0
    assert [command for command, _ in dbt.calls] == ["deps", "parse"]
    for _, environment in dbt.calls:
        assert environment == environment | {"STAGE": "production", "THREADS": "4", "DBT_PROJECT": str(project)}


def test_environment_may_be_empty(dbt: Dbt, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBT_ENVIRONMENT", "")
    assert prepare_dbt.main() == 0
    assert len(dbt.calls) == 2


@pytest.mark.parametrize(("fails", "tried"), [("deps", ["deps"]), ("parse", ["deps", "parse"])])
def test_failure_ends_the_build_and_names_the_project(
    fails: str, tried: list[str], dbt: Dbt, project: Path, capsys: pytest.CaptureFixture
) -> None:
    dbt.fails(fails)
    assert prepare_dbt.main() == 7
    assert capsys.readouterr().err == f"dbt {fails} failed in {project}: correct the project as dbt says above.\n"
    assert [command for command, _ in dbt.calls] == tried


def test_dbt_itself_parses_with_that_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "dbt"
    shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns("target", "logs"))
    (project / "models" / "stage.sql").write_text("select '{{ env_var('STAGE') }}' as stage")
    monkeypatch.delenv("STAGE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DBT_PROJECT", str(project))
    monkeypatch.setenv("DBT_ENVIRONMENT", '{"STAGE": "production"}')
    assert prepare_dbt.main() == 0
    nodes = json.loads((project / "target" / "manifest.json").read_text())["nodes"]
    assert "model.data_platform.stage" in nodes
