"""What the daemon does when something around it fails, with Dagster's own daemons and an instance of their own."""

import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._core.errors import DagsterCodeLocationLoadError
from dagster._core.storage.tags import AUTO_RETRY_RUN_ID_TAG, MAX_RETRIES_TAG, WILL_RETRY_TAG
from dagster._daemon import controller
from dagster._daemon.auto_run_reexecution import auto_run_reexecution
from dagster._daemon.monitoring import run_monitoring
from data_platform_runtime import recovery

RETRIES = {"run_retries": {"enabled": True, "max_retries": 1, "retry_on_asset_or_op_failure": False}}


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """An instance that retries, and the daemon's functions as they were, afterwards."""
    monkeypatch.setattr(controller, "EventLogConsumerDaemon", controller.EventLogConsumerDaemon)
    monkeypatch.setattr(auto_run_reexecution, "retry_run", auto_run_reexecution.retry_run)
    monkeypatch.setattr(run_monitoring, "check_run_timeout", run_monitoring.check_run_timeout)
    monkeypatch.setattr(recovery, "INTERVAL", 0.0)
    with dg.instance_for_test(RETRIES) as instance:
        yield instance


@pytest.fixture
def location(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A code location that is down, and what was tried of it."""
    location = SimpleNamespace(down=True, vanished=False, tried=[])

    def retry(run: dg.DagsterRun, context: Any) -> None:
        location.tried.append(run.run_id)
        if location.down:
            raise DagsterCodeLocationLoadError("the code server does not answer", load_error_infos=[])
        if not location.vanished:
            context.instance.add_run_tags(run.run_id, {AUTO_RETRY_RUN_ID_TAG: "the-next"})

    monkeypatch.setattr(auto_run_reexecution, "retry_run", retry)
    recovery.keep_retries()
    return location


def failed(instance: dg.DagsterInstance) -> str:
    """Give a run that died."""
    run = a_run(instance)
    instance.report_run_failed(run, "its container is gone")
    return run.run_id


def a_run(instance: dg.DagsterInstance) -> dg.DagsterRun:
    """Give a run that has started."""

    @dg.job
    def some_job() -> None:
        pass

    run = instance.create_run_for_job(some_job)
    instance.report_engine_event("started", run)
    return run


def iterate(instance: dg.DagsterInstance) -> None:
    """Let the daemon look once."""
    list(controller.EventLogConsumerDaemon(interval_seconds=0).run_iteration(SimpleNamespace(instance=instance)))


def test_retry_waits_for_its_code_location(instance: dg.DagsterInstance, location: SimpleNamespace) -> None:
    iterate(instance)
    run = failed(instance)
    for _ in range(3):
        iterate(instance)
    assert location.tried[0] == run
    assert instance.get_run_by_id(run).tags[WILL_RETRY_TAG] == "true"
    location.down, tried = False, len(location.tried)
    for _ in range(3):
        iterate(instance)
    assert len(location.tried) == tried + 1
    assert recovery.waiting(instance) == []


def test_retry_that_cannot_be_is_not_tried_for_ever(instance: dg.DagsterInstance, location: SimpleNamespace) -> None:
    location.down, location.vanished = False, True
    iterate(instance)
    run = failed(instance)
    for _ in range(3):
        iterate(instance)
    assert location.tried == [run]
    assert instance.get_run_by_id(run).tags[WILL_RETRY_TAG] == "false"


def test_run_that_takes_too_long_says_which_variable_to_raise(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery.explain_timeouts()
    run = a_run(instance)
    monkeypatch.setattr(type(instance.run_launcher), "terminate", lambda self, run_id: True)
    record = SimpleNamespace(dagster_run=run, start_time=time.time() - 100)
    run_monitoring.check_run_timeout(instance, record, logging.getLogger(), 10.0)
    assert instance.get_run_by_id(run.run_id).tags[MAX_RETRIES_TAG] == "0"
    said = [event.message for event in instance.all_logs(run.run_id)]
    assert any("raise dagster_max_runtime" in message for message in said)
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
    assert instance.get_run_by_id(run.run_id).tags[WILL_RETRY_TAG] == "false"


def test_pools_get_their_limits_and_keep_those_of_others(instance: dg.DagsterInstance) -> None:
    instance.event_log_storage.set_concurrency_slots("other", 3)
    recovery.set_pools(instance, {"duckdb": 1})
    recovery.set_pools(instance, {"duckdb": 2})
    limits = {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()}
    assert limits == {"duckdb": 2, "other": 3}
