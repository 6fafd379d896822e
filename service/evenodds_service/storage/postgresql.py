"""Opens PostgreSQL, through a driver that gives up a server that says nothing. SQLite does without this module."""

from __future__ import annotations

import math
from typing import Any

import psycopg
from psycopg.abc import RV, PQGen
from sqlalchemy import Connection, Dialect, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.pool import ConnectionPoolEntry

from evenodds_service.storage.engine import Patience, milliseconds, patience_of

_WAKE_SECONDS = 0.1
_GRACE_SECONDS = 2.0  # the server's own timeout comes first: it leaves the connection usable, and says more
_LOST_AFTER = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
"""When a server is gone, not slow: the machine behind the connection (TCP) has not given a sign for a minute."""


def open_postgresql(url: URL, usual: Patience, options: dict[str, Any], *, timeout_seconds: float) -> Engine:
    """An engine whose transactions have the usual patience unless they say otherwise.

    Args:
        options: Of the pool, for `create_engine`.
        timeout_seconds: Longest wait for a new connection.
    """
    settings = (
        *_limits(usual),
        # A plan made without the parameters takes a second, not a millisecond, to look up 500 ids in a pool that
        # has grown since the last ANALYZE.
        "plan_cache_mode=force_custom_plan",
    )
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,  # a connection that died with its server is replaced, not handed out
        connect_args={
            "connect_timeout": max(2, round(timeout_seconds)),  # seconds; the driver takes no less
            "options": " ".join(f"-c {setting}" for setting in settings),
            **_LOST_AFTER,
        },
        **options,
    )

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Dialect, _record: ConnectionPoolEntry, _arguments: Any, options: dict[str, Any]) -> Any:
        connection = _Impatient.connect(**options)
        connection.give_up_after(usual.statement)
        return connection

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        patience = patience_of(connection)
        if patience == usual:
            return
        driver = connection.connection.driver_connection
        assert isinstance(driver, _Impatient)
        driver.give_up_after(patience.statement)
        limits = "; ".join(f"SET LOCAL {limit}" for limit in _limits(patience))
        connection.exec_driver_sql(limits, execution_options={"no_parameters": True})  # three statements in one go

    @event.listens_for(engine, "checkin")
    def _return(driver: _Impatient | None, _entry: ConnectionPoolEntry) -> None:
        if driver is not None:
            driver.give_up_after(usual.statement)

    return engine


def _limits(patience: Patience) -> tuple[str, ...]:
    """PostgreSQL's settings for it."""
    return (
        f"lock_timeout={milliseconds(patience.lock)}",
        f"statement_timeout={milliseconds(patience.statement)}",
        f"idle_in_transaction_session_timeout={milliseconds(patience.idle)}",
    )


class _Impatient(psycopg.Connection[Any]):
    """Gives a server up that says nothing: one that hangs, or whose network swallows everything.

    The driver itself would never stop waiting. What counts is the time spent listening: a process that is itself
    stopped, or starved by others, does not take its own absence for the server's silence.
    """

    _most_silent_waits: float = 10.0 / _WAKE_SECONDS

    def give_up_after(self, statement_seconds: float | None) -> None:
        """Wait a little longer for each answer than the server gives a statement; None waits without end."""
        self._most_silent_waits = (
            math.inf if statement_seconds is None else (statement_seconds + _GRACE_SECONDS) / _WAKE_SECONDS
        )

    def wait(self, gen: PQGen[RV], interval: float = _WAKE_SECONDS, timeout: float | None = None) -> RV:
        most = self._most_silent_waits if timeout is None else min(timeout / _WAKE_SECONDS, self._most_silent_waits)
        return super().wait(self._until(most, gen), _WAKE_SECONDS)

    def _until(self, most_silent_waits: float, generator: PQGen[RV]) -> PQGen[RV]:
        """What the generator does; it is woken in short intervals, and given up after so many in which nothing came."""
        silent_waits = 0
        try:
            wanted = next(generator)
            while True:
                ready = yield wanted
                silent_waits += not ready
                if silent_waits > most_silent_waits:
                    self.close()
                    raise psycopg.OperationalError("the server does not answer")
                wanted = generator.send(ready)
        except StopIteration as end:
            result: RV = end.value
            return result
