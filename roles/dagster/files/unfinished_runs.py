#!/usr/bin/python3
"""Tells which runs have not ended: standard library only.

    unfinished-runs [--in-progress]

Prints a line for each: its ID, its status, and the images of the platform that it names. The daemon's container is
asked, since it knows the database, which may be another than dagster-postgres.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

IN_PROGRESS = ("STARTING", "STARTED", "CANCELING")
WAITING = ("NOT_STARTED", "QUEUED", "MANAGED")
PROGRAM = r"""
import os, sys, psycopg2
with psycopg2.connect(os.environ["DATA_PLATFORM_METADATA"], connect_timeout=10) as connection:
    cursor = connection.cursor()
    cursor.execute('''
        SELECT run_id, status, ARRAY(SELECT DISTINCT (regexp_matches(run_body, %s, 'g'))[1])
        FROM runs WHERE status = ANY(%s) ORDER BY id
    ''', ["(data-platform/[a-z0-9._-]+:[0-9a-f]+)", sys.argv[1:]])
    for run, status, images in cursor:
        print(run, status, *images)
"""
"""Runs in the daemon's container."""


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` say; give the exit status, which is not 0 if the database cannot be asked."""
    parser = argparse.ArgumentParser(prog="unfinished-runs", description="Tells which runs have not ended.")
    parser.add_argument("--in-progress", action="store_true", help="only those that a process works on")
    options = parser.parse_args(arguments)
    states = IN_PROGRESS if options.in_progress else IN_PROGRESS + WAITING
    command = ["docker", "exec", "dagster-daemon", "python", "-c", PROGRAM, *states]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
