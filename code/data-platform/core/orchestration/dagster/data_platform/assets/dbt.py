"""The dbt project's models as assets and its tests as asset checks."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dagster as dg
from dagster_dbt import dbt_assets

from data_platform.resources import DUCKDB_POOL, Dbt, Warehouse, dbt_project


@dbt_assets(manifest=dbt_project.manifest_path, project=dbt_project, pool=DUCKDB_POOL)
def dbt_models(context: dg.AssetExecutionContext, dbt: Dbt, warehouse: Warehouse) -> Iterator[Any]:
    """Build and test the selected models; dbt's artifacts live in scratch for as long as the step runs."""
    parsed = dbt_project.manifest_path.with_name("partial_parse.msgpack")
    with TemporaryDirectory(prefix="dbt-", dir=warehouse.scratch) as target:
        if parsed.exists():
            # dagster-dbt would copy this file with its mode, and dbt must be able to overwrite it.
            shutil.copyfile(parsed, Path(target, parsed.name))
        yield from dbt.cli(["build"], context=context, target_path=Path(target)).stream().fetch_row_counts()
