"""Spending a budget: gains against exact expectations, spending against every spending that there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.budgets.allocation import (
    BIN_WEIGHTS,
    NEVER,
    Objective,
    attempts_at_price,
    bin_gains,
    expected,
    fit_price,
    gains,
    solve_probability,
    spend,
    uniform_attempts,
    verdict,
)
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.settings import BudgetMode
from evenodds_service.errors import BudgetTooSmall

quick = settings(max_examples=60)
PARAMETER = st.floats(0.05, 60)
BELIEFS = st.lists(st.tuples(PARAMETER, PARAMETER), min_size=1, max_size=4)
COSTS = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0])
OBJECTIVES: list[Objective] = ["solve", "signal"]
MODES: list[BudgetMode] = ["parallel", "sequential"]
MOST = 5


def columns(beliefs: list[tuple[float, float]]) -> tuple[FloatArray, FloatArray]:
    a, b = np.array(beliefs).T
    return a, b


def limits(objective: Objective, n: int, minimum: int | None = None) -> tuple[IntArray, IntArray]:
    least = (2 if objective == "signal" else 0) if minimum is None else minimum
    return np.full(n, least), np.full(n, MOST)


def best_total(gained: FloatArray, costs: FloatArray, minimum: IntArray, maximum: IntArray, budget: float) -> float:
    """Over every spending that keeps to the limits and the budget."""
    ranges = [range(int(low), int(high) + 1) for low, high in zip(minimum, maximum, strict=True)]
    totals = [
        float(expected(gained, np.array(attempts)).sum())
        for attempts in itertools.product(*ranges)
        if costs @ np.array(attempts) <= budget + 1e-9
    ]
    return max(totals)


@quick
@given(PARAMETER, PARAMETER, st.integers(1, 30))
def test_attempts_solve_as_often_as_not_all_of_them_fail(a: float, b: float, k: int) -> None:
    total = expected(gains("solve", np.array([a]), np.array([b]), k), np.array([k]))[0]

    assert total == pytest.approx(-np.expm1(special.betaln(a, b + k) - special.betaln(a, b)), rel=1e-9, abs=1e-12)


@quick
@given(PARAMETER, PARAMETER, st.integers(2, 30))
def test_a_group_is_worth_its_chance_to_be_informative(a: float, b: float, k: int) -> None:
    total = expected(gains("signal", np.array([a]), np.array([b]), k), np.array([k]))[0]

    assert total == pytest.approx(informative_moments(np.array([a]), np.array([b]), k)[0][0], rel=1e-9, abs=1e-12)


@quick
@given(st.sampled_from(OBJECTIVES), PARAMETER, PARAMETER)
def test_gains_fall(objective: Objective, a: float, b: float) -> None:
    gained = gains(objective, np.array([a]), np.array([b]), 64)[0]
    gained = gained[1:] if objective == "signal" else gained

    assert (gained >= 0).all()
    assert (np.diff(gained) <= 1e-15).all()


@quick
@given(st.sampled_from(OBJECTIVES), BELIEFS, st.integers(0, 24))
def test_with_equal_costs_no_spending_is_better(
    objective: Objective, beliefs: list[tuple[float, float]], spare: int
) -> None:
    a, b = columns(beliefs)
    gained, costs = gains(objective, a, b, MOST), np.ones(len(a))
    minimum, maximum = limits(objective, len(a))
    budget = float(minimum.sum() + spare)

    spending = spend(gained, costs_N=costs, minimum_N=minimum, maximum_N=maximum, budget=budget)

    best = best_total(gained, costs, minimum, maximum, budget)
    assert expected(gained, spending.attempts_N).sum() == pytest.approx(best, rel=1e-9)
    assert spending.shortfall == 0.0


@quick
@given(st.sampled_from(OBJECTIVES), BELIEFS, st.data())
def test_with_unequal_costs_the_best_is_missed_by_less_than_it_says(
    objective: Objective, beliefs: list[tuple[float, float]], data: st.DataObject
) -> None:
    a, b = columns(beliefs)
    costs = np.array(data.draw(st.lists(COSTS, min_size=len(a), max_size=len(a))))
    gained = gains(objective, a, b, MOST)
    minimum, maximum = limits(objective, len(a))
    budget = float(costs @ minimum) + data.draw(st.floats(0, 20))

    spending = spend(gained, costs_N=costs, minimum_N=minimum, maximum_N=maximum, budget=budget)

    best = best_total(gained, costs, minimum, maximum, budget)
    total = float(expected(gained, spending.attempts_N).sum())
    assert best - spending.shortfall - 1e-9 <= total <= best + 1e-9
    assert spending.shortfall <= gained.max() + 1e-9
    left = budget - float(costs @ spending.attempts_N)
    assert left >= -1e-6
    assert (costs[spending.attempts_N < maximum] > left - 1e-6).all()


def test_what_is_missed_is_bounded_where_the_dearer_attempt_would_have_been_better() -> None:
    """Two attempts, the better one per cost is bought, and what is left does not pay for the other."""
    gained, costs, one = np.array([[0.5], [0.4]]), np.array([3.0, 2.0]), np.array([1, 1])

    spending = spend(gained, costs_N=costs, minimum_N=0 * one, maximum_N=one, budget=3.0)

    assert spending.attempts_N.tolist() == [0, 1]
    assert spending.shortfall == pytest.approx(0.5 / 3.0)


@quick
@given(st.lists(st.tuples(PARAMETER, PARAMETER), min_size=1, max_size=30), st.integers(0, 400), st.integers(0, 3))
def test_the_budget_is_spent_to_the_last_attempt_within_the_limits(
    beliefs: list[tuple[float, float]], budget: int, least: int
) -> None:
    a, b = columns(beliefs)
    minimum, maximum = np.full(len(a), least), np.full(len(a), 12)
    budget = max(budget, int(minimum.sum()))

    spending = spend(
        gains("solve", a, b, 12), costs_N=np.ones(len(a)), minimum_N=minimum, maximum_N=maximum, budget=float(budget)
    )

    assert spending.attempts_N.sum() == min(budget, maximum.sum())
    assert (spending.attempts_N >= minimum).all()
    assert (spending.attempts_N <= maximum).all()


@quick
@given(st.sampled_from(OBJECTIVES), st.lists(st.tuples(PARAMETER, PARAMETER), min_size=1, max_size=8), st.data())
def test_a_larger_budget_takes_nothing_away(
    objective: Objective, beliefs: list[tuple[float, float]], data: st.DataObject
) -> None:
    """From no prompt where costs are equal (beliefs may be the same), from the total where they are not."""
    a, b = columns([*beliefs, beliefs[0]])
    costs = np.array(data.draw(st.lists(COSTS, min_size=len(a), max_size=len(a))))
    gained = gains(objective, a, b, MOST)
    minimum, maximum = limits(objective, len(a))
    small, large = sorted(data.draw(st.tuples(st.integers(0, 40), st.integers(0, 40))))

    def spent(each: FloatArray, spare: int) -> IntArray:
        budget = float(each @ minimum) + spare
        return spend(gained, costs_N=each, minimum_N=minimum, maximum_N=maximum, budget=budget).attempts_N

    assert (spent(np.ones(len(a)), small) <= spent(np.ones(len(a)), large)).all()
    assert expected(gained, spent(costs, small)).sum() <= expected(gained, spent(costs, large)).sum() + 1e-9


def test_prompts_that_look_alike_are_served_in_their_order() -> None:
    a = b = np.ones(4)

    spending = spend(
        gains("solve", a, b, 9), costs_N=np.ones(4), minimum_N=np.zeros(4, int), maximum_N=np.full(4, 9), budget=10
    )

    assert spending.attempts_N.tolist() == [3, 3, 2, 2]


def test_a_dear_prompt_must_gain_more() -> None:
    a = b = np.ones(2)

    spending = spend(
        gains("solve", a, b, 9),
        costs_N=np.array([1.0, 4.0]),
        minimum_N=np.zeros(2, int),
        maximum_N=np.full(2, 9),
        budget=8,
    )

    assert spending.attempts_N.tolist() == [4, 1]


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(BudgetTooSmall) as refused:
        spend(np.ones((3, 4)), costs_N=np.ones(3), minimum_N=np.full(3, 2), maximum_N=np.full(3, 4), budget=5.0)

    assert str(refused.value) == (
        "budget 5 is less than the minimum attempts of 3 prompts cost, 6: raise it, or lower min_attempts"
    )


def test_a_large_pool_is_spent_on_like_a_small_one() -> None:
    """10,000 prompts in classes of equal beliefs: the greatest gains are bought, whatever their number."""
    generator = np.random.default_rng(0)
    a, b = generator.uniform(0.1, 8, 10_000), generator.uniform(0.1, 8, 10_000)
    gained = gains("solve", a, b, 64)

    spending = spend(
        gained,
        costs_N=np.ones(10_000),
        minimum_N=np.zeros(10_000, int),
        maximum_N=np.full(10_000, 64),
        budget=80_000.0,
    )

    assert spending.attempts_N.sum() == 80_000
    assert expected(gained, spending.attempts_N).sum() == pytest.approx(np.sort(gained.ravel())[-80_000:].sum())


@quick
@given(BELIEFS, st.integers(0, 30))
def test_uniform_spending_costs_the_budget_and_is_never_better(beliefs: list[tuple[float, float]], budget: int) -> None:
    a, b = columns(beliefs)
    gained, costs = gains("solve", a, b, 6), np.ones(len(a))
    minimum, maximum = np.zeros(len(a), int), np.full(len(a), 6)

    attempts = uniform_attempts(costs, minimum, maximum, budget)

    assert attempts.sum() == pytest.approx(min(budget, maximum.sum()))
    assert np.ptp(attempts) == 0.0
    greedy = spend(gained, costs_N=costs, minimum_N=minimum, maximum_N=maximum, budget=budget).attempts_N
    assert expected(gained, attempts).sum() <= expected(gained, greedy).sum() + 1e-6


def test_uniform_spending_keeps_to_limits_of_single_prompts() -> None:
    attempts = uniform_attempts(np.ones(3), np.array([0, 5, 0]), np.array([1, 9, 9]), 9.0)

    assert attempts.tolist() == pytest.approx([1, 5, 3])


def test_bins_spend_in_proportion_to_their_weights() -> None:
    """Near-hopeless, challenging, fair and easy: 1 : 4 : 2 : 1."""
    mean = np.array([0.02, 0.3, 0.6, 0.95])

    spending = spend(
        bin_gains(mean, 99), costs_N=np.ones(4), minimum_N=np.zeros(4, int), maximum_N=np.full(4, 99), budget=40
    )

    assert spending.attempts_N.tolist() == [5 * w for w in BIN_WEIGHTS]


@pytest.mark.parametrize(
    ("expected_total", "n_observations", "is_capped", "worth", "reason"),
    [
        (5.0, 10, True, False, "the budget gives every prompt its maximum"),
        (9.0, 0, False, False, "no outcome has been observed yet"),
        (5.05, 10, False, False, "changes by +1.0% against uniform spending, less than 2%"),
        (4.5, 10, False, False, "changes by -10.0%"),
        (5.5, 10, False, True, "the expected total rises by 10.0% against uniform spending"),
    ],
)
def test_the_verdict_says_when_not_to_allocate(
    expected_total: float, n_observations: int, is_capped: bool, worth: bool, reason: str
) -> None:
    is_worth, why = verdict(expected_total, 5.0, n_observations=n_observations, is_capped=is_capped)

    assert is_worth is worth
    assert reason in why


@quick
@given(st.sampled_from(MODES), BELIEFS, st.floats(1, 20))
def test_the_fitted_price_spends_at_most_the_target_and_no_lower_one_does(
    mode: BudgetMode, beliefs: list[tuple[float, float]], target: float
) -> None:
    a, b = columns(beliefs)

    price, spent = fit_price(mode, a, b, target, minimum=1, maximum=16)

    assert 0.0 <= price <= 1.0
    assert spent <= target * (1 + 1e-6)
    assert spent == pytest.approx(average(mode, a, b, price), rel=1e-6)
    if price > 0.0:
        lower = max((v for v in worths(mode, a, b) if v < price * (1 - 1e-6)), default=None)
        assert lower is None or average(mode, a, b, lower) > target * (1 - 1e-6)


def average(mode: BudgetMode, a: FloatArray, b: FloatArray, price: float) -> float:
    """Attempts per request that are expected at this price, from the distribution of the first success."""
    attempts = attempts_at_price(mode, a, b, price, minimum=1, maximum=16)
    if mode == "parallel":
        return float(attempts.mean())
    survive = [
        sum(np.exp(special.betaln(ai, bi + j) - special.betaln(ai, bi)) for j in range(n))
        for ai, bi, n in zip(a, b, attempts, strict=True)
    ]
    return float(np.mean(survive))


def worths(mode: BudgetMode, a: FloatArray, b: FloatArray) -> list[float]:
    if mode == "parallel":
        return [float(v) for v in gains("solve", a, b, 16)[:, 1:].ravel()]
    return [float(ai / (ai + bi + j)) for ai, bi in zip(a, b, strict=True) for j in range(1, 16)]


@quick
@given(st.sampled_from(MODES), BELIEFS, st.floats(1e-4, 0.9), st.floats(1e-4, 0.9))
def test_a_higher_price_buys_fewer_attempts(
    mode: BudgetMode, beliefs: list[tuple[float, float]], one: float, other: float
) -> None:
    a, b = columns(beliefs)

    cheap, dear = (
        attempts_at_price(mode, a, b, price, minimum=1, maximum=64) for price in (min(one, other), max(one, other))
    )

    assert (dear <= cheap).all()
    assert (dear >= 1).all()


def test_one_after_another_the_price_is_compared_with_the_chance_after_the_failures() -> None:
    """Beta(2, 2): 2/4, 2/5, 2/6, 2/7, ...: at .3 three failures are put up with."""
    attempts = attempts_at_price("sequential", np.array([2.0]), np.array([2.0]), 0.3, minimum=0, maximum=64)

    assert attempts.tolist() == [3]


def test_one_after_another_solves_as_much_as_all_at_once_with_fewer_attempts() -> None:
    """The same traffic, the same target: a simulation of both."""
    generator = np.random.default_rng(3)
    a, b = generator.uniform(0.2, 4, 4_000), generator.uniform(0.2, 4, 4_000)
    rates = stats.beta.rvs(a, b, random_state=generator)
    solved = {}
    for mode in MODES:
        price, spent = fit_price(mode, a, b, 6.0, minimum=1, maximum=64)
        attempts = attempts_at_price(mode, a, b, price, minimum=1, maximum=64)
        first = generator.geometric(np.maximum(rates, 1e-12))
        made = np.minimum(attempts, first) if mode == "sequential" else attempts
        assert made.mean() == pytest.approx(spent, rel=0.05)
        solved[mode] = float((first <= attempts).mean())

    assert solved["sequential"] > solved["parallel"] + 0.02


def test_a_target_at_the_least_buys_nothing_more_and_one_beyond_the_most_buys_all() -> None:
    a, b = np.array([1.0, 2.0]), np.array([1.0, 5.0])

    assert fit_price("parallel", a, b, 1.0, minimum=1, maximum=8) == (NEVER, 1.0)
    assert fit_price("parallel", a, b, 9.0, minimum=1, maximum=8) == (0.0, 8.0)
    assert fit_price("parallel", a, b, 8.0, minimum=8, maximum=8) == (0.0, 8.0)


@given(a=st.floats(1e-2, 1e3), b=st.floats(1e-2, 1e3), k=st.integers(0, 200))
def test_the_chance_to_solve_is_that_not_all_attempts_fail_for_one_belief_and_for_many(
    a: float, b: float, k: int
) -> None:
    alone = solve_probability(np.array([a]), np.array([b]), np.array([k]))
    among = solve_probability(np.full(40_000, a), np.full(40_000, b), np.full(40_000, k))

    all_fail = np.exp(special.betaln(a, b + k) - special.betaln(a, b))
    assert alone[0] == pytest.approx(1.0 - all_fail, abs=1e-9)
    assert among[-1] == pytest.approx(alone[0], abs=1e-9)
