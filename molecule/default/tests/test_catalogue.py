"""What Dagster keeps of old runs goes; what assets, partitions and checks came to stays as it is."""

import json
from typing import Any

from conftest import MONTHS, Platform

CATALOGUE = """
{ assetNodes { id
    partitionStats { numMaterialized numFailed numMaterializing numPartitions }
    assetMaterializations(limit: 1) { runId timestamp partition metadataEntries { label } }
    assetChecksOrError { ... on AssetChecks { checks { name
        executionForLatestMaterialization { status runId timestamp evaluation { success } } } } } } }
"""
OLD = "/usr/local/lib/data-platform/finished-runs --hours=24 --days=0"
PUBLISHED = "data-platform-sql -noheader -list 'select run_id from platform.smoke'"
EVENTS = "SELECT count(*) FROM event_logs"


def catalogue(platform: Platform) -> dict[str, Any]:
    """Give what the UI shows of all assets."""
    nodes = platform.graphql(CATALOGUE)["assetNodes"]
    for node in nodes:
        node["assetChecksOrError"].get("checks", []).sort(key=lambda check: check["name"])
    return {node.pop("id"): node for node in nodes}


def test_catalogue_is_the_same_without_what_is_old(host: Any, platform: Platform) -> None:
    months = {"dagster/asset_partition_range_start": MONTHS[0], "dagster/asset_partition_range_end": MONTHS[1]}
    for _ in range(2):
        assert platform.finished(platform.launch("everything", months)) == "SUCCESS"
    smoke = platform.launch("smoke")
    assert platform.finished(smoke) == "SUCCESS"
    platform.wait(lambda: host.run(PUBLISHED).stdout.strip(), {smoke}, 90)  # a run does that by itself
    platform.wait(lambda: host.check_output("docker ps --quiet --filter label=dagster/run_id"), {""}, 30)
    before, events = catalogue(platform), int(platform.postgres(EVENTS)[0])
    assert any((node["partitionStats"] or {}).get("numMaterialized", 0) >= 2 for node in before.values())

    counted = json.loads(host.check_output(f"{OLD} --dry-run").removeprefix("Would remove "))
    assert int(platform.postgres(EVENTS)[0]) == events
    removed = json.loads(host.check_output(OLD).removeprefix("Removed "))
    assert (removed["events"], removed["runs"]) == (counted["events"], counted["runs"])
    assert removed["events"] > 0
    assert int(platform.postgres(EVENTS)[0]) <= events - removed["events"]
    assert platform.postgres(f"SELECT count(*) FROM runs WHERE run_id = '{smoke}'") == ["0"]
    assert catalogue(platform) == before
    assert json.loads(host.check_output(OLD).removeprefix("Removed "))["events"] == 0


def test_it_is_done_each_hour_by_itself_and_does_not_wake_the_engine(host: Any) -> None:
    assert host.check_output("systemctl is-enabled data-platform-retention.timer") == "enabled"
    host.check_output("systemctl start data-platform-retention.service")
    said = host.check_output("journalctl --no-pager --output=cat --unit=data-platform-retention --lines=5")
    assert 'Removed {"containers": ' in said
