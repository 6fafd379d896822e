"""Opens the database: the one place that knows how SQLite and PostgreSQL want to be spoken to.

SQLite runs in WAL mode with `synchronous=FULL`: NORMAL would keep every acknowledged commit when the process
is killed, but may lose the newest ones when the machine loses power, and an acknowledged observation is a
promise. What is deleted there is overwritten (`secure_delete`), because texts may have to be forgotten. PostgreSQL
stays at READ COMMITTED: whoever writes to a run's log locks the run's row first.

Every transaction has its `Patience`. A request is given up in time, so that its caller hears 503 and not silence. What
would have to begin anew from its start if it were given up (a migration, a bulk load, a worker's result) waits for a
slow database instead.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from evenodds_service.errors import DatabaseUrlUnusable, StoreUnavailable

WRITES = "evenodds_writes"
"""Execution option of an engine whose transactions write: SQLite takes the write lock as they begin."""

PATIENCE = "evenodds_patience"
"""Execution option of engines and connections: the `Patience` of their transactions."""

POOL_WAIT_SECONDS = 2.0
"""Longest wait for a free connection. All threads of a process may stand in this line: it has to move."""

_LONG_SECONDS = 600.0
_IDLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a transaction waits before it is given up, in seconds; None is without end.

    Attributes:
        lock: For a lock that another transaction holds. SQLite waits for nothing else.
        statement: For the answer to one statement, also of a server that hangs.
        idle: How long PostgreSQL leaves the transaction its locks while no statement comes. A process that hangs must
            not keep a run locked.
    """

    lock: float
    statement: float | None
    idle: float | None

    def for_bulk(self) -> Patience:
        """Of a transaction whose work grows with the pool or the log: it waits for locks no longer, and works on."""
        return replace(self, statement=_LONG_SECONDS, idle=_IDLE_SECONDS)

    def for_migration(self, turn_seconds: float) -> Patience:
        """Of a migration, which is never given up halfway.

        Args:
            turn_seconds: Longest wait until others have ended theirs.
        """
        return Patience(lock=turn_seconds, statement=None, idle=None)


WORKER_PATIENCE = Patience(lock=_LONG_SECONDS, statement=_LONG_SECONDS, idle=_IDLE_SECONDS)
"""Of a worker, whom nobody waits for, and whose fit is lost if it cannot be published."""


def open_engine(
    database_url: str, *, pool_size: int = 5, timeout_seconds: float = 10, patience: Patience | None = None
) -> Engine:
    """An engine for `sqlite:///FILE` or `postgresql://...`. Connects on first use, not here.

    Args:
        pool_size: Most connections held at once, at least 1. A caller waits for a free one, but not for long.
        timeout_seconds: Longest wait for a new connection, and what a request's transactions are given.
        patience: Of transactions that are not a request's.

    Raises:
        DatabaseUrlUnusable: the URL cannot be read, names another database, or a SQLite database in memory.
    """
    try:
        url = make_url(database_url)
    except ArgumentError as error:
        raise DatabaseUrlUnusable(
            "the database URL cannot be read: use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
        ) from error
    patience = patience or Patience(lock=timeout_seconds, statement=timeout_seconds, idle=timeout_seconds)
    options: dict[str, Any] = {
        "pool_size": pool_size,
        "max_overflow": 0,
        "hide_parameters": True,  # errors are logged, and parameters hold texts of prompts
        "pool_timeout": min(timeout_seconds, POOL_WAIT_SECONDS),
        "execution_options": {PATIENCE: patience},
    }
    if url.drivername == "sqlite":
        return _open_sqlite(url, patience, options)
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        from evenodds_service.storage.postgresql import open_postgresql  # its driver is imported where it is used

        return open_postgresql(url, patience, options, timeout_seconds=timeout_seconds)
    raise DatabaseUrlUnusable(
        f"the database URL starts with {url.drivername!r}: use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
    )


