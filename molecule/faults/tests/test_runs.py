"""Each run in a container of its own: what it is, what it can reach, and how it ends."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import STATUS, Platform

CONTAINER = "data-platform-run-{}"
EVENTS = """
query($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events { __typename
    ... on MessageEvent { message eventType } } } } }
"""
TAGS = "query($run: ID!) { runOrError(runId: $run) { ... on Run { tags { key value } } } }"
TERMINATE = "mutation($run: String!) { terminateRun(runId: $run) { __typename } }"
TOTAL = """
{ assetOrError(assetKey: {path: ["total"]}) { ... on Asset { assetMaterializations(limit: 1) { metadataEntries {
    label ... on IntMetadataEntry { intValue } ... on TextMetadataEntry { text } } } } } }
"""
RETRIES = """
query($run: String!) { runsOrError(filter: {tags: [{key: "dagster/parent_run_id", value: $run}]}) {
    ... on Runs { results { runId status } } } }
"""
ASKS = """
import http.client, json, socket, sys
connection = http.client.HTTPConnection("docker")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
connection.request(sys.argv[2], sys.argv[3], "{}", {"Content-Type": "application/json"})
print(connection.getresponse().status)
"""


POLL, STOP_TIMEOUT, START_TIMEOUT = 5, 30, 180
"""Seconds between two looks at runs in progress; that a run is given to end, and to start."""


def status(platform: Platform, run: str) -> str:
    """Give the state of a run."""
    return platform.graphql(STATUS, run=run)["runOrError"]["status"]


def started(platform: Platform, run: str) -> None:
    """Wait until a run is in progress."""
    platform.wait(lambda: status(platform, run), {"STARTED"}, 60)


def messages(platform: Platform, run: str) -> str:
    """Give all that the UI says of a run."""
    return "\n".join(event.get("message", "") for event in platform.graphql(EVENTS, run=run)["logsForRun"]["events"])


def retries(platform: Platform, run: str) -> list[dict[str, str]]:
    """Give the runs that tried it again."""
    return platform.graphql(RETRIES, run=run)["runsOrError"]["results"]


def inspected(host: Any, run: str) -> dict[str, Any]:
    """Give what Docker says of a run's container."""
    return json.loads(host.check_output("docker inspect %s", CONTAINER.format(run)))[0]


def pids(host: Any, run: str) -> list[str]:
    """Give the processes of a run's container: init, what watches, the run, and what that has started."""
    return host.run("docker top %s -eo pid", CONTAINER.format(run)).stdout.split()[1:]


def running(host: Any, run: str) -> bool:
    """Tell whether a run's container runs."""
    return inspected(host, run)["State"]["Running"]


def is_contained(container: dict[str, Any]) -> None:
    """Assert that a container may do what runs may, and no more."""
    limits = container["HostConfig"]
    assert (limits["Privileged"], limits["ReadonlyRootfs"], limits["CapDrop"], limits["CapAdd"]) == (
        False,
        True,
        ["ALL"],
        None,
    )
    assert (limits["Binds"], limits["SecurityOpt"], limits["PidMode"], limits["IpcMode"]) == (
        None,
        ["no-new-privileges"],
        "",
        "private",
    )
    assert container["Config"]["User"] == "10001:10001"
    assert set(container["NetworkSettings"]["Networks"]) == {"data-platform"}
    assert all(
        mount["Source"].startswith(("/etc/data-platform/", "/var/lib/data-platform/")) for mount in container["Mounts"]
    )
    assert not [mount for mount in container["Mounts"] if mount["Source"].startswith("/etc/") and mount["RW"]]
    assert "docker.sock" not in json.dumps(container["Mounts"])
    assert "DOCKER_HOST" not in " ".join(container["Config"]["Env"])


@pytest.fixture(scope="module")
def patient(platform: Platform) -> Iterator[str]:
    """A run in progress, of a location that asks for privileges."""
    run = platform.launch("patient", location="workload", config={"wait": {"seconds": 40}})
    started(platform, run)
    yield run
    platform.finished(run)


def test_run_has_a_container_that_gets_nothing_of_what_its_location_asks_for(host: Any, patient: str) -> None:
    container = inspected(host, patient)
    is_contained(container)
    served = json.loads(host.check_output("docker inspect dagster-code-workload"))[0]
    assert container["Config"]["Image"] == served["Config"]["Image"]
    assert container["HostConfig"]["Memory"] == container["HostConfig"]["MemorySwap"] == 600 * 2**20
    assert "of the workload" not in json.dumps(container)


