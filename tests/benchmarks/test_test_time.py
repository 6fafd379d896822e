"""The figures of the test-time benchmark: exact expectations over recorded samples, against what they stand for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from benchmarks.test_time import HeldOut, as_served, one_shot, probed, saved, sequential

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.budgets.allocation import gains

FLAT = (np.ones(2), np.ones(2))


def held_out(*successes: int, samples: int = 6) -> HeldOut:
    return HeldOut.of(np.array(successes), np.full(len(successes), samples))


def test_attempts_are_drawn_without_replacement() -> None:
    """Against every order of 2 successes among 5 samples."""
    orders = list(itertools.permutations([1, 1, 0, 0, 0]))

    silent = held_out(2, samples=5).silent_T_J[0]

    assert silent == pytest.approx([np.mean([not any(order[:j]) for order in orders]) for j in range(6)])


def test_uniform_and_oracle_of_a_hopeless_and_a_fair_prompt() -> None:
    """The oracle gives the hopeless prompt its one attempt and the fair one all others."""
    test = held_out(0, 3)
    silent = test.silent_T_J[1]

    uniform, oracle = one_shot(test, None), one_shot(test, test.true_gains)

    assert uniform(2.0) == pytest.approx((1 - silent[2]) / 2)
    assert oracle(2.0) == pytest.approx((1 - silent[3]) / 2)
    assert saved(oracle, uniform, 2.0) > 0.2


def test_stopping_at_success_spends_what_failures_ask_for() -> None:
    """Two attempts each in turn: the second is made only where the first failed."""
    test = held_out(0, 3)
    silent = test.silent_T_J[1]

    curve = sequential(test, FLAT)

    spent = (1 + 1 + 1 + silent[1]) / 2
    assert curve(spent) == pytest.approx((1 - silent[2]) / 2)
    assert curve(1.0) == pytest.approx(0.25)


def test_a_probe_leaves_the_solved_alone() -> None:
    """One prompt is always solved by its probe, the other never: the rest of the budget cannot help."""
    curve = probed(held_out(6, 0), FLAT, seed=0)

    assert [curve(budget) for budget in (1.0, 2.0, 3.0)] == pytest.approx([0.5, 0.5, 0.5])


def test_as_served_the_target_is_spent_and_solves_what_it_should() -> None:
    generator = np.random.default_rng(0)
    rates = generator.beta(1.0, 1.0, 6_000)
    test = HeldOut.of(generator.binomial(64, rates), np.full(6_000, 64))
    flat: tuple[FloatArray, FloatArray] = (np.ones(6_000), np.ones(6_000))

    spent, solved = as_served(test, flat, 3.0, 0, "sequential")

    assert spent == pytest.approx(3.0, rel=0.05)
    assert solved == pytest.approx(sequential(test, flat)(3.0), abs=0.02)


def test_greedy_beats_uniform_where_beliefs_are_right() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.uniform(0.1, 3, 2_000), generator.uniform(0.1, 3, 2_000)
    test = HeldOut.of(generator.binomial(64, generator.beta(a, b)), np.full(2_000, 64))

    greedy, uniform = one_shot(test, gains("solve", a, b, test.most)), one_shot(test, None)

    assert all(greedy(budget) > uniform(budget) for budget in (2.0, 4.0, 8.0))
