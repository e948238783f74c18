"""A person's hands: the prompt on the warehouse and Dagster's command line, as members of the group have them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import WAREHOUSE, Platform

TABLES = "select database_name, schema_name, table_name, estimated_size from duckdb_tables() order by all"
ROWS = "select count(*) as rows from platform.hands"

WRITE = f"""
import duckdb
connection = duckdb.connect({WAREHOUSE!r})
connection.execute("create schema if not exists platform")
connection.execute("create table if not exists platform.hands(row integer)")
connection.execute("insert into platform.hands values (1)")
print(connection.table("platform.hands").shape[0], flush=True)
input()
connection.execute("insert into platform.hands values (2)")
"""
PROMPT_WHILE_WRITING = f"""
coproc WRITER {{ docker exec --interactive dagster-code python -c "$0"; }}
read -r -u ${{WRITER[0]}} written
seen=$(data-platform-sql -noheader -list {ROWS!r}) || exit
echo >&${{WRITER[1]}}
wait $WRITER_PID || exit
echo $written $seen $(data-platform-sql -noheader -list {ROWS!r})
"""
WRITE_WHILE_PROMPTING = f"""
write() {{ docker exec --interactive dagster-code python -c "$0" <<< ''; }}
first=$(write) || exit
coproc PROMPT {{ data-platform-sql -noheader -list; }}
echo '{ROWS};' >&${{PROMPT[1]}}
read -r -u ${{PROMPT[0]}} before
second=$(write) || exit
echo '{ROWS};' >&${{PROMPT[1]}}
read -r -u ${{PROMPT[0]}} then
exec {{PROMPT[1]}}>&-
wait $PROMPT_PID || exit
echo $first $before $second $then $(data-platform-sql -noheader -list {ROWS!r})
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
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"
    host.check_output("useradd --groups data-platform member && useradd other")
    yield
    host.check_output("userdel member && userdel other")


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


def test_prompt_opens_while_somebody_writes_and_does_not_stop_them(host: Any) -> None:
    written, seen, afterwards = map(int, host.check_output("bash -c %s %s", PROMPT_WHILE_WRITING, WRITE).split())
    assert (seen, afterwards) == (written, written + 1)


def test_open_prompt_keeps_its_data_and_nobody_from_writing(host: Any) -> None:
    rows = map(int, host.check_output("bash -c %s %s", WRITE_WHILE_PROMPTING, WRITE).split())
    first, before, second, then, afterwards = rows
    assert (before, second, then, afterwards) == (first + 1, first + 2, first + 1, first + 3)


def test_prompt_ends_with_its_terminal(host: Any) -> None:
    for _ in range(5):
        host.check_output("python3 -c %s", HANG_UP)
        assert host.check_output("docker ps --all --quiet --filter name=data-platform-sql") == ""
    assert len(host.check_output("ls -d /var/lib/data-platform/sql/copy-*").split()) == 1


@pytest.mark.parametrize("program", ["data-platform-sql", "data-platform-dagster"])
def test_who_is_not_a_member_is_told_what_to_do(host: Any, program: str) -> None:
    refused = host.run(as_user("other", program))
    assert refused.rc == 1
    assert refused.stderr == (
        f"{program} is for members of the group data-platform: have other added to tools_members in the inventory, "
        "and log in again.\n"
    )


def test_copies_are_for_root(host: Any) -> None:
    directory = host.file("/var/lib/data-platform/sql")
    assert (oct(directory.mode), directory.uid) == ("0o700", 0)


def test_dagster_launches_and_lists_runs(host: Any, platform: Platform) -> None:
    host.check_output(as_user("member", "data-platform-dagster job launch --job smoke"))
    (newest,) = platform.postgres("select run_id from runs order by id desc limit 1")
    assert newest in host.check_output(as_user("member", "data-platform-dagster run list --limit 1"))
    assert platform.finished(newest) == "SUCCESS"


def test_dagster_finds_the_code(host: Any) -> None:
    assert "raw/airlines" in host.check_output(as_user("member", "data-platform-dagster asset list")).splitlines()
