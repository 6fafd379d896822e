"""A worker's loop: what it takes up, what it publishes, and what does not stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from tests.backends import mainly_sqlite
from tests.waiting import PATIENCE_SECONDS, in_background, until

from evenodds import PromptIn
from evenodds_service.domain.prompts import Prompt
from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import StoreUnavailable
from evenodds_service.model.answers import ANSWER_NAMES
from evenodds_service.model.ngrams import ngram_matrix
from evenodds_service.model.refit import TrainingData
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.storage.store import Store

if TYPE_CHECKING:
    from tests.conftest import Service
    from tests.worker.conftest import Bench


def model_bytes(bench: Bench, name: str, version: int) -> SharedModel:
    run = bench.store.run(name)
    snapshot = bench.store.snapshot(run.id, version)
    return SharedModel.from_bytes(snapshot.weights, embedder=snapshot.embedder)


def test_a_worker_refits_what_is_due_and_then_rests(bench: Bench) -> None:
    bench.learned("math")
    bench.learned("young", n_observed=64)
    worker = bench.worker(bench.constant(0.25))

    worked = [worker.work_once() for _ in range(2)]

    assert worked == [True, False]
    (refit,) = bench.refits("math")
    assert (refit.status, refit.worker, refit.attempts, refit.model_version) == ("done", "w", 1, 1)
    assert bench.store.run("math").model_version == 1
    assert bench.snapshots("math") == [1]
    assert bench.refits("young") == ()


@mainly_sqlite
def test_a_worker_saves_the_state_of_a_run_that_it_tidied(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenodds_service.worker.TIDY_SECONDS", -1.0)
    bench.load("served", 30, retain_prompts=20)

    bench.worker(bench.constant(0.5)).work_once()

    run = bench.store.run("served")
    assert run.pool_size == 20
    assert bench.store.run_states([run.id])[run.id].log_position == run.log_position


@mainly_sqlite
def test_the_report_says_what_was_fitted_and_how_long_each_part_took(bench: Bench) -> None:
    run = bench.learned("math")

    bench.worker(bench.constant(0.25)).work_once()

    (refit,) = bench.refits("math")
    assert refit.report is not None
    assert set(refit.report) == {"rate", "observations", "seconds_loading", "seconds_fitting"}
    assert (refit.report["rate"], refit.report["observations"]) == (0.25, 128)
    assert bench.store.snapshot(run.id, 1).fitted_position == run.log_position


@mainly_sqlite
def test_a_refit_reads_the_answer_behind_the_text_and_its_features_among_the_inputs(bench: Bench) -> None:
    seen: list[TrainingData] = []

    def fit(data: TrainingData) -> SharedModel:
        seen.append(data)
        return bench.constant(0.25)(data)

    run, _ = bench.store.put_run("math", RunSettings(embedder="none"), now=bench.clock())
    bench.add(run, [PromptIn(prompt_id=f"p{i}", text="?", answer=f"{i}/7" if i % 2 else None) for i in range(160)])
    bench.observe("math", 0, range(128))

    bench.worker(fit).work_once()

    (data,) = seen
    texts = [f"?\nAnswer: {i}/7" if i % 2 else "?" for i in range(160)]
    assert (data.ngrams != ngram_matrix(texts)).nnz == 0
    assert data.basis.n_answer == len(ANSWER_NAMES)
    of_answers = data.x_N_d[:, data.basis.n_surface - len(ANSWER_NAMES) : data.basis.n_surface]
    assert not of_answers[0::2].any()
    assert of_answers[1::2].any(axis=1).all()


@mainly_sqlite
def test_the_material_is_the_whole_run_also_what_came_since_the_last_refit(bench: Bench) -> None:
    seen: list[TrainingData] = []

    def fit(data: TrainingData) -> SharedModel:
        seen.append(data)
        return bench.constant(0.25)(data)

    worker = bench.worker(fit)
    bench.learned("math")
    worker.work_once()
    bench.load("math", 40, first=160)
    bench.observe("math", 7, range(32, 192))
    worker.work_once()

    first, second = seen
    sizes = [(len(m.x_N_d), m.ngrams.shape[0], len(m.embeddings_N_D), len(m.history)) for m in seen]
    assert sizes == [(160, 160, 160, 128), (200, 200, 200, 288)]
    assert second.history.steps.tolist() == [*first.history.steps.tolist(), *[7] * 160]
    assert second.history.prompts.tolist() == [*range(128), *range(32, 192)]
    assert first.warm_start is None
    assert second.warm_start is not None
    assert second.warm_start.report["rate"] == 0.25


@mainly_sqlite
def test_a_worker_that_starts_anew_fits_the_same_material(bench: Bench) -> None:
    seen: list[TrainingData] = []

    def fit(data: TrainingData) -> SharedModel:
        seen.append(data)
        return bench.constant(0.25)(data)

    one = bench.worker(fit, name="one")
    bench.learned("math")
    one.work_once()
    bench.observe("math", 5, range(128))
    one.work_once()
    bench.store.request_refit(bench.store.run("math").id, now=bench.clock())
    bench.worker(fit, name="two").work_once()

    _, kept, fresh = seen
    assert (kept.x_N_d == fresh.x_N_d).all()
    assert (kept.ngrams != fresh.ngrams).nnz == 0
    assert kept.history.successes.tolist() == fresh.history.successes.tolist()
    assert [refit.worker for refit in bench.refits("math")] == ["two", "one", "one"]


def test_a_stalled_worker_is_taken_over_and_its_late_result_changes_nothing(bench: Bench) -> None:
    bench.learned("math")
    stalled = bench.stalled(bench.constant(0.1))
    slow, heir = bench.worker(stalled, name="slow"), bench.worker(bench.constant(0.9), name="heir")

    with in_background(slow.work_once):
        assert stalled.began.wait(PATIENCE_SECONDS)
        before_its_time = heir.work_once()
        bench.clock.advance(61)
        taken_over = heir.work_once()
        after = bench.store.run("math")
        stalled.go_on.set()

    assert (before_its_time, taken_over) == (False, True)
    (refit,) = bench.refits("math")
    assert (refit.status, refit.worker, refit.attempts, refit.model_version) == ("done", "heir", 2, 1)
    assert bench.store.run("math") == after
    assert bench.snapshots("math") == [1]
    assert model_bytes(bench, "math", 1).report["rate"] == 0.9


def test_a_worker_that_was_taken_over_goes_on_with_the_next_refit(bench: Bench) -> None:
    bench.learned("math")
    stalled = bench.stalled(bench.constant(0.1))
    slow = bench.worker(stalled, name="slow")
    with in_background(slow.work_once):
        assert stalled.began.wait(PATIENCE_SECONDS)
        bench.clock.advance(61)
        bench.worker(bench.constant(0.9), name="heir").work_once()
        stalled.go_on.set()

    bench.observe("math", 5, range(128))
    worked = slow.work_once()

    assert worked
    assert [(refit.worker, refit.model_version) for refit in bench.refits("math")] == [("slow", 2), ("heir", 1)]
    assert bench.snapshots("math") == [1, 2]


def test_a_beating_heart_keeps_the_lease_of_a_long_fit(bench: Bench) -> None:
    bench.learned("math")
    stalled = bench.stalled(bench.constant(0.1))
    slow = bench.worker(stalled, name="slow", lease=timedelta(seconds=0.03))

    def lease_reaches(seconds: float) -> bool:
        (refit,) = bench.refits("math")
        return refit.lease_until is not None and refit.lease_until >= bench.clock() + timedelta(seconds=seconds)

    with in_background(slow.work_once):
        assert stalled.began.wait(PATIENCE_SECONDS)
        for _ in range(3):
            bench.clock.advance(0.025)
            until(lambda: lease_reaches(0.02), "a heartbeat")
        taken_over = bench.worker(bench.constant(0.9), name="heir").work_once()
        stalled.go_on.set()

    assert not taken_over
    (refit,) = bench.refits("math")
    assert (refit.worker, refit.attempts, refit.model_version) == ("slow", 1, 1)


def test_a_fit_that_raises_is_told_and_tried_again_after_a_while(
    bench: Bench, start_service: Callable[[str], Service]
) -> None:
    bench.learned("math")
    client = start_service(bench.database_url).client

    failed = bench.worker(bench.failing("singular matrix")).work_once()
    (told,) = client.refits("math").refits
    bench.clock.advance(59)
    too_early = bench.worker(bench.constant(0.25)).work_once()
    bench.clock.advance(1)
    again = bench.worker(bench.constant(0.25)).work_once()

    assert (failed, too_early, again) == (True, False, True)
    assert (told.status, told.error, told.model_version) == ("failed", "ArithmeticError: singular matrix", None)
    assert [refit.status for refit in client.refits("math").refits] == ["done", "failed"]
    assert client.run("math").last_refit == client.refits("math").refits[0]
    assert bench.snapshots("math") == [1]


@mainly_sqlite
def test_one_bad_run_does_not_keep_the_others_from_their_fit(bench: Bench) -> None:
    bench.learned("bad", group_size=3)
    bench.learned("good")

    def fit(data: TrainingData) -> SharedModel:
        return (bench.failing("bad data") if data.group_size == 3 else bench.constant(0.5))(data)

    worker = bench.worker(fit)
    worked = [worker.work_once() for _ in range(3)]

    assert worked == [True, True, False]
    assert [refit.status for refit in bench.refits("bad")] == ["failed"]
    assert [refit.status for refit in bench.refits("good")] == ["done"]


@mainly_sqlite
def test_a_refit_of_an_empty_run_fails_with_what_to_do(bench: Bench) -> None:
    run = bench.load("empty", 0)
    bench.store.request_refit(run.id, now=bench.clock())

    bench.worker().work_once()

    (refit,) = bench.refits("empty")
    assert refit.error == ("NothingToFit: run 'empty' has no prompts to fit: load them with POST /runs/{run}/prompts")


@mainly_sqlite
@pytest.mark.parametrize("settings", [{}, {"predictor": "gps-paper"}, {"embedder": "none"}, {"predictor": "mopps"}])
def test_a_refit_without_observations_publishes_what_there_is(bench: Bench, settings: dict[str, Any]) -> None:
    run = bench.load("math", 5, **settings)
    bench.store.request_refit(run.id, now=bench.clock())

    bench.worker().work_once()

    (refit,) = bench.refits("math")
    assert (refit.status, refit.error, refit.model_version) == ("done", None, 1)


def test_a_run_deleted_during_its_fit_is_no_trouble(bench: Bench) -> None:
    bench.learned("math")
    bench.learned("other")

    def fit(data: TrainingData) -> SharedModel:
        if bench.store.runs(after="", limit=10)[0].name == "math":
            bench.store.delete_run("math")
            bench.load("math", 3)  # another run of the same name
        return bench.constant(0.5)(data)

    worker = bench.worker(fit)
    worked = [worker.work_once() for _ in range(3)]

    assert worked == [True, True, False]
    assert bench.refits("math") == ()
    assert bench.store.run("math").model_version == 0
    assert [refit.status for refit in bench.refits("other")] == ["done"]


def test_a_run_deleted_while_it_is_read_is_no_trouble(bench: Bench) -> None:
    class Deleting(Store):
        """Another caller deletes the run just before its texts are read."""

        def prompts(
            self, run_id: int, *, first: int = 0, limit: int = 100, containing: str | None = None
        ) -> tuple[Prompt, ...]:
            self.delete_run("math")
            return super().prompts(run_id, first=first, limit=limit)

    bench.learned("math")
    worker = bench.worker(bench.constant(0.5), store=Deleting(bench.engine))

    worked = [worker.work_once() for _ in range(2)]

    assert worked == [True, False]


def test_without_the_database_nothing_is_published_and_the_lease_runs_out(bench: Bench) -> None:
    bench.learned("math")

    def fit(data: TrainingData) -> SharedModel:
        outage.enter_context(bench.without_writes())
        return bench.constant(0.1)(data)

    with bench.impatient_store() as store, ExitStack() as outage, pytest.raises(StoreUnavailable):
        bench.worker(fit, name="unlucky", store=store).work_once()
    (left,) = bench.refits("math")
    bench.clock.advance(61)
    taken_over = bench.worker(bench.constant(0.9), name="heir").work_once()

    assert (left.status, left.worker, left.error) == ("running", "unlucky", None)
    assert taken_over
    (refit,) = bench.refits("math")
    assert (refit.status, refit.worker, refit.attempts) == ("done", "heir", 2)
    assert bench.snapshots("math") == [1]


def test_a_worker_outlives_an_outage_of_the_database(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.learned("math")
    stop = threading.Event()

    outage = ExitStack()
    outage.enter_context(bench.without_writes())
    with bench.impatient_store() as store:
        worker = bench.worker(bench.constant(0.5), store=store)
        with in_background(lambda: worker.run(stop)):
            until(lambda: "the database is unavailable" in caplog.text, "the worker to meet the outage")
            during = bench.refits("math")
            outage.close()
            until(lambda: [refit.status for refit in bench.refits("math")] == ["done"], "the refit")
            stop.set()

    assert during == ()
    assert bench.snapshots("math") == [1]


@mainly_sqlite
def test_a_worker_that_is_told_to_stop_finishes_its_fit_first(bench: Bench) -> None:
    bench.learned("math")
    stop = threading.Event()
    stalled = bench.stalled(bench.constant(0.5))
    worker = bench.worker(stalled)

    with in_background(lambda: worker.run(stop)):
        assert stalled.began.wait(PATIENCE_SECONDS)
        stop.set()
        stalled.go_on.set()

    assert [refit.status for refit in bench.refits("math")] == ["done"]


def test_two_workers_share_the_runs_without_doing_one_twice(bench: Bench) -> None:
    names = [f"run{i}" for i in range(4)]
    for name in names:
        bench.learned(name)
    stop = threading.Event()
    one, two = (bench.worker(bench.constant(0.5), name=name) for name in ("one", "two"))

    with in_background(lambda: one.run(stop)), in_background(lambda: two.run(stop)):
        until(
            lambda: all([r.status for r in bench.refits(name)] == ["done"] for name in names), "the refit of each run"
        )
        stop.set()

    assert [bench.snapshots(name) for name in names] == [[1]] * 4
    assert [refit.attempts for name in names for refit in bench.refits(name)] == [1] * 4
