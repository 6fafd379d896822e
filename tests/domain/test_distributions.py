from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.distributions import (
    MAX_CONCENTRATION,
    MIN_CONCENTRATION,
    beta_binomial_log_likelihood,
    beta_from_moments,
    informative_moments,
    log_gamma,
    rising_ratio,
    target_moments,
)

quick = settings(max_examples=40)
PARAMETER = st.floats(0.05, 60)
EXTREME = st.floats(-6, 8).map(lambda exponent: 10.0**exponent)
GROUP_SIZE = st.integers(1, 40)


def beta_nodes(a: float, b: float, n: int) -> tuple[FloatArray, FloatArray]:
    """Rates p and weights whose sums are exact expectations under Beta(a, b) of polynomials up to degree 2n - 1."""
    with np.errstate(invalid="ignore"):  # scipy computes 0/0 where a + b is 1, and does not use it
        nodes, weights = special.roots_jacobi(n, b - 1, a - 1)
    return (nodes + 1) / 2, weights / weights.sum()


def array(*values: float) -> FloatArray:
    return np.array(values, dtype=np.float64)


@quick
@given(st.floats(-12, 12).map(lambda exponent: 10.0**exponent))
def test_log_gamma_agrees_with_the_standard_library(x: float) -> None:
    assert log_gamma(array(x))[0] == pytest.approx(math.lgamma(x), rel=1e-10, abs=1e-10)


@quick
@given(EXTREME, EXTREME, st.integers(0, 40), st.floats(0, 1))
def test_the_likelihood_agrees_with_a_ratio_of_beta_functions(a: float, b: float, n: int, share: float) -> None:
    k = share * n

    ours = beta_binomial_log_likelihood(array(k), array(n), array(a), array(b))[0]

    reference = special.betaln(a + k, b + n - k) - special.betaln(a, b)
    assert ours == pytest.approx(reference, rel=1e-6, abs=1e-5)


@quick
@given(PARAMETER, PARAMETER, st.integers(1, 30))
def test_the_likelihoods_of_all_orders_of_all_outcomes_sum_to_one(a: float, b: float, n: int) -> None:
    k = np.arange(n + 1.0)

    ours = np.exp(beta_binomial_log_likelihood(k, array(n), array(a), array(b)))

    assert (special.comb(n, k) * ours).sum() == pytest.approx(1, rel=1e-9)


@quick
@given(EXTREME, EXTREME, st.one_of(st.integers(0, 70), st.just(500)))
def test_a_rising_ratio_is_the_product_of_its_factors(x: float, rest: float, m: int) -> None:
    total = x + rest

    ours = rising_ratio(array(x), array(total), m)[0]

    slow = math.exp(math.fsum(math.log((x + j) / (total + j)) for j in range(m)))
    assert ours == pytest.approx(slow, rel=1e-5, abs=1e-12)


@quick
@given(PARAMETER, PARAMETER, st.integers(2, 40))
def test_the_informative_probability_and_its_deviation_agree_with_quadrature(a: float, b: float, size: int) -> None:
    mean, deviation = informative_moments(array(a), array(b), size)

    p, weights = beta_nodes(a, b, size + 1)
    v = 1 - p**size - (1 - p) ** size
    expected = weights @ v
    assert mean[0] == pytest.approx(expected, abs=1e-9)
    assert deviation[0] ** 2 == pytest.approx(weights @ (v - expected) ** 2, abs=1e-9)


@quick
@given(PARAMETER, PARAMETER)
def test_for_one_attempt_it_is_the_chance_that_two_attempts_differ(a: float, b: float) -> None:
    mean, deviation = informative_moments(array(a), array(b), 1)

    p, weights = beta_nodes(a, b, 4)
    v = 2 * p * (1 - p)
    assert mean[0] == pytest.approx(2 * a * b / ((a + b) * (a + b + 1)))
    assert mean[0] == pytest.approx(weights @ v, abs=1e-10)
    assert deviation[0] ** 2 == pytest.approx(weights @ (v - mean[0]) ** 2, abs=1e-10)


def test_pairs_and_groups_of_two_have_the_same_chance_to_differ() -> None:
    a, b = array(0.3, 1, 7), array(2, 1, 3)

    for one, two in zip(informative_moments(a, b, 1), informative_moments(a, b, 2), strict=True):
        assert one == pytest.approx(two)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 30.0), (1.5, 900.0)])
def test_groups_of_500_agree_with_the_beta_binomial_and_with_integration(a: float, b: float) -> None:
    mean, deviation = informative_moments(array(a), array(b), 500)

    silent = stats.betabinom.pmf([0, 500], 500, a, b).sum()
    assert mean[0] == pytest.approx(1 - silent, abs=1e-7)

    def square(p: float) -> float:
        return float((1 - p**500 - (1 - p) ** 500) ** 2 * stats.beta.pdf(p, a, b))

    second = sum(integrate.quad(square, *ends)[0] for ends in itertools.pairwise((0, 0.01, 0.1, 0.9, 0.99, 1)))
    assert deviation[0] ** 2 == pytest.approx(second - mean[0] ** 2, abs=1e-6)


