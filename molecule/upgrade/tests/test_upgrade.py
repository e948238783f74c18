"""From the previous lock to this project's own: refused, failing, killed at each step, and at last done."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SERVICES, WAREHOUSE, Platform, environment

HOME = "/var/lib/data-platform/upgrade"
JOURNAL = f"{HOME}/unfinished"
PREVIOUS = ROOT / ".cache" / "upgrade"
OLD_REVISION, NEW_REVISION = "7e2f3204cf8e", "29b539ebc72a"
UPGRADE, UPGRADE_POSTGRES = "playbooks/upgrade.yml", "playbooks/upgrade_postgres.yml"
NEW_POSTGRES = "--extra-vars=images_postgres_version=17"
CLUSTERS = "/var/lib/data-platform/postgres"
SENTENCE = "is not finished, so dagster-webserver does not start: run the playbook of that upgrade again."
TABLES = "select tablename from pg_tables where schemaname = 'public' order by 1"
TICKING = {"daemon_heartbeats", "job_ticks"}
"""Tables that the daemon writes to all the time."""
SCHEDULE = """
mutation($selector: ScheduleSelector!) { startSchedule(scheduleSelector: $selector) {
    __typename ... on PythonError { message } } }
"""
SCHEDULES = """
{ repositoriesOrError { ... on RepositoryConnection { nodes {
    schedules { name scheduleState { status } } sensors { name sensorState { status } } } } } }
"""
WORKSPACE = "--workspace=/etc/data-platform/workspace/workspace.yaml"
NOWHERE = {"name": "core", "source": "code/data-platform", "module": "nowhere"}
DENY = """
alter table alembic_version owner to postgres; revoke all on alembic_version from dagster;
grant select on alembic_version to dagster
"""
ALLOW = "alter table alembic_version owner to dagster; grant all on alembic_version to dagster"
DESCRIBED = "cd /etc; find data-platform systemd/system/dagster-*.service -type f | sort | xargs sha256sum"

Play = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def upgrade(inventory: str) -> Play:
    """Run a playbook of this project, or of its previous copy; give its exit status and output."""

    def run(*arguments: str, playbook: str = UPGRADE, project: Path = ROOT) -> tuple[int, str]:
        variables = {**environment(), "ANSIBLE_ROLES_PATH": str(project / "roles")}
        command = ["ansible-playbook", f"--inventory={inventory}", playbook, *arguments]
        done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, check=False)
        return done.returncode, " ".join(re.sub("''", "'", done.stdout).split())

    return run


@pytest.fixture(scope="module", autouse=True)
def used(host: Any, platform: Platform) -> None:
    """The platform as somebody has used it: runs, tables, a schedule that is on, and sensors that are off."""
    for sensor in ("changed_warehouse", "landing_folder"):
        host.check_output(f"docker exec dagster-webserver dagster sensor stop {sensor} {WORKSPACE} --location=core")
    each_minute(host, "stop")
    idle(host, platform)
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"
    selector = {"scheduleName": "daily_refresh", "repositoryName": "__repository__", "repositoryLocationName": "core"}
    platform.graphql(SCHEDULE, selector=selector)


def each_minute(host: Any, what: str) -> None:
    """Start or stop the schedule of the location workload."""
    host.check_output(
        f"docker exec dagster-webserver dagster schedule {what} each_minute {WORKSPACE} --location=workload"
    )


def patient(platform: Platform, seconds: float) -> str:
    """Launch a run that takes so long; give its ID."""
    return platform.launch("patient", location="workload", config={"wait": {"seconds": seconds}})


def idle(host: Any, platform: Platform) -> None:
    """Wait until no run is left, nor its container."""
    ask = "select count(*) from runs where status not in ('SUCCESS', 'FAILURE', 'CANCELED')"
    platform.wait(lambda: platform.postgres(ask)[0], {"0"}, 120)
    platform.wait(lambda: host.check_output("docker ps --quiet --filter label=dagster/run_id"), {""}, 60)


def revision(platform: Platform) -> str:
    """Give the revision of the metadata."""
    (found,) = platform.postgres("select version_num from alembic_version")
    return found


def data(host: Any, platform: Platform) -> dict[str, Any]:
    """Describe all data: rows of each table, revision, warehouse, schedules."""
    tables = [table for table in platform.postgres(TABLES) if table not in TICKING]
    rows = platform.postgres(" union all ".join(f"select '{name} ' || count(*) from {name}" for name in tables))
    return {
        "rows": rows,
        "revision": revision(platform),
        "warehouse": host.check_output("sha256sum %s", WAREHOUSE),
        "schedules": platform.graphql(SCHEDULES)["repositoriesOrError"],
    }


def described(host: Any) -> dict[str, Any]:
    """Describe what the services are made of."""
    images = {name: host.check_output("docker inspect --format '{{.Config.Image}}' %s", name) for name in SERVICES}
    return {"images": images, "files": host.check_output("bash -c %s", DESCRIBED)}


def states(host: Any) -> list[str]:
    """Give the states of the services."""
    return host.run(f"systemctl is-active {' '.join(SERVICES)}").stdout.split()


def containers(host: Any) -> str:
    """Give the IDs of the services' containers."""
    return host.check_output(f"docker inspect --format '{{{{.Id}}}}' {' '.join(SERVICES)}")


