"""What the daemon does better than Dagster's own when something around it fails.

- A retry waits for a code location that is down; Dagster drops it for good.
- A run that took too long says which variable to raise, and is not tried again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.errors import DagsterCodeLocationLoadError, DagsterUserCodeUnreachableError
from dagster._core.storage.dagster_run import RunRecord
from dagster._core.storage.tags import AUTO_RETRY_RUN_ID_TAG, MAX_RETRIES_TAG, WILL_RETRY_TAG
from dagster._daemon import controller
from dagster._daemon.auto_run_reexecution import auto_run_reexecution, event_log_consumer
from dagster._daemon.monitoring import run_monitoring

DAYS = 1
"""Days that a retry waits for its code location."""

INTERVAL = 10.0
"""Seconds between two looks whether retries wait."""

DOWN = (DagsterUserCodeUnreachableError, DagsterCodeLocationLoadError)


def keep_retries() -> None:
    """Have the daemon keep a retry whose code location is down, and launch it when it is up again."""
    retry = auto_run_reexecution.retry_run

    def retry_or_wait(failed_run: DagsterRun, workspace_context: Any) -> None:
        try:
            retry(failed_run, workspace_context)
        except DOWN as error:
            logging.getLogger("dagster.daemon.EventLogConsumerDaemon").warning(
                "The retry of run %s waits for its code location: %s", failed_run.run_id, str(error).splitlines()[0]
            )
            return
        run = workspace_context.instance.get_run_by_id(failed_run.run_id)
        if run and AUTO_RETRY_RUN_ID_TAG not in run.tags:
            workspace_context.instance.add_run_tags(run.run_id, {WILL_RETRY_TAG: "false"})

    class Consumer(event_log_consumer.EventLogConsumerDaemon):
        """Dagster's consumer of events, which also tries again what waits."""

        looked = 0.0

        def run_iteration(self, workspace_process_context: Any) -> Iterator[None]:
            """Consume what is new, then try what waits."""
            yield from super().run_iteration(workspace_process_context)
            if time.monotonic() - self.looked >= INTERVAL:
                self.looked = time.monotonic()
                yield from auto_run_reexecution.consume_new_runs_for_automatic_reexecution(
                    workspace_process_context, waiting(workspace_process_context.instance), self._logger
                )

    auto_run_reexecution.retry_run = retry_or_wait
    controller.EventLogConsumerDaemon = Consumer


def waiting(instance: DagsterInstance) -> list[RunRecord]:
    """Runs that are to be retried and were not, the oldest first."""
    records = instance.get_run_records(
        RunsFilter(
            statuses=[DagsterRunStatus.FAILURE],
            tags={WILL_RETRY_TAG: "true"},
            updated_after=datetime.now(tz=UTC) - timedelta(days=DAYS),
        ),
        ascending=True,
    )
    return [record for record in records if AUTO_RETRY_RUN_ID_TAG not in record.dagster_run.tags]


class Explaining:
    """The instance, as the check of the maximum time is to see it.

    Args:
        instance: The instance.
    """

    def __init__(self, instance: DagsterInstance) -> None:
        """Stand before the instance."""
        self.instance = instance

    def __getattr__(self, name: str) -> Any:
        """Be the instance."""
        return getattr(self.instance, name)

    def report_run_canceling(self, run: DagsterRun, message: str) -> None:
        """Say of a run that takes too long what can be done, and that it is not tried again."""
        self.instance.add_run_tags(run.run_id, {MAX_RETRIES_TAG: "0"})
        hint = "It is not tried again: raise dagster_max_runtime, or the tag dagster/max_runtime of its job."
        self.instance.report_run_canceling(run, message=f"{message} {hint}")


def explain_timeouts() -> None:
    """Have the daemon say of a run that took too long which variable to raise, and not try it again."""
    check = run_monitoring.check_run_timeout

    def explained(instance: DagsterInstance, *arguments: Any) -> None:
        check(Explaining(instance), *arguments)

    run_monitoring.check_run_timeout = explained


def set_pools(instance: DagsterInstance, pools: dict[str, int]) -> None:
    """Give pools their limits, where they have other ones.

    Args:
        instance: The instance.
        pools: Steps that may be in progress at once, by pool.
    """
    storage = instance.event_log_storage
    limits = {pool.name: pool.limit for pool in storage.get_pool_limits() if not pool.from_default}
    for name, limit in pools.items():
        if limits.get(name) != limit:
            storage.set_concurrency_slots(name, limit)
