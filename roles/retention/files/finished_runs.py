#!/usr/bin/python3
"""Removes what finished runs leave: standard library only.

    data-platform-retention [--dry-run] --hours HOURS --days DAYS

Their containers go HOURS after their end, their scratch directories with them; in Dagster's database and logs, what is
older than DAYS and tells nothing of an asset any more. Prints how many of each went, or would go.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

LABEL = "dagster/run_id"
SCRATCH = Path("/var/lib/data-platform/run-scratch")
LOGS = "/var/lib/data-platform/compute-logs/storage"
FORM = '{{.Id}} {{index .Config.Labels "' + LABEL + '"}} {{.State.Running}} {{.Created}} {{.State.FinishedAt}}'


class Failure(Exception):
    """Something is wrong; the text is one sentence for the operator."""


def run(*command: str) -> str:
    """Run ``command`` and give its output.

    Raises:
        Failure: It failed.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Failure(f"'{' '.join(command[:4])}' failed: {(result.stderr.strip() or result.stdout.strip())[-500:]}")
    return result.stdout


def moment(text: str) -> datetime:
    """Read a time as Docker prints it, in UTC and to the nanosecond; one that never was is the year 1."""
    return datetime.fromisoformat(text[:19]).replace(tzinfo=UTC)


def containers() -> list[tuple[str, str, bool, datetime]]:
    """ID, run, whether it runs, and when it was last made or ended, of each container of a run."""
    listed = run("docker", "container", "ls", "--all", "--quiet", "--no-trunc", "--filter", f"label={LABEL}")
    found = listed.split()
    lines = run("docker", "container", "inspect", "--format", FORM, *found).splitlines() if found else []
    words = [line.split(" ") for line in lines]
    return [(id_, name, runs == "true", max(map(moment, times))) for id_, name, runs, *times in words]


def retain(hours: float, dry_run: bool, now: datetime) -> dict[str, int]:
    """Remove containers of runs that ended ``hours`` before ``now``, and scratch directories without a container."""
    there = containers()
    old = [(i, name) for i, name, runs, last in there if not runs and last < now - timedelta(hours=hours)]
    kept = {name for i, name, _, _ in there} - {name for _, name in old}
    directories = sorted(SCRATCH.iterdir()) if SCRATCH.is_dir() else []
    young = (now - timedelta(hours=1)).timestamp()  # its container may be about to be made
    scratch = [path for path in directories if path.name not in kept and path.stat().st_ctime < young]
    if not dry_run:
        if old:
            run("docker", "rm", "--volumes", *(identifier for identifier, _ in old))
        for path in scratch:
            shutil.rmtree(path)
    return {"containers": len(old), "scratch": len(scratch)}


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` say; give the exit status."""
    parser = argparse.ArgumentParser(prog="data-platform-retention", description="Removes what finished runs leave.")
    parser.add_argument("--dry-run", action="store_true", help="only count")
    parser.add_argument("--hours", type=float, required=True, help="hours that containers of finished runs are kept")
    parser.add_argument("--days", type=int, required=True, help="days that what Dagster writes down of runs is kept")
    options = parser.parse_args(arguments)
    dry = ["--dry-run"] if options.dry_run else []
    program = ["python", "-m", "data_platform_runtime.retention", f"--days={options.days}", f"--logs={LOGS}", *dry]
    try:
        removed = retain(options.hours, options.dry_run, datetime.now(tz=UTC))
        removed |= json.loads(run("docker", "exec", "dagster-daemon", *program).splitlines()[-1])
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"{'Would remove' if options.dry_run else 'Removed'} {json.dumps(removed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
