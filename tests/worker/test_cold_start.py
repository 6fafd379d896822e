"""A process that starts from a checkpoint and the log's tail answers bit for bit as one that read the whole log."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
from sqlalchemy import Engine, delete, update
from tests.backends import mainly_sqlite

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.domain.log_entries import Entry
from evenodds_service.domain.prompts import RawBlock
from evenodds_service.domain.settings import PredictorName, RunSettings
from evenodds_service.runtime import live_run
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.store import Store
from evenodds_service.storage.tables import pool_blocks
from evenodds_service.worker import Fit

if TYPE_CHECKING:
    from tests.worker.conftest import Bench

PREDICTORS: tuple[PredictorName, ...] = ("gps", "gps-paper", "mopps")
PACKED = 512


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of two blocks is small."""
    monkeypatch.setattr(live_run, "PACKED", PACKED)


class Watched(Store):
    """Keeps from which position the log was first read, and which prompts were read row by row."""

    read_from: int | None = None

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.by_row: list[tuple[int, int]] = []

    def pool_block(
        self, run_id: int, *, first: int, last: int, surface: str, embedder: str | None, as_of: int | None = None
    ) -> RawBlock:
        self.by_row.append((first, last))
        return super().pool_block(run_id, first=first, last=last, surface=surface, embedder=embedder, as_of=as_of)

    def entries(self, run_id: int, *, after: int, as_of: int | None = None, limit: int = 1_000) -> tuple[Entry, ...]:
        if self.read_from is None:
            self.read_from = after
        return super().entries(run_id, after=after, as_of=as_of, limit=limit)


def started(bench: Bench) -> tuple[LiveRun, int | None]:
    """The view of a process that starts now, and from which position it read the log."""
    store = Watched(bench.engine)
    run = store.run("math")
    live = LiveRun(run.id)
    live.catch_up(store, run)
    return live, store.read_from


def beliefs(live: LiveRun) -> list[FloatArray]:
    """About the pool, and about its first prompts as if they were new, under every predictor."""
    block = live.pool.raw(0, 5)
    texts = [f"Compute {i}" for i in range(5)]
    known = [array for predictor in PREDICTORS for array in live.beliefs(predictor)]
    return [*known, *(array for predictor in PREDICTORS for array in live.new_beliefs(predictor, texts, block)[:2])]


def assert_same(one: LiveRun, other: LiveRun) -> None:
    assert to_bytes(one.state) == to_bytes(other.state)
    for ours, theirs in zip(beliefs(one), beliefs(other), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)


def grown(bench: Bench, fit: Fit, *, predictor: PredictorName = "gps") -> int:
    """A run with a snapshot and its checkpoint, to which prompts, observations and a further snapshot were added.

    Returns the position of the first checkpoint.
    """
    bench.learned("math", predictor=predictor)
    worker = bench.worker(fit)
    worker.work_once()
    position = bench.store.run("math").log_position
    bench.load("math", 40, first=160)
    bench.observe("math", 4, range(100, 200))
    bench.store.request_refit(bench.store.run("math").id, now=bench.clock())
    worker.work_once()
    bench.observe("math", 5, range(0, 200, 3))
    return position


@pytest.mark.parametrize("predictor", ["gps", "gps-paper"])
@pytest.mark.usefixtures("few_updates")
def test_every_refit_leaves_a_checkpoint_from_which_a_process_starts(bench: Bench, predictor: PredictorName) -> None:
    checkpoint = grown(bench, bench.real, predictor=predictor)
    run = bench.store.run("math")
    assert run.model_version == 2

    newest, read_from = started(bench)
    bench.forget_checkpoints("math", above=checkpoint)
    older, read_from_older = started(bench)
    bench.forget_checkpoints("math")
    whole, read_from_beginning = started(bench)

    assert (read_from, read_from_older, read_from_beginning) == (run.log_position - 1, checkpoint, 0)
    assert_same(newest, whole)
    assert_same(older, whole)


