"""Make the shared image's own package importable, and give its tests a webserver."""

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

PACKAGES = Path(__file__).parents[2] / "roles" / "images" / "files" / "dagster"

sys.path.insert(0, str(PACKAGES))
sys.dont_write_bytecode = True
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def free_port() -> int:
    """Give a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Webserver(HTTPServer):
    """Answers every request with one status and text, and keeps what it was asked."""

    status, text = 200, ""

    def __init__(self) -> None:
        """Take any free port."""
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[tuple[str, str]] = []

    def says(self, field: str, value: Any) -> None:
        """Answer with this value of the field asked for."""
        self.text = json.dumps({"data": {field: value}})


class Answer(BaseHTTPRequestHandler):
    """One answer."""

    def do_POST(self) -> None:
        """Answer as the server was told to."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body)["query"]))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.text.encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def webserver() -> Iterator[Webserver]:
    """A webserver on a port of its own."""
    with Webserver() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
