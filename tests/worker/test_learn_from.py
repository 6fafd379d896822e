"""A run that learns from others: what they showed is there before its first batch, and goes when they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from evenodds import PromptIn
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.ranks import spearman
from evenodds_service.domain.refits import GROWN_SECONDS
from evenodds_service.domain.settings import RunSettings
from evenodds_service.model.history import History
from evenodds_service.model.refit import TrainingData, fit_shared_model
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.worker import Worker

if TYPE_CHECKING:
    from tests.worker.conftest import Bench

N, ATTEMPTS = 200, 8
TRIED = range(120)  # too few for a refit of its own
"""Prompts that the source has tried; the others it only holds."""
on_one_database = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
KINDS = ("Compute the sum of", "Solve the equation of", "Prove the theorem about", "Refute the conjecture on")


def texts(n: int = N, *, shout: bool = False) -> list[str]:
    """Each kind of them is harder than the one before; the same ones shouted differ in case and marks."""
    plain = [f"{KINDS[i % 4]} {i * 37 % 1_009} and {i * 91 % 1_013}." for i in range(n)]
    return [text.upper().replace(" ", "  ").replace(".", "!") for text in plain] if shout else plain


def rates(seed: int = 0) -> FloatArray:
    log_odds = 2.0 - 1.3 * (np.arange(N) % 4) + np.random.default_rng(seed).normal(scale=1.0, size=N)
    return np.asarray(1 / (1 + np.exp(-log_odds)))


def load(bench: Bench, name: str, written: Sequence[str], *, prefix: str = "p", **settings: Any) -> None:
    made = RunSettings(**{"group_size": ATTEMPTS, **settings})
    run, _ = bench.store.put_run(name, made, now=bench.clock())
    bench.add(run, [PromptIn(prompt_id=f"{prefix}{i}", text=text) for i, text in enumerate(written)])


def observe(bench: Bench, name: str, step: int, prompts: Sequence[int], rates_N: FloatArray, *, seed: int = 0) -> None:
    k = np.random.default_rng([seed, step]).binomial(ATTEMPTS, rates_N[list(prompts)])
    rows = [NewObservation.of_counts(i, int(s), ATTEMPTS) for i, s in zip(prompts, k, strict=True)]
    bench.store.append_observations(bench.store.run(name).id, Outcomes(step=step, observations=rows), now=bench.clock())


def evaluated(bench: Bench, name: str, rates_N: FloatArray, **settings: Any) -> None:
    """A source: a model that has tried some of its prompts once."""
    load(bench, name, texts(), prefix=f"{name}-", **settings)
    observe(bench, name, 0, TRIED, rates_N, seed=len(name))


def sources_only(data: TrainingData) -> SharedModel:
    """What other runs showed, without the priors from the run's own outcomes, which take most of the time."""
    return fit_shared_model(replace(data, history=History.empty()), device=torch.device("cpu"))


def fitted(bench: Bench, name: str, worker: Worker) -> LiveRun:
    """The run after a refit, which is asked for if it is not due."""
    if not worker.work_once():
        bench.store.request_refit(bench.store.run(name).id, now=bench.clock())
        assert worker.work_once()
    return view(bench, name)


def settled(bench: Bench, name: str, worker: Worker) -> LiveRun:
    """The run after all that is due."""
    while worker.work_once():
        pass
    return view(bench, name)


def view(bench: Bench, name: str) -> LiveRun:
    run = bench.store.run(name)
    live = LiveRun(run.id)
    live.catch_up(bench.store, run)
    return live


def means(live: LiveRun) -> FloatArray:
    a, b = live.beliefs("gps")
    return np.asarray(a / (a + b))


@on_one_database
def test_the_first_batch_is_forecast_by_what_another_run_showed_on_the_same_texts(bench: Bench) -> None:
    """Also on prompts that nobody has tried, by their texts, and on texts outside of the pool."""
    truth = rates()
    evaluated(bench, "A", truth)
    load(bench, "B", texts(shout=True), learn_from=("A",))

    live = settled(bench, "B", bench.worker(sources_only))

    forecast, tried, others = means(live), list(TRIED), list(range(len(TRIED), N))
    assert (live.state.model_version, live.state.n_observations) == (1, 0)
    assert spearman(forecast[tried], truth[tried]) > 0.85
    assert spearman(forecast[others], truth[others]) > 0.6
    block = live.pool.raw(0, 4)
    a, b, _ = live.new_beliefs("gps", [f"{kind} 3 and 5." for kind in KINDS], block)
    assert (np.diff(a / (a + b)) < 0).all()


def test_what_a_source_showed_goes_with_it(bench: Bench) -> None:
    """Whether it is deleted, retracted or rewound: the next refit is that of a run that never met it."""
    good, misleading = rates(), 1.0 - rates()
    evaluated(bench, "A", good)
    for name in ("deleted", "retracted"):
        evaluated(bench, name, misleading)
    load(bench, "moved", texts(), prefix="m")
    observe(bench, "moved", 0, TRIED, good, seed=3)
    load(bench, "B", texts(), learn_from=("A", "deleted", "retracted", "moved"))
    worker = bench.worker(sources_only)
    before = settled(bench, "B", worker)
    for step in range(1, 7):
        observe(bench, "moved", step, [step], misleading)

    bench.store.delete_run("deleted")
    retracted = bench.store.run("retracted")
    bench.store.retract(retracted.id, from_step=0, now=bench.clock())
    bench.store.rewind(bench.store.run("moved").id, step=0, now=bench.clock())
    after = fitted(bench, "B", worker)
    load(bench, "never", texts(), learn_from=("A", "moved"))
    never = settled(bench, "never", worker)

    def columns(live: LiveRun) -> tuple[str, ...]:
        assert live.model is not None
        assert live.model.sources is not None
        return live.model.sources.names

    assert columns(before) == ("A", "deleted", "moved", "retracted")
    assert columns(after) == columns(never) == ("A", "moved")
    np.testing.assert_array_equal(means(after), means(never))
    assert spearman(means(after), good) > 0.8 > spearman(means(before), good)


