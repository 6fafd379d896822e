"""How the schema moves from release to release: Alembic, driven from here and never by hand.

The migrations themselves stand in the folder `migrations` at the top of the repository and inside the wheel.
One upgrade is one transaction, and two processes that upgrade at once take turns.
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
from alembic.script.revision import ResolutionError
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, text

from evenodds_service.errors import SchemaMismatch
from evenodds_service.storage.engine import WRITES, open_engine, translated_faults
from evenodds_service.storage.tables import metadata

_ADVISORY_LOCK = 0x45_76_65_6E  # any number that no other program on the database uses
_MAX_NAME = 27  # of the 32 characters that Alembic keeps of a revision


def head_revision() -> str:
    """The revision that this release needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None, "the migrations folder is empty"
    return head


def current_revision(engine: Engine) -> str | None:
    """The revision that the database is at; None where it was never migrated. Raises StoreUnavailable."""
    with translated_faults(), engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def check_schema(engine: Engine) -> None:
    """Raises SchemaMismatch unless the database is at this release's revision; says what to do."""
    current, head = current_revision(engine), head_revision()
    if current is None:
        raise SchemaMismatch(f"database is empty, this release needs revision {head}: run `evenodds migrate`")
    if current != head:
        _check_known(current)
        raise SchemaMismatch(f"database is at revision {current}, this release needs {head}: run `evenodds migrate`")


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the database up to the revision; nothing to do is fine. All or nothing.

    Raises:
        SchemaMismatch: the database is at a revision that this release does not know.
        StoreUnavailable
    """
    with _migrating(engine) as config:
        command.upgrade(config, revision)


def downgrade(engine: Engine, revision: str) -> None:
    """Take the database back to the revision (`base` for the empty one); what the newer tables held is lost.

    Raises:
        SchemaMismatch: the database is at a revision that this release does not know.
        StoreUnavailable
    """
    with _migrating(engine) as config:
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
    return _folder() / "versions" / f"{revision}.py"


@contextmanager
def _migrating(engine: Engine) -> Iterator[Config]:
    """Alembic's configuration, bound to a transaction that nobody else migrates in."""
    with translated_faults(), engine.connect().execution_options(**{WRITES: True}) as connection:
        # SQLite would empty the tables that refer to a dropped one, and rebuilding a table drops it. The
        # pragma does nothing inside a transaction and must not stay on a pooled connection.
        is_sqlite = connection.dialect.name == "sqlite"
        if is_sqlite:
            connection.detach()
            connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
        with connection.begin():
            if not is_sqlite:
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None:
                _check_known(current)
            yield _config(connection)
            if is_sqlite:
                dangling = connection.execute(text("PRAGMA foreign_key_check")).all()
                assert not dangling, f"the migration leaves rows that refer to nothing: {dangling[:3]}"


def _check_known(revision: str) -> None:
    try:
        ScriptDirectory.from_config(_config()).get_revision(revision)
    except (CommandError, ResolutionError) as error:
        raise SchemaMismatch(
            f"database is at revision {revision}, which this release does not know "
            f"(it needs {head_revision()}): install the release that migrated the database, or a newer one"
        ) from error


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("file_template", "%%(rev)s")
    config.attributes["connection"] = connection
    config.attributes["metadata"] = metadata
    return config


def _folder() -> Path:
    """Inside the installed package, else at the top of the repository."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "migrations", package.parents[1] / "migrations")
    return next(place for place in places if (place / "env.py").is_file())