def test_kernel_contains_the_run(host: Any, patient: str) -> None:
    scores = []
    for pid in pids(host, patient):
        fields = dict(
            line.split(":\t", 1)
            for line in host.file(f"/proc/{pid}/status").content_string.splitlines()
            if ":\t" in line
        )
        assert (fields["NoNewPrivs"], fields["Seccomp"], int(fields["CapBnd"], 16)) == ("1", "2", 0)
        assert "0" not in fields["Uid"].split()
        assert "dagster.slice" in host.file(f"/proc/{pid}/cgroup").content_string
        scores.append(int(host.file(f"/proc/{pid}/oom_score_adj").content_string))
    assert scores[:3] == [500, 500, 1000], "init, what watches, and the run, which the kernel is to take first"


def test_run_and_code_reach_no_engine(host: Any, patient: str) -> None:
    look = "ls /run /var/run; find / -xdev -type s 2>/dev/null; cat /proc/mounts"
    reach = (
        "import socket, sys\n"
        "for port in (2375, 2376):\n"
        "    for address in ('172.17.0.1', socket.gethostbyname('dagster-code').rpartition('.')[0] + '.1'):\n"
        "        probe = socket.socket(); probe.settimeout(1)\n"
        "        assert probe.connect_ex((address, port)) != 0\n"
    )
    for name in (CONTAINER.format(patient), "dagster-code", "dagster-code-workload"):
        assert not re.search(r"docker\.sock|engine", host.check_output("docker exec %s sh -c %s", name, look))
        assert host.run("docker exec %s python -c %s", name, reach).rc == 0


def test_scratch_is_no_memory_and_of_the_run_alone(host: Any, patient: str) -> None:
    name = CONTAINER.format(patient)
    assert (
        host.check_output("docker exec %s stat --file-system --format=%%T /var/lib/data-platform/scratch", name)
        != "tmpfs"
    )
    variables = host.check_output("docker exec %s sh -c 'echo $HOME $TMPDIR $DBT_TARGET_PATH'", name).split()
    assert [path.rpartition("/")[0] for path in variables] == ["/var/lib/data-platform/scratch"] * 3
    assert host.run("docker exec %s ls /var/lib/data-platform/run-scratch", name).rc != 0


def test_run_is_in_the_journal(host: Any, platform: Platform, patient: str) -> None:
    platform.finished(patient)
    name = CONTAINER.format(patient)
    journal = host.check_output("journalctl --no-pager --output=cat --identifier=dagster-run CONTAINER_NAME=%s", name)
    assert "RUN_SUCCESS" in journal
    assert inspected(host, patient)["State"]["ExitCode"] == 0
    assert host.check_output("ls -A /var/lib/data-platform/run-scratch/%s", patient) == ""


@pytest.mark.parametrize(
    ("client", "method", "path", "expected"),
    [
        ("daemon", "GET", "/version", 200),
        ("daemon", "GET", "/v1.41/containers/{id}/json", 200),
        ("daemon", "GET", "/v1.41/containers/dagster-postgres/json", 403),
        ("daemon", "GET", "/v1.41/containers/json", 403),
        ("daemon", "POST", "/v1.41/containers/{id}/exec", 403),
        ("daemon", "POST", "/v1.41/containers/{id}/../../images/prune", 403),
        ("daemon", "POST", "/v1.41/containers/create", 400),
        ("daemon", "POST", "/v1.41/images/create?fromImage=debian", 403),
        ("daemon", "POST", "/v1.41/build", 403),
        ("daemon", "DELETE", "/v1.41/containers/{id}", 403),
        ("daemon", "GET", "/v1.41/containers/{id}/archive?path=/etc", 403),
        ("webserver", "GET", "/v1.41/containers/{id}/json", 200),
        ("webserver", "POST", "/v1.41/containers/create", 403),
        ("webserver", "POST", "/v1.41/containers/{id}/start", 403),
    ],
)
def test_proxy_lets_through_what_dagster_needs_and_nothing_else(
    host: Any, client: str, method: str, path: str, expected: int
) -> None:
    identifier = host.check_output("docker inspect --format '{{.Id}}' dagster-postgres")
    socket = f"/run/data-platform-engine/{client}/docker.sock"
    asked = host.check_output(
        f"docker exec dagster-{client} python -c %s %s %s %s", ASKS, socket, method, path.format(id=identifier)
    )
    assert int(asked) == expected


def test_no_user_of_the_host_reaches_the_proxy(host: Any) -> None:
    for client in ("daemon", "webserver"):
        path = f"/run/data-platform-engine/{client}/docker.sock"
        assert host.run("setpriv --reuid=65534 --regid=65534 --clear-groups cat %s", path).stderr.endswith(
            "Permission denied\n"
        )


