"""Real flights through Dagster, dbt and DuckDB, launched as the UI does it."""

from typing import Any

import pytest
from conftest import MONTHS, Platform

FLIGHTS = 336_776
RANGE = {"dagster/asset_partition_range_start": MONTHS[0], "dagster/asset_partition_range_end": MONTHS[-1]}

TABLES = "select schema_name || '.' || table_name, estimated_size from duckdb_tables() where schema_name != 'platform'"

DEFINITIONS = """
{ repositoryOrError(repositorySelector: {repositoryName: "__repository__", repositoryLocationName: "core"}) {
    ... on Repository {
      jobs { name }
      schedules { name }
      assetNodes { assetKey { path } isPartitioned hasAssetChecks }
} } }
"""
CHECKS = """
{ assetNodes { assetKey { path } assetChecksOrError { ... on AssetChecks { checks {
    name executionForLatestMaterialization { status } } } } } }
"""
MATERIALIZE_ALL = """
mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
    __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }
"""
START_SCHEDULE = """
mutation($selector: ScheduleSelector!) { startSchedule(scheduleSelector: $selector) {
    ... on ScheduleStateResult { scheduleState { status } } } }
"""
SCHEDULE = """
query($selector: ScheduleSelector!) { scheduleOrError(scheduleSelector: $selector) {
    ... on Schedule { scheduleState { id status } } } }
"""
STOP_SCHEDULE = """
mutation($id: String!) { stopRunningSchedule(id: $id) { ... on ScheduleStateResult { scheduleState { status } } } }
"""
BACKFILL = "query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }"


def asset_keys(platform: Platform) -> list[list[str]]:
    """Give the keys of all assets."""
    nodes = platform.graphql(DEFINITIONS)["repositoryOrError"]["assetNodes"]
    return [node["assetKey"]["path"] for node in nodes]


def check_states(platform: Platform) -> dict[str, str | None]:
    """Give the outcome of each asset check on the newest materialisation."""
    states = {}
    for node in platform.graphql(CHECKS)["assetNodes"]:
        for check in node["assetChecksOrError"].get("checks", []):
            execution = check["executionForLatestMaterialization"]
            states["/".join([*node["assetKey"]["path"], check["name"]])] = execution and execution["status"]
    return states


def contents(platform: Platform) -> dict[str, int]:
    """Give the rows of each table of the warehouse, less the ledger of the landing folder."""
    names = [name for name, _ in platform.duckdb(TABLES) if name != "landing.files"]
    union = " union all ".join(f"select '{name}', count(*) from {name}" for name in names)
    return dict(platform.duckdb(union))


@pytest.fixture(scope="module")
def materialised(platform: Platform) -> dict[str, int]:
    """The rows of each table after everything was materialised in one run."""
    assert platform.finished(platform.launch("everything", RANGE)) == "SUCCESS"
    return contents(platform)


def test_all_definitions_are_loaded(platform: Platform) -> None:
    repository = platform.graphql(DEFINITIONS)["repositoryOrError"]
    assert {"everything", "refresh_marts", "smoke"} <= {job["name"] for job in repository["jobs"]}
    assert "daily_refresh" in {schedule["name"] for schedule in repository["schedules"]}
    keys = {"/".join(key) for key in asset_keys(platform)}
    assert {f"raw/{table}" for table in ("airlines", "airports", "flights", "planes", "weather")} <= keys
    assert {"marts/delays_by_carrier_route", "marts/delays_by_weather", "marts/on_time_daily"} <= keys


def test_smoke_job_reaches_database_and_warehouse(platform: Platform) -> None:
    run = platform.launch("smoke")
    assert platform.finished(run) == "SUCCESS"
    assert platform.duckdb("select run_id from platform.smoke") == [[run]]
    assert platform.postgres(f"select status from runs where run_id = '{run}'") == ["SUCCESS"]


def test_every_flight_is_in_the_warehouse(platform: Platform, materialised: dict[str, int]) -> None:
    assert materialised["raw.flights"] == FLIGHTS
    assert platform.duckdb("select sum(flights)::bigint from marts.on_time_daily") == [[FLIGHTS]]


def test_every_check_passed(platform: Platform, materialised: dict[str, int]) -> None:
    states = check_states(platform)
    assert len(states) > 30
    not_passed = {name for name, state in states.items() if state != "SUCCEEDED"}
    assert not_passed - {"landing/files/every_file_was_accepted"} == set()  # that one waits for files, not for this job


@pytest.mark.slow  # the daemon looks after backfills every 30 s
def test_materialize_all_of_the_ui_gives_the_same_rows(platform: Platform, materialised: dict[str, int]) -> None:
    selection = [{"path": key} for key in asset_keys(platform)]
    params = {"assetSelection": selection, "partitionNames": MONTHS, "tags": [], "title": "all"}
    launched = platform.graphql(MATERIALIZE_ALL, params=params)["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched
    finished = platform.wait(
        lambda: platform.graphql(BACKFILL, id=launched["backfillId"])["partitionBackfillOrError"]["status"],
        {"COMPLETED_SUCCESS", "COMPLETED_FAILED", "COMPLETED", "FAILED", "CANCELED"},
        400,
    )
    assert finished == "COMPLETED_SUCCESS"
    assert contents(platform) == materialised


def test_metadata_is_in_postgres_and_nowhere_else(host: Any, platform: Platform, materialised: dict[str, int]) -> None:
    tables = ["runs", "event_logs", "snapshots", "daemon_heartbeats", "asset_keys", "asset_check_executions"]
    counts = platform.postgres(" union all ".join(f"select '{name}', count(*) from {name}" for name in tables))
    assert [line for line in counts if line.endswith("|0")] == []
    assert host.run("find /var/lib/data-platform -name '*.db'").stdout == ""


def test_a_schedule_that_was_switched_on_stays_on(host: Any, platform: Platform) -> None:
    selector = {"scheduleName": "daily_refresh", "repositoryName": "__repository__", "repositoryLocationName": "core"}
    assert platform.graphql(START_SCHEDULE, selector=selector)["startSchedule"]["scheduleState"]["status"] == "RUNNING"
    host.check_output("systemctl restart 'dagster-*'")
    schedule = platform.graphql(SCHEDULE, selector=selector)["scheduleOrError"]
    assert schedule["scheduleState"]["status"] == "RUNNING"
    assert platform.postgres("select count(*) from instigators where status = 'RUNNING'") == ["1"]
    stopped = platform.graphql(STOP_SCHEDULE, id=schedule["scheduleState"]["id"])["stopRunningSchedule"]
    assert stopped["scheduleState"]["status"] == "STOPPED"


def test_postgres_is_set_up_as_said(platform: Platform) -> None:
    settings = {"data_checksums": "on", "password_encryption": "scram-sha-256", "fsync": "on"}
    assert {name: platform.postgres(f"show {name}")[0] for name in settings} == settings
    assert platform.postgres("show server_version")[0].startswith("17.")
    assert platform.postgres("select rolsuper from pg_roles where rolname = 'dagster'") == ["f"]
    methods = platform.postgres("select distinct auth_method from pg_hba_file_rules where type = 'host'")
    assert methods == ["scram-sha-256"]


def test_a_wrong_password_is_refused(host: Any) -> None:
    refused = host.run(
        "docker exec --env PGPASSWORD=wrong dagster-postgres "
        "psql --host=127.0.0.1 --username=dagster --command='select 1'"
    )
    assert refused.rc != 0
    assert "password authentication failed" in refused.stderr