@mainly_sqlite
def test_what_comes_later_is_folded_alike(bench: Bench) -> None:
    grown(bench, bench.constant(0.3))
    cold, _ = started(bench)
    bench.forget_checkpoints("math")
    whole, _ = started(bench)

    bench.load("math", 8, first=200)
    bench.observe("math", 6, range(150, 208))
    bench.store.request_refit(bench.store.run("math").id, now=bench.clock())
    bench.worker().work_once()
    for live in (cold, whole):
        live.catch_up(bench.store, bench.store.run("math"))

    assert cold.state.model_version == 3
    assert_same(cold, whole)


@mainly_sqlite
def test_an_unusable_checkpoint_is_logged_and_the_whole_log_is_read(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = grown(bench, bench.constant(0.3))
    bench.forget_checkpoints("math")
    whole, _ = started(bench)
    bench.store.save_checkpoint(
        bench.store.run("math").id, position=checkpoint, state=b"of another release", now=bench.clock()
    )

    cold, read_from = started(bench)

    assert read_from == 0
    assert_same(cold, whole)
    (warning,) = [message for message in caplog.messages if "checkpoint" in message]
    assert warning.startswith("run 'math': 18 bytes are no checkpoint")
    assert warning.endswith("; folding its log from the beginning")


@mainly_sqlite
def test_a_reader_does_not_start_from_a_checkpoint_behind_the_position_that_it_knows(bench: Bench) -> None:
    grown(bench, bench.constant(0.3))
    store = Watched(bench.engine)
    run = store.run("math")
    bench.observe("math", 7, range(10))
    bench.store.request_refit(run.id, now=bench.clock())
    bench.worker().work_once()

    live = LiveRun(run.id)
    live.catch_up(store, run)

    assert live.state.position >= run.log_position
    assert store.read_from == run.log_position - 1


def test_a_large_pool_is_read_in_packed_blocks_and_is_the_same(
    bench: Bench, caplog: pytest.LogCaptureFixture, small_blocks: None
) -> None:
    """Also by a fork, with blocks that cannot be read, and with none at all."""
    n = PACKED + 200
    bench.learned("math", n)
    bench.worker(bench.constant(0.3)).work_once()
    bench.store.fork_run("fork", RunSettings(group_size=8), fork_of="math", at_step=None, now=bench.clock())
    whole = LiveRun(bench.store.run("math").id)

    def read(name: str) -> tuple[LiveRun, list[tuple[int, int]]]:
        store = Watched(bench.engine)
        live = LiveRun(store.run(name).id)
        live.catch_up(store, store.run(name))
        return live, store.by_row

    packed, by_row = read("math")
    forked, by_row_of_fork = read("fork")
    with bench.engine.begin() as connection:
        connection.execute(update(pool_blocks).values(content=b"not packed"))
    damaged, by_row_of_damaged = read("math")
    with bench.engine.begin() as connection:
        connection.execute(delete(pool_blocks))
    bench.forget_checkpoints("math")
    whole.catch_up(bench.store, bench.store.run("math"))

    assert by_row == by_row_of_fork == [(PACKED, n)]
    assert by_row_of_damaged[0][0] == 0
    assert [message for message in caplog.messages if "10 bytes are no checkpoint" in message]
    for live in (packed, forked, damaged):
        assert_same(live, whole)
        for name in ("prompt_ids", "groups", "numeric"):
            assert getattr(live.pool.raw(0, n), name) == getattr(whole.pool.raw(0, n), name)
        for name in ("prior_rates_N", "surface_N_S", "embedding_N_D"):
            np.testing.assert_array_equal(getattr(live.pool.raw(0, n), name), getattr(whole.pool.raw(0, n), name))


def test_only_what_is_new_is_packed(bench: Bench, small_blocks: None) -> None:
    class Counting(Store):
        saved: ClassVar[list[int]] = []

        def save_packed_block(self, run_id: int, content: bytes, *, first: int, last: int, features: str) -> None:
            self.saved.append(first)
            super().save_packed_block(run_id, content, first=first, last=last, features=features)

    store = Counting(bench.engine)
    run = bench.load("math", PACKED - 1)
    live = LiveRun(run.id)
    for more in (0, 1, PACKED):
        if more:
            run = bench.load("math", more, first=run.n_prompts)
        live.catch_up(store, run)
        for _ in range(2):
            live.save(store, run, now=bench.clock())

    assert store.saved == [0, PACKED]
