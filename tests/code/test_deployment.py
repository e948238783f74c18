"""The code runs as it does on a host: from a tree it cannot write to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
from conftest import ALL_MONTHS, FLIGHTS, query

EVERYTHING = f"""
import dagster as dg
from data_platform.definitions import defs

job = defs.resolve_job_def("everything")
result = job.execute_in_process(instance=dg.DagsterInstance.ephemeral(), tags={ALL_MONTHS})
assert all(check.passed for check in result.get_asset_check_evaluations())
"""
WITHOUT_ROOTS_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


def copy_read_only(code: Path, root: Path) -> None:
    shutil.copytree(code, root, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def run(program: str, root: Path, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WITHOUT_ROOTS_RIGHTS, sys.executable, "-c", program],
        cwd=root / "core" / "orchestration" / "dagster",
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
    )


def test_everything_again_from_a_read_only_tree_changes_nothing(
    everything: dg.ExecuteInProcessResult, code: Path, warehouse_path: Path, tmp_path: Path
) -> None:
    routes = "select carrier, origin, dest, flights, on_time from marts.delays_by_carrier_route order by all"
    before = query(warehouse_path, routes)
    copy_read_only(code, tmp_path / "code")

    result = run(EVERYTHING, tmp_path / "code", tmp_path)

    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert query(warehouse_path, "select count(*) from raw.flights") == [(FLIGHTS,)]
    assert query(warehouse_path, routes) == before
    assert list(Path(os.environ["DATA_PLATFORM_SCRATCH"]).iterdir()) == []


def test_a_missing_manifest_is_named(code: Path, tmp_path: Path) -> None:
    shutil.copytree(code, tmp_path / "unparsed", ignore=shutil.ignore_patterns("__pycache__", "target"))
    copy_read_only(tmp_path / "unparsed", tmp_path / "code")

    result = run("import data_platform.definitions", tmp_path / "code", tmp_path)

    assert "manifest.json is missing and cannot be written here: run `dbt parse`" in result.stderr
