"""A worker publishes through a slow database, however long it takes, while requests are told in time to come back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from tests.slow_database import REQUEST_SECONDS, outlast_a_request, request_engine, stalls
from tests.waiting import PATIENCE_SECONDS, in_background, until

from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import StoreUnavailable
from evenodds_service.model.refit import TrainingData
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.storage.engine import WORKER_PATIENCE, open_engine
from evenodds_service.storage.store import Run, Store

if TYPE_CHECKING:
    from tests.worker.conftest import Bench

ROOT = Path(__file__).parents[2]
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def patient(bench: Bench) -> Iterator[Store]:
    """A worker's store, where requests are given up soon."""
    store = Store(open_engine(bench.database_url, timeout_seconds=REQUEST_SECONDS, patience=WORKER_PATIENCE))
    yield store
    store.close()


def assert_published(bench: Bench) -> None:
    (refit,) = bench.refits("math")
    assert (refit.status, refit.attempts) == ("done", 1)
    assert bench.snapshots("math") == [1]


def test_a_worker_publishes_when_a_lock_is_given_back_that_a_request_did_not_wait_for(
    bench: Bench, patient: Store
) -> None:
    bench.learned("math")
    locks = ExitStack()

    def fit(data: TrainingData) -> SharedModel:
        locks.enter_context(bench.without_writes())
        return bench.constant(0.5)(data)

    stalled = bench.stalled(fit)
    stalled.go_on.set()
    with locks, in_background(bench.worker(stalled, store=patient).work_once):
        assert stalled.began.wait(timeout=PATIENCE_SECONDS)
        until(lambda: bench.refits("math")[0].status == "running", "the claim")
        with request_engine(bench.database_url) as engine:
            until(lambda: is_refused(Store(engine), bench), "a refusal")
            assert is_refused(Store(engine), bench)
        during = bench.snapshots("math")
        locks.close()

    assert during == []
    assert_published(bench)


def is_refused(store: Store, bench: Bench) -> bool:
    """Whether a request that writes to the run is told to come back."""
    try:
        store.put_run("math", RunSettings(group_size=8), now=bench.clock())
    except StoreUnavailable:
        return True
    return False


def as_read(store: Store) -> Run | None:
    """None where the machine was too busy for a request's patience."""
    try:
        return store.run("math")
    except StoreUnavailable:
        return None


@on_postgresql
def test_a_worker_publishes_through_slow_statements_and_a_server_that_hangs(bench: Bench, patient: Store) -> None:
    bench.learned("math")

    with stalls(bench.database_url) as stalled, request_engine(bench.database_url) as engine:
        stalled.inserts("snapshots")
        with in_background(bench.worker(bench.constant(0.5), store=patient).work_once):
            process = stalled.process()
            outlast_a_request(bench.database_url)
            with stalled.hung(process):
                refused = is_refused(Store(engine), bench)
                read = until(lambda: as_read(Store(engine)), "a request that reads")
            stalled.release()

    assert read is not None
    assert (refused, read.model_version) == (True, 0)
    assert_published(bench)


@pytest.mark.slow
@on_postgresql
def test_the_command_works_with_the_patience_of_a_worker(bench: Bench, tmp_path: Path) -> None:
    bench.learned("math")
    settings = {
        "EVENODDS_DATABASE_URL": bench.database_url,
        "EVENODDS_DATABASE_TIMEOUT_SECONDS": str(REQUEST_SECONDS),
        "EVENODDS_DEVICE": "cpu",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("client", "service")),
    }
    command = [sys.executable, "-m", "evenodds_service", "work"]

    with stalls(bench.database_url) as stalled, psycopg.connect(bench.database_url) as holder:
        holder.execute("LOCK TABLE runs IN EXCLUSIVE MODE")
        with subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                until(stalled.waits_for_a_lock, "the worker at the lock")
                holder.rollback()
                until(lambda: [refit.status for refit in bench.refits("math")] == ["done"], "the snapshot")
            finally:
                process.terminate()
            _, said = process.communicate(timeout=PATIENCE_SECONDS)

    assert "the database is unavailable" not in said
    assert bench.snapshots("math") == [1]
