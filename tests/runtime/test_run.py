"""What is left when the process of a run dies, and what ends one whose run has ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import psycopg2
import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.storage.tags import MAX_RETRIES_TAG
from dagster._core.test_utils import create_run_for_test
from data_platform_runtime import run

V2 = "low 0\nhigh 0\nmax 4\noom 1\noom_kill 3\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Have the signals that a process starts with, whatever Dagster made of them; leave those of the test run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Set the state of the run in the database."""
    monkeypatch.setattr(run, "REASON", tmp_path / "reason")
    monkeypatch.setattr(run, "status", lambda _: "STARTED")
    return lambda value: monkeypatch.setattr(run, "status", lambda _: value)


def watched(work: Callable[[], None], **times: float) -> int:
    return run.watch(run.start(work), "some-run", **{"interval": 0.05, "grace": 0.2, **times})


@pytest.mark.parametrize(("content", "count"), [(V2, 3), (V1, 2), ("oom_kill_disable 0\n", 0)])
def test_kills_are_counted_in_either_version_of_cgroups(tmp_path: Path, content: str, count: int) -> None:
    (tmp_path / "there").write_text(content)
    assert run.kills([tmp_path / "nowhere", tmp_path / "there"]) == count


def test_kills_are_none_where_nobody_counts(tmp_path: Path) -> None:
    assert run.kills([tmp_path / "nowhere"]) == 0


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (lambda: None, 0),
        (lambda: sys.exit(3), 3),
        (lambda: sys.exit("reason"), 1),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    ],
)
def test_end_of_the_process_is_told(work: Callable[[], None], code: int) -> None:
    assert watched(work) == code


def test_reason_of_what_was_raised_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    assert watched(lambda: int("no number")) == 1
    assert "no number" in run.REASON.read_text()
    assert "no number" in capfd.readouterr().err


def test_process_is_what_the_kernel_takes_first() -> None:
    assert watched(lambda: sys.exit(Path("/proc/self/oom_score_adj").read_text().strip() == "1000")) == 1


def test_termination_is_passed_on(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(run.__file__).parents[1])!r})
from pathlib import Path
from data_platform_runtime import run
def work():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    Path({str(tmp_path / "ready")!r}).touch()
    time.sleep(30)
run.status = lambda _: "STARTED"
sys.exit(run.watch(run.start(work), "some-run"))
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait(10) == 7


def test_process_is_ended_when_its_run_has_ended_without_it(
    state: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    state("CANCELED")
    started = time.monotonic()
    assert watched(lambda: time.sleep(30)) == -signal.SIGTERM
    assert time.monotonic() - started < 15
    assert "The run has ended, its process has not" in capfd.readouterr().out


def test_process_that_does_not_listen_is_killed(state: Callable[[str], None]) -> None:
    def work() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(30)

    state("FAILURE")
    assert watched(work) == -signal.SIGKILL


def test_process_that_ends_soon_after_its_run_is_left_alone(state: Callable[[str], None]) -> None:
    state("SUCCESS")
    assert watched(lambda: time.sleep(0.5), grace=10) == 0


def test_database_that_does_not_answer_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> str:
        raise psycopg2.OperationalError("no answer")

    monkeypatch.setattr(run, "status", refuse)
    assert watched(lambda: time.sleep(0.5), grace=0.0) == 0


@pytest.mark.parametrize("ended", ["SUCCESS", "FAILURE", "CANCELED", "QUEUED", None])
def test_nothing_is_told_of_a_run_that_ended_or_waits_again(
    state: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch, ended: str | None
) -> None:
    state(ended)
    monkeypatch.setattr(run, "tell", lambda *_: pytest.fail("told"))
    run.report("some-run", 1, 0, "core", "1g")


def test_database_is_waited_for_to_tell_how_a_run_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([psycopg2.OperationalError("no answer"), "STARTED"])
    told: list[tuple[object, ...]] = []

    def answer(_: str) -> str:
        value = next(answers)
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(run, "status", answer)
    monkeypatch.setattr(run.time, "sleep", lambda _: None)
    monkeypatch.setattr(run, "tell", lambda *arguments: told.append(arguments))
    run.report("some-run", -9, 1, "core", "1g")
    assert told == [("some-run", -9, 1, "core", "1g")]


def test_scratch_is_left_empty(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/etc")
    run.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert Path("/etc/passwd").exists()


def test_memory_that_was_too_little_is_told_with_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with DagsterInstance.ephemeral() as instance:
        monkeypatch.setattr(DagsterInstance, "get", lambda: nullcontext(instance))
        started = create_run_for_test(instance, job_name="greedy", status=DagsterRunStatus.STARTED)
        run.tell(started.run_id, 137, 1, "shop", "600m")
        ended = instance.get_run_by_id(started.run_id)
        said = " ".join(entry.message for entry in instance.all_logs(started.run_id))
    assert ended and ended.status == DagsterRunStatus.FAILURE
    assert ended.tags[MAX_RETRIES_TAG] == "0"
    assert "memory limit of 600m" in said
    assert "run_limits of the code location shop" in said
