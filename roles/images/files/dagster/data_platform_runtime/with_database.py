"""Run a command once the metadata database lets it in; say in one sentence why it does not.

By itself Dagster tries a login that is refused for 11 seconds, and its traceback is a hundred lines long.

Run as ``python -m data_platform_runtime.with_database COMMAND…``: libpq's address of the database is in
DATA_PLATFORM_METADATA, its password in the file that PGPASSFILE names.
"""

from __future__ import annotations

import os
import sys
import time

import psycopg2

PATIENCE = 10.0
"""Seconds that a database which does not answer is waited for."""

INTERVAL = 0.2
"""Seconds between two attempts."""

REFUSED = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "does not exist",
    "permission denied",
)
"""What the database's answer holds if another attempt will not succeed either."""


class NoDatabase(Exception):
    """The database does not let us in; the text is one sentence for the operator."""


def wait(address: str, patience: float = PATIENCE) -> None:
    """Wait until the database lets us in.

    Args:
        address: libpq's address of the database.
        patience: Seconds to wait for one that does not answer.

    Raises:
        NoDatabase: It refuses the login, or did not answer in time.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            psycopg2.connect(address, connect_timeout=max(2, int(deadline - time.monotonic()))).close()
            return
        except psycopg2.OperationalError as error:
            reason = " ".join(str(error).split())
            if any(word in reason for word in REFUSED):
                raise NoDatabase(
                    f"The metadata database refuses the login ({reason}): "
                    f"see to the password in {os.environ.get('PGPASSFILE', 'PGPASSFILE')}, or run the playbook again."
                ) from error
            if time.monotonic() > deadline:
                raise NoDatabase(
                    f"The metadata database does not answer ({reason}): see to it, this starts again by itself."
                ) from error
        time.sleep(INTERVAL)


def main(command: list[str]) -> int:
    """Become ``command``; give the exit status if that fails."""
    try:
        wait(os.environ["DATA_PLATFORM_METADATA"])
    except NoDatabase as reason:
        print(f"Error: {reason}", file=sys.stderr)
        return 1
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
