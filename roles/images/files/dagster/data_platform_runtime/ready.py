"""Answer whether the service in this container does its job.

Run as ``python -m data_platform_runtime.ready SERVICE``: exits with 0 if it does, else with 1 and one sentence on
standard error. Each service is asked itself, never through another one. Of the webserver one may ask besides whether it
shows certain images of code locations: ``ready webserver LOCATION=IMAGE…``.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from data_platform_runtime import code_servers

TIMEOUT = 5.0
"""Seconds that one question may take."""

DAEMONS = {"BACKFILL", "QUEUED_RUN_COORDINATOR", "SCHEDULER", "SENSOR"}
"""The daemons that every instance runs."""

LOCATIONS = """
{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus displayMetadata { key value } } } } }
"""


class NotReady(Exception):
    """The service does not do its job yet; the text says what is missing."""


def webserver(*wanted: str, port: int = 3001) -> None:
    """Ask the webserver for its code locations: each must have been tried, whether it loaded or not.

    Args:
        wanted: Locations with the images that they must be shown with, as ``LOCATION=IMAGE``.
        port: Where the webserver listens.

    Raises:
        NotReady: The webserver does not answer GraphQL, a location is still loading, or shown with another image.
    """
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql",
        data=json.dumps({"query": LOCATIONS}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            answer = json.load(response)
    except (OSError, ValueError) as error:
        raise NotReady(f"the webserver does not answer on port {port}: {error}") from error
    entries = ((answer.get("data") or {}).get("workspaceOrError") or {}).get("locationEntries")
    if entries is None:
        raise NotReady(f"the webserver has no workspace: {answer}")
    loading = [entry["name"] for entry in entries if entry["loadStatus"] != "LOADED"]
    if loading:
        raise NotReady(f"still loading: {', '.join(loading)}")
    shown = {
        f"{entry['name']}={pair['value']}"
        for entry in entries
        for pair in entry["displayMetadata"]
        if pair["key"] == "image"
    }
    if missing := sorted(set(wanted) - shown):
        raise NotReady(f"not shown yet: {', '.join(missing)}")


def code() -> None:
    """Ask the code server of this container for its health, and have it found by others, if it was not.

    Raises:
        NotReady: The code server does not answer, or does not serve yet: it serves once its definitions are loaded.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    own = code_servers.own_socket()
    with grpc.insecure_channel(f"unix:{own}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="DagsterApi"), timeout=TIMEOUT
            )
        except grpc.RpcError as error:
            raise NotReady(f"the code server does not answer on {own}: {error.details()}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise NotReady("the code server does not serve yet")
    code_servers.take_over(own)


def container_start() -> datetime:
    """When the first process of this container started, to the second (proc(5): btime plus starttime)."""
    booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    ticks = Path("/proc/1/stat").read_text().rsplit(")", 1)[1].split()[19]
    return datetime.fromtimestamp(int(booted.split()[1]) + int(ticks) / os.sysconf("SC_CLK_TCK"), tz=UTC)


def daemon() -> None:
    """Look in the database for heartbeats that are newer than this container.

    Raises:
        NotReady: The database does not answer, or a daemon has not sent a heartbeat yet.
    """
    import psycopg2

    started = container_start()
    try:
        with psycopg2.connect(os.environ["DATA_PLATFORM_METADATA"], connect_timeout=int(TIMEOUT)) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT daemon_type FROM daemon_heartbeats WHERE timestamp > %s", (started,))
            beating = {row[0] for row in cursor}
    except psycopg2.Error as error:
        raise NotReady(f"the metadata database does not answer: {error}") from error
    missing = DAEMONS - beating
    if missing:
        raise NotReady(f"no heartbeat yet from {', '.join(sorted(missing))}")


SERVICES: dict[str, Callable[..., None]] = {"webserver": webserver, "code": code, "daemon": daemon}


def main(arguments: list[str]) -> int:
    """Check the service named in ``arguments``; give the exit status."""
    service, *wanted = arguments or [""]
    if service not in SERVICES or (wanted and service != "webserver"):
        print(f"usage: python -m data_platform_runtime.ready {'|'.join(SERVICES)}", file=sys.stderr)
        return 2
    try:
        SERVICES[service](*wanted)
    except NotReady as reason:
        print(f"{service} is not ready: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
