"""Code servers that are replaced while they serve: each on a Unix socket of its own, found by a link.

All code servers of a location listen in one directory of the host, each on a socket that is named after its container.
The link ``current.sock`` is replaced once the next one is ready. What webserver and daemon have loaded from a server
they ask of that same server, until it is gone: a run that is launched between the switch and the moment when they have
loaded the new definitions is planned by the code that its image holds.

Run as ``python -m data_platform_runtime.code_servers serve [--secrets=FILE] ARGUMENT…`` instead of
``dagster api grpc``, and as ``python -m data_platform_runtime.code_servers drain`` in the container of a code server
that was replaced: ends once nobody has asked it anything for a while, and no run is left in the container.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_platform_runtime import with_database, with_secrets

LINK = "current.sock"
"""Name of the link by which the code server of a location is found."""

IDLE = 5.0
"""Seconds without a call after which a code server that was replaced has nothing more to do."""

PATIENCE = 90.0
"""Seconds after which it ends in any case: Dagster lets the evaluation of a sensor or schedule take 60."""

ASK_INTERVAL = 1.0
"""Seconds between two questions which server there is, as Dagster has them by itself."""

LOOK_INTERVAL = 0.1
"""Seconds between two looks at the link."""

REQUEST_TIMEOUT = 2
"""Seconds that such a question may take, as Dagster has them by itself."""

CONNECTED = "03"
"""State of a connection in /proc/net/unix."""

TABLES = ("unix", "tcp", "tcp6", "udp", "udp6", "netlink", "packet", "raw", "raw6")
"""Files in /proc/net with the sockets of this container's network."""

PROCESSES = Path("/proc")
"""Directory with one for each process of this container."""

DEPLOYMENTS = Path("/var/lib/data-platform/deployments")
"""Directory of the host with a file for each location that says what was deployed last, and when."""


def own_socket() -> Path:
    """Where the code server of this container listens."""
    return Path(os.environ["DATA_PLATFORM_SOCKETS"], f"{socket.gethostname()}.sock")


def prepare(arguments: list[str]) -> list[str]:
    """Have secrets in the environment, wait for the database, and collect garbage less often than code is imported.

    Args:
        arguments: Arguments of ``dagster api grpc``, and ``--secrets=FILE`` before them if the location has any.

    Returns:
        The arguments of ``dagster api grpc``.

    Raises:
        SystemExit: The secrets cannot be read, or the database does not let us in; with one sentence.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--secrets", type=Path)
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.secrets:
            os.environ.update(with_secrets.read(options.secrets))
        with_database.wait(os.environ["DATA_PLATFORM_METADATA"])
    except (OSError, ValueError) as error:
        sys.exit(with_secrets.refusal(options.secrets, error))
    except with_database.NoDatabase as error:
        sys.exit(f"Error: {error}")
    gc.set_threshold(50_000, 20, 20)
    return rest


def serve(arguments: list[str]) -> None:
    """Be a code server: ``dagster api grpc`` with these arguments."""
    from dagster._cli import cli

    cli(["api", "grpc", f"--socket={own_socket()}", *arguments], obj={})


def take_over(own: Path) -> None:
    """Have the code server that listens at ``own`` found by others from now on, and remove what dead ones left."""
    link = own.with_name(LINK)
    if not link.is_symlink() or os.readlink(link) != own.name:
        new = own.with_suffix(".link")
        new.unlink(missing_ok=True)
        new.symlink_to(own.name)
        new.replace(link)
    for other in own.parent.glob("*.sock"):
        if other not in (own, link) and is_dead(other):
            other.unlink(missing_ok=True)


def is_dead(path: Path) -> bool:
    """Whether nobody listens at a socket any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def calls(path: Path) -> int:
    """How many calls the server of this container is answering: each has a connection of its own while it lasts.

    The server's end of one from another container belongs to that one's network, as unix(7) sockets have it, so it is a
    socket of a process here that no table here lists. That of one from this container is listed with the server's path.

    Args:
        path: The server's socket.
    """
    used = set()
    for file in PROCESSES.glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it was closed meanwhile
            used.add(os.readlink(file))
    rows = {name: [line.split() for line in table(name).splitlines()[1:]] for name in TABLES}
    listed = {f"socket:[{word}]" for lines in rows.values() for row in lines for word in row}
    own = sum(row[5] == CONNECTED and row[7:] == [str(path)] for row in rows["unix"] if len(row) > 7)
    return own + len({link for link in used if link.startswith("socket:")} - listed)


def table(name: str) -> str:
    """Give a table of /proc/net; empty where the kernel has none."""
    with suppress(OSError):
        return (PROCESSES / "self/net" / name).read_text()
    return ""


def runs(own: Path) -> bool:
    """Whether runs are processes of the code server that listens at ``own``, as with DefaultRunLauncher."""
    from dagster._grpc.client import DagsterGrpcClient
    from dagster._grpc.types import GetCurrentRunsResult
    from dagster._serdes import deserialize_value

    answer = DagsterGrpcClient(socket=str(own)).get_current_runs()
    return bool(deserialize_value(answer, GetCurrentRunsResult).current_runs)


