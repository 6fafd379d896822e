"""A migration outlives what ends a request, and whatever ends a migration leaves nothing half made."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, inspect, text
from tests.slow_database import outlast_a_request, request_engine, stalls
from tests.waiting import PATIENCE_SECONDS, in_background

from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import MigrationFailed
from evenodds_service.storage.engine import WRITES
from evenodds_service.storage.migration import downgrade, upgrade
from evenodds_service.storage.revisions import check_schema, current_revision, head_revision
from evenodds_service.storage.store import Store

MIDDLE = "CREATE TABLE log"
MIGRATE = """
import sys
from sqlalchemy import event
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
engine = open_engine(sys.argv[1])
@event.listens_for(engine, "before_cursor_execute")
def pause(_connection, _cursor, statement, *_):
    if sys.argv[2] in statement:
        print("paused", flush=True)
        sys.stdin.readline()
upgrade(engine)
"""


@pytest.fixture
def impatient(new_database_url: str) -> Iterator[Engine]:
    """On a database without tables, with a request's patience."""
    with request_engine(new_database_url) as engine:
        yield engine


on_postgresql = pytest.mark.parametrize("new_database_url", ["postgresql"], indirect=True)


@contextmanager
def paused(engine: Engine, go_on: threading.Event) -> Iterator[threading.Event]:
    """Whoever migrates with the engine says so in the middle of it, and does nothing until it may go on."""
    is_there = threading.Event()

    def pause(_connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if MIDDLE in statement:
            is_there.set()
            assert go_on.wait(timeout=PATIENCE_SECONDS)

    event.listen(engine, "before_cursor_execute", pause)
    try:
        yield is_there
    finally:
        go_on.set()
        event.remove(engine, "before_cursor_execute", pause)


def tables(engine: Engine) -> list[str]:
    return inspect(engine).get_table_names()


def test_a_migration_outlives_a_pause_that_ends_a_request(new_database_url: str, impatient: Engine) -> None:
    go_on = threading.Event()

    with paused(impatient, go_on) as is_there, in_background(lambda: upgrade(impatient)):
        assert is_there.wait(timeout=PATIENCE_SECONDS)
        outlast_a_request(new_database_url)
        go_on.set()

    check_schema(impatient)


@on_postgresql
def test_a_migration_outlives_statements_and_a_silent_server_that_end_a_request(
    new_database_url: str, impatient: Engine
) -> None:
    with stalls(new_database_url) as stalled:
        stalled.new_tables()
        with in_background(lambda: upgrade(impatient)):
            process = stalled.process()
            outlast_a_request(new_database_url)
            with stalled.hung(process):
                pass
            stalled.release()

    check_schema(impatient)


def test_a_second_migration_waits_for_the_first_and_finds_nothing_to_do(
    new_database_url: str, impatient: Engine, empty_engine: Engine
) -> None:
    go_on = threading.Event()

    with paused(empty_engine, go_on) as is_there, in_background(lambda: upgrade(empty_engine)):
        assert is_there.wait(timeout=PATIENCE_SECONDS)
        with in_background(lambda: upgrade(impatient)):
            outlast_a_request(new_database_url)
            go_on.set()

    check_schema(impatient)


def test_a_migration_that_waits_too_long_for_another_says_so_and_does_nothing(
    impatient: Engine, empty_engine: Engine
) -> None:
    go_on = threading.Event()
    whoever = "writes to the database" if impatient.dialect.name == "sqlite" else "also migrates this database"

    with paused(empty_engine, go_on) as is_there, in_background(lambda: upgrade(empty_engine)):
        assert is_there.wait(timeout=PATIENCE_SECONDS)
        with pytest.raises(
            MigrationFailed,
            match=f"^another process {whoever}, and has not finished within 0.1 seconds: wait until it has, or stop "
            "it, then run `evenodds migrate` again; the schema is unchanged$",
        ):
            upgrade(impatient, turn_seconds=0.1)
        between = current_revision(impatient)
        go_on.set()

    assert between is None
    check_schema(impatient)


def test_nothing_to_do_waits_for_nobody(impatient: Engine, empty_engine: Engine) -> None:
    upgrade(empty_engine)

    with empty_engine.execution_options(**{WRITES: True}).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
        if impatient.dialect.name == "postgresql":
            connection.execute(text("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE"))

        upgrade(impatient, turn_seconds=0.1)


@on_postgresql
def test_a_migration_is_given_up_where_a_table_stays_in_use(
    impatient: Engine, empty_engine: Engine, now: datetime
) -> None:
    upgrade(empty_engine)

    with empty_engine.begin() as reader:
        reader.execute(text("SELECT * FROM runs"))
        with pytest.raises(
            MigrationFailed,
            match=r"^the migration failed \(canceling statement due to lock timeout\): stop the service, its "
            "workers and whatever else uses the tables, then run `evenodds migrate` again; the schema is unchanged$",
        ):
            downgrade(impatient, "base")

    check_schema(impatient)
    assert Store(impatient).put_run("math", RunSettings(), now=now)[1]
    downgrade(impatient, "base")
    assert tables(impatient) == ["alembic_version"]


def test_a_migration_that_fails_at_its_last_table_leaves_no_table(impatient: Engine) -> None:
    with impatient.execution_options(**{WRITES: True}).begin() as connection:
        connection.execute(text("CREATE TABLE snapshots (theirs INTEGER)"))

    with pytest.raises(
        MigrationFailed,
        match=r"^the migration failed \(.*snapshots.* already exists\b.*\): correct what the database reports, "
        "then run `evenodds migrate` again; the schema is unchanged$",
    ):
        upgrade(impatient)

    assert tables(impatient) == ["snapshots"]
    with impatient.execution_options(**{WRITES: True}).begin() as connection:
        connection.execute(text("DROP TABLE snapshots"))
    upgrade(impatient)
    check_schema(impatient)


def test_a_migration_that_is_killed_leaves_no_table(new_database_url: str, empty_engine: Engine) -> None:
    command = [sys.executable, "-c", MIGRATE, new_database_url, MIDDLE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "paused\n"

        process.send_signal(signal.SIGKILL)

    assert tables(empty_engine) == []
    upgrade(empty_engine)
    assert current_revision(empty_engine) == head_revision()
