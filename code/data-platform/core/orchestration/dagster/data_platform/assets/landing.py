"""The landing folder's ledger as an asset, and what lands as materialisations of the tables that it lands in."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import dagster as dg
import duckdb

from data_platform import assets
from data_platform.assets.ingest import LANDED_FLIGHTS, flights
from data_platform.landing import Outcome, land, scan
from data_platform.loading import columns_of, identifier
from data_platform.resources import DUCKDB_POOL, Landing, Warehouse, count_rows, preview

LEDGER = dg.AssetKey(["landing", "files"])
ACCEPTED = dg.AssetCheckSpec(
    "every_file_was_accepted",
    asset=LEDGER,
    description="The newest run refused no file. Those that it did refuse are in the folder quarantine.",
)
KEYED = {"flights": LANDED_FLIGHTS}
SHOWN = 100


@dg.asset(key=LEDGER, group_name="landing", kinds={"duckdb"}, pool=DUCKDB_POOL, check_specs=[ACCEPTED])
def landed_files(
    context: dg.AssetExecutionContext, warehouse: Warehouse, landing: Landing
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult]:
    """Every file that was landed, one row each: dataset, SHA-256, name, bytes, rows, time and run.

    Materialising it loads what waits in the landing folder into `raw.<dataset>`, one table per folder there.
    """
    root = landing.folder()
    waiting = scan(root)
    outcomes: list[Outcome] = []
    with warehouse.connect() as connection:
        landed = land(connection, root, waiting, context.run.run_id, KEYED, tables_of_assets() - KEYED.keys())
        for dataset, of_dataset in groupby(landed, key=lambda outcome: outcome.dataset):
            outcomes += (several := list(of_dataset))
            for outcome in [outcome for outcome in several if outcome.reason][:SHOWN]:
                context.log.warning(outcome.message)
            if any(outcome.state == "landed" for outcome in several):
                for event in materializations(connection, context.instance, dataset, several):
                    context.log_event(event)
        files = count_rows(connection, "landing.files")

    wrong = [outcome for outcome in outcomes if outcome.reason]
    records = [(outcome.path, outcome.line, outcome.reason) for outcome in wrong]
    records += [(path, None, reason) for path, reason in waiting.stuck.items()]
    yield dg.AssetCheckResult(passed=not records, metadata=reasons(records))
    if failed := [outcome for outcome in wrong if outcome.state == "failed"]:
        raise dg.Failure(
            f"{len(failed)} files wait on, since something else than the files is wrong: {failed[0].message}. "
            "Once that is mended, run land_files again; the sensor does so within ten minutes."
        )
    states = [outcome.state for outcome in outcomes]
    counts = {state: states.count(state) for state in ("landed", "duplicate", "refused")}
    yield dg.MaterializeResult(metadata={"dagster/row_count": files, **counts, "outcomes": table(outcomes)})


def tables_of_assets() -> set[str]:
    """Return the tables of the schema raw that assets of this package make."""
    keys = set().union(*(asset.keys for asset in dg.load_assets_from_package_module(assets)))
    return {key.path[1] for key in keys if key.path[0] == "raw"}


def materializations(
    connection: duckdb.DuckDBPyConnection, instance: dg.DagsterInstance, dataset: str, outcomes: Sequence[Outcome]
) -> Iterator[dg.AssetMaterialization]:
    """Give what the catalogue shall show of a dataset's table, for a partitioned one by partition.

    A month of flights that was never ingested does not count as materialised because some flights of it landed.
    """
    key = dg.AssetKey(["raw", dataset])
    name = f"raw.{identifier(dataset)}"
    landed = [outcome for outcome in outcomes if outcome.state == "landed"]
    whole = {
        "dagster/row_count": count_rows(connection, name),
        "dagster/column_schema": dg.TableSchema(
            [dg.TableColumn(column, kind) for column, kind in columns_of(connection, "raw", dataset).items()]
        ),
        "landed_files": len(landed),
        "landed_rows": sum(outcome.loaded.rows for outcome in landed),
        "preview": preview(connection, f"from {name}"),
    }
    touched = frozenset().union(*(outcome.loaded.partitions for outcome in landed))
    ingested = touched & instance.get_materialized_partitions(key) if key == flights.key else frozenset()
    for partition in sorted(ingested):
        of_partition = f"from {name} where {KEYED[dataset].partition} = '{partition}'"
        (rows,) = connection.execute(f"select count(*) {of_partition}").fetchone()
        metadata = {"dagster/partition_row_count": rows, "preview": preview(connection, of_partition)}
        yield dg.AssetMaterialization(key, partition=partition, metadata=whole | metadata)
    if not ingested:
        yield dg.AssetMaterialization(key, metadata=whole)


def reasons(records: Sequence[tuple[str, int | None, str]]) -> dict[str, dg.MetadataValue]:
    """Return as metadata of the check which files were refused, in which line and why."""
    return {
        "refused": dg.MetadataValue.int(len(records)),
        "reasons": dg.MetadataValue.table(
            [dg.TableRecord({"file": file, "line": line, "reason": reason}) for file, line, reason in records[:SHOWN]],
            dg.TableSchema([dg.TableColumn("file"), dg.TableColumn("line", "int"), dg.TableColumn("reason")]),
        ),
    }


def table(outcomes: Sequence[Outcome]) -> dg.TableMetadataValue:
    """Return what became of each of the first files."""
    columns = [dg.TableColumn("file"), dg.TableColumn("outcome"), dg.TableColumn("rows", "int")]
    return dg.MetadataValue.table(
        [
            dg.TableRecord({"file": outcome.path, "outcome": outcome.state, "rows": outcome.loaded.rows})
            for outcome in outcomes[:SHOWN]
        ],
        dg.TableSchema(columns),
    )
