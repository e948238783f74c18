"""Dagster's daemon, which reads its workspace again when it is asked to, and recovers better (``recovery``).

By itself it reads once a minute, and a run of a code location that was added since then fails.

Run as ``python -m data_platform_runtime.daemon run ARGUMENT…`` instead of ``dagster-daemon run``, and in the same
container as ``python -m data_platform_runtime.daemon reload``: exits with 0 once the daemon has read the workspace.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
"""Seconds that reading may take."""

INTERVAL = 1
"""Seconds between two looks whether the daemon was asked to."""

ASKED = Path("/tmp/reload-workspace")
"""There from the time that the daemon is asked to read until it has read."""


def run(arguments: list[str]) -> None:
    """Be the daemon with the command line ``arguments``."""
    from dagster import DagsterInstance
    from dagster._daemon import cli, controller

    from data_platform_runtime import code_servers, connections, recovery

    class Controller(controller.DagsterDaemonController):
        """The daemon's main loop, whose minute is over when it is asked to read."""

        def check_workspace_freshness(self, last_workspace_update_time: float) -> float:
            """Read the workspace if it is time; give the time, in seconds since the epoch, when it was last read."""
            asked = ASKED.exists()
            last = last_workspace_update_time
            if asked:
                last = min(last, time.time() - controller.RELOAD_WORKSPACE_INTERVAL - 1)
            read = super().check_workspace_freshness(last)
            if asked and read > last:
                ASKED.unlink()
            return read

    class Queue(controller.QueuedRunCoordinatorDaemon):
        """The queue of runs, looked at after parts of a second too: Dagster's own setting knows whole ones only."""

        def __init__(self, interval_seconds: float, **options: Any) -> None:
            """Take the interval from the environment, where it says one."""
            super().__init__(float(os.environ.get("DATA_PLATFORM_DEQUEUE_INTERVAL", interval_seconds)), **options)

    controller.DagsterDaemonController = Controller
    controller.QueuedRunCoordinatorDaemon = Queue
    controller.THREAD_CHECK_INTERVAL = INTERVAL
    code_servers.stay()
    connections.keep()
    recovery.keep_retries()
    recovery.explain_timeouts()
    with DagsterInstance.get() as instance:
        recovery.set_pools(instance, json.loads(os.environ.get("DATA_PLATFORM_POOLS", "{}")))
    cli.cli(["run", *arguments], obj={})


def reload() -> None:
    """Ask the daemon in this container to read its workspace, and wait until it has.

    Raises:
        RuntimeError: It has not in time.
    """
    ASKED.touch()
    deadline = time.monotonic() + TIMEOUT
    while ASKED.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the daemon has not read its workspace within {TIMEOUT:.0f} s")
        time.sleep(0.1)


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` say; give the exit status."""
    if arguments[:1] == ["run"]:
        run(arguments[1:])
    elif arguments == ["reload"]:
        try:
            reload()
        except RuntimeError as reason:
            print(f"The workspace was not read again: {reason}.", file=sys.stderr)
            return 1
    else:
        print("usage: python -m data_platform_runtime.daemon run ARGUMENT…|reload", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