def check_file(database_url: str) -> None:
    """Look at the file of a SQLite database, where the driver would only say that it cannot be opened.

    Raises:
        DatabaseUrlUnusable: it cannot be made, written or read, is no SQLite database, or has lost its end.
    """
    try:
        url = make_url(database_url)
    except ArgumentError:
        return  # `open_engine` says so
    if url.drivername != "sqlite" or url.database in (None, "", ":memory:"):
        return
    file = Path(str(url.database))
    where, other = f"the SQLite file {file}", "or name another file in EVENODDS_DATABASE_URL"
    if not file.parent.is_dir():
        raise DatabaseUrlUnusable(f"{where}: its folder does not exist: create it, {other}")
    if file.is_dir():
        raise DatabaseUrlUnusable(f"{where}: it is a folder: name a file in it in EVENODDS_DATABASE_URL")
    for place in (file.parent, file) if file.exists() else (file.parent,):
        if not os.access(place, os.R_OK | os.W_OK):
            raise DatabaseUrlUnusable(
                f"{where}: {place} is not writable (check its permissions, and whether the file system is read-only): "
                f"give this user write permission, {other}"
            )
    wal = file.with_name(file.name + "-wal")
    if not file.exists() or file.stat().st_size == 0 or (wal.exists() and wal.stat().st_size > 0):
        return
    with file.open("rb") as opened:
        header = opened.read(100)
    size, page = file.stat().st_size, int.from_bytes(header[16:18], "big")
    stated = (65_536 if page == 1 else page) * int.from_bytes(header[28:32], "big")
    if not header.startswith(b"SQLite format 3\0"):
        raise DatabaseUrlUnusable(f"{where} is not a SQLite database: restore it from a backup, {other}")
    if len(header) < 100 or (header[24:28] == header[92:96] and size < stated):
        raise DatabaseUrlUnusable(
            f"{where} has {size:,} bytes and should have {stated:,}: its end is missing: restore it from a backup, "
            f"{other}"
        )


@contextmanager
def translated_faults() -> Iterator[None]:
    """Turns every failure to reach or use the database in time into StoreUnavailable."""
    try:
        yield
    except PoolTimeoutError as error:
        reason = "all connections are in use"
        raise StoreUnavailable(f"the database is unavailable ({reason}): repeat the call later") from error
    except (OperationalError, InterfaceError, InternalError) as error:
        # On PostgreSQL, an InternalError is a server that has become read-only, or a transaction that it has ended.
        reason = " ".join(str(error.orig).split())
        raise StoreUnavailable(f"the database is unavailable ({reason}): repeat the call later") from error
    except DatabaseError as error:
        if not isinstance(error.orig, sqlite3.DatabaseError) or type(error.orig) is not sqlite3.DatabaseError:
            raise
        reason = f"the SQLite file is damaged: {error.orig}"  # of no other fault is it the plain class
        raise StoreUnavailable(f"the database is unavailable ({reason}): restore it from a backup") from error


def _open_sqlite(url: URL, usual: Patience, options: dict[str, Any]) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise DatabaseUrlUnusable(
            "a SQLite database in memory loses everything when the process ends: name a file, sqlite:///FILE"
        )
    engine = create_engine(url, connect_args={"timeout": usual.lock}, **options)

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _entry: ConnectionPoolEntry) -> None:
        # The driver's own transactions begin late and never with the write lock; `_begin` does it instead.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        patience = patience_of(connection)
        if patience.lock != usual.lock:
            connection.exec_driver_sql(f"PRAGMA busy_timeout={milliseconds(patience.lock)}")
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def patience_of(owner: Connection | Engine) -> Patience:
    """How long its transactions wait."""
    patience = owner.get_execution_options()[PATIENCE]
    assert isinstance(patience, Patience)
    return patience


def milliseconds(seconds: float | None) -> int:
    """As both databases count; 0 is without end."""
    return 0 if seconds is None else max(1, round(seconds * 1_000))
