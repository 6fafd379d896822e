"""The price of an attempt in step with the requests: its target is met, whatever the requests are like."""

from __future__ import annotations

import numpy as np
import pytest

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.budgets.allocation import attempts_at_price
from evenodds_service.domain.budgets.pricing import Traffic
from evenodds_service.domain.settings import BudgetMode, BudgetPolicy

NONE = np.zeros(0)


def spent(
    traffic: Traffic, policy: BudgetPolicy, a: FloatArray, b: FloatArray, first_success: FloatArray
) -> list[float]:
    """Attempts made for each request, asked for one by one under a sequential policy, else all at once."""
    made = []
    for i in range(len(a)):
        here = slice(i, i + 1)
        price = traffic.price(a[here], b[here])
        n = attempts_at_price(
            policy.mode, a[here], b[here], price, minimum=policy.min_attempts, maximum=policy.max_attempts
        )[0]
        n = min(n, first_success[i]) if policy.mode == "sequential" else n
        traffic.grant(int(n))
        made.append(float(n))
    return made


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("target", [2.0, 3.5])
def test_the_target_is_met_where_beliefs_are_right(mode: BudgetMode, target: float) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.uniform(0.3, 4, 2_000), generator.uniform(0.3, 4, 2_000)
    first = generator.geometric(np.maximum(generator.beta(a, b), 1e-9)).astype(float)
    policy = BudgetPolicy(mode=mode, target_attempts=target)

    made = spent(Traffic(policy, NONE, NONE), policy, a, b, first)

    assert np.mean(made[200:]) == pytest.approx(target, rel=0.07)


@pytest.mark.parametrize("target", [2.0, 4.0, 8.0])
def test_the_target_is_met_where_beliefs_promise_successes_that_never_come(target: float) -> None:
    a = b = np.ones(3_000)
    policy = BudgetPolicy(mode="sequential", target_attempts=target)

    made = spent(Traffic(policy, NONE, NONE), policy, a, b, np.full(3_000, np.inf))

    assert np.mean(made[400:]) == pytest.approx(target, rel=0.1)


def test_who_asks_once_and_makes_all_attempts_is_not_given_more_than_the_target() -> None:
    """Only one grant for each request: it seems that little is spent."""
    generator = np.random.default_rng(1)
    a, b = generator.uniform(0.3, 4, 1_000), generator.uniform(0.3, 4, 1_000)
    policy = BudgetPolicy(mode="sequential", target_attempts=4)
    asked_once, asked_always = Traffic(policy, NONE, NONE), Traffic(policy, NONE, NONE)

    prices = []
    for i in range(1_000):
        prices.append((asked_once.price(a[i : i + 1], b[i : i + 1]), asked_always.price(a[i : i + 1], b[i : i + 1])))
        asked_once.grant(1)
        asked_always.grant(4)

    assert prices[-1][0] >= prices[-1][1] * (1 - 1e-9)


def test_the_first_requests_are_priced_by_the_beliefs_to_begin_with() -> None:
    policy = BudgetPolicy(target_attempts=4)
    a, b = np.full(200, 1.0), np.full(200, 9.0)

    price = Traffic(policy, a, b).price(np.array([9.0]), np.array([1.0]))

    attempts = attempts_at_price("parallel", np.array([1.0, 9.0]), np.array([9.0, 1.0]), price, minimum=1, maximum=32)
    assert attempts.tolist() == [4, 2]


def test_the_price_follows_when_other_requests_come() -> None:
    policy = BudgetPolicy(target_attempts=4)
    traffic = Traffic(policy, NONE, NONE)

    prices = [traffic.price(np.array([1.0]), np.array([1.0])) for _ in range(700)]
    prices += [traffic.price(np.array([1.0]), np.array([30.0])) for _ in range(700)]

    assert prices[699] == pytest.approx(1 / 4 / 5)  # the fourth gain of Beta(1, 1)
    assert prices[-1] < prices[699] / 1.5


def test_without_any_request_every_attempt_is_worth_making() -> None:
    assert Traffic(BudgetPolicy(), NONE, NONE).price(NONE, NONE) == 0.0
