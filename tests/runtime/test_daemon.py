"""What makes the daemon read its workspace again, with Dagster's own main loop."""

import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dagster import DagsterInstance
from dagster._daemon import cli, controller
from dagster._daemon.auto_run_reexecution import auto_run_reexecution
from dagster._daemon.monitoring import run_monitoring
from dagster_postgres import utils
from data_platform_runtime import daemon


class Workspace:
    """A workspace that counts how often it is read."""

    def __init__(self) -> None:
        """Make it readable."""
        self.read, self.broken = 0, False

    def refresh_workspace(self) -> None:
        """Read it."""
        if self.broken:
            raise ValueError("load_from is missing")
        self.read += 1


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that asks, in a place of its own."""
    monkeypatch.setattr(daemon, "ASKED", tmp_path / "asked")
    return daemon.ASKED


@pytest.fixture
def workspace() -> Workspace:
    """The workspace of the daemon."""
    return Workspace()


@pytest.fixture
def loop(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The main loop that the daemon would run, without its threads."""
    started: list[list[str]] = []
    for name in (
        "DagsterDaemonController",
        "EventLogConsumerDaemon",
        "QueuedRunCoordinatorDaemon",
        "THREAD_CHECK_INTERVAL",
    ):
        monkeypatch.setattr(controller, name, getattr(controller, name))
    monkeypatch.setattr(auto_run_reexecution, "retry_run", auto_run_reexecution.retry_run)
    monkeypatch.setattr(run_monitoring, "check_run_timeout", run_monitoring.check_run_timeout)
    monkeypatch.setattr(utils, "create_engine", utils.create_engine)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("DATA_PLATFORM_DEQUEUE_INTERVAL", "0.5")
    monkeypatch.setenv("DATA_PLATFORM_POOLS", '{"duckdb": 1}')
    monkeypatch.setattr(cli, "cli", lambda arguments, obj: started.append(arguments))
    assert daemon.main(["run", "--workspace=here"]) == 0
    assert started == [["run", "--workspace=here"]]
    loop = object.__new__(controller.DagsterDaemonController)
    loop._grpc_server_registry, loop._workspace_process_context = None, workspace
    loop._logger = logging.getLogger("daemon")
    return loop


def test_dagster_builds_its_loop_from_what_is_replaced(loop: Any) -> None:
    replaced, original = type(loop).__mro__[:2]
    assert (replaced, controller.THREAD_CHECK_INTERVAL) == (controller.DagsterDaemonController, daemon.INTERVAL)
    assert "DagsterDaemonController" in controller.daemon_controller_from_instance.__wrapped__.__code__.co_names
    assert {"THREAD_CHECK_INTERVAL", "check_workspace_freshness"} <= set(original.check_daemon_loop.__code__.co_names)


def test_pools_have_their_limits_when_the_daemon_runs(loop: Any) -> None:
    with DagsterInstance.get() as instance:
        assert {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()} == {"duckdb": 1}


def test_workspace_is_read_each_minute_and_no_oftener(loop: Any, workspace: Workspace) -> None:
    now = time.time()
    assert loop.check_workspace_freshness(now - 50) == now - 50
    assert workspace.read == 0
    assert loop.check_workspace_freshness(now - 61) >= now
    assert workspace.read == 1


def test_workspace_is_read_at_once_when_it_is_asked_for(loop: Any, workspace: Workspace, asked: Path) -> None:
    asked.touch()
    now = time.time()
    assert loop.check_workspace_freshness(now) >= now
    assert workspace.read == 1
    assert not asked.exists()


def test_workspace_that_cannot_be_read_is_tried_again(loop: Any, workspace: Workspace, asked: Path) -> None:
    asked.touch()
    workspace.broken = True
    last = loop.check_workspace_freshness(time.time())
    assert asked.exists()
    workspace.broken = False
    loop.check_workspace_freshness(last)
    assert workspace.read == 1
    assert not asked.exists()


def test_reload_returns_when_the_daemon_has_read(loop: Any, workspace: Workspace, asked: Path) -> None:
    result: list[int] = []
    waiting = threading.Thread(target=lambda: result.append(daemon.main(["reload"])))
    waiting.start()
    last = time.time()
    while not workspace.read:
        last = loop.check_workspace_freshness(last)
    waiting.join(5)
    assert result == [0]


def test_daemon_that_does_not_read_is_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(daemon, "TIMEOUT", 0.0)
    assert daemon.main(["reload"]) == 1
    said = capsys.readouterr().err
    assert said == "The workspace was not read again: the daemon has not read its workspace within 0 s.\n"


@pytest.mark.parametrize("arguments", [[], ["start"], ["reload", "now"]])
def test_wrong_use_is_told_of(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert daemon.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ")


@pytest.mark.usefixtures("loop")
def test_queue_is_looked_at_as_often_as_the_environment_says() -> None:
    instance = SimpleNamespace(run_coordinator=SimpleNamespace(dequeue_interval_seconds=5))
    queue = controller.create_daemon_of_type("QUEUED_RUN_COORDINATOR", instance)
    assert queue.interval_seconds == 0.5
