"""Dagster's connections to its database: kept for the next statement, and tried before they are used.

By itself Dagster connects anew for each statement, everywhere but in the webserver: some 8 ms each, and half a second
in a short run. What its webserver keeps is not tried: after a restart of the database, the first requests fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event, exc, pool

KEPT = {"pool_size": 5, "max_overflow": -1}
"""At most so many connections are kept by each of Dagster's three storages; more are made where they are needed."""


class Kept(pool.QueuePool):
    """Connections of Dagster's storages; user code in the same process may have pools of its own."""


def attempt(connections: type[pool.Pool] = pool.Pool) -> None:
    """Have the pools of this process replace a connection that the database has closed.

    Args:
        connections: The class of the pools.
    """

    @event.listens_for(connections, "checkout")
    def check(connection: Any, record: Any, proxy: Any) -> None:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
        except connection.Error as error:
            raise exc.DisconnectionError("the database closed the connection") from error


def keep() -> None:
    """Have Dagster's storages of this process keep their connections."""
    from dagster_postgres import utils

    utils.create_engine = keeping(utils.create_engine)
    attempt(Kept)


def keeping(create_engine: Callable[..., Any]) -> Callable[..., Any]:
    """Give what creates engines that keep connections, where ``create_engine`` was told to keep none."""

    def create(url: str, **options: Any) -> Any:
        if options.get("poolclass") is pool.NullPool:
            options = {**options, "poolclass": Kept, **KEPT}
        return create_engine(url, **options)

    return create
