"""A person's hands: the prompt on the warehouse and Dagster's command line, as members of the group have them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import WAREHOUSE, Platform

TABLES = "select database_name, schema_name, table_name, estimated_size from duckdb_tables() order by all"
PUBLISHED = "/var/lib/data-platform/published"
ROWS = "select count(*) as rows from platform.hands"

WRITE = f"""
import duckdb
connection = duckdb.connect({WAREHOUSE!r})
connection.execute("create schema if not exists platform")
connection.execute("create table if not exists platform.hands(row integer)")
connection.execute("insert into platform.hands values (1)")
print(connection.table("platform.hands").shape[0], flush=True)
input()
"""
PROMPT_WHILE_WRITING = f"""
coproc WRITER {{ docker exec --interactive dagster-code python -c "$0"; }}
read -r -u ${{WRITER[0]}} written
data-platform-sql -noheader -list {ROWS!r} || exit
echo >&${{WRITER[1]}}
wait $WRITER_PID
"""
WRITE_WHILE_PROMPTING = f"""
coproc PROMPT {{ data-platform-sql -noheader -list; }}
echo '{ROWS};' >&${{PROMPT[1]}}
read -r -u ${{PROMPT[0]}} before
docker exec --interactive dagster-code python -c "$0" <<< '' || exit
echo '{ROWS};' >&${{PROMPT[1]}}
read -r -u ${{PROMPT[0]}} then
exec {{PROMPT[1]}}>&-
wait $PROMPT_PID || exit
echo $before $then
"""
HANG_UP = """
import os, pty, termios
pid, terminal = pty.fork()
if pid == 0:
    os.execvp("runuser", ["runuser", "--user=member", "--", "data-platform-sql", "-dark-mode"])
termios.tcsetwinsize(terminal, (24, 80))
shown = b""
while b"warehouse" not in shown:
    shown += os.read(terminal, 1024)
os.close(terminal)
os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module", autouse=True)
def people(host: Any, platform: Platform) -> Iterator[None]:
    """A user who is a member of the group and one who is not; and a warehouse with something in it."""
    host.check_output("echo | docker exec --interactive dagster-code python -c %s", WRITE)
    publish(platform)
    host.check_output("useradd --groups data-platform member && useradd other")
    yield
    host.check_output("userdel member && userdel other")


def publish(platform: Platform) -> None:
    """Have the warehouse published as it is now."""
    assert platform.finished(platform.launch("publish_warehouse")) == "SUCCESS"


def as_user(name: str, command: str) -> str:
    """Give the command that runs another as a user, without a terminal."""
    return f"runuser --user={name} -- {command}"


@pytest.mark.parametrize("user", ["member", "root"])
def test_prompt_shows_what_the_warehouse_holds(host: Any, platform: Platform, user: str) -> None:
    shown = json.loads(host.check_output(as_user(user, f'data-platform-sql -json -c "{TABLES}"')))
    assert [list(row.values()) for row in shown] == platform.duckdb(TABLES)


def test_prompt_reads_what_is_piped_into_it(host: Any) -> None:
    command = as_user("member", "data-platform-sql -csv")
    assert host.check_output(f"echo 'select 6 * 7 as answer' | {command}") == "answer\n42"


def test_prompt_ends_with_the_status_of_duckdb(host: Any) -> None:
    refused = host.run(as_user("member", "data-platform-sql 'from nowhere'"))
    assert refused.rc == 1
    assert "Table with name nowhere does not exist" in refused.stderr


def test_prompt_cannot_write(host: Any) -> None:
    refused = host.run(as_user("member", "data-platform-sql 'create or replace table platform.smoke as select 1'"))
    assert refused.rc == 1
    assert "attached in read-only mode" in refused.stderr


def test_prompt_sees_nothing_of_the_host(host: Any) -> None:
    looks = ".shell id -u\nselect count(*) from glob(['/etc/data-platform/**', '/var/lib/data-platform/**'])"
    seen = host.check_output(f"echo %s | {as_user('member', 'data-platform-sql -noheader -list')}", looks)
    assert seen.split() == ["65534", "0"]
    assert host.run(as_user("member", "docker ps")).rc != 0


def test_prompt_opens_while_somebody_writes_and_says_what_it_shows(host: Any, platform: Platform) -> None:
    publish(platform)
    (before,) = (row for (row,) in platform.duckdb(ROWS))
    shown = host.run("bash -c %s %s", PROMPT_WHILE_WRITING, WRITE)
    assert (shown.rc, int(shown.stdout)) == (0, before)
    assert "what was written since is published once the runs have ended" in shown.stderr
    publish(platform)
    shown = host.run(f"data-platform-sql -noheader -list {ROWS!r}")
    assert (int(shown.stdout), shown.stderr) == (before + 1, "")


def test_open_prompt_keeps_its_data_and_nobody_from_writing(host: Any, platform: Platform) -> None:
    publish(platform)
    written, before, then = map(int, host.check_output("bash -c %s %s", WRITE_WHILE_PROMPTING, WRITE).split())
    assert (before, then) == (written - 1, written - 1)


def test_what_a_run_writes_is_published_by_itself(host: Any, platform: Platform) -> None:
    run = platform.launch("smoke")
    assert platform.finished(run) == "SUCCESS"
    shown = "data-platform-sql -noheader -list 'select run_id from platform.smoke'"
    platform.wait(lambda: host.run(shown).stdout.strip(), {run}, 90)


def test_snapshots_are_complete_few_and_for_the_group(host: Any) -> None:
    names = set(host.check_output(f"ls {PUBLISHED}").split())
    snapshots = {name for name in names if name.startswith("warehouse-")}
    assert names == {"state.json", "warehouse.duckdb", *snapshots}
    assert len(snapshots) <= 2
    assert host.run(as_user("member", f"head -c 1 {PUBLISHED}/warehouse.duckdb")).rc == 0
    assert host.run(as_user("other", f"head -c 1 {PUBLISHED}/warehouse.duckdb")).rc != 0
    assert host.run(as_user("member", f"touch {PUBLISHED}/more")).rc != 0


def test_prompt_ends_with_its_terminal(host: Any) -> None:
    for _ in range(5):
        host.check_output("python3 -c %s", HANG_UP)
        assert host.check_output("docker ps --all --quiet --filter name=data-platform-sql") == ""


@pytest.mark.parametrize("program", ["data-platform-sql", "data-platform-dagster"])
def test_who_is_not_a_member_is_told_what_to_do(host: Any, program: str) -> None:
    refused = host.run(as_user("other", program))
    assert refused.rc == 1
    assert refused.stderr == (
        f"{program} is for members of the group data-platform: have other added to tools_members in the inventory, "
        "and log in again.\n"
    )


def test_dagster_launches_and_lists_runs(host: Any, platform: Platform) -> None:
    host.check_output(as_user("member", "data-platform-dagster job launch --job smoke"))
    (newest,) = platform.postgres("select run_id from runs where pipeline_name = 'smoke' order by id desc limit 1")
    assert newest in host.check_output(as_user("member", "data-platform-dagster run list --limit 5"))
    assert platform.finished(newest) == "SUCCESS"


def test_dagster_finds_the_code(host: Any) -> None:
    assert "raw/airlines" in host.check_output(as_user("member", "data-platform-dagster asset list")).splitlines()
