"""Clocks that jump, and clocks of machines that differ: the order of the log is its own, and no refit is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.backends import mainly_sqlite
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.api.run_metrics import RunMetrics
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.runtime.run_states import RunStates

if TYPE_CHECKING:
    from tests.conftest import Service
    from tests.worker.conftest import Bench

DAY = timedelta(days=1).total_seconds()


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_after_a_jump_during_a_fit_one_version_is_published(bench: Bench, jump: float) -> None:
    bench.learned("math")
    stalled = bench.stalled(bench.constant(0.1))
    thread = threading.Thread(target=bench.worker(stalled, name="slow").work_once)
    thread.start()
    assert stalled.began.wait(PATIENCE_SECONDS)

    bench.clock.advance(jump)
    taken_over = bench.worker(bench.constant(0.9), name="heir").work_once()
    stalled.go_on.set()
    thread.join()

    (refit,) = bench.refits("math")
    assert taken_over
    assert (refit.status, refit.worker, refit.attempts, refit.model_version) == ("done", "heir", 2, 1)
    assert bench.snapshots("math") == [1]


@pytest.mark.parametrize("ahead", [DAY, -DAY])
def test_a_refit_that_a_wrong_clock_has_claimed_is_taken_over(bench: Bench, ahead: float) -> None:
    """Its worker died."""
    run = bench.learned("math")
    bench.store.request_refit(run.id, now=bench.clock())
    wrong = bench.clock() + timedelta(seconds=ahead)
    assert bench.store.claim_refit(worker="wrong", lease=timedelta(seconds=60), now=wrong)

    assert bench.worker(bench.constant(0.5), name="right").work_once()

    (refit,) = bench.refits("math")
    assert (refit.status, refit.worker) == ("done", "right")


def test_a_difference_below_the_lease_takes_nothing_from_anybody(bench: Bench) -> None:
    run = bench.learned("math")
    bench.store.request_refit(run.id, now=bench.clock())
    assert bench.store.claim_refit(worker="here", lease=timedelta(seconds=60), now=bench.clock())

    for seconds in (-50, 50):
        elsewhere = bench.clock() + timedelta(seconds=seconds)
        assert bench.store.claim_refit(worker="elsewhere", lease=timedelta(seconds=60), now=elsewhere) is None


@mainly_sqlite
def test_refits_go_on_after_the_clock_was_set_back(bench: Bench) -> None:
    bench.learned("math", refit_every_seconds=600)
    bench.clock.advance(DAY)
    worker = bench.worker(bench.constant(0.5))
    assert worker.work_once()

    bench.clock.advance(-DAY)
    bench.observe("math", 9, range(3))

    assert worker.work_once()
    assert bench.snapshots("math") == [1, 2]


@mainly_sqlite
def test_the_order_of_the_log_and_what_is_learned_from_it_do_not_depend_on_the_clock(bench: Bench) -> None:
    for name, seconds in (("steady", 1.0), ("jumping", -DAY)):
        bench.load(name, 40)
        for step in range(4):
            bench.clock.advance(seconds * (-1) ** step if name == "jumping" else seconds)
            bench.observe(name, step, range(10 * step, 10 * step + 10))

    views = []
    for name in ("steady", "jumping"):
        run = bench.store.run(name)
        live = LiveRun(run.id)
        live.catch_up(bench.store, run)
        views.append(live)

    steady, jumping = views
    assert steady.state.position == jumping.state.position == 5
    for ours, theirs in zip(steady.beliefs("gps"), jumping.beliefs("gps"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@mainly_sqlite
def test_a_request_is_recognised_whatever_the_time(bench: Bench, start_service: Callable[[str], Service]) -> None:
    run = bench.load("math", 4)
    rows = [NewObservation.of_counts(0, 1, 8)]

    def append() -> bool:
        return bench.store.append_observations(
            run.id, Outcomes(step=0, observations=rows, request_id="once", request_hash="hash"), now=bench.clock()
        ).replayed

    replayed = [append()]
    for seconds in (DAY, -2 * DAY):
        bench.clock.advance(seconds)
        replayed.append(append())

    assert replayed == [False, True, True]
    assert start_service(bench.database_url).client.predict("math", ["p0"]).predictions[0].attempts_seen == 8


@mainly_sqlite
def test_an_age_is_never_negative(bench: Bench) -> None:
    """The clock of the worker was ahead of this process's."""
    bench.learned("ahead")
    assert bench.worker(bench.constant(0.5)).work_once()
    live_runs = LiveRuns(bench.store, capacity=2)
    live_runs.at_head("ahead")
    run_states = RunStates(bench.store, live_runs, now=bench.clock)
    metrics = RunMetrics(bench.store, live_runs, run_states, lambda: bench.clock() - timedelta(days=1))

    samples = [sample for family in metrics.collect() for sample in family.samples]

    (age,) = [sample.value for sample in samples if sample.name == "evenodds_run_refit_age_seconds"]
    assert age == 0.0
