from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evenodds_service.domain.report.intervals import Proportion, difference, ratio

COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS)
def test_a_proportions_interval_is_wilsons(counts: tuple[int, int]) -> None:
    k, n = counts

    share = Proportion.of(k, n)

    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert (share.value, share.low, share.high) == pytest.approx((k / n, interval.low, interval.high))


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """The examples of his paper (1998, table II, method 10)."""
    assert difference(Proportion.of(56, 70), Proportion.of(48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert difference(Proportion.of(10, 10), Proportion.of(0, 10)) == pytest.approx((1, 0.6075, 1), abs=1e-4)


@given(COUNTS, COUNTS)
def test_intervals_hold_their_estimate_and_turn_round_with_it(one: tuple[int, int], other: tuple[int, int]) -> None:
    first, second = Proportion.of(*one), Proportion.of(*other)

    value, low, high = difference(first, second)
    turned = difference(second, first)

    assert low <= value <= high
    assert turned == pytest.approx((-value, -high, -low))
    if one[0] and other[0]:
        value, low, high = ratio(first, second)
        turned = ratio(second, first)
        assert low <= value <= high
        assert turned == pytest.approx((1 / value, 1 / high, 1 / low), rel=1e-6)


def test_a_ratio_to_what_may_be_zero_has_no_upper_end() -> None:
    value, low, high = ratio(Proportion.of(5, 10), Proportion.of(0, 10))

    assert (value, high) == (math.inf, math.inf)
    assert 0 < low < math.inf
    assert ratio(Proportion.of(0, 10), Proportion.of(5, 10))[:2] == (0, 0)


@pytest.mark.parametrize(("p", "n", "q", "m"), [(0.8, 230, 0.45, 26), (0.6, 60, 0.5, 8), (0.95, 400, 0.3, 40)])
def test_intervals_of_simulated_arms_hold_the_truth_in_19_of_20(p: float, n: int, q: float, m: int) -> None:
    rng = np.random.default_rng(0)
    pairs = [(Proportion.of(rng.binomial(n, p), n), Proportion.of(rng.binomial(m, q), m)) for _ in range(2_000)]

    differences = np.mean([low <= p - q <= high for _, low, high in (difference(*pair) for pair in pairs)])
    ratios = np.mean([low <= q / p <= high for _, low, high in (ratio(b, a) for a, b in pairs)])

    assert 0.93 < differences < 0.98
    assert 0.93 < ratios < 0.98
