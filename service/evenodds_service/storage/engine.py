"""Opens the database: the one place that knows how SQLite and PostgreSQL want to be spoken to.

SQLite runs in WAL mode with `synchronous=FULL`: NORMAL would keep every acknowledged commit when the process
is killed, but may lose the newest ones when the machine loses power, and an acknowledged observation is a
promise. PostgreSQL stays at READ COMMITTED: whoever writes to a run's log locks the run's row first.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.abc import RV, PQGen
from sqlalchemy import Connection, Dialect, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from evenodds_service.errors import DatabaseUrlUnusable, StoreUnavailable

WRITES = "evenodds_writes"
"""Execution option of an engine whose transactions write: SQLite takes the write lock as they begin."""


POOL_WAIT_SECONDS = 2.0
"""Longest wait for a free connection. All threads of a process may stand in this line: it has to move."""

_WAKE_SECONDS = 0.1
_GRACE_SECONDS = 2.0  # the server's own timeout comes first: it leaves the connection usable, and says more


def open_engine(database_url: str, *, pool_size: int = 5, timeout_seconds: float = 10) -> Engine:
    """An engine for `sqlite:///FILE` or `postgresql://...`. Connects on first use, not here.

    Args:
        pool_size: Most connections held at once, at least 1. A caller waits for a free one, but not for long.
        timeout_seconds: Longest wait for a lock, and (on PostgreSQL) for the answer to one statement, also of a server
            that hangs or is cut off.

    Raises:
        DatabaseUrlUnusable: the URL cannot be read, names another database, or a SQLite database in memory.
    """
    try:
        url = make_url(database_url)
    except ArgumentError as error:
        raise DatabaseUrlUnusable(
            "the database URL cannot be read: use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
        ) from error
    if url.drivername == "sqlite":
        return _open_sqlite(url, pool_size=pool_size, timeout_seconds=timeout_seconds)
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        return _open_postgresql(url, pool_size=pool_size, timeout_seconds=timeout_seconds)
    raise DatabaseUrlUnusable(
        f"the database URL starts with {url.drivername!r}: use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
    )


@contextmanager
def translated_faults() -> Iterator[None]:
    """Turns every failure to reach or use the database in time into StoreUnavailable."""
    try:
        yield
    except PoolTimeoutError as error:
        reason = "all connections are in use"
        raise StoreUnavailable(f"the database did not do its part ({reason}): repeat the call later") from error
    except (OperationalError, InterfaceError, InternalError) as error:
        # On PostgreSQL, an InternalError is a server that has become read-only, or a transaction that it has ended.
        reason = " ".join(str(error.orig).split())
        raise StoreUnavailable(f"the database did not do its part ({reason}): repeat the call later") from error


def _open_sqlite(url: URL, *, pool_size: int, timeout_seconds: float) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise DatabaseUrlUnusable("a SQLite database in memory forgets everything: name a file, sqlite:///FILE")
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=min(timeout_seconds, POOL_WAIT_SECONDS),
        connect_args={"timeout": timeout_seconds},  # SQLite's busy timeout
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _entry: ConnectionPoolEntry) -> None:
        # The driver's own transactions begin late and never with the write lock; `_begin` does it instead.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _open_postgresql(url: URL, *, pool_size: int, timeout_seconds: float) -> Engine:
    limit = round(timeout_seconds * 1_000)  # milliseconds
    settings = (
        f"statement_timeout={limit}",
        # A process that hangs inside a transaction must not keep a run locked.
        f"idle_in_transaction_session_timeout={limit}",
        # A plan made without the parameters takes a second, not a millisecond, to look up 500 ids in a pool that
        # has grown since the last ANALYZE.
        "plan_cache_mode=force_custom_plan",
    )
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=min(timeout_seconds, POOL_WAIT_SECONDS),
        pool_pre_ping=True,  # a connection that died with its server is replaced, not handed out
        connect_args={
            "connect_timeout": max(2, round(timeout_seconds)),  # seconds; the driver takes no less
            "options": " ".join(f"-c {setting}" for setting in settings),
        },
    )

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Dialect, _record: ConnectionPoolEntry, _arguments: Any, options: dict[str, Any]) -> Any:
        connection = _Impatient.connect(**options)
        connection.patience_seconds = timeout_seconds + _GRACE_SECONDS
        return connection

    return engine


class _Impatient(psycopg.Connection[Any]):
    """Gives a server up that says nothing: one that hangs, or whose network swallows everything.

    The driver itself would wait for ever.
    """

    patience_seconds = 10.0

    def wait(self, gen: PQGen[RV], interval: float = _WAKE_SECONDS, timeout: float | None = None) -> RV:
        patience = self.patience_seconds if timeout is None else min(timeout, self.patience_seconds)
        return super().wait(self._until(time.monotonic() + patience, gen), interval)

    def _until(self, deadline: float, generator: PQGen[RV]) -> PQGen[RV]:
        """What the generator does; it is woken in short intervals, and after the deadline it is given up."""
        try:
            wanted = next(generator)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > deadline:
                    self.close()
                    raise psycopg.OperationalError("the server does not answer")
                wanted = generator.send(ready)
        except StopIteration as end:
            result: RV = end.value
            return result
