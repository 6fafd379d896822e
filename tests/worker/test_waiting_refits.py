"""For how long a refit has waited, as metrics show it where no worker runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.backends import mainly_sqlite

from evenodds_service.api.run_metrics import RunMetrics
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.runtime.run_states import RunStates

if TYPE_CHECKING:
    from tests.worker.conftest import Bench


def metrics_of(bench: Bench) -> RunMetrics:
    live_runs = LiveRuns(bench.store, capacity=2)
    return RunMetrics(bench.store, live_runs, RunStates(bench.store, live_runs, now=bench.clock), bench.clock)


def waiting(metrics: RunMetrics) -> dict[str, float]:
    """Seconds by run."""
    samples = [sample for family in metrics.collect() for sample in family.samples]
    return {s.labels["run"]: s.value for s in samples if s.name == "evenodds_run_refit_waiting_seconds"}


@mainly_sqlite
def test_a_refit_that_no_worker_asks_for_is_seen_to_wait(bench: Bench) -> None:
    bench.learned("due")
    bench.learned("young", n_observed=124)
    metrics = metrics_of(bench)

    assert waiting(metrics) == {"due": 0, "young": 0}
    bench.clock.advance(1_000)
    assert waiting(metrics) == {"due": 1_000, "young": 0}


@mainly_sqlite
def test_an_open_refit_waits_since_it_was_asked_for_and_a_published_one_does_not(bench: Bench) -> None:
    run = bench.learned("math")
    bench.store.request_refit(run.id, now=bench.clock())
    bench.clock.advance(60)
    assert waiting(metrics_of(bench)) == {"math": 60}

    assert bench.worker(bench.constant(0.5)).work_once()

    assert waiting(metrics_of(bench)) == {"math": 0}


@mainly_sqlite
def test_no_refit_waits_where_a_rewind_leaves_the_model_before(bench: Bench) -> None:
    bench.learned("math")
    worker = bench.worker(bench.constant(0.5))
    assert worker.work_once()
    bench.observe("math", 4, range(160))
    assert worker.work_once()
    bench.store.rewind(bench.store.run("math").id, step=3, now=bench.clock())
    while worker.work_once():  # the rewind asks for a refit
        pass

    assert waiting(metrics_of(bench)) == {"math": 0}
