"""Removes what Dagster keeps of old runs; the catalogue stays as it is.

Run as ``python -m data_platform_runtime.retention [--dry-run] --days N --logs DIRECTORY`` where the metadata database
can be reached. Of runs that ended more than N days ago go the printed lines, and the events that tell nothing of an
asset any more: those of no asset, and those that a newer event of the same kind, asset and partition has replaced. A
run that has no events of assets goes as a whole. What each asset, partition and check came to last stays.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2

BATCH = 20_000
"""Events and runs that are removed at most by one start, so that it ends soon and its transaction is short."""

FINISHED = ("SUCCESS", "FAILURE", "CANCELED")

OLD_RUNS = """
    SELECT runs.run_id FROM runs
    WHERE runs.status = ANY(%(finished)s) AND runs.update_timestamp < %(limit)s
    AND NOT EXISTS (SELECT 1 FROM event_logs WHERE event_logs.run_id = runs.run_id AND asset_key IS NOT NULL)
    ORDER BY runs.id LIMIT %(batch)s
"""
OLD_EVENTS = """
    SELECT event.id FROM event_logs AS event JOIN runs USING (run_id)
    WHERE runs.status = ANY(%(finished)s) AND runs.update_timestamp < %(limit)s
    AND (event.asset_key IS NULL OR EXISTS (
        SELECT 1 FROM event_logs AS newer
        WHERE newer.asset_key = event.asset_key AND newer.dagster_event_type = event.dagster_event_type
        AND newer.partition IS NOT DISTINCT FROM event.partition AND newer.id > event.id
    ))
    AND coalesce(event.dagster_event_type, '') NOT LIKE 'ASSET_CHECK%%'
    AND coalesce(event.dagster_event_type, '') NOT IN ('PIPELINE_START', 'PIPELINE_SUCCESS', 'PIPELINE_FAILURE')
    ORDER BY event.id LIMIT %(batch)s
"""


def old_logs(folder: Path, days: int, now: float) -> list[Path]:
    """Directories with the printed lines of runs, none of which was written to for ``days`` before ``now`` (epoch)."""
    found = folder.iterdir() if folder.is_dir() else []
    return [path for path in sorted(found) if path.is_dir() and newest(path) < now - days * 86400]


def newest(folder: Path) -> float:
    """When something in a directory was last written, in seconds since the epoch."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def retain(connection: Any, instance: Any, logs: Path, days: int, dry_run: bool, batch: int = BATCH) -> dict[str, int]:
    """Remove what is old.

    Args:
        connection: psycopg2 connection to the metadata database.
        instance: The Dagster instance.
        logs: Directory with the printed lines, a directory for each run.
        days: Days that all is kept.
        dry_run: Only count.
        batch: What is removed at most, of runs and of events.

    Returns:
        How many were removed, or would be, by what they are.
    """
    limit = datetime.now(tz=UTC).replace(tzinfo=None) - timedelta(days=days)  # the column has UTC without saying so
    values = {"finished": list(FINISHED), "limit": limit, "batch": batch}
    with connection, connection.cursor() as cursor:
        cursor.execute(OLD_RUNS, values)
        runs = [row[0] for row in cursor]
        cursor.execute(OLD_EVENTS, values)
        events = [row[0] for row in cursor]
        if not dry_run:
            cursor.execute("DELETE FROM asset_event_tags WHERE event_id = ANY(%s)", (events,))
            cursor.execute("DELETE FROM event_logs WHERE id = ANY(%s)", (events,))
    old = old_logs(logs, days, time.time())
    if not dry_run:
        for run in runs:
            instance.delete_run(run)
        for path in old:
            shutil.rmtree(path)
    return {"runs": len(runs), "events": len(events), "printed": len(old)}


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` say; give the exit status."""
    parser = argparse.ArgumentParser(prog="data_platform_runtime.retention", description="Removes what is old of runs.")
    parser.add_argument("--dry-run", action="store_true", help="only count")
    parser.add_argument("--days", type=int, required=True, help="days that all is kept")
    parser.add_argument("--logs", type=Path, required=True, help="directory with the printed lines of runs")
    options = parser.parse_args(arguments)
    from dagster import DagsterInstance

    try:
        connection = psycopg2.connect(os.environ["DATA_PLATFORM_METADATA"], connect_timeout=10)
    except psycopg2.OperationalError as error:
        print(f"Nothing was removed, because the metadata database does not answer: {error}", file=sys.stderr)
        return 1
    try:
        with DagsterInstance.get() as instance:
            print(json.dumps(retain(connection, instance, options.logs, options.days, options.dry_run)))
    finally:
        connection.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
