"""Snapshots that nobody can go back to are dropped, and no answer changes by that.

Each test has a run beside it that was told the same and keeps all of its snapshots: what it answers is what is due.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sqlalchemy import delete, func, select, update
from tests.backends import mainly_sqlite

from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.domain.log_entries import VoidEntry
from evenodds_service.domain.prompts import FittedPrior
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.store import NewSnapshot, Snapshot, Store
from evenodds_service.storage.tables import checkpoints, log, snapshots

if TYPE_CHECKING:
    from tests.worker.conftest import Bench

LEASE = timedelta(hours=1)
KEPT = 2
CHECKPOINTS = 8
STEPS = 15
"""A refit after each, so that most snapshots are dropped."""


class Twins:
    """The run `dropping`, and the run `keeping`, which was told the same."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.stores = {
            "dropping": Store(bench.engine, keep_snapshots=KEPT),
            "keeping": Store(bench.engine, keep_snapshots=10**6),
        }
        self._lives = {name: LiveRun(bench.load(name, 40, embedder="none").id) for name in self.stores}

    def train(self, steps: Iterable[int], names: Sequence[str] = ("dropping", "keeping")) -> None:
        """Four outcomes and a refit at each step; new prompts once."""
        for name, step in ((name, step) for step in steps for name in names):
            if step == 4:
                self.bench.load(name, 4, first=self.bench.store.run(name).n_prompts, embedder="none")
            self.bench.observe(name, step, range(step, step + 4))
            self.refit(name)

    def refit(self, name: str) -> None:
        """Publish a model and save a checkpoint behind it, as a worker does."""
        store, now = self.stores[name], self.bench.clock()
        live = self.started(name, self._lives[name])
        asked = store.request_refit(live.run_id, now=now)
        while (refit := store.claim_refit(worker=name, lease=LEASE, now=now)) and refit.id != asked.id:
            pass  # a fork's
        assert refit is not None
        model = self._model(live)
        new = NewSnapshot(model.embedder, model.to_bytes(), live.state.position, report={})
        store.publish_refit(refit, new, now=now)
        self.started(name, live)
        assert live.save(store, store.run(name), now=now) is not None

    @staticmethod
    def _model(live: LiveRun) -> SharedModel:
        """Each time another, and of the state alone."""
        basis, n = live.state.basis, live.state.n_prompts
        assert basis is not None
        means = np.random.default_rng(live.state.position).random(n).astype(np.float32)
        priors = {name: FittedPrior(means, np.full(n, 4.0, np.float32)) for name in ("ngrams", "latent")}
        return SharedModel("", 8, basis, priors, {}, {})

    def both(self, more: str = "") -> tuple[LiveRun, LiveRun]:
        """Both as a process has them that starts now."""
        return self.started(f"dropping{more}"), self.started(f"keeping{more}")

    def started(self, name: str, live: LiveRun | None = None) -> LiveRun:
        run = self.bench.store.run(name)
        live = live or LiveRun(run.id)
        live.catch_up(self.bench.store, run)
        return live

    def forked(self, at_step: int) -> str:
        """What to add to the names for forks that were then taken back to this step."""
        for name in self.stores:
            fork, _ = self.bench.store.fork_run(
                f"{name} {at_step}",
                self.bench.store.run(name).settings,
                fork_of=name,
                at_step=None,
                now=self.bench.clock(),
            )
            self.bench.store.rewind(fork.id, step=at_step, now=self.bench.clock())
        return f" {at_step}"

    def kept(self, name: str) -> list[int]:
        """Versions of the snapshots that are there."""
        of_run = (snapshots.c.run_id == self.bench.store.run(name).id, func.length(snapshots.c.weights) > 0)
        with self.bench.engine.connect() as connection:
            return list(connection.scalars(select(snapshots.c.version).where(*of_run).order_by(snapshots.c.version)))

    def voided(self, name: str) -> list[int]:
        """Log positions of voided snapshots."""
        of_run = (log.c.run_id == self.bench.store.run(name).id, log.c.kind == "snapshot", log.c.voided_at.is_not(None))
        with self.bench.engine.connect() as connection:
            return list(connection.scalars(select(log.c.position).where(*of_run).order_by(log.c.position)))

    def damage(self, name: str, *, above: int = 0) -> None:
        """Make checkpoints behind this log position those of another release."""
        of_run = (checkpoints.c.run_id == self.bench.store.run(name).id, checkpoints.c.position > above)
        with self.bench.engine.begin() as connection:
            connection.execute(update(checkpoints).where(*of_run).values(state=b"of another release"))

    def checkpoints(self, name: str) -> list[int]:
        """Their log positions, the newest first."""
        of_run = checkpoints.c.run_id == self.bench.store.run(name).id
        statement = select(checkpoints.c.position).where(of_run).order_by(checkpoints.c.position.desc())
        with self.bench.engine.connect() as connection:
            return list(connection.scalars(statement))


