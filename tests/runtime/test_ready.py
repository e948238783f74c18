"""The readiness probes, against servers that speak the real protocols."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import grpc
import pytest
from conftest import Webserver, free_port
from dagster._daemon.types import DaemonHeartbeat
from dagster_postgres import PostgresRunStorage
from data_platform_runtime import code_servers, ready
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVER_PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nonexistent"))
NOBODY = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
LOADED = {"name": "core", "loadStatus": "LOADED", "displayMetadata": []}
LOADING = LOADED | {"name": "slow", "loadStatus": "LOADING"}


def test_webserver_is_ready_once_every_location_was_tried(webserver: Webserver) -> None:
    webserver.says("workspaceOrError", {"locationEntries": [LOADED, LOADED | {"name": "other"}]})
    ready.webserver(port=webserver.server_port)
    assert webserver.asked == [("/graphql", ready.LOCATIONS)]


def test_webserver_is_asked_for_the_images_that_it_shows(webserver: Webserver) -> None:
    shown = [{"key": "image", "value": "core:1"}, {"key": "other", "value": "core:2"}]
    other = {"name": "other", "loadStatus": "LOADED", "displayMetadata": []}
    webserver.says("workspaceOrError", {"locationEntries": [LOADED | {"displayMetadata": shown}, other]})
    ready.webserver("core=core:1", port=webserver.server_port)
    with pytest.raises(ready.NotReady, match="not shown yet: core=core:2, other=core:1$"):
        ready.webserver("core=core:1", "core=core:2", "other=core:1", port=webserver.server_port)


def test_webserver_without_locations_is_ready(webserver: Webserver) -> None:
    webserver.says("workspaceOrError", {"locationEntries": []})
    ready.webserver(port=webserver.server_port)


def test_webserver_that_still_loads_is_not_ready(webserver: Webserver) -> None:
    webserver.says("workspaceOrError", {"locationEntries": [LOADED, LOADING]})
    with pytest.raises(ready.NotReady, match="still loading: slow$"):
        ready.webserver(port=webserver.server_port)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (500, "{}"),
        (502, "<html>"),
        (200, "<html>"),
        (200, "{}"),
        (200, '{"data": null, "errors": [{"message": "no"}]}'),
        (200, '{"data": {"workspaceOrError": null}}'),
        (200, '{"data": {"workspaceOrError": {}}}'),
    ],
)
def test_webserver_that_does_not_make_sense_is_not_ready(status: int, text: str, webserver: Webserver) -> None:
    webserver.status, webserver.text = status, text
    with pytest.raises(ready.NotReady):
        ready.webserver(port=webserver.server_port)


def test_webserver_that_is_not_there_is_not_ready() -> None:
    port = free_port()
    with pytest.raises(ready.NotReady, match=f"the webserver does not answer on port {port}: .*refused"):
        ready.webserver(port=port)


def test_question_is_one_that_dagsters_webserver_understands() -> None:
    from dagster_graphql.schema import create_schema
    from graphql import parse, validate

    assert validate(create_schema().graphql_schema, parse(ready.LOCATIONS)) == []


@pytest.fixture
def code_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[health.HealthServicer]:
    """A gRPC server with the health protocol, where the code server of this container listens."""
    monkeypatch.setenv("DATA_PLATFORM_SOCKETS", str(tmp_path))
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{code_servers.own_socket()}")
    server.start()
    yield servicer
    server.stop(None)


def test_code_server_is_ready_and_found_once_it_serves(code_server: health.HealthServicer) -> None:
    link = code_servers.own_socket().with_name("current.sock")
    code_server.set("DagsterApi", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(ready.NotReady, match="does not serve yet"):
        ready.code()
    assert not link.is_symlink()
    code_server.set("DagsterApi", health_pb2.HealthCheckResponse.SERVING)
    ready.code()
    assert link.resolve() == code_servers.own_socket()


def test_server_of_something_else_is_not_ready(code_server: health.HealthServicer) -> None:
    code_server.set("SomethingElse", health_pb2.HealthCheckResponse.SERVING)
    with pytest.raises(ready.NotReady, match=f"the code server does not answer on {code_servers.own_socket()}"):
        ready.code()


def run(program: str, *arguments: str) -> None:
    subprocess.run(
        [SERVER_PROGRAMS / program, *arguments], check=True, capture_output=True, timeout=60, cwd="/", **NOBODY
    )


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a real database, with Dagster's tables."""
    if not (SERVER_PROGRAMS / "initdb").exists():
        pytest.skip("PostgreSQL's server is not installed here")
    home = tempfile.mkdtemp()
    if NOBODY:
        os.chown(home, NOBODY["user"], NOBODY["group"])
    port = free_port()
    run(
        "initdb",
        f"--pgdata={home}/data",
        "--auth=trust",
        "--username=dagster",
        "--no-sync",
        "--encoding=UTF8",
        "--locale=C",
    )
    # In another time zone than UTC, to tell times that carry their zone from those that do not.
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home} -c timezone=Asia/Tokyo"
    run("pg_ctl", f"--pgdata={home}/data", f"--options={settings}", f"--log={home}/log", "--wait", "start")
    try:
        yield f"postgresql://dagster@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", f"--pgdata={home}/data", "--mode=immediate", "--wait", "stop")
        shutil.rmtree(home)