def journal(host: Any) -> dict[str, Any]:
    """Give what an upgrade has written down of itself."""
    return json.loads(host.run("cat %s", JOURNAL).stdout or "{}")


def refuses_to_start(host: Any) -> None:
    """See that no service starts, not by systemctl nor with the next boot, and that each says why in one sentence."""
    assert set(states(host)) <= {"inactive", "failed"}
    since = host.check_output("date +%s")
    assert host.run("systemctl start dagster-webserver").rc == 1
    host.check_output("systemctl stop 'dagster-*'")
    said = host.check_output(f"journalctl --unit=dagster-webserver --since=@{since} --output=cat").splitlines()
    assert [line for line in said if "An upgrade" in line and line.endswith(SENTENCE)], said
    assert host.run("docker ps --quiet --filter name=^dagster-").stdout == ""


@pytest.mark.parametrize("playbook", ["playbooks/site.yml"])
def test_other_version_is_refused_before_any_change(
    host: Any, platform: Platform, upgrade: Play, playbook: str
) -> None:
    assert revision(platform) == OLD_REVISION
    before = described(host), containers(host)
    status, said = upgrade(playbook=playbook)
    assert status != 0
    assert (
        "The data of this host belong to Dagster 1.12.8, and this project has 1.13.27: run playbooks/upgrade.yml"
        in said
    )
    assert "changed=0" in said
    assert (described(host), containers(host)) == before


@pytest.mark.parametrize("playbook", ["playbooks/site.yml", UPGRADE])
def test_new_major_version_of_postgresql_is_refused_before_any_change(host: Any, upgrade: Play, playbook: str) -> None:
    before = containers(host)
    status, said = upgrade(NEW_POSTGRES, playbook=playbook)
    assert status != 0
    assert (
        "The metadata of this host are of PostgreSQL 15, and images_postgres_version is 17, which cannot read them: "
        "run playbooks/upgrade_postgres.yml, which moves them, or leave it at 15." in said
    )
    assert "changed=0" in said
    assert containers(host) == before


def test_nothing_to_upgrade_says_so_and_does_nothing(host: Any, upgrade: Play) -> None:
    before = containers(host)
    status, said = upgrade(project=PREVIOUS)
    assert status == 0, said
    assert "Nothing to upgrade: the services have the images of this project." in said
    assert "changed=0" in said
    assert containers(host) == before


def test_failing_migration_returns_to_what_was_before(
    host: Any, platform: Platform, upgrade: Play, record: Callable[..., None]
) -> None:
    platform.postgres(DENY)
    before, made = data(host, platform), described(host)
    started = time.monotonic()
    status, said = upgrade()
    record("migration that fails: upgrade and return, with images built", time.monotonic() - started)
    assert status != 0
    assert "'dagster instance migrate' failed: " in said
    assert "permission denied for table alembic_version" in said
    assert "The platform is as it was before" in said
    assert (data(host, platform), described(host)) == (before, made)
    assert states(host) == ["active"] * 4
    assert host.run("ls %s", JOURNAL).rc != 0
    platform.postgres(ALLOW)
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"
    idle(host, platform)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"dagster_config": {"nonsense": True}}, "The upgrade failed in 'Configure Dagster': The new content of "),
        ({"dagster_code_locations": [NOWHERE]}, "dagster-code did not become ready: see 'journalctl -u dagster-code'."),
    ],
    ids=["configuration", "code"],
)
def test_what_does_not_fit_returns_to_what_was_before(
    host: Any, platform: Platform, upgrade: Play, variables: dict[str, Any], sentence: str
) -> None:
    before, made = data(host, platform), described(host)
    status, said = upgrade(f"--extra-vars={json.dumps(variables)}")
    assert status != 0
    assert sentence in said
    assert "The platform is as it was before" in said
    assert (data(host, platform), described(host)) == (before, made)


