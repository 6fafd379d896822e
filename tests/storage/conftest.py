"""A store with one run, once for each backend. The tests share a migrated database, emptied before each."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone

import pytest
from sqlalchemy import Engine, delete
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.domain.settings import RunSettings
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Run, Store
from evenodds_service.storage.tables import api_keys, embeddings, runs


@pytest.fixture
def now() -> datetime:
    return datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=timezone.utc)


@pytest.fixture
def empty_engine(new_database_url: str) -> Iterator[Engine]:
    """On a database without tables."""
    engine = open_engine(new_database_url, timeout_seconds=PATIENCE_SECONDS)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def migrated_engine(shared_database_url: str) -> Iterator[Engine]:
    # As many connections as the tests have threads, and time to wait for one another on a busy machine.
    engine = open_engine(shared_database_url, pool_size=16, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(migrated_engine: Engine) -> Engine:
    """On a migrated database without rows."""
    with migrated_engine.begin() as connection:
        connection.execute(delete(runs))  # and with them all that they own
        connection.execute(delete(embeddings))
        connection.execute(delete(api_keys))
    return migrated_engine


@pytest.fixture
def store(engine: Engine) -> Store:
    return Store(engine)


@pytest.fixture
def run(store: Store, now: datetime) -> Run:
    return store.put_run("math", RunSettings(), now=now)[0]
