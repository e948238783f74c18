"""Files that people drop in the landing folder are picked up by the sensor, and end where they belong."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Platform

LANDING = "/var/lib/data-platform/landing"
MEMORY = 1500 * 1024**2
BIG_ROWS = 11_000_000
FLIGHTS = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,"
    "tailnum,origin,dest,air_time,distance,hour,minute,time_hour"
)
PARQUET = """
import duckdb
duckdb.execute("copy (select 8 as id, date '2024-02-08' as day, 8.0::double as price) "
               "to '/var/lib/data-platform/scratch/whole.parquet'")
"""
BEFORE = r"""
set -eu
umask 077
cd ~
printf 'id,day,price\n1,2024-01-31,10\n2,2024-02-01,2.5\n' > orders.csv
printf 'id,day,price\n6,2024-02-06,1.0\n' > moved.csv
chmod 644 moved.csv
touch --date=2020-01-01 moved.csv
awk 'BEGIN { text = "\"some, or more, text of a person\""; for (i = 0; i < 110000; i++)
    printf "%d,2024-01-01 00:00:%d,sensor-%d,%.15f,%s\n", i, i % 60, i % 997, i / 7, text }' > block
touch copying
cd /var/lib/data-platform/landing
mkdir orders big flights airlines readings
"""
SLOW_COPY = f"""
exec > {LANDING}/orders/slow.csv
echo id,day,price
while test -e ~/copying; do echo 7,2024-02-07,7; sleep 1; done
"""
DROPS = rf"""
set -eu
cd {LANDING}
umask 022
cat ~/orders.csv > orders/good.csv
umask 077
cat ~/orders.csv > orders/again.csv
cat ~/orders.csv > airlines/orders.csv
printf 'id,day,price\n9,2024-02-09,1\n' > orders/private.csv
chmod 600 orders/private.csv
printf 'id,day,price\n3,2024-02-03,1\n4,2024-02-04\n5,2024-02-05,1\n' > orders/broken.csv
mv ~/moved.csv orders/"it's
moved.csv"
ln -s /etc/data-platform/secrets/pgpass orders/link.csv
cat ~/whole.parquet > orders/whole.parquet
head --bytes=-1 ~/whole.parquet > orders/cut.parquet
cat > flights/new.csv <<EOF
{FLIGHTS}
2013,1,1,517,515,2,830,819,11,UA,9999,LANDED,EWR,IAH,227,1400,5,15,2013-01-01T10:00:00Z
2013,1,1,NA,615,NA,NA,919,NA,UA,9999,LANDED,EWR,IAH,NA,1400,6,15,2013-01-01T11:00:00Z
EOF
for i in $(seq 1000); do printf 'sensor,value\n%s,%s.5\n' $i $i > readings/$i.csv; done
(echo id,at,sensor,value,note; for i in $(seq 100); do cat ~/block; done) > big/big.csv
"""
CORRECTIONS = rf"""
set -eu
cd {LANDING}
umask 077
rm ~/copying
chmod a+r quarantine/orders/private.csv
mv quarantine/orders/private.csv orders/
cat ~/orders.csv > orders/other.csv
sed 's/^4,.*/&,4/' quarantine/orders/broken.csv > orders/broken.csv
sed 's/,517,515,2,/,519,515,4,/; 3d' landed/flights/new.csv > flights/corrected.csv
"""
CHECKS = """
{ assetCheckExecutions(assetKey: {path: ["landing", "files"]}, checkName: "every_file_was_accepted", limit: 50) {
    runId status evaluation { metadataEntries { ... on TableMetadataEntry { table { records } } } } } }
"""
CATALOGUE = """
query($path: [String!]!) { assetOrError(assetKey: {path: $path}) { ... on Asset { assetMaterializations(limit: 50) {
    runId metadataEntries { label ... on IntMetadataEntry { intValue } } } } } }
"""
REMAINING = (
    f"find {LANDING} -mindepth 2 -not -type d -not -path '*/landed/*' -not -path '*/quarantine/*' -not -name slow.csv"
)
UNFINISHED = (
    "select count(*) from runs where pipeline_name = 'land_files' and status not in ('SUCCESS', 'FAILURE', 'CANCELED')"
)
REMOVE = """
import duckdb
with duckdb.connect("/var/lib/data-platform/warehouse/warehouse.duckdb") as connection:
    connection.execute("drop schema landing cascade")
    connection.execute("delete from raw.flights where tailnum = 'LANDED'")
    for table in ("orders", "big", "readings"):
        connection.execute(f"drop table raw.{table}")