def commands() -> bool:
    """Whether somebody's command of Dagster is in progress in this container, such as ``dagster job execute``.

    It is a script, so its name comes after that of its interpreter.
    """
    for file in PROCESSES.glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if any(word.rpartition(b"/")[2] == b"dagster" for word in file.read_bytes().split(b"\0")[:2]):
                return True
    return False


def drain(idle: float = IDLE, patience: float = PATIENCE, interval: float = 0.1) -> None:
    """Wait until the code server of this container was asked nothing for a while, and no run is left in here.

    Args:
        idle: Seconds without a call.
        patience: Seconds after which it is not waited for calls any more.
        interval: Seconds between two looks.
    """
    own = own_socket()
    now = time.monotonic()
    asked, deadline = now, now + patience
    while now < min(asked + idle, deadline):
        if calls(own):
            asked = now
        time.sleep(interval)
        now = time.monotonic()
    while runs(own) or commands():
        time.sleep(idle)


def deployed(location: str, image: str | None) -> dict[str, str]:
    """What the UI is to show of the code that a location serves: its version, and when it was deployed.

    Args:
        location: Name of the location.
        image: Its image.
    """
    try:
        record: Mapping[str, Any] = json.loads((DEPLOYMENTS / f"{location}.json").read_text())
    except (OSError, ValueError):
        return {}
    shown = {"code version": "version", "revision": "revision", "deployed": "deployed", "deployed by": "by"}
    if not image or record.get("image") != image:
        return {}
    return {label: str(record[name]) for label, name in shown.items() if record.get(name)}


def resolved(address: str) -> str:
    """Give the address of a server, where it may be that of a link to one."""
    return f"unix:{os.path.realpath(address.removeprefix('unix:'))}" if address.startswith("unix:") else address


def stay() -> None:
    """Have this process ask each code server what it has loaded from it, even after another one has taken over."""
    from dagster._core import remote_origin
    from dagster._core.remote_representation import code_location
    from dagster._grpc import server_watcher
    from dagster._grpc.client import DagsterGrpcClient

    # gRPC lets channels to one address share a connection, and that of the link may be one to the server before.
    DagsterGrpcClient._server_address = property(
        lambda client: resolved(vars(client)["address"]),
        lambda client, address: vars(client).update(address=address),
    )

    class Client(DagsterGrpcClient):
        """A client of one server, and of the one that the link leads to once that server is gone."""

        def __init__(self, link: str, server: str) -> None:
            """Take note of both."""
            super().__init__(socket=link)
            self.socket = server  # where Dagster asks for a run that is a process of this server
            self.server = f"unix:{server}"

        @property
        def _server_address(self) -> str:
            return self.server if os.path.exists(self.server.removeprefix("unix:")) else resolved(vars(self)["address"])

        @_server_address.setter
        def _server_address(self, address: str) -> None:
            vars(self).update(address=address)

    class Watcher(DagsterGrpcClient):
        """A client that asks which server there is when the link leads elsewhere, and otherwise once a second."""

        def __init__(self, link: str) -> None:
            """Take note of the link."""
            self.link, self.known, self.asked, self.answer = link, "", 0.0, ""
            super().__init__(socket=link)

        def get_server_id(self, timeout: int = REQUEST_TIMEOUT) -> str:
            """Give the server's ID."""
            leads_to, now = os.path.realpath(self.link), time.monotonic()
            if leads_to != self.known or now - self.asked >= ASK_INTERVAL:
                self.answer = super().get_server_id(timeout)
                self.known, self.asked = leads_to, now
            return self.answer

    class Location(code_location.GrpcServerCodeLocation):
        """A code location that stays with the server it was loaded from."""

        def __init__(self, origin: Any, instance: Any, **options: Any) -> None:
            """Load it from one server: again, if another one took over meanwhile."""
            link = getattr(origin, "socket", None)
            while True:
                server = os.path.realpath(link) if link else None
                super().__init__(origin, instance, **options)
                if not link or os.path.realpath(link) == server:
                    break
            if link:
                self.client = Client(link, str(server))

        def get_display_metadata(self) -> Mapping[str, str]:
            """What the UI shows of it."""
            return {**super().get_display_metadata(), **deployed(self.origin.location_name, self.container_image)}

    def create_client(origin: Any) -> DagsterGrpcClient:
        return Watcher(origin.socket) if origin.socket else own_client(origin)

    code_location.GrpcServerCodeLocation = Location
    own_client = remote_origin.GrpcServerCodeLocationOrigin.create_client
    remote_origin.GrpcServerCodeLocationOrigin.create_client = create_client
    server_watcher.WATCH_INTERVAL = LOOK_INTERVAL
    server_watcher.MAX_RECONNECT_ATTEMPTS = int(server_watcher.MAX_RECONNECT_ATTEMPTS / LOOK_INTERVAL)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(prepare(sys.argv[2:]))
    elif sys.argv[1:] == ["drain"]:
        drain()
    else:
        sys.exit("usage: python -m data_platform_runtime.code_servers serve ARGUMENT…|drain")
