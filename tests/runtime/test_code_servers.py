"""Code servers take over from each other while they are asked, with gRPC and Dagster's own client as they are."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import PACKAGES
from data_platform_runtime import code_servers, ready, with_database

MODULE = """
import dagster as dg
@dg.job
def {name}(): ...
defs = dg.Definitions(jobs=[{name}])
"""


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a location's code servers, which is that of this container."""
    monkeypatch.setenv("DATA_PLATFORM_SOCKETS", str(tmp_path))
    return tmp_path


def listen(path: Path) -> socket.socket:
    """Listen at a socket."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen()
    return server


def test_the_server_that_is_ready_is_found_and_what_is_dead_goes(sockets: Path) -> None:
    with listen(sockets / "old.sock"), listen(sockets / "new.sock"):
        listen(sockets / "dead.sock").close()
        for name in ("old", "new", "new"):
            code_servers.take_over(sockets / f"{name}.sock")
            assert os.readlink(sockets / "current.sock") == f"{name}.sock"
        assert sorted(path.name for path in sockets.iterdir()) == ["current.sock", "new.sock", "old.sock"]


def test_code_is_ready_once_its_own_server_answers(sockets: Path) -> None:
    with pytest.raises(ready.NotReady, match="the code server does not answer"):
        ready.code()
    assert not (sockets / "current.sock").is_symlink()


CALL = """
import socket, sys, time
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
    client.connect(sys.argv[1])
    time.sleep(60)
"""
ELSEWHERE = ["unshare", "--user", "--map-root-user", "--net"]
HAS_NETWORKS = sys.platform == "linux" and not subprocess.run([*ELSEWHERE, "true"], check=False).returncode


@pytest.fixture
def in_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have this process be all that runs in the container."""
    processes = tmp_path / "proc"
    processes.mkdir()
    for name in (str(os.getpid()), "self"):
        (processes / name).symlink_to(f"/proc/{os.getpid()}")
    monkeypatch.setattr(code_servers, "PROCESSES", processes)
    monkeypatch.setattr(code_servers, "runs", lambda path: False)
    monkeypatch.setattr(code_servers, "commands", lambda: False)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/net/unix is Linux's")
@pytest.mark.parametrize(
    "elsewhere",
    [[], pytest.param(ELSEWHERE, marks=pytest.mark.skipif(not HAS_NETWORKS, reason="no networks may be made here"))],
    ids=["this container", "another container"],
)
@pytest.mark.usefixtures("in_here")
def test_a_server_drains_once_nobody_has_a_connection_to_it(elsewhere: list[str], sockets: Path) -> None:
    own = code_servers.own_socket()
    before = code_servers.calls(own)
    with listen(own) as server, subprocess.Popen([*elsewhere, sys.executable, "-c", CALL, str(own)]) as client:
        answering, _ = server.accept()
        assert code_servers.calls(own) == before + 1
        started = time.monotonic()
        code_servers.drain(idle=0.2, patience=1.0, interval=0.01)
        assert 1.0 <= time.monotonic() - started < 5.0
        threading.Timer(0.5, answering.close).start()
        started = time.monotonic()
        code_servers.drain(idle=0.2, patience=10.0, interval=0.01)
        assert 0.6 <= time.monotonic() - started < 5.0
        client.kill()


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        (["/opt/dagster/bin/python", "/opt/dagster/bin/dagster", "job", "execute"], True),
        (["dagster", "job", "execute"], True),
        (["python", "-m", "data_platform_runtime.code_servers", "serve", "--working-directory=/code/dagster"], False),
        (["python", "-m", "data_platform_runtime.code_servers", "drain"], False),
        (["sleep", "1000"], False),
        ([], False),
    ],
)
def test_commands_of_dagster_are_told_from_all_else(
    command: list[str], is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_servers, "PROCESSES", tmp_path)
    for process in ("1", "20", "self"):
        (tmp_path / process).mkdir()
    (tmp_path / "20" / "cmdline").write_bytes(b"".join(f"{word}\0".encode() for word in command))
    (tmp_path / "self" / "cmdline").write_bytes(b"dagster\0")
    assert code_servers.commands() is is_one