@pytest.fixture
def killed(inventory: str, host: Any) -> Iterator[Callable[..., None]]:
    """Start the upgrade, and kill it: the program on the host in a step of its journal, or the play in a task."""

    def start(*command: str) -> subprocess.Popen:
        command = ["ansible-playbook", f"--inventory={inventory}", *command]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, start_new_session=True, **output
        )

    def at_step(*command: str, step: str, seconds: float) -> None:
        process = start(*command)
        come = "! systemctl is-active --quiet dagster-daemon"
        if step != "draining":
            come = f'grep -qs \'"step": "{step}"\' {JOURNAL}'
        watch = f"until {come}; do sleep 0.05; done; sleep {seconds}"
        host.check_output("timeout 240 bash -c %s", f"{watch}; kill -KILL $(cat {HOME}/lock)")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def in_task(task: str) -> None:
        process = start(UPGRADE)
        assert process.stdout
        while f"TASK [{task}" not in (line := process.stdout.readline()):
            assert line, f"The play ended before '{task}'."
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def kill(*command: str, step: str = "", task: str = "", seconds: float = 0.2) -> None:
        if step:
            at_step(*command or [UPGRADE], step=step, seconds=seconds)
        else:
            in_task(task)

    yield kill


KILLS = [
    {"step": "saving", "seconds": 1.0},
    {"task": "postgres : Hand the clients theirs"},
    {"task": "code_location : Bring their secrets"},
    {"step": "migrating", "seconds": 2.0},
    {"step": "checking", "seconds": 1.0},
    {"step": "checking", "seconds": 7.0},
]


def settle(host: Any, platform: Platform) -> None:
    """Wait until what a killed play left at work on the host has ended, and the services have stopped."""
    busy = f"sh -c 'flock {HOME}/lock true; systemctl list-units --plain --no-legend run-*.service | wc -l'"
    platform.wait(lambda: host.check_output(busy), {"0"}, 60)


@pytest.mark.slow
def test_run_that_takes_too_long_stops_the_upgrade_and_nothing_else(
    host: Any, platform: Platform, upgrade: Play, killed: Callable[..., None]
) -> None:
    image = described(host)["images"]["dagster-code"]
    host.check_output(f"docker run --detach --rm --name busy --label dagster/run_id=x {image} sleep 300")
    before = data(host, platform), described(host)
    status, said = upgrade("--extra-vars=upgrade_patience=2")
    assert status != 0
    assert "1 run or command is still in progress after 2 s: wait for them or end them, or allow more" in said
    assert states(host) == ["active"] * 4
    killed(step="draining", seconds=1.0)
    settle(host, platform)
    assert states(host) == ["active"] * 4
    assert journal(host) == {}
    host.check_output("docker rm --force busy")
    assert (data(host, platform), described(host)) == before


@pytest.mark.slow
def test_upgrade_killed_at_each_step_leaves_the_services_down_and_is_reverted_by_hand(
    host: Any, platform: Platform, killed: Callable[..., None]
) -> None:
    before, made = data(host, platform), described(host)
    for kill in KILLS:
        killed(**kill)
        settle(host, platform)
        assert journal(host)["step"] == kill.get("step", "saved"), kill
        refuses_to_start(host)
        host.check_output("/usr/local/lib/data-platform/upgrade revert")
        assert (data(host, platform), described(host)) == (before, made), kill


@pytest.mark.slow
def test_services_stay_down_after_a_boot_in_the_middle_and_the_playbook_goes_on(
    host: Any, platform: Platform, upgrade: Play, killed: Callable[..., None]
) -> None:
    before, made = data(host, platform), described(host)
    killed(step="migrating", seconds=1.0)
    subprocess.run(["docker", "restart", host.check_output("hostname")], check=True, capture_output=True)
    platform.wait(lambda: host.run("systemctl is-system-running --wait").stdout.strip(), {"running", "degraded"}, 60)
    time.sleep(10)
    assert host.run("docker ps --quiet --filter name=^dagster-").stdout == ""
    for name in SERVICES:
        said = host.check_output("journalctl --boot --unit=%s --output=cat", name)
        assert f"is not finished, so {name} does not start: run the playbook of that upgrade again." in said
    host.check_output("systemctl stop 'dagster-*'")
    refuses_to_start(host)
    status, said = upgrade(f"--extra-vars={json.dumps({'dagster_code_locations': [NOWHERE]})}")
    assert status != 0
    assert "dagster-code did not become ready: see 'journalctl -u dagster-code'." in said
    assert "The platform is as it was before" in said
    assert (data(host, platform), described(host)) == (before, made)


