"""Code is loaded before it is put in the place of that which serves, with Dagster and dbt as they are."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import PACKAGES

DBT = PACKAGES.parents[3] / "code" / "data-platform" / "core" / "processing" / "dbt"
GOOD = """
import dagster as dg
@dg.job
def job(): ...
@dg.asset
def asset(): ...
@dg.sensor(job=job)
def here(): ...
defs = dg.Definitions(assets=[asset], jobs=[job], sensors=[here])
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A location's code, and an instance."""
    from data_platform_runtime import rehearsal, with_database

    monkeypatch.setenv("DATA_PLATFORM_METADATA", "postgresql:///")
    monkeypatch.setattr(with_database, "wait", lambda address: None)
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "code").mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setattr(rehearsal, "CODE", tmp_path / "code")
    monkeypatch.setattr(rehearsal.plainly, "__defaults__", (tmp_path / "code",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "pipelines", raising=False)
    return tmp_path / "code"


def rehearse(code: Path, text: str) -> int:
    """Rehearse a module with this text; give the exit status."""
    from data_platform_runtime import rehearsal

    (code / "pipelines.py").write_text(text)
    return rehearsal.main(["--location-name=sales", f"--working-directory={code}", "--module-name=pipelines"])


def test_code_that_loads_is_accepted_without_a_word(code: Path, capsys: pytest.CaptureFixture) -> None:
    assert rehearse(code, GOOD) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "last", "line"),
    [
        ("import nowhere_to_be_found\n", "ModuleNotFoundError: No module named 'nowhere_to_be_found'", "line 1"),
        (f"{GOOD}\n1 / 0\n", "ZeroDivisionError: division by zero", "1 / 0"),
        ("def (\n", "SyntaxError: invalid syntax", "def ("),
        (
            GOOD.replace("assets=[asset]", "assets=[asset, dg.AssetSpec('asset')]"),
            "dagster._core.errors.DagsterInvalidDefinitionError: Duplicate asset key: AssetKey(['asset'])",
            "",
        ),
        ("", "No Definitions, RepositoryDefinition", ""),
    ],
)
def test_code_that_cannot_be_served_is_refused_with_its_own_lines_of_the_traceback(
    text: str, last: str, line: str, code: Path, capsys: pytest.CaptureFixture
) -> None:
    assert rehearse(code, text) == 1
    said = capsys.readouterr().err
    assert last in said
    assert line in said
    assert "site-packages" not in said


def test_what_is_switched_on_and_gone_is_named(code: Path, capsys: pytest.CaptureFixture) -> None:
    import dagster as dg
    from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteInstigatorOrigin, RemoteRepositoryOrigin
    from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus

    with dg.DagsterInstance.get() as instance:
        for location, name, status in [
            ("sales", "here", InstigatorStatus.RUNNING),
            ("sales", "gone", InstigatorStatus.RUNNING),
            ("sales", "gone_by_declaration", InstigatorStatus.DECLARED_IN_CODE),
            ("sales", "gone_and_off", InstigatorStatus.STOPPED),
            ("elsewhere", "other", InstigatorStatus.RUNNING),
        ]:
            server = GrpcServerCodeLocationOrigin("localhost", socket="/a", location_name=location)
            origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(server, "__repository__"), name)
            kind = dg._core.definitions.run_request.InstigatorType.SENSOR
            instance.add_instigator_state(InstigatorState(origin, kind, status))
    assert rehearse(code, GOOD) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{name} is switched on, and the new code of sales does not have it any more: it runs no longer."
        for name in ("gone", "gone_by_declaration")
    ]


def test_manifest_that_is_older_than_the_models_is_refused(
    code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from data_platform_runtime import prepare_dbt

    project = code / "dbt"
    shutil.copytree(DBT, project, ignore=shutil.ignore_patterns("target", "logs"))
    monkeypatch.setenv("DBT_PROJECT", str(project))
    monkeypatch.setenv("DAGSTER_CURRENT_IMAGE", "data-platform/code-x:1")
    monkeypatch.setenv("DATA_PLATFORM_WAREHOUSE", str(code / "warehouse.duckdb"))
    monkeypatch.setenv("DATA_PLATFORM_SCRATCH", str(code))
    assert prepare_dbt.main() == 0
    described = json.loads((project / "target" / "manifest.json").read_text())["nodes"]
    assert [name for name in described if name.startswith("model.")]
    assert rehearse(code, GOOD) == 0
    model = sorted((project / "models").rglob("*.sql"))[0]
    model.write_bytes(model.read_bytes().replace(b"\n", b"\r\n"))
    assert prepare_dbt.main() == 0
    assert rehearse(code, GOOD) == 0
    model.write_text(f"{model.read_text()}\n-- changed\n")
    assert rehearse(code, GOOD) == 1
    said = capsys.readouterr().err
    assert (
        f"dbt's manifest in the image data-platform/code-x:1 is older than {model.relative_to(project)}: remove" in said
    )
    (project / "target" / "manifest.json").write_text('{"metadata": {}, "files": []}')
    assert rehearse(code, GOOD) == 0
