"""Point the code at a temporary warehouse and parse dbt in a copy, so that tests leave the checkout untouched."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import duckdb
import pytest

CODE = Path(__file__).parents[2] / "code" / "data-platform"
SOURCES_ONLY = shutil.ignore_patterns("__pycache__", "target", "logs")
FLIGHTS = 336_776
ALL_MONTHS = {
    "dagster/asset_partition_range_start": "2013-01-01",
    "dagster/asset_partition_range_end": "2013-12-01",
}

os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
sys.dont_write_bytecode = True


def query(path: Path, sql: str) -> list[tuple]:
    """Return the rows of a query on a DuckDB file that nobody else holds open."""
    with duckdb.connect(path, read_only=True) as connection:
        return connection.execute(sql).fetchall()


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory, warehouse_path: Path) -> Path:
    """The code as an image holds it: copied, with dbt parsed for this session's warehouse."""
    root = tmp_path_factory.mktemp("code") / "data-platform"
    shutil.copytree(CODE, root, ignore=SOURCES_ONLY)
    dbt = "core/processing/dbt"
    parse = ["dbt", "--no-use-colors", "parse", "--project-dir", dbt, "--profiles-dir", dbt, "--log-path", "../logs"]
    subprocess.run(parse, cwd=root, env={**os.environ, "HOME": str(root.parent)}, check=True, capture_output=True)
    return root


@pytest.fixture(scope="session")
def warehouse_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The DuckDB file of this session."""
    path = tmp_path_factory.mktemp("warehouse") / "warehouse.duckdb"
    os.environ["DATA_PLATFORM_WAREHOUSE"] = str(path)
    os.environ["DATA_PLATFORM_SCRATCH"] = str(tmp_path_factory.mktemp("scratch"))
    os.environ["DATA_PLATFORM_LANDING"] = str(tmp_path_factory.mktemp("landing"))
    return path


@pytest.fixture(scope="session")
def defs(code: Path) -> dg.Definitions:
    """The platform's own definitions."""
    sys.path.insert(0, str(code / "core" / "orchestration" / "dagster"))
    from data_platform.definitions import defs

    return defs


@pytest.fixture(scope="session")
def instance() -> Iterator[dg.DagsterInstance]:
    """A throw-away Dagster instance."""
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture(scope="session")
def everything(defs: dg.Definitions, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """The first of all runs: every asset, every month."""
    return defs.resolve_job_def("everything").execute_in_process(instance=instance, tags=ALL_MONTHS)