@pytest.fixture
def twins(bench: Bench) -> Twins:
    return Twins(bench)


def assert_same(one: LiveRun, other: LiveRun) -> None:
    """To the last bit."""
    assert to_bytes(one.state) == to_bytes(other.state)
    block = one.pool.raw(0, 5)
    texts = [f"Compute {i}" for i in range(5)]
    for ours, theirs in zip(
        [*one.beliefs("gps"), *one.new_beliefs("gps", texts, block)[:2]],
        [*other.beliefs("gps"), *other.new_beliefs("gps", texts, block)[:2]],
        strict=True,
    ):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)


def test_a_long_run_keeps_few_snapshots_and_every_process_answers_as_if_it_kept_all(twins: Twins) -> None:
    twins.train(range(4))
    idle = twins.started("dropping")  # a process that is asked again much later
    warm = twins.started("dropping")
    for step in range(4, STEPS):
        twins.train([step])
        twins.started("dropping", warm)
        assert len(twins.kept("dropping")) <= KEPT + CHECKPOINTS
        assert twins.kept("dropping")[-KEPT:] == [step, step + 1]

    kept = twins.kept("dropping")
    assert twins.kept("keeping") == list(range(1, STEPS + 1))
    assert len(kept) <= STEPS / 2
    assert twins.bench.store.run("dropping").model_version == STEPS
    cold, due = twins.both()
    twins.bench.forget_checkpoints("keeping")
    from_the_beginning = twins.started("keeping")
    for live in (cold, warm, twins.started("dropping", idle), from_the_beginning):
        assert_same(live, due)
    assert twins.voided("dropping") == []


@mainly_sqlite
def test_a_rewind_within_what_is_kept_is_exact_and_an_older_one_goes_without_what_is_dropped(twins: Twins) -> None:
    twins.train(range(STEPS))
    warm = twins.started("dropping")
    n_exact = 0
    for step in (STEPS - 2, STEPS - 3, STEPS - 5, 5, 0, -1):
        names = twins.forked(step)
        cold, due = twins.both(names)
        lost = sorted(set(twins.voided(f"dropping{names}")) - set(twins.voided(f"keeping{names}")))
        n_exact += not lost
        if lost:  # then the other goes without them too, from the same checkpoint on
            without(twins, f"keeping{names}", lost)
            due = twins.started(f"keeping{names}")
        assert_same(cold, due)
        assert twins.bench.store.run(f"dropping{names}").model_version == cold.state.model_version
        assert cold.model is not None or cold.state.model_version == 0
    assert 3 <= n_exact < 6  # the newest, and what nothing was fitted on
    run = twins.bench.store.run("dropping")
    twins.bench.store.rewind(run.id, step=5, now=twins.bench.clock())
    assert_same(twins.started("dropping", warm), twins.started("dropping"))
    refit = twins.bench.refits("dropping")[0]
    assert refit.status == "pending"
    twins.refit("dropping")
    assert twins.bench.store.run("dropping").model_version == STEPS + 1  # no version names two
    assert_same(twins.started("dropping", warm), twins.started("dropping"))


def without(twins: Twins, name: str, positions: list[int]) -> None:
    """Void these snapshots in the last rewind, and have the log behind the checkpoint before them folded again."""
    run = twins.bench.store.run(name)
    entries = (log.c.run_id == run.id, log.c.position.in_(positions))
    later = (checkpoints.c.run_id == run.id, checkpoints.c.position >= positions[0])
    with twins.bench.engine.begin() as connection:
        connection.execute(update(log).where(*entries).values(voided_at=run.log_position))
        connection.execute(delete(checkpoints).where(*later))