def test_a_server_drains_once_the_commands_beside_it_have_ended(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [True, True, False]
    monkeypatch.setattr(code_servers, "runs", lambda path: False)
    monkeypatch.setattr(code_servers, "commands", lambda: left.pop(0))
    code_servers.drain(idle=0.01, patience=1.0, interval=0.01)
    assert left == []


@pytest.fixture
def servers(sockets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Two code servers of Dagster's, whose code has jobs of their names."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    processes: dict[str, Any] = {}
    try:
        for name in ("old", "new"):
            (tmp_path / f"{name}_code.py").write_text(MODULE.format(name=name))
            command = ["dagster", "api", "grpc", f"--socket={sockets / f'{name}.sock'}", "--location-name=sales"]
            processes[name] = subprocess.Popen(
                [*command, f"--working-directory={tmp_path}", f"--module-name={name}_code"],
                env={**os.environ, "DAGSTER_CURRENT_IMAGE": f"data-platform/code-sales:{name}"},
            )
            monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
            deadline = time.monotonic() + 60
            while not (sockets / "current.sock").exists() or os.readlink(sockets / "current.sock") != f"{name}.sock":
                assert time.monotonic() < deadline
                with suppress(ready.NotReady):
                    ready.code()
        code_servers.take_over(sockets / "old.sock")
        yield processes
    finally:
        for process in processes.values():
            process.kill()  # SIGTERM is ignored where SIGINT is, as in a job in the background
            process.wait()


def test_what_was_loaded_from_a_server_is_asked_of_it_until_it_is_gone(sockets: Path, servers: dict[str, Any]) -> None:
    program = """
import os, sys
from data_platform_runtime import code_servers
code_servers.stay()
from dagster import DagsterInstance
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin
origin = GrpcServerCodeLocationOrigin(host="localhost", socket=sys.argv[1], location_name="sales")
with DagsterInstance.ephemeral() as instance:
    def jobs(location):
        return [job.name for job in location.get_repository("__repository__").get_all_jobs()]
    def asked(location):
        return location.client.get_server_id()
    watcher = origin.create_client()
    before = origin.create_location(instance)
    first = asked(before)
    assert watcher.get_server_id() == watcher.get_server_id() == first
    code_servers.take_over(code_servers.Path(sys.argv[1]).with_name("new.sock"))
    after = origin.create_location(instance)
    assert (jobs(before), jobs(after)) == (["old"], ["new"]), (jobs(before), jobs(after))
    assert asked(before) == first != asked(after)
    assert watcher.get_server_id() == asked(after)
    os.unlink(os.path.join(os.path.dirname(sys.argv[1]), "old.sock"))
    assert asked(before) == asked(after)
    print(before.get_display_metadata()["image"], after.get_display_metadata()["image"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(sockets / "current.sock")],
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["data-platform/code-sales:old", "data-platform/code-sales:new"], done.stderr


def test_a_server_starts_with_its_secrets_once_the_database_lets_it_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(with_database, "wait", asked.append)
    monkeypatch.setenv("DATA_PLATFORM_METADATA", "postgresql://somewhere")
    monkeypatch.setenv("TOKEN", "old")
    (tmp_path / "secrets.json").write_text('{"TOKEN": "new", "NUMBER": 1}')
    rest = code_servers.prepare([f"--secrets={tmp_path}/secrets.json", "--location-name=sales", "--module-name=m"])
    assert rest == ["--location-name=sales", "--module-name=m"]
    assert (os.environ["TOKEN"], os.environ["NUMBER"]) == ("new", "1")
    assert asked == ["postgresql://somewhere"]
    monkeypatch.delenv("NUMBER")


def test_a_server_that_cannot_start_says_why_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> None:
        raise with_database.NoDatabase("The metadata database refuses the login.")

    monkeypatch.setattr(with_database, "wait", refuse)
    monkeypatch.setenv("DATA_PLATFORM_METADATA", "postgresql://somewhere")
    with pytest.raises(SystemExit, match=r"^Error: The metadata database refuses the login\.$"):
        code_servers.prepare(["--location-name=sales"])
    with pytest.raises(SystemExit, match="cannot be read .No such file or directory.: run the playbook again"):
        code_servers.prepare([f"--secrets={tmp_path}/nowhere", "--location-name=sales"])


def test_runs_that_live_in_a_server_are_asked_for(sockets: Path, servers: dict[str, Any]) -> None:
    assert code_servers.runs(sockets / "old.sock") is False


def test_the_ui_shows_what_was_deployed_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_servers, "DEPLOYMENTS", tmp_path)
    assert code_servers.deployed("sales", "code-sales:1") == {}
    record = {
        "image": "code-sales:1",
        "version": "1",
        "revision": "",
        "deployed": "2026-01-02 03:04:05 UTC",
        "by": "me@here",
    }
    (tmp_path / "sales.json").write_text(json.dumps(record))
    assert code_servers.deployed("sales", "code-sales:1") == {
        "code version": "1",
        "deployed": "2026-01-02 03:04:05 UTC",
        "deployed by": "me@here",
    }
    assert code_servers.deployed("sales", "code-sales:2") == {}
    (tmp_path / "sales.json").write_text("{")
    assert code_servers.deployed("sales", "code-sales:1") == {}
