"""Bets against forecasts: fair to those that are right or nearly so, quick to see those that are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.sequential import ALARM_NATS, FLIPPED, LOW, Watch, bets, flip_bets, tolerated
from evenodds_service.domain.learning.tallies import MAX_GROUPS, Met

chances = st.floats(0.0, 1.0)


@given(forecast=chances, outcome=chances)
def test_no_bet_loses_everything(forecast: float, outcome: float) -> None:
    factor = bets(np.array([forecast]), np.array([outcome]))[0]

    assert factor > 0
    assert (factor > 1) == (outcome < tolerated(np.array([forecast]))[0]) or factor == pytest.approx(1, abs=1e-6)


@given(forecast=st.floats(0.001, 0.999))
def test_a_bet_wins_nothing_on_average_where_forecasts_are_a_unit_of_log_odds_too_high(forecast: float) -> None:
    least = float(tolerated(np.array([forecast]))[0])
    lost, won = bets(np.full(2, forecast), np.array([0.0, 1.0]))

    assert (1 - least) * lost + least * won == pytest.approx(1)
    middle = bets(np.array([forecast]), np.array([least]))[0]
    assert middle == pytest.approx(1)  # also where the outcomes between are all the same


@given(
    forecasts=st.lists(chances, min_size=8, max_size=20),
    outcomes=st.lists(chances, min_size=20, max_size=20),
)
def test_a_bet_on_a_flip_never_loses_everything(forecasts: list[float], outcomes: list[float]) -> None:
    assert (flip_bets(np.array(forecasts), np.array(outcomes[: len(forecasts)])) > 0).all()


def met(forecast: FloatArray, rate: FloatArray, *, judged: bool = True) -> Met:
    n = len(rate)
    informative = (rate > 0) & (rate < 1)
    chance = np.full(n, 0.9)
    return Met(informative, 0.0, 0.0, rate, forecast, chance, np.ones(n, bool), np.full(n, judged))


def test_at_the_edge_of_what_is_tolerated_an_alarm_comes_once_in_many_runs() -> None:
    """Each prompt has a chance of its own, and all attempts at it come out alike."""
    rng, alarms, n_runs, n_steps = np.random.default_rng(0), 0, 200, 50
    edge = float(tolerated(np.array([0.5]))[0])
    for _ in range(n_runs):
        watch = Watch()
        for step in range(n_steps):
            rate = rng.binomial(1, rng.beta(4 * edge, 4 * (1 - edge), size=8)).astype(float)
            watch.observe(step, met(np.full(8, 0.5), rate), np.zeros(8, np.int64))
            if watch.is_raised[0, LOW]:
                alarms += 1
                break

    assert alarms <= 0.05 * n_runs  # 400 bets; once in a thousand each would be a third


def test_what_was_not_judged_leaves_no_trace() -> None:
    watch = Watch()

    watch.observe(3, met(np.full(64, 0.9), np.zeros(64), judged=False), np.zeros(64, np.int64))

    assert not watch.nats.any()
    assert (watch.since == -1).all()


def test_the_fault_is_dated_from_the_step_of_its_first_bet() -> None:
    watch, rng = Watch(), np.random.default_rng(0)
    groups = np.zeros(16, np.int64)
    for step in range(20):
        forecast = rng.uniform(0.2, 0.8, size=16)
        watch.observe(step, met(forecast, rng.binomial(8, forecast) / 8), groups)
    for step in (20, 21):
        watch.observe(step, met(np.full(16, 0.5), np.zeros(16)), groups)

    assert watch.is_raised[0, LOW]
    assert not watch.is_raised[0, FLIPPED]
    assert (watch.since[0, LOW], watch.last[0, LOW]) == (20, 21)
    assert watch.nats[0, LOW] <= 2 * ALARM_NATS


def test_categories_beyond_the_first_500_share_a_row() -> None:
    watch = Watch()

    watch.observe(0, met(np.full(4, 0.9), np.zeros(4)), np.array([0, MAX_GROUPS - 1, MAX_GROUPS, MAX_GROUPS + 70]))

    assert watch.nats.shape == watch.since.shape == watch.is_raised.shape == (MAX_GROUPS + 2, 4)
    assert watch.sums[-1, LOW].tolist() == [2.0, 1.8, 0.0]