@quick
@given(EXTREME, EXTREME, st.sampled_from([1, 2, 8, 64, 65, 500]))
def test_moments_are_finite_and_in_range_for_extreme_beliefs(a: float, b: float, size: int) -> None:
    mean, deviation = informative_moments(array(a), array(b), size)

    assert 0 <= mean[0] <= 1
    assert 0 <= deviation[0] <= 0.5 + 1e-9


@quick
@given(EXTREME, EXTREME, GROUP_SIZE)
def test_success_and_failure_may_change_places(a: float, b: float, size: int) -> None:
    mean, deviation = informative_moments(array(a), array(b), size)

    mirrored_mean, mirrored_deviation = informative_moments(array(b), array(a), size)
    assert mean == pytest.approx(mirrored_mean, abs=1e-12)
    assert deviation**2 == pytest.approx(mirrored_deviation**2, abs=1e-12)


@quick
@given(PARAMETER, PARAMETER, st.integers(2, 80))
def test_a_larger_group_is_likelier_to_be_informative(a: float, b: float, size: int) -> None:
    smaller, _ = informative_moments(array(a), array(b), size)
    larger, _ = informative_moments(array(a), array(b), size + 1)

    assert larger[0] >= smaller[0] - 1e-9


def test_moments_keep_the_shape_of_the_beliefs() -> None:
    a, b = np.ones((3, 4)), np.full((3, 4), 2.0)

    for size in (1, 8, 100):
        assert [moment.shape for moment in informative_moments(a, b, size)] == [(3, 4), (3, 4)]


@quick
@given(PARAMETER, PARAMETER, st.floats(0.01, 0.99))
def test_target_moments_agree_with_quadrature(a: float, b: float, target: float) -> None:
    mean, deviation = target_moments(array(a), array(b), target)

    p, weights = beta_nodes(a, b, 6)
    closeness = 1 - ((p - target) / max(target, 1 - target)) ** 2
    expected = weights @ closeness
    assert mean[0] == pytest.approx(expected, abs=1e-9)
    assert deviation[0] ** 2 == pytest.approx(weights @ (closeness - expected) ** 2, abs=1e-9)


@quick
@given(EXTREME, EXTREME, st.floats(0.01, 0.99))
def test_target_moments_are_finite_and_in_range_for_extreme_beliefs(a: float, b: float, target: float) -> None:
    mean, deviation = target_moments(array(a), array(b), target)

    assert -1e-9 <= mean[0] <= 1 + 1e-9
    assert 0 <= deviation[0] <= 0.5 + 1e-9


def test_a_sure_belief_at_the_target_is_worth_one_and_at_the_far_end_nothing() -> None:
    sure = 1e9

    at_target, _ = target_moments(array(0.3 * sure), array(0.7 * sure), 0.3)
    far_end, _ = target_moments(array(sure), array(1e-3), 0.3)

    assert at_target[0] == pytest.approx(1, abs=1e-6)
    assert far_end[0] == pytest.approx(0, abs=1e-6)


@quick
@given(st.floats(0.01, 0.99), st.floats(-1.5, 5).map(lambda exponent: 10.0**exponent))
def test_a_belief_survives_the_way_through_its_moments(mean: float, concentration: float) -> None:
    variance = mean * (1 - mean) / (concentration + 1)

    a, b = beta_from_moments(array(mean), array(variance))

    assert a[0] == pytest.approx(mean * concentration, rel=1e-6)
    assert b[0] == pytest.approx((1 - mean) * concentration, rel=1e-6)


@quick
@given(st.floats(1e-6, 1 - 1e-6), st.floats(-1, 1))
def test_impossible_variances_give_the_nearest_belief_with_this_mean(mean: float, variance: float) -> None:
    a, b = beta_from_moments(array(mean), array(variance))

    assert MIN_CONCENTRATION * (1 - 1e-9) <= a[0] + b[0] <= MAX_CONCENTRATION * (1 + 1e-9)
    assert a[0] / (a[0] + b[0]) == pytest.approx(mean, rel=1e-9)


@quick
@given(EXTREME, EXTREME, st.integers(2, 64))
def test_products_and_ratios_of_factors_give_the_same_moments(a: float, b: float, size: int) -> None:
    """Where the products fit a float they are taken; one belief too large for them makes the others take ratios."""
    huge = 1e300 ** (1 / size)

    by_products = informative_moments(array(a), array(b), size)
    by_ratios = informative_moments(array(a, huge), array(b, huge), size)

    for one, other in zip(by_products, by_ratios, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-7)
    assert by_products[0][0] == pytest.approx(by_ratios[0][0], abs=1e-12)


def test_many_beliefs_have_the_moments_of_each() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.01, 30, size=(2, 3, 9_001))

    mean, deviation = informative_moments(a, b, 8)

    for rows in (np.s_[0, :5], np.s_[1, 4_990:5_010], np.s_[2, -5:]):
        one, other = informative_moments(a[rows], b[rows], 8)
        np.testing.assert_array_equal(mean[rows], one)
        np.testing.assert_array_equal(deviation[rows], other)
