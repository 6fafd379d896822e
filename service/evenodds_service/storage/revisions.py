"""At which revision the schema of a database is, and which one this release needs: asked at every start.

Knows nothing of Alembic, which takes a quarter of a second to import and is needed only where something has to move:
see `migration.py`. The file of a migration is named after its revision, and their names sort in the order in which
they follow one another.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, inspect, text

from evenodds_service.errors import SchemaMismatch
from evenodds_service.storage.engine import translated_faults


def head_revision() -> str:
    """The revision that this release needs."""
    return _revisions()[-1]


def current_revision(engine: Engine) -> str | None:
    """The revision that the database is at; None where it was never migrated. Raises StoreUnavailable."""
    with translated_faults(), engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
        return revision


def check_schema(engine: Engine) -> None:
    """Raises SchemaMismatch unless the database is at this release's revision; says what to do."""
    current, head = current_revision(engine), head_revision()
    if current is None:
        raise SchemaMismatch(f"database is empty, this release needs revision {head}: run `evenodds migrate`")
    if current != head:
        check_known(current)
        raise SchemaMismatch(f"database is at revision {current}, this release needs {head}: run `evenodds migrate`")


def check_known(revision: str) -> None:
    """Raises SchemaMismatch where this release has no such revision."""
    if revision not in _revisions():
        raise SchemaMismatch(
            f"database is at revision {revision}, which this release does not know "
            f"(it needs {head_revision()}): install the release that migrated the database, or a newer one"
        )


def migrations_folder() -> Path:
    """Inside the installed package, else at the top of the repository."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "migrations", package.parents[1] / "migrations")
    return next(place for place in places if (place / "env.py").is_file())


def _revisions() -> list[str]:
    """All of them, the oldest first."""
    return sorted(file.stem for file in (migrations_folder() / "versions").glob("[0-9]*.py"))
