"""Forecasts of what is chosen keep up with policies that move fast: a climb by category, a jump, a collapse."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.predictors import PREDICTORS
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry
from evenodds_service.domain.selection.selection import Forecasts, SelectionRequest, select
from evenodds_service.domain.settings import RunSettings

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

N, BATCH, STEPS, WINDOW = 800, 16, 80, 10
Levels = Callable[[int], FloatArray]
"""Log-odds of a prompt of average difficulty at a step, of each of four categories."""


def climbing(step: int) -> FloatArray:
    """From about .05 to .5 within 40 steps, one category eight steps after the other."""
    return -4.0 + 4.5 * np.clip((step - np.array([0, 8, 16, 24])) / 40, 0, 1)


def jumping(step: int) -> FloatArray:
    return np.array([-2.0, -2.0, -1.0, -1.0]) + (2.5 * np.array([1, 1, 1, 0]) if step >= 40 else 0.0)


def collapsing(step: int) -> FloatArray:
    return np.array([0.5, 0.0, -0.5, 0.0]) - (3.0 if step >= 40 else 0.0)


def still(step: int) -> FloatArray:
    return np.array([-1.0, 0.0, -0.5, 0.5])


def forecast_errors(make_block: MakeBlock, levels: Levels, *, seed: int) -> FloatArray:
    """Forecast less true share of informative groups in the batches of a run, means of ten steps each."""
    rng = np.random.default_rng(seed)
    category, difficulty = rng.integers(0, 4, N), rng.normal(0, 1.5, N)
    features = np.column_stack((difficulty[:, None] + rng.normal(0, 1.5, (N, 2)), rng.normal(size=(N, 6))))
    pool = Pool(surface_width=8, embedding_width=0)
    pool.append(make_block(N, surface=features, groups=tuple("abcd"[c] for c in category)))
    state = fold(State(), PoolEntry(1, N), pool)
    errors = []
    for step in range(STEPS):
        rates_N = 1.0 / (1.0 + np.exp(difficulty - levels(step)[category]))
        forecasts = Forecasts.of(*PREDICTORS["gps"].beliefs(state, pool), 8)
        chosen = select(state, pool, RunSettings(), SelectionRequest(step, BATCH, seed=step), forecasts)
        prompts = chosen.choice.prompts
        rates = rates_N[prompts]
        errors.append(chosen.choice.informative_share - float((1.0 - rates**8 - (1.0 - rates) ** 8).mean()))
        fold(state, SelectEntry(state.position + 1, step, prompts, a=chosen.a, b=chosen.b), pool)
        k, n = rng.binomial(8, rates).astype(np.float64), np.full(BATCH, 8.0)
        fold(state, ObserveEntry(state.position + 1, step, prompts, k, n, (k > 0) & (k < 8)), pool)
    means: FloatArray = np.asarray(errors).reshape(-1, WINDOW).mean(axis=1)
    return means


@pytest.mark.parametrize("levels", [climbing, jumping, collapsing, still])
def test_the_forecast_of_a_batch_keeps_up_with_the_policy(make_block: MakeBlock, levels: Levels) -> None:
    errors = np.stack([forecast_errors(make_block, levels, seed=seed) for seed in (0, 1)])

    assert np.abs(errors).mean() <= 0.065, errors.round(3)
    assert np.abs(errors[:, -2:]).mean() <= 0.05, errors.round(3)
