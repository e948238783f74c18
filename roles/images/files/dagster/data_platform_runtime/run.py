"""Be a run: start its process, and see to it that the run ends with it, and the process with the run.

Run as ``python -m data_platform_runtime.run [OPTION…] RUN ARGUMENTS`` in the container of the run with the ID RUN;
ARGUMENTS is what ``dagster api execute_run`` takes. The process is a child of this one, so that one is left to tell why
it died: at once, and in the words of somebody who knows which limit it met.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2

from data_platform_runtime import with_secrets

INTERVAL = 10.0
"""Seconds between two looks whether the run has ended without its process."""

GRACE = 30.0
"""Seconds that the process is given to end once the run has, and once it was told to."""

PATIENCE = 300.0
"""Seconds that a database which does not answer is waited for, to tell it how the run ended."""

CONNECTION_PATIENCE = 120.0
"""Seconds that a step waits for a database which does not answer."""

SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
FINISHED = {"SUCCESS", "FAILURE", "CANCELED"}
LOST = {"NOT_STARTED", "STARTING", "STARTED", "CANCELING"}
"""States that a run is left in by a process that died; a queued one will have another process."""

REASON = Path("/tmp/why-the-run-died")
CGROUPS = [Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")]
"""Where the kernel counts the processes that it killed for their memory: cgroup v2, and v1."""


def kills(files: list[Path] = CGROUPS) -> int:
    """How many processes of this container the kernel has killed because of the memory limit."""
    for file in files:
        if file.exists():
            return next(
                (int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("oom_kill ")), 0
            )
    return 0


def status(run: str) -> str | None:
    """Give the state of a run in the database, None if there is no such run.

    Raises:
        psycopg2.Error: The database does not answer.
    """
    connection = psycopg2.connect(os.environ["DATA_PLATFORM_METADATA"], connect_timeout=10)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT status FROM runs WHERE run_id = %s", (run,))
            return next((row[0] for row in cursor), None)
    finally:
        connection.close()


def patient(connect: Callable[..., Any]) -> Callable[..., Any]:
    """Have Dagster wait longer for its database than the 11 seconds of its own.

    Args:
        connect: Dagster's function that tries to connect, again and again.
    """

    def wait(function: Callable[[], Any], *arguments: Any, **options: Any) -> Any:
        from dagster_postgres.utils import DagsterPostgresException

        deadline = time.monotonic() + CONNECTION_PATIENCE
        while True:
            try:
                return connect(function, *arguments, **options)
            except DagsterPostgresException:
                if time.monotonic() > deadline:
                    raise

    return wait


def work(arguments: str) -> None:
    """Be the process of the run: Dagster's own command; all that it prints is one stream of lines."""
    os.dup2(1, 2)
    gc.disable()  # what is imported stays: looking for garbage among it takes a seventh of the time
    from dagster._cli.api import api_cli
    from dagster_postgres import utils

    from data_platform_runtime import connections

    gc.freeze()
    gc.enable()
    connections.keep()
    utils.retry_pg_connection_fn = patient(utils.retry_pg_connection_fn)
    api_cli.main(["execute_run", arguments], prog_name="dagster api")


def start(work: Callable[[], None]) -> int:
    """Start the process of the run, which the kernel is to prefer to this one when memory runs out; give its ID."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = os.fork()
    if child:
        return child
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        REASON.write_text(traceback.format_exc())
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    os._exit(code)


def watch(child: int, run: str, interval: float = INTERVAL, grace: float = GRACE) -> int:
    """Wait until the process has ended; pass on what tells it to; end it if the run has ended without it.

    Args:
        child: The ID of the process.
        run: The ID of the run.
        interval: Seconds between two looks.
        grace: Seconds that the process is given after the run's end, and after it was told to end.

    Returns:
        The exit status of the process, negative for a signal.
    """
    finished: float | None = None
    told = False
    while True:
        came = signal.sigtimedwait(SIGNALS, interval)
        ended, result = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(result)
        if came and came.si_signo != signal.SIGCHLD:
            os.kill(child, came.si_signo)
        if not came:
            finished = (finished or time.monotonic()) if has_finished(run) else None
            if finished and time.monotonic() - finished >= grace * (1 + told):
                print(f"The run has ended, its process has not: {'killing' if told else 'ending'} it.", flush=True)
                os.kill(child, signal.SIGKILL if told else signal.SIGTERM)
                told = True


def has_finished(run: str) -> bool:
    """Tell whether a run has ended; not so while the database does not answer."""
    try:
        return status(run) in {*FINISHED, None}
    except psycopg2.Error:
        return False


def report(run: str, code: int, killed: int, location: str, memory: str) -> None:
    """Write into the database how the run ended, where its process could not; wait for a database that does not answer.

    Args:
        run: The ID of the run.
        code: The exit status of the process, negative for a signal.
        killed: How many of its processes the kernel killed because of the memory limit.
        location: The name of the code location.
        memory: The memory limit.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if status(run) in LOST or killed:
                tell(run, code, killed, location, memory)
            return
        except Exception as error:  # the database's, or Dagster's around it; said below once patience is over
            reason = error
        if time.monotonic() > deadline:
            print(f"How the run ended could not be written down: {reason}", flush=True)
            return
        time.sleep(1)


def tell(run_id: str, code: int, killed: int, location: str, memory: str) -> None:
    """Write down how the run ended, through Dagster."""
    from dagster import DagsterInstance
    from dagster._core.storage.tags import MAX_RETRIES_TAG

    from data_platform_runtime.launcher import too_much_memory

    with DagsterInstance.get() as instance:
        if killed:
            instance.add_run_tags(run_id, {MAX_RETRIES_TAG: "0"})
        run = instance.get_run_by_id(run_id)
        reasons = [
            *([too_much_memory(location, memory)] if killed else []),
            *([REASON.read_text()] if REASON.exists() else []),
        ]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        if run and run.status.value == "CANCELING":
            instance.report_run_canceled(run)
        elif run and not run.is_finished:
            instance.report_run_failed(
                run, "\n".join(reasons) or f"The process of this run {how} before the run had ended."
            )
        elif run and killed:
            instance.report_engine_event("\n".join(reasons), run)


def main(arguments: list[str]) -> int:
    """Be the run that ``arguments`` name; give the exit status, 0 if its process ended in order."""
    parser = argparse.ArgumentParser(prog="data_platform_runtime.run", description="Be a run.")
    parser.add_argument(
        "--secrets", type=Path, action="append", default=[], help="file of secrets of its code location"
    )
    parser.add_argument("--location", default="", help="its code location")
    parser.add_argument("--memory", default="", help="its memory limit, as it is to be called")
    parser.add_argument("--scratch", type=Path, help="directory of this run alone, which it leaves empty")
    parser.add_argument("run")
    parser.add_argument("arguments")
    options = parser.parse_args(arguments)
    for file in options.secrets:
        os.environ.update(with_secrets.read(file))
    for name in ("HOME", "TMPDIR", "DBT_TARGET_PATH"):
        if name in os.environ:
            Path(os.environ[name]).mkdir(parents=True, exist_ok=True)
    code = watch(start(lambda: work(options.arguments)), options.run)
    report(options.run, code, kills(), options.location, options.memory)
    if options.scratch:
        clear(options.scratch)
    return 0 if code == 0 else 1


def clear(scratch: Path) -> None:
    """Leave nothing in the run's own scratch space."""
    for path in scratch.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # what is left goes with the container, each hour
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
