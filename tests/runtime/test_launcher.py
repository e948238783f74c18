"""The launcher of runs in containers, against an engine that is a server on a Unix socket."""

import json
import os
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher.base import WorkerStatus
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.remote_origin import (
    GrpcServerCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.storage.dagster_run import DagsterRun, DagsterRunStatus
from dagster._core.storage.tags import MAX_RETRIES_TAG
from data_platform_runtime.launcher import RUN_LABEL, ContainerRunLauncher, EngineUnreachable

ID = "a" * 64
TAG = "docker/container_id"
IMAGE = "data-platform/code-core:0123456789ab"
DESCRIBED = {
    "user": "10001:10001",
    "read_only": True,
    "cap_drop": ["ALL"],
    "mem_limit": "1g",
    "command": ["be", "a", "run"],
}
GREEDY = {
    "docker": {
        "env_vars": ["GREEDY=yes"],
        "networks": ["host"],
        "container_kwargs": {"privileged": True, "user": "0", "volumes": ["/:/host"]},
    }
}


class Engine(socketserver.ThreadingUnixStreamServer):
    """Answers as Docker does, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        """Listen, with no container."""
        super().__init__(path, Answer)
        self.asked: list[tuple[str, Any]] = []
        self.containers: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, tuple[int, str]] = {}

    def holds(self, run: str, **state: Any) -> None:
        """Have a container of a run."""
        usual = {"Running": True, "Status": "running", "ExitCode": 0, "OOMKilled": False, "Error": ""}
        self.containers[ID] = {
            "Id": ID,
            "Name": f"/data-platform-run-{run}",
            "Image": "sha256:1",
            "Config": {"Labels": {RUN_LABEL: run}, "Image": IMAGE},
            "HostConfig": {"Memory": 1 << 30},
            "State": {**usual, **state},
        }


class Answer(BaseHTTPRequestHandler):
    """One answer."""

    server: Engine

    def address_string(self) -> str:
        """Say who asks; a Unix socket has no address."""
        return "client"

    def do_GET(self) -> None:
        """Answer what is looked at."""
        if self.path == "/version":
            self.say(200, {"ApiVersion": "1.41"})
        elif (found := self.server.containers.get(self.path.split("/")[-2])) and self.path.endswith("/json"):
            self.say(200, found)
        else:
            self.say(404, {"message": "No such container"})

    def do_POST(self) -> None:
        """Do what is asked for."""
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or "null")
        what = self.path.split("?")[0].rsplit("/", 1)[1]
        self.server.asked.append((self.path.partition("/containers/")[2], body))
        status, message = self.server.answers.get(what, (201 if what == "create" else 204, ""))
        if what == "create" and status == 201:
            self.server.holds(body["Labels"][RUN_LABEL])
        self.say(status, {"message": message} if message else {"Id": ID})

    def say(self, status: int, content: Any) -> None:
        """Send it."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if status != 204:
            self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Instance:
    """What a launcher asks of Dagster."""

    def __init__(self, run: DagsterRun) -> None:
        """Have one run."""
        self.run, self.said, self.started = run, [], time.time()

    def get_run_by_id(self, run_id: str) -> DagsterRun | None:
        """Give the run."""
        return self.run if self.run.run_id == run_id else None

    def get_run_record_by_id(self, run_id: str) -> Any:
        """Give when the run started."""
        return SimpleNamespace(start_time=self.started)

    def add_run_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Add to its tags."""
        self.run = self.run.with_tags({**self.run.tags, **tags})

    def report_engine_event(self, message: str, *_: Any, **__: Any) -> None:
        """Keep what was said."""
        self.said.append(message)

    def report_run_canceling(self, run: DagsterRun, *_: Any) -> None:
        """Keep its state."""
        self.run = self.run.with_status(DagsterRunStatus.CANCELING)

    def report_run_canceled(self, run: DagsterRun, *_: Any) -> None:
        """Keep its state."""
        self.run = self.run.with_status(DagsterRunStatus.CANCELED)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine on a socket of its own."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with Engine(f"{tmp_path}/docker.sock") as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def launcher(tmp_path: Path) -> ContainerRunLauncher:
    """A launcher that knows one code location."""
    scratch = {"host": str(tmp_path), "container": "/scratch"}
    described = {"core": {"image": "data-platform/code-core", "container": DESCRIBED, "scratch": scratch}}
    (tmp_path / "runs.json").write_text(json.dumps(described))
    return ContainerRunLauncher(file=str(tmp_path / "runs.json"), stop_timeout=7)


def a_run(image: str | None = IMAGE, location: str = "core", **tags: str) -> DagsterRun:
    repository = RepositoryPythonOrigin(
        executable_path="/bin/evil",
        code_pointer=ModuleCodePointer("core", "defs", "/code"),
        container_image=image,
        entry_point=["evil"],
        container_context=GREEDY,
    )
    remote = RemoteRepositoryOrigin(GrpcServerCodeLocationOrigin("dagster-code", 4000, location_name=location), "r")
    return DagsterRun(
        job_name="smoke",
        status=DagsterRunStatus.STARTING,
        job_code_origin=JobPythonOrigin("smoke", repository),
        remote_job_origin=RemoteJobOrigin(remote, "smoke"),
        tags=tags,
    )


def launch(launcher: ContainerRunLauncher, run: DagsterRun) -> Instance:
    instance = Instance(run)
    launcher._instance_weakref = lambda: instance
    launcher.launch_run(SimpleNamespace(dagster_run=run, job_code_origin=run.job_code_origin))
    return instance


def with_instance(launcher: ContainerRunLauncher, run: DagsterRun) -> Instance:
    instance = Instance(run)
    launcher._instance_weakref = lambda: instance
    return instance


def test_container_is_what_the_instance_says_whatever_the_run_asks_for(
    launcher: ContainerRunLauncher, engine: Engine, tmp_path: Path
) -> None:
    run = a_run()
    instance = launch(launcher, run)
    (create, body), (start, _) = engine.asked
    assert create == f"create?name=data-platform-run-{run.run_id}"
    assert start == f"{ID}/start"
    assert (body["Image"], body["User"]) == (IMAGE, "10001:10001")
    assert body["Cmd"][:4] == ["be", "a", "run", run.run_id]
    assert not {"Env", "NetworkingConfig"} & set(body)
    assert not {"Binds", "Privileged"} & set(body["HostConfig"])
    assert body["HostConfig"]["CapDrop"] == ["ALL"]
    mounts = [{"Type": "bind", "Source": str(tmp_path / run.run_id), "Target": "/scratch"}]
    assert body["HostConfig"]["Mounts"] == mounts
    assert (tmp_path / run.run_id).is_dir()
    assert instance.run.tags[TAG] == ID


@pytest.mark.parametrize(
    "image",
    [None, "debian", "data-platform/code-other:0123456789ab", "data-platform/code-core:latest", f"evil/{IMAGE}"],
)
def test_image_of_another_location_is_refused(
    launcher: ContainerRunLauncher, engine: Engine, image: str | None
) -> None:
    with pytest.raises(ValueError, match="none of the code location core"):
        launch(launcher, a_run(image))
    assert engine.asked == []


def test_unknown_location_is_refused(launcher: ContainerRunLauncher, engine: Engine) -> None:
    with pytest.raises(ValueError, match="the code location other, which"):
        launch(launcher, a_run(location="other"))
    assert engine.asked == []


@pytest.mark.parametrize("status", [502, 503, 504])
def test_proxy_without_an_engine_sends_the_run_back_to_the_queue(
    launcher: ContainerRunLauncher, engine: Engine, status: int
) -> None:
    engine.answers["create"] = (status, "no server")
    with pytest.raises(DagsterUserCodeUnreachableError):
        launch(launcher, a_run())


def test_missing_socket_sends_the_run_back_to_the_queue(
    launcher: ContainerRunLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(EngineUnreachable):
        launch(launcher, a_run())


def test_refusal_fails_the_run_in_docker_s_words(launcher: ContainerRunLauncher, engine: Engine) -> None:
    engine.answers["start"] = (500, "no space left on device")
    with pytest.raises(RuntimeError, match="no space left on device") as caught:
        launch(launcher, a_run())
    assert not isinstance(caught.value, DagsterUserCodeUnreachableError)


def test_image_that_is_gone_is_named(launcher: ContainerRunLauncher, engine: Engine) -> None:
    engine.answers["create"] = (404, f"No such image: {IMAGE}")
    with pytest.raises(ValueError, match=f"{IMAGE} is not on this host any more"):
        launch(launcher, a_run())


def test_container_whose_creation_nobody_heard_of_is_started(launcher: ContainerRunLauncher, engine: Engine) -> None:
    run = a_run()
    engine.holds(run.run_id)
    engine.answers["create"] = (409, f'Conflict. The container name "/x" is already in use by container "{ID}".')
    instance = launch(launcher, run)
    assert engine.asked[-1][0] == f"{ID}/start"
    assert instance.run.tags[TAG] == ID


def test_container_of_another_run_is_left_alone(launcher: ContainerRunLauncher, engine: Engine) -> None:
    engine.holds("another")
    run = a_run(**{TAG: ID})
    instance = with_instance(launcher, run)
    assert launcher.terminate(run.run_id) is False
    assert engine.asked == []
    assert launcher.check_run_worker_health(instance.run).status == WorkerStatus.NOT_FOUND


def test_termination_stops_the_container_in_the_time_that_the_instance_gives(
    launcher: ContainerRunLauncher, engine: Engine
) -> None:
    run = a_run(**{TAG: ID})
    engine.holds(run.run_id)
    instance = with_instance(launcher, run)
    assert launcher.terminate(run.run_id) is True
    assert engine.asked == [(f"{ID}/stop?t=7", None)]
    assert instance.run.status == DagsterRunStatus.CANCELED


@pytest.mark.parametrize(
    ("state", "status", "said"),
    [
        ({}, WorkerStatus.RUNNING, None),
        ({"Running": False, "ExitCode": 137}, WorkerStatus.FAILED, "ended with status 137"),
        ({"Running": False, "ExitCode": 137, "OOMKilled": True}, WorkerStatus.FAILED, "memory limit of 1024m"),
    ],
)
def test_health_says_why_a_container_ended(
    launcher: ContainerRunLauncher, engine: Engine, state: dict[str, Any], status: WorkerStatus, said: str | None
) -> None:
    run = a_run(**{TAG: ID})
    engine.holds(run.run_id, **state)
    instance = with_instance(launcher, run)
    health = launcher.check_run_worker_health(run)
    assert health.status == status
    assert said is None or said in health.msg
    assert instance.run.tags.get(MAX_RETRIES_TAG) == ("0" if state.get("OOMKilled") else None)


@pytest.mark.parametrize(
    ("listen_since", "status"),
    [
        ({"core/a": -60.0, "core/b": 60.0}, WorkerStatus.RUNNING),
        ({"core/b": 60.0}, WorkerStatus.NOT_FOUND),
        ({}, WorkerStatus.NOT_FOUND),
    ],
)
def test_run_that_a_command_executes_is_left_to_it_while_a_code_server_of_then_is_there(
    listen_since: dict[str, float],
    status: WorkerStatus,
    launcher: ContainerRunLauncher,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data_platform_runtime.launcher.SOCKETS", tmp_path / "sockets")
    run = a_run()
    instance = with_instance(launcher, run)
    (tmp_path / "sockets/core").mkdir(parents=True)
    (tmp_path / "sockets/core/current.sock").symlink_to("gone.sock")
    for name, later in listen_since.items():
        socket = tmp_path / "sockets" / f"{name}.sock"
        socket.touch()
        os.utime(socket, times=(0, instance.started + later))
    assert launcher.check_run_worker_health(run).status == status
    assert launcher.terminate(run.run_id) is False
    assert instance.run.status == DagsterRunStatus.CANCELING
    assert engine.asked == []


def test_engine_that_does_not_answer_says_nothing_about_a_run(
    launcher: ContainerRunLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    run = a_run(**{TAG: ID})
    with_instance(launcher, run)
    with pytest.raises(EngineUnreachable):
        launcher.check_run_worker_health(run)


def test_dagster_makes_the_launcher_of_what_is_configured(tmp_path: Path) -> None:
    configured = {
        "run_launcher": {
            "module": "data_platform_runtime.launcher",
            "class": "ContainerRunLauncher",
            "config": {"file": str(tmp_path / "runs.json"), "stop_timeout": 7},
        }
    }
    with dg.instance_for_test(configured, temp_dir=str(tmp_path)) as instance:
        assert isinstance(instance.run_launcher, ContainerRunLauncher)
        assert instance.run_launcher.supports_resume_run is False
