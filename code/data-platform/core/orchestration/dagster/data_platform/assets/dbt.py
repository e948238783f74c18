"""The dbt project's models as assets and its tests as asset checks."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dagster as dg
import duckdb
from dagster_dbt import DagsterDbtCliRuntimeError, DbtCliInvocation, dbt_assets

from data_platform.resources import DUCKDB_POOL, Dbt, Warehouse, dbt_project


@dbt_assets(manifest=dbt_project.manifest_path, project=dbt_project, pool=DUCKDB_POOL)
def dbt_models(context: dg.AssetExecutionContext, dbt: Dbt, warehouse: Warehouse) -> Iterator[Any]:
    """Build and test the selected models; dbt's artifacts live in scratch for as long as the step runs."""
    parsed = dbt_project.manifest_path.with_name("partial_parse.msgpack")
    with TemporaryDirectory(prefix="dbt-", dir=warehouse.scratch) as target:
        if parsed.exists():
            # dagster-dbt would copy this file with its mode, and dbt must be able to overwrite it.
            shutil.copyfile(parsed, Path(target, parsed.name))
        invocation = dbt.cli(["build"], context=context, target_path=Path(target))
        yield from with_row_counts(invocation, warehouse)


def with_row_counts(invocation: DbtCliInvocation, warehouse: Warehouse) -> Iterator[Any]:
    """Yield the events of a dbt command once it has let go of the warehouse, those of tables with their rows."""
    events: list[Any] = []
    failure = None
    try:
        for event in invocation.stream():
            events.append(event)
    except DagsterDbtCliRuntimeError as error:
        failure = error
    with warehouse.connect(read_only=True) as connection:
        for event in events:
            yield counted(event, invocation.manifest["nodes"], connection)
    if failure:
        raise failure


def counted(event: Any, nodes: Mapping[str, Any], connection: duckdb.DuckDBPyConnection) -> Any:
    """Return an event of dbt, with the number of rows if it says that a table was made."""
    if not isinstance(event, dg.Output | dg.AssetMaterialization):
        return event
    node = nodes[event.metadata["unique_id"].value]
    if node["config"]["materialized"] == "view":
        return event
    (rows,) = connection.execute(f"select count(*) from {node['relation_name']}").fetchone()
    return event.with_metadata({**event.metadata, "dagster/row_count": rows})
