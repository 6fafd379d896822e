"""How the schema moves from release to release: Alembic, driven from here and never by hand.

The migrations themselves stand in the folder `migrations` at the top of the repository and inside the wheel.
One migration is one transaction, and two processes that migrate at once take turns: whatever happens, the database is
at its old revision or at the new one. A migration waits for a slow database without end. For a table that others use
it waits no longer than a request would: whoever wants the table meanwhile waits behind it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from evenodds_service.errors import MigrationFailed
from evenodds_service.storage.engine import PATIENCE, WRITES, open_engine, patience_of, translated_faults
from evenodds_service.storage.revisions import check_known, current_revision, head_revision, migrations_folder
from evenodds_service.storage.tables import metadata

_ADVISORY_LOCK = 0x45_76_65_6E  # any number that no other program on the database uses
_MAX_NAME = 27  # of the 32 characters that Alembic keeps of a revision
_TURN_SECONDS = 600.0
_LOCK_NOT_AVAILABLE = "55P03"  # of PostgreSQL
_AGAIN = "then run `evenodds migrate` again; the schema is unchanged"


def upgrade(engine: Engine, revision: str = "head", *, turn_seconds: float = _TURN_SECONDS) -> None:
    """Bring the database up to the revision; nothing to do is fine, and locks nothing. All or nothing.

    Args:
        turn_seconds: Longest wait until another process that migrates (on SQLite: that writes) has ended.

    Raises:
        SchemaMismatch: the database is at a revision that this release does not know.
        MigrationFailed: it was given up; the database is as it was.
        StoreUnavailable
    """
    if revision == "head" and current_revision(engine) == head_revision():
        return
    with _migrating(engine, turn_seconds) as config:
        command.upgrade(config, revision)


def downgrade(engine: Engine, revision: str, *, turn_seconds: float = _TURN_SECONDS) -> None:
    """Take the database back to the revision (`base` for the empty one); what the newer tables held is lost.

    Args:
        turn_seconds: As of `upgrade`.

    Raises:
        SchemaMismatch: the database is at a revision that this release does not know.
        MigrationFailed: it was given up; the database is as it was.
        StoreUnavailable
    """
    with _migrating(engine, turn_seconds) as config:
        command.downgrade(config, revision)


def new_revision(name: str) -> Path:
    """Write the next migration: what `tables.py` has and the newest migration has not. Read it before use.

    Args:
        name: What changes, say `add_something`: at most 27 of a-z, 0-9 and _.

    Returns:
        The new file.

    Raises:
        ValueError: the name cannot be used.
    """
    if re.fullmatch(rf"[a-z][a-z0-9_]{{0,{_MAX_NAME - 1}}}", name) is None:
        raise ValueError(f"migration name {name!r}: use at most {_MAX_NAME} of a-z, 0-9 and _, a letter first")
    number = len(list(ScriptDirectory.from_config(_config()).walk_revisions())) + 1
    revision = f"{number:04d}_{name}"
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(f"sqlite:///{folder}/migrated.db")
        upgrade(engine)
        with _migrating(engine) as config:
            command.revision(config, message=name.replace("_", " "), autogenerate=True, rev_id=revision)
        engine.dispose()
    return migrations_folder() / "versions" / f"{revision}.py"


@contextmanager
def _migrating(engine: Engine, turn_seconds: float = _TURN_SECONDS) -> Iterator[Config]:
    """Alembic's configuration, bound to a transaction that nobody else migrates in."""
    usual = patience_of(engine)
    options = {WRITES: True, PATIENCE: usual.for_migration(turn_seconds)}
    with translated_faults(), engine.connect().execution_options(**options) as connection, _explained_faults():
        is_sqlite = connection.dialect.name == "sqlite"
        if is_sqlite:
            # SQLite would empty the tables that refer to a dropped one, and rebuilding a table drops it. The
            # pragma does nothing inside a transaction and must not stay on a pooled connection.
            connection.detach()
            connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
        with _begun(connection, turn_seconds):
            if not is_sqlite:
                connection.execute(text(f"SET LOCAL lock_timeout = '{usual.lock:.3f}s'"))
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None:
                check_known(current)
            yield _config(connection)
            if is_sqlite:
                dangling = connection.execute(text("PRAGMA foreign_key_check")).all()
                assert not dangling, f"the migration leaves rows that refer to nothing: {dangling[:3]}"


@contextmanager
def _begun(connection: Connection, turn_seconds: float) -> Iterator[None]:
    """A transaction, when the others that migrate have ended. Raises MigrationFailed where they go on."""
    try:
        transaction = connection.begin()  # on SQLite with the write lock
        if connection.dialect.name != "sqlite":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    except OperationalError as error:
        if not _is_about_a_lock(error):
            raise
        whoever = "writes to the database" if connection.dialect.name == "sqlite" else "also migrates this database"
        raise MigrationFailed(
            f"another process {whoever}, and has not finished within {turn_seconds:g} seconds: wait until it has, or "
            f"stop it, {_AGAIN}"
        ) from error
    with transaction:
        yield


@contextmanager
def _explained_faults() -> Iterator[None]:
    """Turns every failure inside the transaction, which takes everything back, into MigrationFailed."""
    try:
        yield
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        if _is_about_a_lock(error):
            step = "stop the service, its workers and whatever else uses the tables"
        else:
            step = "correct what the database reports"
        raise MigrationFailed(f"the migration failed ({reason}): {step}, {_AGAIN}") from error


def _is_about_a_lock(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) == _LOCK_NOT_AVAILABLE or "database is locked" in str(error.orig)


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("file_template", "%%(rev)s")
    config.attributes["connection"] = connection
    config.attributes["metadata"] = metadata
    return config
