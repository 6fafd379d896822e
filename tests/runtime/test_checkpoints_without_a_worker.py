"""A service without a worker saves checkpoints too: who starts again does not fold the whole log."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import httpx
import pytest
from sqlalchemy import Engine, text
from tests.backends import mainly_sqlite
from tests.commands.test_command_line import serve
from tests.waiting import PATIENCE_SECONDS, until

from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.prompts import NewPrompt
from evenodds_service.domain.settings import RunSettings
from evenodds_service.runtime import live_run
from evenodds_service.runtime.live_run import CHECKPOINT_EVERY, LiveRun
from evenodds_service.storage.engine import WRITES, Patience, open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Run, Store

if TYPE_CHECKING:
    from tests.commands.test_command_line import Server

__all__ = ["serve"]  # a fixture

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
_REPORTS = 15
EVERY = 40


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few entries between checkpoints."""
    monkeypatch.setattr(live_run, "CHECKPOINT_EVERY", EVERY)


def grown(store: Store, engine: Engine, n: int) -> Run:
    """The run `math` with three prompts and a log of n entries: copies of the first reports, all in one statement."""
    run, is_new = store.put_run("math", RunSettings(embedder="none"), now=NOW)
    if is_new:
        store.add_prompts(run.id, [NewPrompt(name) for name in "abc"], embedder="none", now=NOW)
        for step in range(_REPORTS):
            observation = NewObservation.of_counts(step % 3, step % 5, 8)
            store.append_observations(run.id, Outcomes(step, [observation]), now=NOW)
    copies = """
        INSERT INTO log (run_id, position, kind, step, body, n_observations, created_at)
        WITH RECURSIVE places (place) AS (SELECT :last + 1 UNION ALL SELECT place + 1 FROM places WHERE place < :n)
        SELECT run_id, place, kind, step, body, n_observations, created_at
        FROM places JOIN log ON run_id = :run_id AND position = 2 + place % :reports
    """
    position = store.run("math").log_position
    if n > position:
        with engine.execution_options(**{WRITES: True}).begin() as connection:
            values = {"last": position, "n": n, "run_id": run.id, "reports": _REPORTS}
            assert connection.execute(text(copies), values).rowcount == n - position
            grow = "UPDATE runs SET log_position = :n, n_observations = n_observations + :new WHERE id = :run_id"
            connection.execute(text(grow), {"n": n, "new": n - position, "run_id": run.id})
    return store.run("math")


@mainly_sqlite
def test_a_killed_service_starts_again_from_its_own_checkpoint(
    database_url: str, engine: Engine, serve: Callable[..., Server]
) -> None:
    store = Store(engine)
    run = grown(store, engine, CHECKPOINT_EVERY)
    observation = {"prompt_id": "a", "successes": 3, "attempts": 8}
    report = {"run": "math", "step": CHECKPOINT_EVERY, "observations": [observation]}
    question = {"run": "math", "prompts": [{"prompt_id": name} for name in "abc"]}
    server = serve(EVENODDS_DATABASE_URL=database_url)
    with httpx.Client(base_url=server.base_url, timeout=60) as http:
        http.post("/observe", json=report).raise_for_status()
        told = http.post("/predict", json=question).raise_for_status().json()
    until(lambda: store.newest_checkpoint_position(run.id) > CHECKPOINT_EVERY, "a checkpoint")

    server.end(signal.SIGKILL)
    with engine.begin() as connection:  # whoever reads what was folded fails
        connection.execute(text("UPDATE log SET body = 'gone' WHERE kind = 'observe'"))
    again = serve(EVENODDS_DATABASE_URL=database_url)

    with httpx.Client(base_url=again.base_url, timeout=60) as http:
        assert http.post("/predict", json=question).raise_for_status().json() == told


def test_a_checkpoint_is_saved_when_enough_was_folded_and_none_by_another(engine: Engine, often: None) -> None:
    store = Store(engine)
    run = grown(store, engine, EVERY - 1)
    live = LiveRun(run.id)

    def keep_up(run: Run) -> int:
        """Position of the newest checkpoint afterwards."""
        live.catch_up(store, run)
        live.save_behind(store, run, now=NOW)
        until(lambda: not live.is_saving, "the end of the saving")
        return store.newest_checkpoint_position(run.id)

    assert keep_up(run) == 0
    assert keep_up(grown(store, engine, EVERY)) == EVERY
    assert keep_up(grown(store, engine, 2 * EVERY - 1)) == EVERY
    store.save_checkpoint(run.id, position=2 * EVERY - 2, state=b"of another", now=NOW)
    assert keep_up(grown(store, engine, 2 * EVERY)) == 2 * EVERY - 2


def test_a_checkpoint_that_cannot_be_saved_is_tried_again(
    database_url: str, engine: Engine, often: None, caplog: pytest.LogCaptureFixture
) -> None:
    run = grown(Store(engine), engine, EVERY)
    patience = Patience(lock=0.5, statement=PATIENCE_SECONDS, idle=PATIENCE_SECONDS)
    impatient = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS, patience=patience)
    store, live = Store(impatient), LiveRun(run.id)
    live.catch_up(store, run)

    with engine.begin() as connection:  # nobody else writes
        connection.execute(text("UPDATE runs SET name = name"))
        connection.execute(text("DELETE FROM checkpoints"))
        if engine.dialect.name == "postgresql":
            connection.execute(text("LOCK TABLE checkpoints IN EXCLUSIVE MODE"))
        live.save_behind(store, run, now=NOW)
        until(lambda: not live.is_saving, "the end of the saving")
    failed = store.newest_checkpoint_position(run.id), caplog.text
    live.save_behind(store, run, now=NOW)
    until(lambda: not live.is_saving, "the end of the saving")

    assert failed[0] == 0
    assert "run 'math': a checkpoint could not be saved" in failed[1]
    assert store.newest_checkpoint_position(run.id) == EVERY
    impatient.dispose()
