"""A store with runs in it, a clock that tests turn, and workers with a fit of the test's own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import Engine, delete, text
from tests.waiting import PATIENCE_SECONDS

from evenodds import PromptIn
from evenodds_service.domain.log_entries import NewObservation, Outcomes, SnapshotEntry
from evenodds_service.domain.prompts import FittedPrior
from evenodds_service.domain.settings import RunSettings
from evenodds_service.model import paper_fit
from evenodds_service.model.refit import TrainingData, fit_shared_model
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.storage.engine import WRITES, Patience, open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Refit, Run, Store
from evenodds_service.storage.tables import checkpoints
from evenodds_service.worker import Fit, Worker

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks is a folder of scripts, not an installed package

LEASE = timedelta(seconds=60)
GROUP_SIZE = 8


def text_of(i: int) -> str:
    return f"{'Prove' if i % 2 else 'Compute'} something about the number {i}."


def real_fit(data: TrainingData) -> SharedModel:
    return fit_shared_model(data, device=torch.device("cpu"))


def constant(rate: float) -> Fit:
    """A fit that finds the same rate for every prompt of the pool, and knows nothing of others."""

    def fit(data: TrainingData) -> SharedModel:
        n = len(data.x_N_d)
        prior = FittedPrior(np.full(n, rate, np.float32), np.full(n, 4.0, np.float32))
        return SharedModel(
            embedder=data.embedder,
            group_size=data.group_size,
            basis=data.basis,
            priors={"ngrams": prior},
            weights={},
            report={"rate": rate},
        )

    return fit


def failing(message: str) -> Fit:
    def fit(data: TrainingData) -> SharedModel:
        raise ArithmeticError(message)

    return fit


@dataclass
class Clock:
    """Stands still unless it is turned."""

    now: datetime = field(default_factory=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc))

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class Stalled:
    """A fit that says when it has begun and goes on when it is told to."""

    def __init__(self, then: Fit) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self._then = then

    def __call__(self, data: TrainingData) -> SharedModel:
        self.began.set()
        assert self.go_on.wait(PATIENCE_SECONDS)
        return self._then(data)


@dataclass
class Bench:
    """A database with its store and clock."""

    database_url: str
    engine: Engine
    store: Store
    clock: Clock

    def load(self, name: str, n: int, *, first: int = 0, **settings: Any) -> Run:
        """The run with prompts p<first> .. p<first + n - 1>: every other one says Prove, the rest Compute."""
        run, _ = self.store.put_run(name, RunSettings(**{"group_size": GROUP_SIZE, **settings}), now=self.clock())
        self.add(run, [PromptIn(prompt_id=f"p{i}", text=text_of(i)) for i in range(first, first + n)])
        return self.store.run(name)

    def add(self, run: Run, items: Sequence[PromptIn]) -> None:
        """Put these prompts into the pool, with their vectors."""
        prepared = Featurizer(self.store).prepare(run, items, names=[str(i) for i in range(len(items))])
        self.store.add_prompts(
            run.id,
            prepared.prompts,
            prepared.vectors,
            embedder=prepared.embedder,
            embedding_width=prepared.embedding_width,
            now=self.clock(),
        )

    def observe(self, name: str, step: int, prompts: Iterable[int]) -> None:
        """Compute is mostly solved and Prove mostly not, each prompt a little differently."""
        run = self.store.run(name)
        rows = [NewObservation.of_counts(i, i % 3 if i % 2 else GROUP_SIZE - i % 4, GROUP_SIZE) for i in prompts]
        self.store.append_observations(run.id, Outcomes(step=step, observations=rows), now=self.clock())

    def learned(self, name: str, n: int = 160, n_observed: int = 128, **settings: Any) -> Run:
        """A loaded run with as many observations, in four steps, as make its first refit due."""
        self.load(name, n, **settings)
        for step in range(4):
            self.observe(name, step, range(step * n_observed // 4, (step + 1) * n_observed // 4))
        return self.store.run(name)

    def worker(self, fit: Fit | None = None, *, name: str = "w", store: Store | None = None, **more: Any) -> Worker:
        """With the real fit by default."""
        options = {"clock": self.clock, "lease": LEASE, "poll_seconds": 0.01, **more}
        return Worker(store or self.store, name=name, fit=fit or real_fit, **options)

    def refits(self, name: str) -> tuple[Refit, ...]:
        return self.store.refits(self.store.run(name).id)

    def snapshots(self, name: str) -> list[int]:
        """Versions in the order of the log."""
        entries = self.store.entries(self.store.run(name).id, after=0)
        return [entry.version for entry in entries if isinstance(entry, SnapshotEntry)]

    def forget_checkpoints(self, name: str, *, above: int = 0) -> None:
        """Remove the run's checkpoints behind this log position."""
        here = (checkpoints.c.run_id == self.store.run(name).id, checkpoints.c.position > above)
        with self.engine.begin() as connection:
            connection.execute(delete(checkpoints).where(*here))

    @contextmanager
    def without_writes(self) -> Iterator[None]:
        """Nobody else can write to the database for as long as the body runs."""
        other = open_engine(self.database_url, timeout_seconds=10 * PATIENCE_SECONDS)
        with other.execution_options(**{WRITES: True}).begin() as connection:
            if other.dialect.name != "sqlite":
                connection.execute(text("LOCK TABLE runs, refits IN SHARE MODE"))
            yield
        other.dispose()

    @contextmanager
    def impatient_store(self) -> Iterator[Store]:
        """One that waits a second for a lock, and for all else as long as any machine needs."""
        patience = Patience(lock=1, statement=PATIENCE_SECONDS, idle=PATIENCE_SECONDS)
        engine = open_engine(self.database_url, timeout_seconds=PATIENCE_SECONDS, patience=patience)
        yield Store(engine)
        engine.dispose()

    # What a test's worker may fit.

    real = staticmethod(real_fit)
    constant = staticmethod(constant)
    failing = staticmethod(failing)
    stalled = Stalled


@pytest.fixture
def bench(database_url: str) -> Iterator[Bench]:
    """Over a migrated database of the test's own, once for each backend."""
    engine = open_engine(database_url, pool_size=10, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    yield Bench(database_url, engine, Store(engine), Clock())
    engine.dispose()


@pytest.fixture
def few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published model learns little from a batch: enough to differ, and soon done."""
    monkeypatch.setattr(paper_fit, "UPDATES_PER_STEP", 2)
