"""The program that gives each line of a service its own level in the journal."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, module_at

PROGRAM = ROOT / "roles/service/files/levels.py"
LEVELS = module_at(PROGRAM)

DAGSTER = """\
\x1b[32m2026-11-25 21:01:16 +0000\x1b[0m - dagster-webserver - \x1b[34mINFO\x1b[0m - Serving dagster-webserver
2026-11-25 21:16:47 +0000 - dagster - DEBUG - smoke - b8cb81d1 - 128 - RUN_START - Started: "x - ERROR - y".
a second line of the same record
2026-11-25 21:16:48 +0000 - dagster.daemon.SensorDaemon - WARNING - slow
2026-11-25 21:16:48 +0000 - dagster - ERROR - smoke - b8cb81d1 - STEP_FAILURE - Execution of step failed.

ValueError: no

Stack Trace:
  File "a.py", line 1, in b
2026-11-25 21:16:49,123 - root - CRITICAL - gone
2026-11-25 21:16:49 +0000 - dagster - INFO - again
Traceback (most recent call last):
  File "a.py", line 1, in <module>
ModuleNotFoundError: No module named 'x'
"""
POSTGRES = """\
2026-11-25 21:11:08.127 UTC [56] LOG:  checkpoint starting: time
2026-11-25 21:11:08.127 UTC [57] ERROR:  relation "x" does not exist at character 15
2026-11-25 21:11:08.127 UTC [57] STATEMENT:  select * from x
2026-11-25 21:11:08.127 UTC [58] me@dagster FATAL:  password authentication failed for user "dagster"
2026-11-25 21:11:08.127 UTC [58] me@dagster DETAIL:  Connection matched file "pg_hba.conf" line 1
2026-11-25 21:11:08.127 UTC [59] FATAL:  terminating connection due to administrator command
2026-11-25 21:11:08.127 UTC [60] FATAL:  the database system is starting up
2026-11-25 21:11:08.127 UTC [60] WARNING:  there is no transaction in progress
2026-11-25 21:11:08.127 UTC [60] PANIC:  could not write to file "pg_wal/xlogtemp.1": No space left on device
2026-11-25 21:11:08.127 UTC [60] DEBUG2:  vacuum
"""
OTHERS = """\
plain
/opt/a/b.py:12: DeprecationWarning: old
plain again
docker: Error response from daemon: driver failed: address already in use.
E0000 00:00:1795640471.877589 1 a.cc:1] gRPC is not amused
I0000 00:00:1795640471.877589 1 a.cc:1] gRPC is well
WARNING:root:Retrying failed database connection: (psycopg2.OperationalError) no
NOTE:root:is no level
"""


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        (DAGSTER, [6, 7, 7, 4, 3, 3, 3, 3, 3, 3, 2, 6, 3, 3, 3]),
        (POSTGRES, [6, 4, 4, 3, 3, 5, 5, 5, 2, 7]),
        (OTHERS, [6, 4, 4, 3, 4, 6, 4, 4]),
    ],
    ids=["dagster", "postgres", "others"],
)
def test_line_has_the_level_that_it_or_its_record_says(text: str, levels: list[int]) -> None:
    lines = text.encode().splitlines(keepends=True)
    given = [line.decode() for line in LEVELS.with_levels(lines)]
    assert [int(line[1]) for line in given] == levels
    plain = LEVELS.COLOUR.sub(b"", text.encode()).decode().splitlines()
    assert [line[3:-1] for line in given] == plain


def test_both_streams_are_passed_on_as_they_are_and_the_status_too() -> None:
    command = "printf 'caf\\303\\251 \\377\\n'; echo to stderr >&2; printf 'no end of line'; exit 7"
    done = subprocess.run([sys.executable, PROGRAM, "sh", "-c", command], capture_output=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == (
        b"<6>caf\xc3\xa9 \xff\n<6>to stderr\n<6>no end of line\n",
        b"",
        7,
    )


def test_line_is_passed_on_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, PROGRAM, "sh", "-c", "echo first; exec sleep 60"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"<6>first\n"
        child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        subprocess.run(["kill", "-KILL", child], check=True)
        assert process.wait(timeout=10) == 128 + signal.SIGKILL
