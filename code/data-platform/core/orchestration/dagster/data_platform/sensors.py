"""Sensors: what launches jobs when something happens."""

import hashlib
import time
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from data_platform.jobs import land_files, publish_warehouse
from data_platform.landing import scan
from data_platform.publishing import newest, state_of
from data_platform.resources import Landing, Published, Warehouse

WAITING_TAG = "data_platform/waiting"
STATE_TAG = "data_platform/warehouse_state"
RETRY_SECONDS = 600
PUBLISH_SECONDS = 300
UNFINISHED = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]


def on_its_way(context: dg.SensorEvaluationContext, job: str, tag: str, value: str, done: str) -> str:
    """Return why a job is not to be launched for something: a run is, or was, on its way for it; else an empty string.

    Args:
        context: The sensor's.
        job: Name of the job.
        tag: Tag of its runs that says what they are for.
        value: What the next one would be for.
        done: What a run that succeeded for the same has done.
    """
    for latest in context.instance.get_run_records(dg.RunsFilter(job_name=job), limit=1):
        run = latest.dagster_run
        if not run.is_finished:
            return f"The run {run.run_id} is on its way."
        if run.tags.get(tag) == value:
            if run.is_success:
                return f"The run {run.run_id} {done}."
            if latest.end_time and time.time() - latest.end_time < RETRY_SECONDS:
                return f"The run {run.run_id} failed for the same; it is tried again in ten minutes."
    return ""


@dg.sensor(
    job=land_files,
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Launches land_files when files wait in the landing folder that nobody is copying any more.",
)
def landing_folder(context: dg.SensorEvaluationContext, landing: Landing) -> dg.RunRequest | dg.SkipReason:
    """Launch a run for what waits, unless one is on its way; what a run failed for is tried again ten minutes later."""
    waiting = scan(landing.folder())
    if not waiting.files and not waiting.stuck:
        return dg.SkipReason("No file waits.")
    done = "said what is wrong with the files that wait"
    if reason := on_its_way(context, land_files.name, WAITING_TAG, waiting.digest, done):
        return dg.SkipReason(reason)
    return dg.RunRequest(tags={WAITING_TAG: waiting.digest})


@dg.sensor(
    job=publish_warehouse,
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Launches publish_warehouse when the warehouse has changed: as soon as no run is in progress that may write "
        "more, and every five minutes anyway."
    ),
)
def changed_warehouse(
    context: dg.SensorEvaluationContext, warehouse: Warehouse, published: Published
) -> dg.RunRequest | dg.SkipReason:
    """Launch a run when the newest snapshot is of another state, and no run is in progress that may write more."""
    state, snapshot = state_of(Path(warehouse.path)), newest(Path(published.path))
    if not state:
        return dg.SkipReason("There is no warehouse yet.")
    if snapshot and snapshot.state == state:
        return dg.SkipReason(f"The snapshot {snapshot.name} holds what the warehouse holds.")
    digest = hashlib.sha256(state.encode()).hexdigest()[:32]
    if reason := on_its_way(context, publish_warehouse.name, STATE_TAG, digest, "published it"):
        return dg.SkipReason(reason)
    runs = context.instance.get_runs_count(dg.RunsFilter(statuses=UNFINISHED))
    if (
        runs
        and snapshot
        and datetime.now(UTC).timestamp() - datetime.fromisoformat(snapshot.at).timestamp() < PUBLISH_SECONDS
    ):
        return dg.SkipReason(f"{runs} runs are in progress or wait; the last snapshot is from {snapshot.at}.")
    return dg.RunRequest(tags={STATE_TAG: digest})
