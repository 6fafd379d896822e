"""How a Store method gets its one transaction, and the one statement that differs by database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from sqlalchemy import Connection, Engine, Insert, Table, select
from sqlalchemy.dialects import postgresql, sqlite

from evenodds_service.storage.engine import WRITES, translated_faults
from evenodds_service.timing import phase

CHUNK = 500
"""Keys in one look-up, well below the limit on parameters of either database."""


class Transactions:
    """Owns the engine. Each public method of a subclass opens exactly one transaction."""

    def __init__(self, engine: Engine) -> None:
        """The engine comes from `open_engine`; from here on the store closes it."""
        self._engine = engine
        self._writing_engine = engine.execution_options(**{WRITES: True})

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()

    def ping(self) -> None:
        """Raises StoreUnavailable where the database does not answer."""
        with self._reading() as connection:
            connection.execute(select(1))

    def _reading(self) -> AbstractContextManager[Connection]:
        return _transaction(self._engine)

    def _writing(self) -> AbstractContextManager[Connection]:
        """Commits on leaving; rolls everything back on any exception."""
        return _transaction(self._writing_engine)


def insert_or_ignore(connection: Connection, table: Table) -> Insert:
    """An insert that leaves out the rows whose key exists."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    return postgresql.insert(table).on_conflict_do_nothing()


def chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), CHUNK):
        yield keys[start : start + CHUNK]


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    with phase("database"), translated_faults(), engine.begin() as connection:
        yield connection
