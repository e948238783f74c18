"""Dagster's webserver, whose pooled connections to the database are tried before they are used.

By itself it uses what its pool holds: after a restart of the database, the first requests fail.

Run as ``python -m data_platform_runtime.webserver ARGUMENT…`` instead of ``dagster-webserver``.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, exc, pool


def try_connections(pools: type[pool.Pool] = pool.Pool) -> None:
    """Have the ``pools`` of this process replace a connection that the database has closed."""

    @event.listens_for(pools, "checkout")
    def attempt(connection: Any, record: Any, proxy: Any) -> None:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
        except connection.Error as error:
            raise exc.DisconnectionError("the database closed the connection") from error


if __name__ == "__main__":
    from dagster_webserver.cli import main

    try_connections()
    main()