@pytest.mark.slow
def test_revert_that_was_killed_is_finished_by_the_next(
    host: Any, platform: Platform, killed: Callable[..., None]
) -> None:
    before, made = data(host, platform), described(host)
    killed(step="checking", seconds=7.0)
    settle(host, platform)
    steps = []
    for seconds in (0.2, 0.8, 2.0, 3.5):
        host.run(f"timeout --signal=KILL {seconds} /usr/local/lib/data-platform/upgrade revert")
        steps.append(journal(host)["step"])  # at the last, all may be brought back, and the services start
        host.check_output("/usr/local/lib/data-platform/upgrade halt")
        refuses_to_start(host)
    assert steps[:2] == ["reverting"] * 2, steps
    host.check_output("/usr/local/lib/data-platform/upgrade revert")
    assert (data(host, platform), described(host)) == (before, made)


def test_killed_upgrade_is_finished_by_the_next_and_all_data_are_there(
    host: Any, platform: Platform, upgrade: Play, killed: Callable[..., None], record: Callable[..., None]
) -> None:
    each_minute(host, "start")
    before, made = data(host, platform), described(host)
    code = host.check_output("docker inspect --format '{{.Config.Image}}' dagster-code-workload")
    began = time.time()
    progressing, queued = patient(platform, 40), [patient(platform, 10) for _ in range(12)]
    killed(step="migrating", seconds=3.0)
    settle(host, platform)
    refuses_to_start(host)
    containers_before = host.check_output("docker container ls --all --format '{{.Names}}'").split()
    status, said = upgrade(playbook="playbooks/site.yml")
    assert status != 0
    assert "is not finished: run the playbook of that upgrade again" in said
    started = time.monotonic()
    status, said = upgrade()
    assert status == 0, said
    record("upgrade after one that was killed, images built before", time.monotonic() - started)
    last_due = int(time.time()) // 60
    assert "An upgrade was not finished: it is begun again." in said
    assert "Ran the job smoke" in said
    after = data(host, platform)
    assert after["revision"] == NEW_REVISION
    assert after["schedules"] == before["schedules"]
    grown = {row.split()[0]: int(row.split()[1]) for row in after["rows"]}
    assert [row for row in before["rows"] if int(row.split()[1]) > grown[row.split()[0]]] == []
    assert platform.duckdb("select count(*) from platform.smoke") == [[1]]
    images = described(host)["images"]
    assert {name for name in SERVICES if images[name] != made["images"][name]} == set(SERVICES) - {"dagster-postgres"}
    assert states(host) == ["active"] * 4
    assert host.run("ls %s /run/data-platform-upgrade", JOURNAL).stdout == ""
    assert {platform.finished(run) for run in (progressing, *queued)} == {"SUCCESS"}
    launched = [
        host.check_output("docker inspect --format '{{.Config.Image}}' data-platform-run-%s", run) for run in queued
    ]
    assert [run for run in queued if f"data-platform-run-{run}" not in containers_before]
    assert set(launched) == {code}  # that of the previous Dagster, with which they were queued
    due = platform.ticked(began)
    each_minute(host, "stop")
    assert len(due) == len(set(due))
    assert last_due in due  # of what was due while the daemon was away, Dagster runs the last
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"
    idle(host, platform)


def test_upgraded_platform_is_what_site_yml_makes(host: Any, play: Callable[..., int], upgrade: Play) -> None:
    before = containers(host)
    assert play() == 0
    assert play(playbook=UPGRADE) == 0
    assert containers(host) == before


@pytest.mark.parametrize("playbook", ["playbooks/site.yml", UPGRADE])
def test_older_version_is_refused_before_any_change(host: Any, upgrade: Play, playbook: str) -> None:
    before = described(host), containers(host)
    status, said = upgrade(playbook=playbook, project=PREVIOUS)
    assert status != 0
    assert "The data of this host were written by Dagster 1.13.27, and this project has the older 1.12.8" in said
    assert "changed=0" in said
    assert (described(host), containers(host)) == before


@pytest.mark.slow
def test_refreshed_base_is_an_upgrade_of_all_services(
    host: Any, platform: Platform, upgrade: Play, record: Callable[..., None]
) -> None:
    before, made = data(host, platform), described(host)["images"]
    started = time.monotonic()
    status, said = upgrade("--extra-vars=images_refresh=2026-11-24")
    record("refreshed base: upgrade, with all images built", time.monotonic() - started)
    assert status == 0, said
    after = data(host, platform)
    assert (after["revision"], after["schedules"]) == (before["revision"], before["schedules"])
    assert {name for name, image in described(host)["images"].items() if image != made[name]} == set(SERVICES)
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"


