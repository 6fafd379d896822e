"""Whole runs: what always failed or was solved is tried again, counts in full, and returns when it is of use again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.predictors import PREDICTORS
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry
from evenodds_service.domain.selection.selection import Chosen, Forecasts, SelectionRequest, select
from evenodds_service.domain.settings import PredictorName, RunSettings

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

N, BATCH = 300, 16
HOPELESS, SOLVED = np.arange(0, 60), np.arange(60, 120)


class Run:
    """A training whose prompts have these success rates."""

    def __init__(self, make_block: MakeBlock, rates_N: FloatArray) -> None:
        self.rates_N, self.chance = rates_N, np.random.default_rng(0)
        self.pool = Pool(surface_width=0, embedding_width=0)
        self.pool.append(make_block(N))
        self.state = fold(State(), PoolEntry(1, N), self.pool)
        self.visits_N = np.zeros(N, dtype=np.int64)
        self.step = 0

    def observe(self, prompts: IntArray, successes: FloatArray, *, attempts: int = 8) -> None:
        informative = (successes > 0) & (successes < attempts)
        counts = np.full(len(prompts), float(attempts))
        fold(
            self.state,
            ObserveEntry(self.state.position + 1, self.step, prompts, successes, counts, informative),
            self.pool,
        )

    def choose(self) -> Chosen:
        a, b = PREDICTORS["gps"].beliefs(self.state, self.pool)
        request = SelectionRequest(step=self.step, batch_size=BATCH, seed=self.step)
        return select(self.state, self.pool, RunSettings(), request, Forecasts.of(a, b, 8))

    def go(self, n_steps: int) -> None:
        for _ in range(n_steps):
            prompts = self.choose().choice.prompts
            fold(self.state, SelectEntry(self.state.position + 1, self.step, prompts), self.pool)
            self.observe(prompts, self.chance.binomial(8, self.rates_N[prompts]).astype(float))
            self.visits_N[prompts] += 1
            self.step += 1

    def informative(self, prompts: IntArray, predictor: PredictorName = "gps") -> FloatArray:
        a, b = PREDICTORS[predictor].beliefs(self.state, self.pool, prompts)
        return Forecasts.of(a, b, 8).informative_N


@pytest.fixture
def run(make_block: MakeBlock) -> Run:
    """All prompts were tried twice: sixty never succeeded, sixty always."""
    rates_N = np.random.default_rng(1).uniform(0.2, 0.8, size=N)
    rates_N[HOPELESS], rates_N[SOLVED] = 0.0, 1.0
    run = Run(make_block, rates_N)
    for _ in range(2):
        run.observe(np.arange(N), run.chance.binomial(8, rates_N).astype(float))
        run.step += 1
    run.step += 30  # all are rested
    return run


def test_attempts_of_all_visits_count_together(make_block: MakeBlock) -> None:
    """16 failures, and not eight anew."""
    run = Run(make_block, np.zeros(N))
    once, twice = np.arange(4), np.arange(4, 8)
    run.observe(np.concatenate((once, twice)), np.zeros(8))
    run.step += 1
    run.observe(twice, np.zeros(4))

    whole = Run(make_block, np.zeros(N))
    whole.step = 1
    whole.observe(twice, np.zeros(4), attempts=16)

    a, b = PREDICTORS["gps"].beliefs(run.state, run.pool)
    assert (b[twice] / a[twice]).min() > 1.5 * (b[once] / a[once]).max()
    assert run.state.attempts_N[twice].tolist() == whole.state.attempts_N[twice].tolist() == [16.0] * 4


def test_solved_and_hopeless_prompts_are_reviewed_at_some_hundredths_of_a_batch(run: Run) -> None:
    run.go(120)

    shares = [run.visits_N[prompts].sum() / run.visits_N.sum() for prompts in (SOLVED, HOPELESS)]
    assert all(0.01 <= share <= 0.04 for share in shares), shares
    assert (run.visits_N[np.concatenate((SOLVED, HOPELESS))] > 0).mean() > 0.5


@pytest.mark.parametrize("retired", [SOLVED[:20], HOPELESS[:20]], ids=["solved", "hopeless"])
def test_what_was_retired_returns_when_a_review_is_mixed(run: Run, retired: IntArray) -> None:
    """The policy has learned, or forgotten, what these ask for; nobody says so but their outcomes."""
    before = run.informative(retired)
    run.rates_N[retired] = 0.5

    run.go(150)

    reviewed = retired[run.visits_N[retired] > 0]
    assert before.max() < 0.5
    assert len(reviewed) >= 10
    assert run.informative(reviewed).mean() > 0.75
    assert run.visits_N[reviewed].mean() > 3
