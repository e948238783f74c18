"""Sensors: what launches jobs when something happens."""

import time

import dagster as dg

from data_platform.jobs import land_files
from data_platform.landing import scan
from data_platform.resources import Landing

WAITING_TAG = "data_platform/waiting"
RETRY_SECONDS = 600


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
    for newest in context.instance.get_run_records(dg.RunsFilter(job_name=land_files.name), limit=1):
        run = newest.dagster_run
        if not run.is_finished:
            return dg.SkipReason(f"The run {run.run_id} is on its way.")
        if run.tags.get(WAITING_TAG) == waiting.digest:
            if run.is_success:
                return dg.SkipReason(f"The run {run.run_id} said what is wrong with the files that wait.")
            if newest.end_time and time.time() - newest.end_time < RETRY_SECONDS:
                return dg.SkipReason(f"The run {run.run_id} failed for what waits; it is tried again in ten minutes.")
    return dg.RunRequest(tags={WAITING_TAG: waiting.digest})