@on_one_database
def test_a_run_whose_sources_are_all_gone_goes_on_alone(bench: Bench) -> None:
    truth = rates()
    evaluated(bench, "A", truth)
    load(bench, "B", texts(), learn_from=("A",))
    worker = bench.worker(sources_only)
    settled(bench, "B", worker)
    for step in range(4):
        observe(bench, "B", step, range(40 * step, 40 * step + 40), truth)
    settled(bench, "B", worker)
    bench.store.delete_run("A")

    live = fitted(bench, "B", worker)
    observe(bench, "B", 4, range(160, 200), truth)

    live.catch_up(bench.store, bench.store.run("B"))
    assert live.state.columns is None
    assert live.model is not None
    assert live.model.sources is None
    assert np.isfinite(means(live)).all()
    assert spearman(means(live), truth) > 0.6


@on_one_database
@pytest.mark.parametrize("joined_by", ["hashes", "ids"])
def test_runs_that_keep_no_texts_have_prompts_in_common(bench: Bench, joined_by: str) -> None:
    truth, settings = rates(), dict[str, Any](keep_text=False)
    shared = {"data_set": "math"} if joined_by == "ids" else {}
    load(bench, "A", texts(), **settings, **shared)
    observe(bench, "A", 0, TRIED, truth)
    other = texts(shout=True) if joined_by == "hashes" else [f"Another wording, {i * 7919 % 997}" for i in range(N)]
    load(bench, "B", other, prefix="p" if joined_by == "ids" else "q", learn_from=("*",), **settings, **shared)
    load(bench, "stranger", other, prefix="q", learn_from=("A",), data_set="code", **settings)

    worker = bench.worker(sources_only)
    live = settled(bench, "B", worker)

    assert spearman(means(live)[: len(TRIED)], truth[: len(TRIED)]) > 0.85
    assert live.model is not None
    assert live.model.in_common == {"A": len(TRIED)}
    stranger = view(bench, "stranger").model
    assert stranger is not None
    assert stranger.in_common == ({"A": len(TRIED)} if joined_by == "hashes" else {"A": 0})


@on_one_database
def test_a_policy_that_moved_is_two_columns_and_prompts_that_come_later_are_told(bench: Bench) -> None:
    early, late = rates(0), rates(7)
    load(bench, "A", texts(), prefix="a")
    for step in range(6):
        observe(bench, "A", step, range(N), early if step < 3 else late, seed=5)
    load(bench, "B", texts(90), learn_from=("A",))
    worker = bench.worker(sources_only)
    settled(bench, "B", worker)

    load(bench, "B", texts(N), learn_from=("A",))  # which is more than twice as many
    live = settled(bench, "B", worker)
    more = [*texts(N), "Prove one more."]
    load(bench, "B", more, learn_from=("A",))
    asked_at_once = worker.work_once()
    bench.clock.advance(GROWN_SECONDS)
    asked_later = worker.work_once()

    assert live.model is not None
    assert live.model.sources is not None
    assert live.model.sources.names == ("A (early)", "A (late)")
    shown = live.model.sources.log_odds_N_C.astype(np.float64)
    assert spearman(shown[:, 0], early) > 0.9 < spearman(shown[:, 1], late)
    assert (asked_at_once, asked_later) == (False, True)


def test_replicas_agree_to_the_bit_from_wherever_they_start(bench: Bench) -> None:
    """Over snapshots with other sources each time, with named rates and without."""
    truth = rates()
    evaluated(bench, "A", truth)
    load(bench, "B", texts(), learn_from=("A", "C"))
    worker = bench.worker()
    settled(bench, "B", worker)
    warm = view(bench, "B")
    observe(bench, "B", 0, range(0, 80), truth)
    evaluated(bench, "C", rates(1))
    fitted(bench, "B", worker)
    first = bench.store.run("B").log_position
    observe(bench, "B", 1, range(60, 140), truth)
    warm.catch_up(bench.store, bench.store.run("B"))
    bench.store.delete_run("C")
    fitted(bench, "B", worker)
    observe(bench, "B", 2, range(100, 180), truth)

    warm.catch_up(bench.store, bench.store.run("B"))
    newest = view(bench, "B")
    bench.forget_checkpoints("B", above=first)
    older = view(bench, "B")
    bench.forget_checkpoints("B")
    whole = view(bench, "B")

    assert newest.state.columns is not None
    assert newest.state.columns.read == ("A",)
    for other in (warm, newest, older):
        assert to_bytes(other.state) == to_bytes(whole.state)
        np.testing.assert_array_equal(means(other), means(whole))


@on_one_database
def test_a_run_that_finds_nobody_to_learn_from_is_fitted_as_one_that_does_not_ask(bench: Bench) -> None:
    evaluated(bench, "A", rates())
    bench.learned("alone")
    bench.learned("asking", learn_from=("nobody-*", "asking"))

    settled(bench, "alone", bench.worker(sources_only))

    alone, asking = view(bench, "alone"), view(bench, "asking")
    assert asking.state.columns is None
    np.testing.assert_array_equal(means(asking), means(alone))
