"""Connections to the database: kept, and tried before they are used."""

import sqlite3

import pytest
from data_platform_runtime import connections
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

    connections.attempt(Pool)
    engine = create_engine("sqlite://", creator=connect, poolclass=Pool, pool_size=1)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 2")).scalar() == 2
    made[0].close()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 3")).scalar() == 3
    assert len(made) == 2


@pytest.mark.parametrize(("asked", "kept"), [(pool.NullPool, connections.Kept), (pool.StaticPool, pool.StaticPool)])
def test_engine_that_was_to_keep_no_connection_keeps_it(asked: type[pool.Pool], kept: type[pool.Pool]) -> None:
    made: list[object] = []

    def connect() -> sqlite3.Connection:
        made.append(None)
        return sqlite3.connect(":memory:", factory=Connection)

    engine = connections.keeping(create_engine)("sqlite://", creator=connect, poolclass=asked)
    for _ in range(3):
        with engine.connect() as connection:
            assert connection.execute(text("SELECT 4")).scalar() == 4
    assert (type(engine.pool), len(made)) == (kept, 1)


def test_dagster_s_storages_keep_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster_postgres import PostgresEventLogStorage, PostgresRunStorage, PostgresScheduleStorage, utils

    monkeypatch.setattr(utils, "create_engine", utils.create_engine)
    monkeypatch.setattr(connections, "attempt", lambda _: None)
    connections.keep()
    for storage in (PostgresEventLogStorage, PostgresRunStorage, PostgresScheduleStorage):
        made = storage("postgresql://nobody@nowhere/none", should_autocreate_tables=False)
        assert isinstance(made._engine.pool, connections.Kept)