"""


def as_alice(host: Any, script: str) -> None:
    """Run a script as a member of the group."""
    host.check_output("su alice --command %s", script)


def landed(host: Any, platform: Platform) -> None:
    """Wait until nothing waits but the slow copy, and no run is on its way."""
    platform.wait(lambda: str(host.check_output(REMAINING) or platform.postgres(UNFINISHED)[0]), {"0"}, 240)


def materializations(platform: Platform, but: set[str], *path: str) -> list[dict[str, int]]:
    """Give the figures that the catalogue shows of an asset, newest first, but those of some runs."""
    events = platform.graphql(CATALOGUE, path=path)["assetOrError"]["assetMaterializations"]
    return [
        {entry["label"]: entry["intValue"] for entry in event["metadataEntries"] if "intValue" in entry}
        for event in events
        if event["runId"] not in but
    ]


def runs(platform: Platform) -> set[str]:
    """Give the runs that loaded files."""
    return set(platform.postgres("select run_id from runs where pipeline_name = 'land_files'"))


def check_executions(platform: Platform, but: set[str]) -> list[dict[str, Any]]:
    """Give the executions of the check, newest first, but those of some runs."""
    executions = platform.graphql(CHECKS)["assetCheckExecutions"]
    return [execution for execution in executions if execution["runId"] not in but]


@pytest.fixture(scope="module")
def earlier(host: Any, platform: Platform) -> Iterator[set[str]]:
    """The runs before this module's; a member of the group; the memory that the pipelines then have."""
    host.check_output("useradd --create-home --shell /bin/bash --groups data-platform-landing alice")
    host.check_output(f"docker update --memory {MEMORY} --memory-swap {MEMORY} dagster-code")
    host.check_output("docker exec dagster-code python -c %s", PARQUET)
    host.check_output("install --owner=alice /var/lib/data-platform/scratch/whole.parquet ~alice")
    yield runs(platform)
    host.check_output("rm --force ~alice/copying")
    platform.wait(lambda: host.run("systemctl is-active slow-copy").stdout.strip(), {"inactive"}, 10)
    platform.wait(lambda: platform.postgres(UNFINISHED)[0], {"0"}, 240)
    host.check_output("userdel --remove alice && systemctl restart dagster-code")
    host.check_output(f"find {LANDING} -mindepth 1 -delete && rm /var/lib/data-platform/scratch/whole.parquet")
    host.check_output("docker exec dagster-code python -c %s", REMOVE)


@pytest.fixture(scope="module")
def dropped(host: Any, platform: Platform, earlier: set[str]) -> list[dict[str, Any]]:
    """What the check said, after files of all kinds were dropped, while another was still being copied."""
    as_alice(host, BEFORE)
    host.check_output("systemd-run --unit=slow-copy --uid=alice bash -c %s", SLOW_COPY)
    as_alice(host, DROPS)
    landed(host, platform)
    assert host.file(f"{LANDING}/orders/slow.csv").exists
    return check_executions(platform, but=earlier)


