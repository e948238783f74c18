"""The program that waits for the metadata database, against a server that speaks just enough of its protocol."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from conftest import PACKAGES, free_port
from data_platform_runtime import with_database

SETTINGS = [b"client_encoding\0UTF8\0", b"DateStyle\0ISO, MDY\0", b"server_version\x0017.0\0"]
LET_IN = b"R\0\0\0\x08\0\0\0\0%sZ\0\0\0\x05I" % b"".join(
    b"S" + (len(body) + 4).to_bytes(4, "big") + body for body in SETTINGS
)


class Database:
    """A server that answers each login as it is told, the last answer for ever."""

    def __init__(self) -> None:
        """Listen on a port of its own."""
        self.answers: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"postgresql://dagster@127.0.0.1:{self.listener.getsockname()[1]}/dagster?gssencmode=disable"
        threading.Thread(target=self.serve, daemon=True).start()

    def says(self, *errors: str) -> None:
        """Give each login one of these errors; an empty one lets it in."""
        self.answers = [
            b"E" + (len(body) + 4).to_bytes(4, "big") + body if error else LET_IN
            for error in errors
            for body in [b"SFATAL\0VFATAL\0C28P01\0M" + error.encode() + b"\0\0"]
        ]

    def serve(self) -> None:
        """Answer until the socket is closed."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                if connection.recv(1024)[4:8] == (80877103).to_bytes(4, "big"):  # asks for TLS
                    connection.sendall(b"N")
                    connection.recv(1024)
                connection.sendall(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
                connection.recv(1024)


@pytest.fixture
def database() -> Iterator[Database]:
    """A server."""
    database = Database()
    yield database
    database.listener.close()


def run(address: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command once the database lets it in."""
    environment = {"PYTHONPATH": str(PACKAGES), "PYTHONDONTWRITEBYTECODE": "1", "PGPASSFILE": "/secrets/pgpass"}
    return subprocess.run(
        [sys.executable, "-m", "data_platform_runtime.with_database", *command],
        env={"PATH": os.environ["PATH"], "DATA_PLATFORM_METADATA": address, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_takes_the_programs_place(database: Database) -> None:
    database.says("")
    assert run(database.address, "sh", "-c", "kill -TERM $$").returncode == -15


@pytest.mark.parametrize(
    "error",
    [
        'password authentication failed for user "dagster"',
        'database "dagster" does not exist',
        "no pg_hba.conf entry for x",
    ],
)
def test_refused_login_is_told_at_once_in_one_sentence(error: str, database: Database) -> None:
    database.says(error)
    done = run(database.address, "echo", "started")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: The metadata database refuses the login (")
    assert done.stderr.endswith(f"{error}): see to the password in /secrets/pgpass, or run the playbook again.\n")
    assert done.stderr.count("\n") == 1


def test_database_that_starts_is_waited_for(database: Database) -> None:
    database.says("the database system is starting up", "sorry, too many clients already", "")
    with_database.wait(database.address)
    assert len(database.answers) == 1


def test_database_that_does_not_answer_is_named() -> None:
    with pytest.raises(
        with_database.NoDatabase, match=r"^The metadata database does not answer \(.*Connection refused"
    ):
        with_database.wait(f"postgresql://dagster@127.0.0.1:{free_port()}/dagster", patience=0.5)
