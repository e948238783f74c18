"""Two assets, a check and a job on the shared DuckDB warehouse: all a code location needs."""

import os
import tempfile
from pathlib import Path

import dagster as dg
import duckdb

WAREHOUSE = os.environ.get("DATA_PLATFORM_WAREHOUSE", str(Path(tempfile.gettempdir(), "warehouse.duckdb")))
MEMORY_LIMIT = os.environ.get("DATA_PLATFORM_DUCKDB_MEMORY", "1GB")


def connect() -> duckdb.DuckDBPyConnection:
    """Open the warehouse; use it as a context manager and only in steps of the pool `duckdb`, as it has one writer."""
    return duckdb.connect(WAREHOUSE, config={"memory_limit": MEMORY_LIMIT})


@dg.asset(key_prefix="examples", group_name="examples", kinds={"duckdb"}, pool="duckdb")
def measurements() -> dg.MaterializeResult:
    """A thousand made-up temperatures in degrees Celsius, the same on every run."""
    with connect() as connection:
        connection.execute("create schema if not exists examples")
        connection.execute(
            "create or replace table examples.measurements as "
            "select range as hour, 15 + 10 * sin(range * pi() / 12) as celsius from range(1000)"
        )
    return dg.MaterializeResult(metadata={"dagster/row_count": 1000})


@dg.asset(key_prefix="examples", group_name="examples", deps=[measurements], kinds={"duckdb"}, pool="duckdb")
def daily_means(context: dg.AssetExecutionContext) -> None:
    """Mean temperature in degrees Celsius per day."""
    with connect() as connection:
        connection.execute(
            "create or replace table examples.daily_means as "
            "select hour // 24 as day, avg(celsius) as celsius from examples.measurements group by day"
        )
        context.add_output_metadata({"dagster/row_count": connection.table("examples.daily_means").shape[0]})


@dg.asset_check(asset=daily_means, pool="duckdb")
def means_are_plausible() -> dg.AssetCheckResult:
    """Daily means lie between 0 and 30 degrees Celsius."""
    with connect() as connection:
        (implausible,) = connection.execute(
            "select count(*) from examples.daily_means where celsius not between 0 and 30"
        ).fetchone()
    return dg.AssetCheckResult(passed=implausible == 0, metadata={"implausible": implausible})


defs = dg.Definitions(
    assets=[measurements, daily_means],
    asset_checks=[means_are_plausible],
    jobs=[dg.define_asset_job("examples", selection=dg.AssetSelection.groups("examples"))],
    executor=dg.in_process_executor,
)