def test_move_of_postgresql_without_packages_changes_nothing(host: Any, upgrade: Play) -> None:
    before = described(host), containers(host)
    status, said = upgrade("--extra-vars=images_postgres_version=99", playbook=UPGRADE_POSTGRES)
    assert status != 0
    assert "Unable to locate package postgresql-99" in said
    assert (described(host), containers(host)) == before


def test_failing_move_of_postgresql_returns_to_what_was_before(
    host: Any, platform: Platform, upgrade: Play, record: Callable[..., None]
) -> None:
    platform.postgres("create extension adminpack")  # PostgreSQL 17 has none
    before, made = data(host, platform), described(host)
    started = time.monotonic()
    status, said = upgrade(NEW_POSTGRES, playbook=UPGRADE_POSTGRES)
    record("move of PostgreSQL that fails: with its image built, and return", time.monotonic() - started)
    assert status != 0
    assert 'extension "adminpack" is not available' in said
    assert "The platform is as it was before" in said
    assert (data(host, platform), described(host)) == (before, made)
    assert host.check_output("ls %s", CLUSTERS) == "15"
    assert states(host) == ["active"] * 4
    platform.postgres("drop extension adminpack")


def test_killed_move_of_postgresql_is_finished_by_the_next_and_all_data_are_there(
    host: Any, platform: Platform, upgrade: Play, killed: Callable[..., None], record: Callable[..., None]
) -> None:
    role = "select rolpassword, has_table_privilege('reader', 'runs', 'select') from pg_authid where rolname = 'reader'"
    platform.postgres("create role reader login password 'of the reader'; grant select on runs to reader")
    platform.postgres("create database reports owner reader")
    platform.postgres("create table numbers as select * from generate_series(1, 1000)", "reports")
    idle(host, platform)
    before, made, reader = data(host, platform), described(host), platform.postgres(role)
    runs = set(platform.postgres("select run_id || status from runs"))

    killed(UPGRADE_POSTGRES, NEW_POSTGRES, step="migrating", seconds=2.0)
    settle(host, platform)
    refuses_to_start(host)
    assert host.check_output("ls %s", CLUSTERS).split()[0] == "15"
    started = time.monotonic()
    status, said = upgrade(NEW_POSTGRES, playbook=UPGRADE_POSTGRES)
    assert status == 0, said
    record("move of PostgreSQL after one that was killed, image built before", time.monotonic() - started)

    moved = f"Moved PostgreSQL from {CLUSTERS}/15, which stays as it was, to {CLUSTERS}/17: [0-9]+ rows in both"
    assert re.search(moved, said)
    assert "Ran the job smoke" in said
    assert platform.postgres("show server_version_num")[0].startswith("17")
    assert host.check_output("cat %s/15/PG_VERSION %s/17/PG_VERSION", CLUSTERS, CLUSTERS).split() == ["15", "17"]
    after = data(host, platform)
    assert (after["revision"], after["schedules"]) == (before["revision"], before["schedules"])
    grown = {row.split()[0]: int(row.split()[1]) for row in after["rows"]}
    assert [row for row in before["rows"] if int(row.split()[1]) > grown[row.split()[0]]] == []
    assert set(platform.postgres("select run_id || status from runs")) >= runs
    assert platform.postgres(role) == reader
    assert platform.postgres("select count(*), sum(generate_series) from numbers", "reports") == ["1000|500500"]
    images = described(host)["images"]
    assert {name for name in SERVICES if images[name] != made["images"][name]} == {"dagster-postgres"}
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"
    idle(host, platform)


def test_platform_with_moved_postgresql_is_what_site_yml_makes(host: Any, play: Callable[..., int]) -> None:
    before = containers(host)
    assert play(NEW_POSTGRES) == 0
    assert containers(host) == before


@pytest.mark.parametrize("playbook", ["playbooks/site.yml", UPGRADE, UPGRADE_POSTGRES])
def test_older_postgresql_is_refused_before_any_change(host: Any, upgrade: Play, playbook: str) -> None:
    before = described(host), containers(host)
    status, said = upgrade(playbook=playbook)
    assert status != 0
    assert "are of PostgreSQL 17, and images_postgres_version is 15, which cannot read them: leave it at 17." in said
    assert "changed=0" in said
    assert (described(host), containers(host)) == before