@pytest.fixture
def storage(database: str, monkeypatch: pytest.MonkeyPatch) -> PostgresRunStorage:
    """Dagster's own storage of heartbeats, empty; the daemon's probe is pointed to it."""
    monkeypatch.setenv("DATA_PLATFORM_METADATA", database)
    return PostgresRunStorage.create_clean_storage(database)


def beat(storage: PostgresRunStorage, daemons: set[str], timestamp: float) -> None:
    for daemon in daemons:
        storage.add_daemon_heartbeat(DaemonHeartbeat(timestamp, daemon, "id", []))


def test_daemon_is_ready_once_all_daemons_beat(storage: PostgresRunStorage) -> None:
    beat(storage, ready.DAEMONS | {"ASSET"}, time.time())
    ready.daemon()


def test_daemon_that_misses_a_beat_is_not_ready(storage: PostgresRunStorage) -> None:
    beat(storage, ready.DAEMONS - {"SENSOR", "BACKFILL"}, time.time())
    with pytest.raises(ready.NotReady, match="no heartbeat yet from BACKFILL, SENSOR$"):
        ready.daemon()


def test_beats_of_the_container_before_do_not_count(storage: PostgresRunStorage) -> None:
    beat(storage, ready.DAEMONS, ready.container_start().timestamp() - 1)
    with pytest.raises(
        ready.NotReady, match="no heartbeat yet from BACKFILL, QUEUED_RUN_COORDINATOR, SCHEDULER, SENSOR"
    ):
        ready.daemon()


def test_daemon_on_a_blank_database_is_not_ready(storage: PostgresRunStorage) -> None:
    with storage.connect() as connection:
        connection.exec_driver_sql("DROP TABLE daemon_heartbeats")
    with pytest.raises(ready.NotReady, match="does not answer"):
        ready.daemon()


def test_daemon_without_database_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PLATFORM_METADATA", f"postgresql://dagster@127.0.0.1:{free_port()}/dagster")
    with pytest.raises(ready.NotReady, match="the metadata database does not answer: .*refused"):
        ready.daemon()


def test_daemons_asked_for_are_those_of_every_instance() -> None:
    with dg.instance_for_test() as instance:
        assert set(instance.get_required_daemon_types()) >= ready.DAEMONS


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), (["no-such-service"], 2), (["code", "webserver"], 2), (["code"], 1)]
)
def test_exit_status_and_one_sentence(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse() -> None:
        raise ready.NotReady("the code server does not serve yet")

    monkeypatch.setitem(ready.SERVICES, "code", refuse)
    assert ready.main(arguments) == status
    said = capsys.readouterr().err
    assert said.startswith("usage: " if status == 2 else "code is not ready: ")
    assert len(said.splitlines()) == 1
