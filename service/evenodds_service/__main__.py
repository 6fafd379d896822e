"""The command line: `evenodds serve | work | keys | migrate | import | replay`. The only place where objects are built.

Imports what a command needs inside the command: the thin client is installed without the service's libraries.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evenodds_service.settings import Settings
    from evenodds_service.storage.engine import Patience
    from evenodds_service.storage.store import Store

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
    from evenodds_service.commands import import_prompts
    from evenodds_service.commands.replay import arguments as replay_arguments

    parser = argparse.ArgumentParser(
        prog="evenodds",
        description="Predicts how hard each prompt is for one language model as it is right now.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the HTTP service (settings: EVENODDS_* variables)")
    serve.add_argument("--with-worker", action="store_true", help="run a worker beside it, as a process of its own")
    serve.set_defaults(command=_serve)

    work = commands.add_parser("work", help="refit shared models in the background, on a GPU where there is one")
    work.add_argument("--exit-with", type=int, metavar="PID", help="end when the parent process, PID, ends")
    work.set_defaults(command=_work)

    keys = commands.add_parser("keys", help="create, list and revoke API keys")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="create a key and show its secret, once")
    create.add_argument("name", help="names the key for ever, also in logs")
    create.add_argument(
        "--scope",
        action="append",
        choices=("read", "write", "admin"),
        help="read: predict and look; write: observe, select, load, refit; admin: delete. May be repeated (default: "
        "read and write)",
    )
    create.add_argument(
        "--runs", default="*", metavar="PATTERN", help="run names it may touch, with * and ? (default: all)"
    )
    create.add_argument(
        "--requests-per-minute", type=_positive, metavar="N", help="in each process (default: no limit)"
    )
    create.add_argument(
        "--max-body-mb", type=_positive, metavar="N", help="of one request (default: the service's limit)"
    )
    create.set_defaults(command=_create_key)
    listing = actions.add_parser("list", help="show the keys, not their secrets")
    listing.set_defaults(command=_list_keys)
    revoke = actions.add_parser("revoke", help="revoke a key for good; it works for 2 seconds more at most")
    revoke.add_argument("name")
    revoke.set_defaults(command=_revoke_key)

    migrate = commands.add_parser("migrate", help="bring the database to this release's schema")
    migrate.set_defaults(command=_migrate)

    replay = commands.add_parser(
        "replay", help="drive a running service through recorded success rates and compare predictors"
    )
    replay_arguments.add_arguments(replay)
    replay.set_defaults(command=_replay)

    load = commands.add_parser("import", help="load a file of prompts, of any size, into the pool of a run")
    import_prompts.add_arguments(load)
    load.set_defaults(command=_import)

    openapi = commands.add_parser("openapi", help="print the OpenAPI document")
    openapi.set_defaults(command=_openapi)

    migration = commands.add_parser("migration", help="write a migration from the tables (for developers)")
    migration.add_argument("name", help="what it does, in a few words joined by _")
    migration.set_defaults(command=_migration)
    return parser


def _serve(options: argparse.Namespace) -> int:
    # The matrices of one request are small: threads inside them cost more than they give, and requests run side by
    # side anyway. Has to be said before numpy is imported.
    threads = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    import uvicorn

    from evenodds_service.api.app import create_app

    try:
        settings, store = _opened()
    except _Refused as error:
        return _fault(str(error))
    _configure_logging(settings)
    try:
        asks_for_keys = _asks_for_keys(settings, store)
    except _Refused as error:
        store.close()
        return _fault(str(error))
    worker = None
    if options.with_worker:
        environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
        environment |= {"OPENBLAS_NUM_THREADS": threads} if threads else {}
        command = [sys.executable, "-m", "evenodds_service", "work", "--exit-with", str(os.getpid())]
        worker = subprocess.Popen(command, env=environment)
    try:
        app = create_app(
            store,
            live_runs=settings.live_runs,
            max_body_mb=settings.max_body_mb,
            asks_for_keys=asks_for_keys,
            telemetry=settings.telemetry,
            predict_staleness_ms=settings.predict_staleness_ms,
            budget_staleness_ms=settings.budget_staleness_ms,
            budget_deadline_ms=settings.budget_deadline_ms,
            budget_queue=settings.budget_queue,
            embedders=settings.allowed_embedders(),
        )
        # What is there by now stays. Without this, each full search for garbage looks through all of it, and every
        # request waits a tenth of a second meanwhile.
        gc.collect()
        gc.freeze()
        uvicorn.run(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=10,
        )
    finally:
        store.close()
        if worker is not None:
            worker.terminate()
            worker.wait()
    return 0


def _asks_for_keys(settings: Settings, store: Store) -> bool:
    """Whether callers need an API key. Raises _Refused where nobody could call, or everybody could unasked."""
    is_loopback = settings.host == "localhost" or settings.host.startswith("127.") or settings.host == "::1"
    if settings.access == "open" or (settings.access == "auto" and is_loopback):
        whoever = "on this machine" if is_loopback else f"who can reach {settings.host}"
        print(
            f"evenodds: no API key is asked for: anyone {whoever} may read and change every run "
            "(EVENODDS_ACCESS=keys asks for keys)",
            file=sys.stderr,
        )
        return False
    if all(key.revoked_at is not None for key in store.api_keys()):
        raise _Refused(
            f"EVENODDS_HOST {settings.host} with EVENODDS_ACCESS={settings.access} asks for API keys, and there is "
            "none: create one with `evenodds keys create NAME`, or set EVENODDS_ACCESS=open where the network keeps "
            "strangers out"
        )
    return True


def _work(options: argparse.Namespace) -> int:
    import logging
    import signal
    import socket
    import threading
    from datetime import datetime, timedelta, timezone

    from evenodds_service.model.errors import DeviceUnavailable
    from evenodds_service.model.paper_network import open_device
    from evenodds_service.model.refit import fit_shared_model
    from evenodds_service.storage.engine import WORKER_PATIENCE
    from evenodds_service.worker import Worker

    try:
        settings, store = _opened(WORKER_PATIENCE)
    except _Refused as error:
        return _fault(str(error))
    _configure_logging(settings)
    try:
        device = open_device(settings.device)
    except DeviceUnavailable as error:
        store.close()
        return _fault(f"EVENODDS_DEVICE: {error}")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.exit_with is not None:
        threading.Thread(target=_stop_with_parent, args=(stop, options.exit_with), daemon=True).start()
    worker = Worker(
        store,
        name=f"{socket.gethostname()}-{os.getpid()}",
        clock=lambda: datetime.now(timezone.utc),
        fit=lambda material: fit_shared_model(material, device=device),
        lease=timedelta(seconds=settings.worker_lease_seconds),
        poll_seconds=settings.worker_poll_seconds,
    )
    logging.info("worker %s fits on %s", f"{socket.gethostname()}-{os.getpid()}", device)
    try:
        worker.run(stop)
    finally:
        store.close()
    return 0


def _stop_with_parent(stop: threading.Event, parent: int) -> None:
    """Where a process dies, the system gives its children another parent, also before they ask who it is."""
    while not stop.wait(1.0):
        if os.getppid() != parent:
            stop.set()


def _configure_logging(settings: Settings) -> None:
    from evenodds_service.logs import configure_logging

    configure_logging(settings.log_format or ("text" if sys.stderr.isatty() else "json"), settings.log_level.upper())


class _Refused(Exception):
    """A setting or the database does not allow a start. The message says why and what to do."""


def _opened(patience: Patience | None = None) -> tuple[Settings, Store]:
    """Settings and the store over a database with this release's schema.

    Args:
        patience: Of the store's transactions; what the settings give a request, by default.

    Raises:
        _Refused: a bad setting, no database, or another schema on PostgreSQL. (SQLite is migrated here.)
    """
    from pydantic import ValidationError

    from evenodds_service.errors import StoreError
    from evenodds_service.settings import Settings
    from evenodds_service.storage import migration
    from evenodds_service.storage.engine import open_engine
    from evenodds_service.storage.store import Store

    try:
        settings = Settings()
        engine = open_engine(
            settings.database_url,
            pool_size=settings.pool_size,
            timeout_seconds=settings.database_timeout_seconds,
            patience=patience,
        )
        if engine.dialect.name == "sqlite":
            migration.upgrade(engine)
        else:
            migration.check_schema(engine)
    except (StoreError, ValidationError) as error:
        raise _Refused(_explained(error)) from error
    return settings, Store(engine)


def _create_key(options: argparse.Namespace) -> int:
    from datetime import datetime, timezone

    from evenodds_service.api.middleware.access import hash_of, new_secret
    from evenodds_service.errors import StoreError

    secret = new_secret()
    megabytes = options.max_body_mb
    try:
        _, store = _opened()
        key = store.create_key(
            options.name,
            secret_hash=hash_of(secret),
            scopes=frozenset(options.scope or ("read", "write")),
            runs=options.runs,
            requests_per_minute=options.requests_per_minute,
            max_body_bytes=megabytes * 1_000_000 if megabytes is not None else None,
            now=datetime.now(timezone.utc),
        )
    except (_Refused, StoreError) as error:
        return _fault(str(error))
    store.close()
    print(
        f"key {key.name!r} for runs {key.runs!r}, scopes {', '.join(sorted(key.scopes))}; it is not shown again:",
        file=sys.stderr,
    )
    print(secret)
    return 0


def _list_keys(_: argparse.Namespace) -> int:
    from evenodds_service.errors import StoreError

    try:
        _settings, store = _opened()
        keys = store.api_keys()
    except (_Refused, StoreError) as error:
        return _fault(str(error))
    store.close()
    print(f"{'name':24} {'scopes':18} {'runs':24} {'created':12} revoked")
    for key in keys:
        revoked = f"{key.revoked_at:%Y-%m-%d}" if key.revoked_at is not None else ""
        scopes = ",".join(sorted(key.scopes))
        print(f"{key.name:24} {scopes:18} {key.runs:24} {key.created_at:%Y-%m-%d}   {revoked}".rstrip())
    return 0


def _revoke_key(options: argparse.Namespace) -> int:
    from datetime import datetime, timezone

    from evenodds_service.errors import StoreError

    try:
        _, store = _opened()
        key = store.revoke_key(options.name, now=datetime.now(timezone.utc))
    except (_Refused, StoreError) as error:
        return _fault(str(error))
    store.close()
    print(f"key {key.name!r} is revoked since {key.revoked_at:%Y-%m-%d %H:%M} UTC")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _migrate(_: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from evenodds_service.errors import StoreError
    from evenodds_service.settings import Settings
    from evenodds_service.storage import migration
    from evenodds_service.storage.engine import open_engine

    try:
        settings = Settings()
        engine = open_engine(settings.database_url, timeout_seconds=settings.database_timeout_seconds)
        before = migration.current_revision(engine)
        migration.upgrade(engine)
        after = migration.current_revision(engine)
    except (StoreError, ValidationError) as error:
        return _fault(_explained(error))
    engine.dispose()
    print(f"the database is at revision {after}" + (" already" if before == after else ""))
    return 0


def _replay(options: argparse.Namespace) -> int:
    from evenodds_service.commands.replay.command import run

    return run(options)


def _import(options: argparse.Namespace) -> int:
    from evenodds_service.commands.import_prompts import run

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
