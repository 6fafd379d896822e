"""`evenodds migrate`, and `evenodds migration` for developers."""

from __future__ import annotations

import argparse

from evenodds_service.commands.opening import explained, fault


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `migrate` and `migration`."""
    parser = commands.add_parser("migrate", help="bring the database's schema to this release")
    parser.set_defaults(command=migrate)
    parser = commands.add_parser("migration", help="write a migration from the tables (for developers)")
    parser.add_argument("name", help="what the migration does, in a few words joined by _")
    parser.set_defaults(command=new_migration)


def migrate(_: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from evenodds_service.errors import StoreError
    from evenodds_service.settings import settings_from_environment
    from evenodds_service.storage.engine import check_file, open_engine
    from evenodds_service.storage.migration import upgrade
    from evenodds_service.storage.revisions import current_revision

    try:
        settings = settings_from_environment()
        check_file(settings.database_url)
        engine = open_engine(settings.database_url, timeout_seconds=settings.database_timeout_seconds)
        before = current_revision(engine)
        upgrade(engine)
        after = current_revision(engine)
    except (StoreError, ValidationError) as error:
        return fault(explained(error))
    engine.dispose()
    print(f"the database is at revision {after}" + (" already" if before == after else ""))
    return 0


def new_migration(options: argparse.Namespace) -> int:
    from evenodds_service.storage import migration

    try:
        print(migration.new_revision(options.name))
    except ValueError as error:
        return fault(str(error))
    return 0
