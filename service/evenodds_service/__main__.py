"""The command line: `evenodds serve | migrate | replay`. The only place where objects are built.

Imports what a command needs inside the command: the thin client is installed without the service's libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

_EXIT_FAULT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 after a fault that was explained on standard error."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except ModuleNotFoundError as error:
        return _fault(f"{error.name} is not installed: pip install 'evenodds[service]'")
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from evenodds_service.replay import arguments as replay_arguments

    parser = argparse.ArgumentParser(
        prog="evenodds",
        description="Predicts how hard each prompt is for one language model as it is right now.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the HTTP service (settings: EVENODDS_* variables)")
    serve.set_defaults(command=_serve)

    migrate = commands.add_parser("migrate", help="bring the database to this release's schema")
    migrate.set_defaults(command=_migrate)

    replay = commands.add_parser(
        "replay", help="drive a running service through recorded success rates and compare predictors"
    )
    replay_arguments.add_arguments(replay)
    replay.set_defaults(command=_replay)

    openapi = commands.add_parser("openapi", help="print the OpenAPI document")
    openapi.set_defaults(command=_openapi)

    migration = commands.add_parser("migration", help="write a migration from the tables (for developers)")
    migration.add_argument("name", help="what it does, in a few words joined by _")
    migration.set_defaults(command=_migration)
    return parser


def _serve(_: argparse.Namespace) -> int:
    # The matrices of one request are small: threads inside them cost more than they give, and requests run side by
    # side anyway. Has to be said before numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    import uvicorn
    from pydantic import ValidationError

    from evenodds_service.api.app import create_app
    from evenodds_service.settings import Settings
    from evenodds_service.storage import migration
    from evenodds_service.storage.engine import open_engine
    from evenodds_service.storage.errors import StoreError
    from evenodds_service.storage.store import Store

    try:
        settings = Settings()
        engine = open_engine(settings.database_url, pool_size=settings.pool_size)
        if engine.dialect.name == "sqlite":
            migration.upgrade(engine)
        else:
            migration.check_schema(engine)
    except (StoreError, ValidationError) as error:
        return _fault(_explained(error))
    store = Store(engine)
    app = create_app(store, live_runs=settings.live_runs)
    try:
        uvicorn.run(app, host=settings.host, port=settings.port, access_log=False, timeout_graceful_shutdown=10)
    finally:
        store.close()
    return 0


def _migrate(_: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from evenodds_service.settings import Settings
    from evenodds_service.storage import migration
    from evenodds_service.storage.engine import open_engine
    from evenodds_service.storage.errors import StoreError

    try:
        engine = open_engine(Settings().database_url)
        before = migration.current_revision(engine)
        migration.upgrade(engine)
        after = migration.current_revision(engine)
    except (StoreError, ValidationError) as error:
        return _fault(_explained(error))
    engine.dispose()
    print(f"the database is at revision {after}" + (" already" if before == after else ""))
    return 0


def _replay(options: argparse.Namespace) -> int:
    from evenodds_service.replay.command import run

    return run(options)


def _openapi(_: argparse.Namespace) -> int:
    from evenodds_service.api.app import create_app
    from evenodds_service.storage.engine import open_engine
    from evenodds_service.storage.store import Store

    app = create_app(Store(open_engine("sqlite:///openapi-is-never-opened.db")))
    print(json.dumps(app.openapi(), indent=2, sort_keys=True))
    return 0


def _migration(options: argparse.Namespace) -> int:
    from evenodds_service.storage import migration

    try:
        print(migration.new_revision(options.name))
    except ValueError as error:
        return _fault(str(error))
    return 0


def _explained(error: Exception) -> str:
    """A faulty setting by the name of its variable; everything else explains itself."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    faults = [f"EVENODDS_{str(e['loc'][0]).upper()}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
    return "; ".join(faults)


def _fault(message: str) -> int:
    print(f"evenodds: {message}", file=sys.stderr)
    return _EXIT_FAULT


if __name__ == "__main__":
    sys.exit(main())
