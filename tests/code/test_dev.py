"""`make dev` serves the code tree as it is being edited, and leaves nothing behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ASSETS = "{ assetNodes { assetKey { path } } }"
RELOAD = """
mutation { reloadWorkspace { ... on Workspace { locationEntries { locationOrLoadError { __typename } } } } }
"""


class Tree:
    """A copy of the repository's files, in a repository of its own, with the environment of this one."""

    def __init__(self, root: Path) -> None:
        """Make it in ``root``."""
        self.root = root
        listed = self.git("ls-files", "-z", "--cached", "--others", "--exclude-standard", at=ROOT).split("\0")
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        (root / ".venv-code").symlink_to(ROOT / ".venv-code")
        self.git("init", "--quiet")
        (root / ".git" / "info" / "exclude").write_text("/.venv-code\n")
        self.git("add", "--all")

    def git(self, *arguments: str, at: Path | None = None) -> str:
        """Run git; give what it says."""
        return subprocess.run(
            ["git", *arguments], cwd=at or self.root, check=True, capture_output=True, text=True
        ).stdout

    def changes(self) -> list[str]:
        """Give the files that have changed or come since."""
        listed = self.git("diff", "--name-only") + self.git("ls-files", "--others", "--exclude-standard")
        return listed.splitlines()


class Server:
    """`make dev` on a port of its own."""

    def __init__(self, tree: Tree, log: Path) -> None:
        """Start it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.tree, self.log = tree, log
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if a shell runs the tests in the background
        with log.open("w") as output:
            command = ["make", "dev", f"DEV_PORT={self.port}"]
            self.process = subprocess.Popen(
                command, cwd=tree.root, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ask(self, query: str) -> dict[str, Any]:
        """Give the data of the answer to a request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": query}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def assets(self) -> set[str]:
        """Give the names of the assets that are served."""
        return {"/".join(node["assetKey"]["path"]) for node in self.ask(ASSETS)["assetNodes"]}

    def wait(self, seconds: int = 120) -> None:
        """Wait until the code is loaded."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.assets():
                    return
            except urllib.error.URLError:
                assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def interrupt(self, seconds: int = 60) -> None:
        """Press Ctrl-C, and wait until it has ended."""
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(seconds)

    def left(self) -> list[str]:
        """Give the processes that it has started and that are there."""
        mark = f"DAGSTER_HOME={self.tree.root}/".encode()
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environment.read_bytes():
                    found.append(environment.with_name("cmdline").read_text().replace("\0", " "))
            except OSError:  # it has ended, or is somebody else's
                continue
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """`make dev` on a copy of this repository."""
    server = Server(Tree(tmp_path), tmp_path.with_suffix(".log"))
    yield server
    if server.process.poll() is None:
        os.killpg(server.process.pid, signal.SIGKILL)


def test_dev_serves_what_is_edited_and_ends_without_a_trace(server: Server) -> None:
    server.wait()
    assert {"raw/flights", "marts/on_time_daily", "reports/on_time_report"} <= server.assets()
    assert server.left()

    model = Path("code/data-platform/core/processing/dbt/models/marts/added_just_now.sql")
    (server.tree.root / model).write_text("select 1 as one\n")
    (entry,) = server.ask(RELOAD)["reloadWorkspace"]["locationEntries"]
    assert entry == {"locationOrLoadError": {"__typename": "RepositoryLocation"}}
    assert "marts/added_just_now" in server.assets()

    server.interrupt()
    deadline = time.monotonic() + 60
    while left := server.left():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert server.tree.changes() == [str(model)]
    assert (server.tree.root / ".dev").is_dir()