def test_row_in_the_database_gets_nothing_that_its_author_asks_for(host: Any, platform: Platform) -> None:
    run = platform.launch("patient", location="workload")
    platform.finished(run)
    (body,) = platform.postgres(f"SELECT run_body FROM runs WHERE run_id = '{run}'")
    forged = run[:-4] + "beef"
    body = (
        body.replace(run, forged)
        .replace('"SUCCESS"', '"QUEUED"')
        .replace('"user": "0"', '"user": "0", "pid_mode": "host"')
    )
    assert '"privileged": true' in body
    columns = "snapshot_id, pipeline_name, mode, partition, partition_set"
    platform.postgres(
        f"INSERT INTO runs (run_id, run_body, status, {columns}) "
        f"SELECT '{forged}', $body${body}$body$, 'QUEUED', {columns} FROM runs WHERE run_id = '{run}'"
    )
    platform.wait(lambda: str(host.run("docker inspect %s", CONTAINER.format(forged)).rc), {"0"}, 30)
    is_contained(inspected(host, forged))


def test_cancelled_run_ends_and_so_does_its_container(host: Any, platform: Platform) -> None:
    run = platform.launch("patient", location="workload", config={"wait": {"seconds": 100}})
    started(platform, run)
    assert platform.graphql(TERMINATE, run=run)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    assert platform.finished(run, 40) == "CANCELED"
    assert not running(host, run)


def test_cancelled_run_that_hangs_is_killed(host: Any, platform: Platform) -> None:
    run = platform.launch("patient", location="workload", config={"wait": {"seconds": 100}})
    started(platform, run)
    host.check_output(f"kill -STOP {' '.join(pids(host, run)[1:])}")
    began = time.monotonic()
    assert platform.graphql(TERMINATE, run=run)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    assert platform.finished(run, 60) == "CANCELED"
    assert time.monotonic() - began < STOP_TIMEOUT + POLL
    assert not running(host, run)


def test_started_run_that_died_is_found_within_two_polls(host: Any, platform: Platform) -> None:
    run = platform.launch("patient", {"dagster/max_retries": "0"}, "workload", {"wait": {"seconds": 100}})
    started(platform, run)
    host.check_output("docker kill %s", CONTAINER.format(run))
    began = time.monotonic()
    assert platform.finished(run, 60) == "FAILURE"
    assert time.monotonic() - began < 2 * POLL + 1


@pytest.mark.slow
def test_run_that_hangs_while_it_starts_is_found_within_its_timeout_and_a_poll(host: Any, platform: Platform) -> None:
    run = platform.launch("patient", {"dagster/max_retries": "0"}, "workload", {"wait": {"seconds": 100}})
    platform.wait(lambda: str(len(pids(host, run))), {"3"}, 30)
    host.check_output(f"kill -STOP {pids(host, run)[2]}")
    began = time.monotonic()
    assert status(platform, run) == "STARTING"
    assert platform.finished(run, 300) == "FAILURE"
    assert time.monotonic() - began < START_TIMEOUT + POLL + 1
    platform.wait(lambda: str(running(host, run)), {"False"}, 90)


@pytest.mark.parametrize("by_a_child", [False, True])
def test_too_much_memory_is_named_and_not_tried_again(host: Any, platform: Platform, by_a_child: bool) -> None:
    run = platform.launch("greedy", location="workload", config={"hold": {"by_a_child": by_a_child}})
    assert platform.finished(run, 60) == "FAILURE"
    time.sleep(3)
    said = messages(platform, run)
    assert "exceeded its memory limit of 600m" in said
    assert "raise memory in run_limits of the code location workload" in said
    time.sleep(8)
    assert retries(platform, run) == []


def test_too_much_time_is_named_and_not_tried_again(host: Any, platform: Platform) -> None:
    run = platform.launch("patient", {"dagster/max_runtime": "3"}, "workload", {"wait": {"seconds": 100}})
    platform.wait(lambda: status(platform, run), {"FAILURE"}, 60)  # it is CANCELED for a moment
    assert "raise dagster_max_runtime, or the tag dagster/max_runtime" in messages(platform, run)
    assert not running(host, run)
    time.sleep(8)
    assert retries(platform, run) == []


def test_wrong_pipeline_is_not_tried_again(platform: Platform) -> None:
    run = platform.launch("wrong", location="workload")
    assert platform.finished(run, 60) == "FAILURE"
    time.sleep(8)
    assert retries(platform, run) == []


def test_what_an_asset_returns_is_there_for_another_run(platform: Platform) -> None:
    for job in ("make_frame", "make_total"):
        assert platform.finished(platform.launch(job, location="workload")) == "SUCCESS"
    (made,) = platform.graphql(TOTAL)["assetOrError"]["assetMaterializations"]
    found = {entry["label"]: entry.get("intValue", entry.get("text")) for entry in made["metadataEntries"]}
    assert (found["total"], found["token"]) == (499500, "of")
