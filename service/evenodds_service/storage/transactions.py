"""How a Store method gets its one transaction, and the statements that differ by database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Connection, Engine, Executable, Insert, Table, text

from evenodds_service.errors import StoreUnavailable
from evenodds_service.storage.engine import PATIENCE, WRITES, patience_of, translated_faults
from evenodds_service.timing import phase

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

KeyT = TypeVar("KeyT")

CHUNK = 500
"""Keys in one look-up, well below the limit on parameters of either database."""


class Transactions:
    """Owns the engine. Each public method of a subclass opens exactly one transaction."""

    def __init__(self, engine: Engine) -> None:
        """The engine comes from `open_engine`; from here on the store closes it."""
        self._engine = engine
        self._writing_engine = engine.execution_options(**{WRITES: True})
        self._bulk_engine = self._writing_engine.execution_options(**{PATIENCE: patience_of(engine).for_bulk()})

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()

    def probe(self) -> None:
        """Raises StoreUnavailable where the database does not answer, or would not keep what is written now."""
        with self._writing() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
            if connection.dialect.name == "postgresql":
                # The update finds room in what the database holds already. A sort that does not fit into memory needs
                # new room on the disk, and gives it back.
                connection.execute(text("SET LOCAL work_mem = '64kB'"))
                connection.execute(
                    text("SELECT count(*) FROM (SELECT g FROM generate_series(1, 9000) g ORDER BY -g) s")
                )

    def _truncate_write_ahead_log(self) -> None:
        """Let nothing of what was erased stand in SQLite's write-ahead log. Waits for those who read meanwhile.

        Raises:
            StoreUnavailable: they took too long; what was asked for may be repeated.
        """
        if self._engine.dialect.name != "sqlite":
            return
        with translated_faults(), closing(self._engine.raw_connection()) as connection:  # in no transaction
            (is_busy, *_) = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if is_busy:
            raise StoreUnavailable(
                "the data are erased from the database, but not yet from its write-ahead log, because other "
                "transactions "
                "read it: repeat the call"
            )

    def _reading(self) -> AbstractContextManager[Connection]:
        return _transaction(self._engine)

    def _writing(self, *, in_bulk: bool = False, of_one_moment: bool = False) -> AbstractContextManager[Connection]:
        """Commits on leaving; rolls everything back on any exception.

        Args:
            in_bulk: The work grows with the pool or the log: a slow database may take its time over it.
            of_one_moment: All statements read the database as it stood at the first one, as they do on SQLite.
        """
        engine = self._bulk_engine if in_bulk else self._writing_engine
        if of_one_moment and engine.dialect.name == "postgresql":
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        return _transaction(engine)


def insert_or_ignore(connection: Connection, table: Table) -> Insert:
    """An insert that leaves out the rows whose key exists."""
    return _insert(connection, table).on_conflict_do_nothing()


def insert_or_update(connection: Connection, table: Table, *, keys: Sequence[str], newer_by: str) -> Executable:
    """An insert of whole rows, each of which replaces the one with its key where that is not newer.

    Args:
        newer_by: The column that says which row is newer. Rows that are equally new are replaced.
    """
    statement = _insert(connection, table)
    fresh = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=list(keys),
        set_={column.name: fresh[column.name] for column in table.c if column.name not in keys},
        where=table.c[newer_by] <= fresh[newer_by],
    )


def _insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An insert that knows conflicts. Each dialect is imported where it is used: both take their time."""
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql

    return postgresql.insert(table)


def chunks(keys: Sequence[KeyT]) -> Iterator[Sequence[KeyT]]:
    for start in range(0, len(keys), CHUNK):
        yield keys[start : start + CHUNK]


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    with phase("database"), translated_faults(), engine.begin() as connection:
        yield connection
