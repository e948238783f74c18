"""The webserver's pooled connections."""

import sqlite3

from data_platform_runtime import webserver
from sqlalchemy import create_engine, pool, text


class Connection(sqlite3.Connection):
    """A connection whose cursors are context managers, as PostgreSQL's are."""

    def cursor(self, *arguments: object) -> sqlite3.Cursor:
        """Give a cursor."""
        return super().cursor(Cursor)


class Cursor(sqlite3.Cursor):
    """A cursor that closes itself."""

    def __enter__(self) -> "Cursor":
        """Begin."""
        return self

    def __exit__(self, *problem: object) -> None:
        """End."""
        self.close()


class Pool(pool.QueuePool):
    """A pool of this test alone."""


def test_connection_that_was_closed_is_replaced() -> None:
    made: list[sqlite3.Connection] = []

    def connect() -> sqlite3.Connection:
        made.append(sqlite3.connect(":memory:", factory=Connection))
        return made[-1]

    webserver.try_connections(Pool)
    engine = create_engine("sqlite://", creator=connect, poolclass=Pool, pool_size=1)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 2")).scalar() == 2
    made[0].close()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 3")).scalar() == 3
    assert len(made) == 2
