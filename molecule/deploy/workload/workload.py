"""Pipelines that are shipped again and again while they run: each run says which version of this file it ran with."""

import time

import dagster as dg

VERSION = "1"


@dg.op(config_schema={"seconds": dg.Field(float, default_value=0.0)})
def wait(context: dg.OpExecutionContext) -> None:
    """Take a while, and say which version this is."""
    time.sleep(context.op_config["seconds"])
    context.instance.add_run_tags(context.run_id, {"version": VERSION})


@dg.job
def patient() -> None:
    """A run that takes as long as it is told to."""
    wait()


@dg.job(config={"ops": {"wait": {"config": {"seconds": 30.0}}}})
def lasting() -> None:
    """A run that outlasts a deployment."""
    wait()


@dg.schedule(cron_schedule="* * * * *", job=patient, default_status=dg.DefaultScheduleStatus.RUNNING)
def each_minute(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    """A run each minute, known by the minute."""
    return dg.RunRequest(run_key=context.scheduled_execution_time.isoformat(), tags={"ticked": VERSION})


@dg.sensor(job=patient, minimum_interval_seconds=30)
def says(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Say which version the code server has."""
    return dg.SkipReason(VERSION)


defs = dg.Definitions(jobs=[patient, lasting], schedules=[each_minute], sensors=[says])
