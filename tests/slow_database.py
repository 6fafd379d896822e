"""Makes a database slow, and shows each time that a request would have been given up meanwhile.

Nothing here waits for a while: a statement stands still until it is released, and what is waited for is that a
transaction with a request's patience has been refused.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from sqlalchemy import Engine, text
from tests.waiting import until

from evenodds_service.errors import StoreUnavailable
from evenodds_service.storage.engine import WRITES, open_engine, translated_faults

REQUEST_SECONDS = 0.3
"""The patience of a request here."""

_KEY = 42  # of the advisory lock that lets stalled statements go on
_STALL = f"""
CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    WHILE NOT pg_try_advisory_xact_lock({_KEY}) LOOP PERFORM pg_sleep(0.01); END LOOP;
    RETURN NEW;
END $$;
CREATE FUNCTION stall_schema() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
    WHILE NOT pg_try_advisory_xact_lock({_KEY}) LOOP PERFORM pg_sleep(0.01); END LOOP;
END $$
"""


@contextmanager
def request_engine(database_url: str) -> Iterator[Engine]:
    """With a request's patience."""
    engine = open_engine(database_url, timeout_seconds=REQUEST_SECONDS)
    yield engine
    engine.dispose()


def outlast_a_request(database_url: str) -> None:
    """Return when a request's transaction, begun now, has been given up: by its statement and by standing idle on
    PostgreSQL, on SQLite by a write lock that is held all the while."""
    with request_engine(database_url) as engine:
        if engine.dialect.name == "sqlite":
            with pytest.raises(StoreUnavailable, match="database is locked"), translated_faults():
                engine.execution_options(**{WRITES: True}).connect().begin()
            return
        with pytest.raises(StoreUnavailable, match="statement timeout"), translated_faults(), engine.begin() as slow:
            slow.execute(text("SELECT pg_sleep(60)"))
        with pytest.raises(StoreUnavailable, match="idle-in-transaction timeout"), translated_faults():
            _stand_idle(engine)


def _stand_idle(engine: Engine) -> None:
    """Use a transaction that the server has ended for having stood idle."""
    with engine.begin() as idle, engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
        pid = idle.execute(text("SELECT pg_backend_pid()")).scalar()
        alive = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
        until(lambda: other.execute(alive, {"pid": pid}).scalar() == 0, "the end of the idle transaction")
        idle.execute(text("SELECT 1"))


class Stalls:
    """Statements of a PostgreSQL database that stand still until they are released."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._connection = psycopg.connect(database_url, autocommit=True)
        self._connection.execute(f"SELECT pg_advisory_lock({_KEY})")
        self._connection.execute(_STALL)

    def inserts(self, table: str) -> None:
        """From now on whoever inserts into the table stands still."""
        self._connection.execute(f"CREATE TRIGGER stall BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION stall()")

    def new_tables(self) -> None:
        """From now on whoever creates a table stands still."""
        self._connection.execute(
            "CREATE EVENT TRIGGER stall ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION stall_schema()"
        )

    def process(self) -> int:
        """The server's process whose statement stands still, as soon as there is one."""
        sleeping = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
        found = until(lambda: self._connection.execute(sleeping).fetchall(), "a stalled statement")
        return int(found[0][0])

    def waits_for_a_lock(self) -> bool:
        """Whether a statement has waited for another session's lock for longer than a request would."""
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
            f"AND now() - query_start > interval '{2 * REQUEST_SECONDS} seconds'"
        )
        return bool(self._connection.execute(waiting).fetchall()[0][0])

    @contextmanager
    def hung(self, process: int) -> Iterator[None]:
        """The server's process says nothing until a request has given up one that hangs like it; it goes on when the
        body has ended."""
        os.kill(process, signal.SIGSTOP)
        try:
            with request_engine(self._url) as engine, engine.connect() as connection:
                same = connection.execute(text("SELECT pg_backend_pid()")).scalar()
                assert isinstance(same, int)
                os.kill(same, signal.SIGSTOP)
                try:
                    with pytest.raises(StoreUnavailable, match="the server does not answer"), translated_faults():
                        connection.execute(text("SELECT 1"))
                finally:
                    os.kill(same, signal.SIGCONT)
            yield
        finally:
            os.kill(process, signal.SIGCONT)

    def release(self) -> None:
        """Everything goes on, now and later."""
        self._connection.execute(f"SELECT pg_advisory_unlock({_KEY})")

    def close(self) -> None:
        self._connection.close()


@contextmanager
def stalls(database_url: str) -> Iterator[Stalls]:
    found = Stalls(database_url)
    try:
        yield found
    finally:
        found.close()  # and with it the lock