@mainly_sqlite
def test_a_fork_at_an_old_step_folds_alike_everywhere(twins: Twins) -> None:
    """Also where nothing of a later step has to be voided in it."""
    twins.train(range(STEPS), ["dropping"])
    settings = twins.bench.store.run("dropping").settings
    for step in (0, 3, 6, 9, STEPS - 2, STEPS - 1):
        names = [f"{which} at {step}" for which in "ab"]
        for name in names:
            twins.bench.store.fork_run(name, settings, fork_of="dropping", at_step=step, now=twins.bench.clock())
        one, other = map(twins.started, names)
        assert_same(one, other)
        assert (one.model is None) == (one.state.model_version == 0)
        fork = twins.bench.store.run(names[0])
        assert (fork.head_step, fork.model_version) == (step, one.state.model_version)


def test_where_no_checkpoint_can_be_read_all_processes_go_without_what_is_dropped(
    twins: Twins, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an upgrade to a release whose states are others: the log is folded from its beginning."""
    twins.train(range(STEPS), ["dropping"])
    warm, run, now = twins.started("dropping"), twins.bench.store.run("dropping"), twins.bench.clock()
    newest, before_it, *_ = twins.checkpoints("dropping")
    twins.damage("dropping", above=before_it)
    assert_same(twins.started("dropping"), warm)  # the checkpoint before it gives the same
    assert twins.bench.store.run("dropping") == run
    twins.damage("dropping")
    assert not twins.bench.store.give_up_checkpoints(run.id, refused=newest - 1, left=0, now=now)

    cold = twins.started("dropping")

    assert "cannot be used, and snapshots behind it are dropped" in caplog.text
    at = run.log_position + 1
    told = replace(run, log_position=at, void_position=at)  # and all else is as it was
    assert not twins.bench.store.give_up_checkpoints(run.id, refused=newest, left=0, now=now)
    assert twins.bench.store.run("dropping") == told
    assert twins.bench.store.entries(run.id, after=run.log_position) == (VoidEntry(at),)
    n_dropped = STEPS - len(twins.kept("dropping"))
    assert len(twins.voided("dropping")) == n_dropped > 0
    assert_same(twins.started("dropping", warm), cold)
    assert_same(twins.started("dropping"), cold)
    assert (cold.state.model_version, cold.state.n_observations) == (STEPS, 4 * STEPS)
    twins.train([STEPS], ["dropping"])
    assert_same(twins.started("dropping"), twins.started("dropping", warm))
    assert len(twins.voided("dropping")) == n_dropped


class Overtaken(Store):
    """Before it reads one of these snapshots the first time, the run goes on until that is dropped."""

    def __init__(self, twins: Twins, versions: set[int]) -> None:
        super().__init__(twins.bench.engine)
        self._twins, self._versions = twins, versions
        self.n_missed = 0

    def snapshot(self, run_id: int, version: int) -> Snapshot:
        if version in self._versions:
            self._versions = set()
            step = self.run("dropping").head_step
            assert step is not None
            while version in self._twins.kept("dropping"):
                step += 1
                self._twins.train([step])
        found = super().snapshot(run_id, version)
        self.n_missed += not found.weights
        return found


@pytest.mark.parametrize("at", ["in the log", "at the checkpoint"])
def test_what_is_dropped_while_a_process_folds_does_not_change_its_state(twins: Twins, at: str) -> None:
    twins.train(range(3))
    folding = twins.started("dropping")
    twins.train([3, 4])
    store = Overtaken(twins, {4} if at == "in the log" else {5})
    if at == "at the checkpoint":
        folding = LiveRun(folding.run_id)

    folding.catch_up(store, store.run("dropping"))

    assert store.n_missed == 1
    assert_same(twins.started("dropping", folding), twins.both()[1])
    assert twins.voided("dropping") == []


@mainly_sqlite
def test_a_state_whose_snapshot_is_dropped_is_saved_no_more(twins: Twins) -> None:
    twins.train(range(6), ["dropping"])
    behind = twins.started("dropping")
    run, now = twins.bench.store.run("dropping"), twins.bench.clock()
    twins.train(range(6, STEPS), ["dropping"])
    assert 6 not in twins.kept("dropping")

    assert behind.save(twins.bench.store, run, now=now) is None

    assert behind.state.position not in twins.checkpoints("dropping")