@pytest.fixture(scope="module")
def corrected(host: Any, platform: Platform, dropped: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the check said then, after corrections were dropped and the slow copy was done."""
    before = runs(platform)
    as_alice(host, CORRECTIONS)
    landed(host, platform)
    platform.wait(lambda: str(host.file(f"{LANDING}/orders/slow.csv").exists), {"False"}, 60)
    platform.wait(lambda: platform.postgres(UNFINISHED)[0], {"0"}, 60)
    return check_executions(platform, but=before)


def below(host: Any, folder: str) -> set[str]:
    """Give the names of the files below a folder of the landing folder, but those of the thousand."""
    found = host.check_output(f"find {LANDING}/{folder} -not -type d -not -path '*/readings/*' -printf '%P\\0'")
    return set(found.rstrip("\0").split("\0"))


def test_good_files_are_tables(platform: Platform, dropped: list[dict[str, Any]]) -> None:
    orders = platform.duckdb("select id, day::varchar, price from raw.orders order by id")
    assert orders == [[1, "2024-01-31", 10.0], [2, "2024-02-01", 2.5], [6, "2024-02-06", 1.0], [8, "2024-02-08", 8.0]]
    assert platform.duckdb("select count(*), count(distinct sensor) from raw.readings") == [[1000, 1000]]
    assert platform.duckdb("select count(*), count(distinct id), max(note) from raw.big") == [
        [BIG_ROWS, 110_000, "some, or more, text of a person"]
    ]
    flights = "select sched_dep_time, dep_delay from raw.flights where tailnum = 'LANDED' order by all"
    assert platform.duckdb(flights) == [[515, 2], [615, None]]


def test_few_runs_did_it_within_their_memory(
    host: Any, platform: Platform, earlier: set[str], dropped: list[dict[str, Any]]
) -> None:
    statuses = platform.postgres("select run_id || ' ' || status from runs where pipeline_name = 'land_files'")
    new = [line.split()[1] for line in statuses if line.split()[0] not in earlier]
    assert new == ["SUCCESS"] * len(new)
    assert len(new) <= 5
    state = "{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.State.OOMKilled}}"
    assert host.check_output(f"docker inspect --format '{state}' dagster-code") == f"{MEMORY} {MEMORY} false"
    size = host.file(f"{LANDING}/landed/big/big.csv").size
    assert size >= 1000**3


def test_bad_files_are_in_quarantine_and_the_check_says_why(host: Any, dropped: list[dict[str, Any]]) -> None:
    said: dict[str, tuple[int | None, str]] = {}
    for execution in dropped:
        (records,) = [entry["table"]["records"] for entry in execution["evaluation"]["metadataEntries"] if entry]
        assert (execution["status"] == "FAILED") == bool(records)
        said |= {record["file"]: (record["line"], record["reason"]) for record in map(json.loads, records)}
    assert said == {
        "airlines/orders.csv": (
            None,
            "the table raw.airlines belongs to another asset: choose another name for the folder",
        ),
        "orders/broken.csv": (3, "Expected Number of Columns: 3 Found: 2"),
        "orders/cut.parquet": (None, said["orders/cut.parquet"][1]),
        "orders/link.csv": (None, "a symbolic link, not a file"),
        "orders/private.csv": (None, "the platform may not read it (-rw-------): chmod a+r it and drop it again"),
    }
    assert said["orders/cut.parquet"][1].startswith("not a whole Parquet file: ")
    assert below(host, "quarantine") == {*said, *(f"{name}.reason.txt" for name in said)}
    reason = host.file(f"{LANDING}/quarantine/orders/broken.csv.reason.txt").content_string
    assert reason == "orders/broken.csv, line 3: Expected Number of Columns: 3 Found: 2\n"


def test_landed_files_are_kept(host: Any, dropped: list[dict[str, Any]]) -> None:
    assert below(host, "landed") == {
        "big/big.csv",
        "flights/new.csv",
        "orders/again.csv",
        "orders/good.csv",
        "orders/it's\nmoved.csv",
        "orders/whole.parquet",
    }


def test_catalogue_shows_tables_and_duplicates(
    platform: Platform, earlier: set[str], dropped: list[dict[str, Any]]
) -> None:
    assert materializations(platform, earlier, "raw", "orders")[0]["dagster/row_count"] == 4
    assert materializations(platform, earlier, "raw", "big")[0]["landed_rows"] == BIG_ROWS
    assert materializations(platform, earlier, "raw", "flights")[0]["landed_rows"] == 2
    ledger = materializations(platform, earlier, "landing", "files")
    assert sum(figures["duplicate"] for figures in ledger) == 1
    assert sum(figures["landed"] for figures in ledger) == 1005


def test_corrections_are_taken_and_the_check_passes(
    host: Any, platform: Platform, corrected: list[dict[str, Any]]
) -> None:
    assert {execution["status"] for execution in corrected} == {"SUCCEEDED"}
    lines = int(host.check_output(f"wc --lines < {LANDING}/landed/orders/slow.csv")) - 1
    assert lines > 10
    counts = platform.duckdb("select id, count(*) from raw.orders group by id order by id")
    assert counts == [[1, 1], [2, 1], [3, 1], [4, 1], [5, 1], [6, 1], [7, lines], [8, 1], [9, 1]]
    flights = "select sched_dep_time, dep_time, dep_delay from raw.flights where tailnum = 'LANDED' order by all"
    assert platform.duckdb(flights) == [[515, 519, 4], [615, None, None]]


def test_only_members_get_at_the_files(host: Any) -> None:
    folder = host.file(LANDING)
    assert (oct(folder.mode), folder.uid, folder.group) == (oct(0o2770), 10001, "data-platform-landing")
    assert host.run(f"su nobody --shell /bin/sh --command 'ls {LANDING}'").rc != 0
