"""What the pipelines work with: the DuckDB warehouse and dbt, configured by environment variables.

| variable                      | meaning                                              | default                      |
|-------------------------------|------------------------------------------------------|------------------------------|
| `DATA_PLATFORM_WAREHOUSE`     | DuckDB file; dbt expects it to be named `warehouse.*`| `warehouse.duckdb` in `/tmp` |
| `DATA_PLATFORM_DUCKDB_MEMORY` | memory limit of each DuckDB process, e.g. `1GB`      | `1GB`                        |
| `DATA_PLATFORM_SCRATCH`       | writable directory for spills and dbt's run artifacts| the system's temp directory  |
| `DATA_PLATFORM_LANDING`       | directory that files to be loaded are dropped in     | `landing` in `/tmp`          |
| `DATA_PLATFORM_PUBLISHED`     | directory of the snapshots for readers               | `published` in `/tmp`        |
| `DATA_PLATFORM_SNAPSHOTS`     | how many snapshots are kept                          | 2                            |

`profiles.yml` reads the same variables. The code tree may be read-only: the dbt project is parsed at image build, and
every dbt run writes to a directory of its own under scratch. If the image is built with the run-time values of these
variables, dbt reuses that parse in every run.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import metadata
from pathlib import Path

import dagster as dg
import duckdb
from dagster_dbt import DbtCliResource, DbtProject
from packaging.version import Version

DUCKDB_POOL = "duckdb"

os.environ.setdefault("DATA_PLATFORM_WAREHOUSE", str(Path(tempfile.gettempdir(), "warehouse.duckdb")))
os.environ.setdefault("DATA_PLATFORM_DUCKDB_MEMORY", "1GB")
os.environ.setdefault("DATA_PLATFORM_SCRATCH", tempfile.gettempdir())
os.environ.setdefault("DATA_PLATFORM_LANDING", str(Path(tempfile.gettempdir(), "landing")))
os.environ.setdefault("DATA_PLATFORM_PUBLISHED", str(Path(tempfile.gettempdir(), "published")))
os.environ.setdefault("DATA_PLATFORM_SNAPSHOTS", "2")


class WarehouseError(RuntimeError):
    """The DuckDB warehouse cannot be opened."""


class Warehouse(dg.ConfigurableResource):
    """The DuckDB warehouse, a single file with a single writer: every step that opens it belongs to `DUCKDB_POOL`."""

    path: str
    memory_limit: str
    scratch: str

    @contextmanager
    def connect(self, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open the warehouse for as long as the `with` block lasts.

        Raises:
            WarehouseError: The file cannot be opened; the message names the file and the remedy.
        """
        config = {
            "memory_limit": self.memory_limit,
            "temp_directory": str(Path(self.scratch, "duckdb")),
            "autoinstall_known_extensions": "false",
        }
        try:
            connection = duckdb.connect(self.path, read_only=read_only, config=config)
        except duckdb.Error as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise WarehouseError(
                f"Cannot open the warehouse {self.path} ({reason}): check that DATA_PLATFORM_WAREHOUSE names a file in "
                "an existing directory writable by this user, and that no process outside Dagster holds it open."
            ) from error
        with connection:
            yield connection


class Landing(dg.ConfigurableResource):
    """The directory that people drop files in, which `data_platform.landing` describes."""

    path: str

    def folder(self) -> Path:
        """Return the directory; it is made where it is missing, as in a development checkout."""
        folder = Path(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class Published(dg.ConfigurableResource):
    """The snapshots that readers get, which `data_platform.publishing` describes."""

    path: str
    kept: int


class Dbt(DbtCliResource):
    """The dbt command line, neither asked for its version nor loaded into this process: both take seconds."""

    @cached_property
    def _cli_version(self) -> Version:
        # dagster-dbt runs `dbt --version`, which takes seconds and asks PyPI for newer versions.
        return Version(metadata.version("dbt-core"))

    def _initialize_dbt_core_adapter(self, args: Sequence[str]) -> None:
        """Have none: `count_rows` needs no dbt."""


def count_rows(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    """Return the number of rows of a table."""
    return connection.table(table).count("*").fetchone()[0]


def preview(connection: duckdb.DuckDBPyConnection, query: str, rows: int = 5) -> dg.MarkdownMetadataValue:
    """Return the first rows of a query as a Markdown table."""
    result = connection.execute(f"select columns(*)::varchar from ({query}) limit {rows}")
    header = [column[0] for column in result.description]
    lines = [header, ["---"] * len(header), *(["" if v is None else v for v in row] for row in result.fetchall())]
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(line)} |" for line in lines))


def load_dbt_project() -> DbtProject:
    """Return the dbt project with its manifest, parsing it first in a development checkout that has none.

    Under `dagster dev` the project is parsed on every load, so that edited models show up after a reload.

    Raises:
        RuntimeError: There is no manifest and no right to write one.
    """
    project = DbtProject(Path(__file__).parents[3] / "processing" / "dbt")
    project.prepare_if_dev()
    if not project.manifest_path.exists():
        if not os.access(project.project_dir, os.W_OK):
            raise RuntimeError(
                f"{project.manifest_path} is missing and cannot be written here: run `dbt parse` when building images."
            )
        project.preparer.prepare(project)
    return project


dbt_project = load_dbt_project()

RESOURCES = {
    "warehouse": Warehouse(
        path=dg.EnvVar("DATA_PLATFORM_WAREHOUSE"),
        memory_limit=dg.EnvVar("DATA_PLATFORM_DUCKDB_MEMORY"),
        scratch=dg.EnvVar("DATA_PLATFORM_SCRATCH"),
    ),
    "landing": Landing(path=dg.EnvVar("DATA_PLATFORM_LANDING")),
    "published": Published(path=dg.EnvVar("DATA_PLATFORM_PUBLISHED"), kept=dg.EnvVar.int("DATA_PLATFORM_SNAPSHOTS")),
    "dbt": Dbt(project_dir=dbt_project),
}
