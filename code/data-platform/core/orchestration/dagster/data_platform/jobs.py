"""Jobs: what an operator or a schedule launches."""

from pathlib import Path
from time import perf_counter

import dagster as dg

from data_platform.publishing import publish
from data_platform.resources import DUCKDB_POOL, Published, Warehouse

SMOKE_TAG = "data_platform/smoke"

LANDING = dg.AssetSelection.groups("landing")

everything = dg.define_asset_job(
    "everything",
    selection=dg.AssetSelection.all() - LANDING,
    description=(
        "Materialises every asset but the landing folder's. One partition loads one month; the run tags "
        "dagster/asset_partition_range_start and dagster/asset_partition_range_end load a range of months in one run."
    ),
)

refresh_marts = dg.define_asset_job(
    "refresh_marts",
    selection=dg.AssetSelection.all() - LANDING - dg.AssetSelection.assets(["raw", "flights"]),
    description="Reloads the reference tables and rebuilds models and reports from the flights already ingested.",
)

land_files = dg.define_asset_job(
    "land_files",
    selection=LANDING,
    tags={"dagster/max_runtime": 3600},  # a run that died with its code server must not keep files waiting for a day
    description="Loads what waits in the landing folder; the sensor landing_folder launches it when something does.",
)


@dg.op(pool=DUCKDB_POOL)
def write_and_read_back(context: dg.OpExecutionContext, warehouse: Warehouse) -> None:
    """Write to the warehouse and to the metadata database, read both back and report the milliseconds each took."""
    started = perf_counter()
    with warehouse.connect() as connection:
        connection.execute("create schema if not exists platform")
        connection.execute("create or replace table platform.smoke as select ? as run_id", [context.run_id])
    with warehouse.connect(read_only=True) as connection:
        stored = connection.table("platform.smoke").fetchone()
    if stored != (context.run_id,):
        raise dg.Failure(f"The warehouse {warehouse.path} returned {stored} instead of this run's id: check its disk.")
    warehouse_ms = 1000 * (perf_counter() - started)

    started = perf_counter()
    context.instance.add_run_tags(context.run_id, {SMOKE_TAG: context.run_id})
    run = context.instance.get_run_by_id(context.run_id)
    if run is None or run.tags.get(SMOKE_TAG) != context.run_id:
        raise dg.Failure("The metadata database did not return the tag just written to this run: check its log.")
    metadata_ms = 1000 * (perf_counter() - started)

    context.add_output_metadata({"warehouse_ms": warehouse_ms, "metadata_database_ms": metadata_ms})
    context.log.info(f"warehouse: {warehouse_ms:.0f} ms, metadata database: {metadata_ms:.0f} ms")


@dg.job(tags={"dagster/priority": "10"})
def smoke() -> None:
    """Proves in seconds that runs start and that the warehouse and the metadata database can be written and read.

    It goes before all that waits.
    """
    write_and_read_back()


@dg.op(pool=DUCKDB_POOL)
def take_snapshot(context: dg.OpExecutionContext, warehouse: Warehouse, published: Published) -> None:
    """Publish what the warehouse holds now."""
    started = perf_counter()
    snapshot = publish(warehouse, Path(published.path), published.kept)
    seconds = perf_counter() - started
    context.add_output_metadata({"snapshot": snapshot.name, "bytes": snapshot.bytes, "seconds": seconds})


@dg.job(tags={"dagster/priority": "1"})
def publish_warehouse() -> None:
    """Gives readers a new snapshot; the sensor changed_warehouse launches it when something was written."""
    take_snapshot()
