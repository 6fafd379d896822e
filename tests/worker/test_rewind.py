"""Snapshots, fits and cold starts around a rewind or a fork: none goes on with what was forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tests.backends import mainly_sqlite

from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.model.refit import TrainingData
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.store import Voided
from evenodds_service.worker import Worker

if TYPE_CHECKING:
    from tests.worker.conftest import Bench


def rewind(bench: Bench, name: str, step: int) -> Voided:
    return bench.store.rewind(bench.store.run(name).id, step=step, now=bench.clock())


def refitted(bench: Bench, name: str, worker: Worker) -> None:
    bench.store.request_refit(bench.store.run(name).id, now=bench.clock())
    assert worker.work_once()


def view(bench: Bench, name: str, live: LiveRun | None = None) -> LiveRun:
    run = bench.store.run(name)
    live = live or LiveRun(run.id)
    live.catch_up(bench.store, run)
    return live


def test_the_model_goes_back_to_the_one_that_saw_nothing_of_what_was_forgotten(bench: Bench) -> None:
    bench.learned("math")
    worker = bench.worker()
    worker.work_once()
    warm = view(bench, "math")
    before = warm.beliefs("gps")
    bench.observe("math", 4, range(40, 100))
    refitted(bench, "math", worker)
    bench.observe("math", 5, range(90, 120))
    view(bench, "math", warm)

    rewind(bench, "math", 3)

    cold = view(bench, "math")
    view(bench, "math", warm)
    assert bench.store.run("math").model_version == warm.state.model_version == cold.state.model_version == 1
    assert to_bytes(warm.state) == to_bytes(cold.state)
    for live in (warm, cold):
        for now, then in zip(live.beliefs("gps"), before, strict=True):
            np.testing.assert_array_equal(now, then)


@mainly_sqlite
def test_a_view_goes_back_to_the_newest_checkpoint_that_is_left(bench: Bench) -> None:
    bench.learned("math")
    bench.worker(bench.constant(0.3)).work_once()
    position = bench.store.run("math").log_position
    bench.observe("math", 4, range(8))
    whole, live = view(bench, "math"), view(bench, "math")
    bench.observe("math", 5, range(8))
    view(bench, "math", live)

    rewind(bench, "math", 4)

    assert bench.store.newest_checkpoint(bench.store.run("math").id) is not None
    view(bench, "math", live)
    bench.forget_checkpoints("math")
    view(bench, "math", whole)
    cold = view(bench, "math")
    assert live.state.position == position + 3
    assert to_bytes(live.state) == to_bytes(whole.state) == to_bytes(cold.state)


@mainly_sqlite
def test_a_worker_whose_run_is_rewound_meanwhile_fits_again_on_what_is_left(bench: Bench) -> None:
    bench.learned("math")
    steps: list[list[int]] = []

    def fit(data: TrainingData) -> SharedModel:
        steps.append(sorted(set(data.history.steps.tolist())))
        if len(steps) == 1:
            rewind(bench, "math", 1)
        return bench.constant(0.25)(data)

    worker = bench.worker(fit)

    worked = [worker.work_once() for _ in range(3)]

    assert worked == [True, True, False]
    assert steps == [[0, 1, 2, 3], [0, 1]]
    assert bench.snapshots("math") == [1]
    (refit,) = bench.refits("math")
    assert (refit.status, refit.attempts, refit.report and refit.report["observations"]) == ("done", 2, 64)


@mainly_sqlite
def test_a_worker_fits_what_never_having_seen_it_would_give(bench: Bench) -> None:
    """The same training data, bit for bit, as of a run in which what was voided never happened."""
    seen: dict[str, TrainingData] = {}
    for name in ("voided", "never"):
        bench.learned(name, n_observed=96)

        def fit(data: TrainingData, name: str = name) -> SharedModel:
            seen[name] = data
            return bench.constant(0.25)(data)

        worker = bench.worker(fit)
        refitted(bench, name, worker)
        if name == "voided":
            bench.observe(name, 4, range(60, 160))
            refitted(bench, name, worker)
            rewind(bench, name, 3)
            run = bench.store.run(name)
            bench.observe(name, 2, range(4))
            bench.store.retract(run.id, from_step=2, to_step=2, prompts=[0, 1, 2, 3], now=bench.clock())
        bench.observe(name, 4, range(100, 130))
        refitted(bench, name, worker)

    voided, never = seen["voided"], seen["never"]
    for column in ("prompts", "steps", "successes", "attempts", "informative"):
        np.testing.assert_array_equal(getattr(voided.history, column), getattr(never.history, column))
    np.testing.assert_array_equal(voided.x_N_d, never.x_N_d)
    one, other = view(bench, "voided"), view(bench, "never")
    for ours, theirs in zip(one.beliefs("gps"), other.beliefs("gps"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_refit_is_due_again_where_the_newest_was_voided(bench: Bench) -> None:
    bench.learned("math")
    worker = bench.worker(bench.constant(0.3))
    worker.work_once()
    first = bench.store.run("math").model_version

    rewind(bench, "math", 2)
    assert bench.store.run("math").model_version == 0
    worked = [worker.work_once() for _ in range(2)]

    assert worked == [True, False]
    assert bench.store.run("math").model_version == first + 1
    assert bench.snapshots("math") == [2]


def test_a_fork_has_the_models_and_checkpoints_that_saw_nothing_later(bench: Bench) -> None:
    bench.learned("math")
    worker = bench.worker()
    worker.work_once()
    position = bench.store.run("math").log_position
    bench.observe("math", 4, range(40, 60))
    then = view(bench, "math").beliefs("gps")
    bench.observe("math", 5, range(20, 100))
    refitted(bench, "math", worker)
    settings = bench.store.run("math").settings

    fork, _ = bench.store.fork_run("fork", settings, fork_of="math", at_step=4, now=bench.clock())

    checkpoint = bench.store.newest_checkpoint(fork.id)
    assert checkpoint is not None
    assert checkpoint[0] == position
    live = view(bench, "fork")
    assert (fork.model_version, live.state.model_version) == (1, 1)
    for ours, theirs in zip(live.beliefs("gps"), then, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert worker.work_once()  # its first fit is due
    assert bench.snapshots("fork") == [1, 2]
    assert bench.snapshots("math") == [1, 2]
