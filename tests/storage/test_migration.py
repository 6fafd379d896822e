from __future__ import annotations

import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

from evenodds_service.errors import SchemaMismatch
from evenodds_service.storage.migration import downgrade, new_revision, upgrade
from evenodds_service.storage.revisions import check_schema, current_revision, head_revision, migrations_folder
from evenodds_service.storage.tables import metadata

UPGRADE = """
import sys
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.revisions import check_schema
engine = open_engine(sys.argv[1])
sys.stdin.readline()
upgrade(engine)
check_schema(engine)
"""


def test_upgrade_check_downgrade_upgrade(empty_engine: Engine) -> None:
    upgrade(empty_engine)
    check_schema(empty_engine)
    upgrade(empty_engine)
    downgrade(empty_engine, "base")

    with pytest.raises(SchemaMismatch):
        check_schema(empty_engine)
    assert inspect(empty_engine).get_table_names() == ["alembic_version"]

    upgrade(empty_engine)
    check_schema(empty_engine)
    assert current_revision(empty_engine) == head_revision()


def test_files_of_migrations_are_named_and_ordered_as_alembic_runs_them() -> None:
    script = ScriptDirectory(str(migrations_folder()))

    revisions = [step.revision for step in script.walk_revisions()]

    assert [head_revision()] == script.get_heads()
    assert revisions == sorted((file.stem for file in (migrations_folder() / "versions").glob("*.py")), reverse=True)


def test_migrated_schema_is_what_the_tables_say(empty_engine: Engine) -> None:
    upgrade(empty_engine)

    with empty_engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, metadata)

    assert differences == []


def test_migrated_constraints_are_what_the_tables_say(empty_engine: Engine) -> None:
    """Also the checks and conditions of indexes, which Alembic does not compare."""
    upgrade(empty_engine)
    migrated = _definitions(empty_engine)
    downgrade(empty_engine, "base")
    metadata.create_all(empty_engine)

    created = _definitions(empty_engine)

    assert migrated == created
    assert len(migrated) > 30


def test_empty_database_is_told_to_migrate(empty_engine: Engine) -> None:
    assert current_revision(empty_engine) is None

    with pytest.raises(
        SchemaMismatch,
        match=f"^database is empty, this release needs revision {head_revision()}: run `evenodds migrate`$",
    ):
        check_schema(empty_engine)


def test_revision_of_another_release_is_named_and_nothing_is_changed(empty_engine: Engine) -> None:
    upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999_later'"))

    for attempt in (check_schema, upgrade):
        with pytest.raises(
            SchemaMismatch,
            match=f"^database is at revision 9999_later, which this release does not know "
            rf"\(it needs {head_revision()}\): install the release that migrated the database",
        ):
            attempt(empty_engine)

    assert current_revision(empty_engine) == "9999_later"


def test_two_processes_may_upgrade_at_once(new_database_url: str, empty_engine: Engine) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UPGRADE, new_database_url],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]

    errors = [process.communicate("go\n")[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0], errors
    check_schema(empty_engine)


@pytest.mark.parametrize("name", ["Add Thing", "", "x" * 28, "1st"])
def test_name_of_a_new_revision_must_fit_its_column(name: str) -> None:
    with pytest.raises(ValueError, match="use at most 27 of a-z, 0-9 and _, a letter first"):
        new_revision(name)


def _definitions(engine: Engine) -> set[tuple[object, ...]]:
    """Each table's columns, and each constraint and index as the database words it."""
    inspector = inspect(engine)
    found: set[tuple[object, ...]] = set()
    for table in sorted(metadata.tables):
        found |= {(table, "column", str(column)) for column in inspector.get_columns(table)}
        found |= {(table, "check", str(check)) for check in inspector.get_check_constraints(table)}
        found |= {(table, "unique", str(unique)) for unique in inspector.get_unique_constraints(table)}
        found |= {(table, "key", str(key)) for key in inspector.get_foreign_keys(table)}
        for index in inspector.get_indexes(table):
            conditions = {name: str(condition) for name, condition in index.pop("dialect_options", {}).items()}
            found.add((table, "index", str(index), str(conditions)))
        found.add((table, "primary key", str(inspector.get_pk_constraint(table))))
    return found
