"""Schedules: when jobs run by themselves."""

import dagster as dg

from data_platform.jobs import refresh_marts

daily_refresh = dg.ScheduleDefinition(
    name="daily_refresh",
    job=refresh_marts,
    cron_schedule="30 4 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description=(
        "Runs refresh_marts daily at 04:30 UTC. Stopped by default: the models need flights, so on a new platform it "
        "would only fail until `everything` has run once, and switching it on is then one click."
    ),
)
