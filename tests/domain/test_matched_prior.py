from __future__ import annotations

import numpy as np
import pytest
from benchmarks.inflated_beta import (
    SLAB_CONCENTRATION,
    InflatedBeta,
    inflated_informative_moments,
    log_likelihood,
    matched_inflated,
    moments,
    updated,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evenodds_service.domain.distributions import beta_binomial_log_likelihood, informative_moments
from evenodds_service.domain.matched_prior import MAX_MATCHED, MIN_MATCHED, matched_concentration

MEANS = st.floats(0.01, 0.99)
PROBABILITIES = st.floats(0.0, 1.0)
GROUP_SIZES = st.sampled_from((1, 2, 5, 8, 100))
COUNTS = st.integers(0, 16)


def one(value: float) -> np.ndarray:
    return np.array([value])


@st.composite
def beliefs(draw: st.DrawFn) -> InflatedBeta:
    zero = draw(st.floats(0.0, 1.0))
    share = draw(st.floats(0.0, 1.0))
    slab = st.floats(0.1, 20.0)
    return InflatedBeta(zero=one(zero), one=one((1 - zero) * share), a=one(draw(slab)), b=one(draw(slab)))


@given(MEANS, st.floats(0.1, 50.0), GROUP_SIZES)
def test_the_concentration_is_found_again_from_mean_and_informative_probability(m: float, s: float, g: int) -> None:
    informative, _ = informative_moments(one(m * s), one((1 - m) * s), g)

    matched = matched_concentration(one(m), informative, g)

    again, _ = informative_moments(m * matched, (1 - m) * matched, g)
    assert again == pytest.approx(informative, abs=1e-6)


@given(MEANS, PROBABILITIES, PROBABILITIES, GROUP_SIZES)
def test_a_likelier_informative_group_asks_for_more_concentration(m: float, v: float, w: float, g: int) -> None:
    low, high = matched_concentration(np.array([m, m]), np.array(sorted((v, w))), g)

    assert low <= high


@settings(max_examples=30)
@given(MEANS, PROBABILITIES, GROUP_SIZES)
def test_one_prompt_gets_the_concentration_that_it_gets_among_many(m: float, v: float, g: int) -> None:
    alone = matched_concentration(one(m), one(v), g)

    among = matched_concentration(np.full(2_100, m), np.full(2_100, v), g)

    assert among == pytest.approx(alone[0], rel=1e-6)


@given(MEANS, GROUP_SIZES)
def test_what_no_concentration_reaches_gets_the_nearest_limit(m: float, g: int) -> None:
    never, always = matched_concentration(np.array([m, m]), np.array([0.0, 1.0]), g)

    assert never == pytest.approx(MIN_MATCHED, rel=1e-5)
    assert always == pytest.approx(MAX_MATCHED, rel=1e-5)


@given(MEANS, PROBABILITIES, GROUP_SIZES)
def test_the_inflated_beta_has_the_mean_and_where_reachable_the_informative_probability(
    m: float, v: float, g: int
) -> None:
    belief = matched_inflated(one(m), one(v), g)

    mean, _ = moments(belief)
    informative, _ = inflated_informative_moments(belief, g)
    most, _ = informative_moments(one(m * MAX_MATCHED), one((1 - m) * MAX_MATCHED), g)
    assert mean == pytest.approx(m)
    assert informative == pytest.approx(np.minimum(v, most), abs=1e-5)


@given(MEANS, PROBABILITIES, GROUP_SIZES)
def test_spikes_stand_only_beside_a_slab_of_the_usual_concentration(m: float, v: float, g: int) -> None:
    belief = matched_inflated(one(m), one(v), g)

    assert min(belief.zero[0], belief.one[0], belief.slab[0]) >= 0
    assert belief.slab[0] == 1.0 or belief.a[0] + belief.b[0] == pytest.approx(SLAB_CONCENTRATION)


@given(beliefs(), COUNTS, COUNTS)
def test_the_posterior_agrees_with_a_fine_grid_of_rates(belief: InflatedBeta, k: int, f: int) -> None:
    assume(belief.a[0] >= 0.5 and belief.b[0] >= 0.5 and belief.slab[0] > 1e-6)
    x = (np.arange(20_000) + 0.5) / 20_000
    angle = np.sin(0.5 * np.pi * x) ** 2  # fine near 0 and 1, where the density may be infinite
    density = angle ** (belief.a[0] - 1) * (1 - angle) ** (belief.b[0] - 1) * np.sin(np.pi * x)
    slab = belief.slab[0] * density / density.sum() * angle**k * (1 - angle) ** f
    zero, spike_one = belief.zero[0] * (k == 0), belief.one[0] * (f == 0)
    total = zero + spike_one + slab.sum()

    posterior = updated(belief, one(k), one(f))

    assert posterior.zero[0] == pytest.approx(zero / total, abs=1e-4)
    assert posterior.one[0] == pytest.approx(spike_one / total, abs=1e-4)
    assert moments(posterior)[0][0] == pytest.approx((spike_one + (slab * angle).sum()) / total, abs=1e-4)
    assert log_likelihood(belief, one(k), one(k + f))[0] == pytest.approx(np.log(total), abs=1e-3)


@given(beliefs(), COUNTS, COUNTS, COUNTS, COUNTS)
def test_evidence_in_two_parts_is_the_same_as_at_once(belief: InflatedBeta, k: int, f: int, l: int, g: int) -> None:  # noqa: E741
    assume(belief.slab[0] > 1e-6)

    twice = updated(updated(belief, one(k), one(f)), one(l), one(g))
    once = updated(belief, one(k + l), one(f + g))

    assert twice.zero == pytest.approx(once.zero, abs=1e-8)
    assert twice.one == pytest.approx(once.one, abs=1e-8)


@given(beliefs(), COUNTS, COUNTS)
def test_a_mixed_outcome_rules_both_spikes_out(belief: InflatedBeta, k: int, f: int) -> None:
    posterior = updated(belief, one(k + 1), one(f + 1))

    assert posterior.zero[0] == posterior.one[0] == 0.0
    assert posterior.slab[0] == 1.0


def test_failures_alone_raise_the_spike_at_zero() -> None:
    prior = InflatedBeta(zero=one(0.2), one=one(0.1), a=one(1.0), b=one(1.0))

    masses = [updated(prior, one(0), one(failures)).zero[0] for failures in (0, 1, 8, 64)]

    # After 8 failures: .2 against a slab of .7 with likelihood 1 / 9.
    assert masses == pytest.approx([0.2, 0.2 / (0.2 + 0.7 / 2), 0.2 / (0.2 + 0.7 / 9), 0.2 / (0.2 + 0.7 / 65)])


@given(beliefs())
def test_no_evidence_leaves_the_prior(belief: InflatedBeta) -> None:
    posterior = updated(belief, one(0), one(0))

    assert posterior.zero == pytest.approx(belief.zero)
    assert posterior.one == pytest.approx(belief.one)
    assert log_likelihood(belief, one(0), one(0)) == pytest.approx(0.0, abs=1e-12)


@given(st.floats(0.1, 20.0), st.floats(0.1, 20.0), COUNTS, COUNTS)
def test_without_spikes_it_is_a_beta(a: float, b: float, k: int, f: int) -> None:
    belief = InflatedBeta(zero=one(0.0), one=one(0.0), a=one(a), b=one(b))

    assert log_likelihood(belief, one(k), one(k + f)) == pytest.approx(
        beta_binomial_log_likelihood(one(k), one(k + f), one(a), one(b))
    )
    assert np.stack(inflated_informative_moments(belief, 8)) == pytest.approx(
        np.stack(informative_moments(one(a), one(b), 8)), abs=1e-7
    )
    mean, variance = moments(belief)
    assert mean == pytest.approx(a / (a + b))
    assert variance == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), abs=1e-12)


@given(beliefs(), st.integers(0, 8))
def test_the_likelihoods_of_all_orders_of_all_counts_sum_to_one(belief: InflatedBeta, n: int) -> None:
    k = np.arange(n + 1.0)
    orders = np.array([_binomial(n, int(j)) for j in k])
    wide = InflatedBeta(*(np.repeat(part, n + 1) for part in (belief.zero, belief.one, belief.a, belief.b)))

    assert (orders * np.exp(log_likelihood(wide, k, np.full(n + 1, float(n))))).sum() == pytest.approx(1.0)


def test_an_impossible_outcome_has_a_finite_log_likelihood() -> None:
    never = InflatedBeta(zero=one(1.0), one=one(0.0), a=one(1.0), b=one(1.0))

    assert log_likelihood(never, one(1), one(2))[0] == -1e30
    assert log_likelihood(never, one(0), one(2))[0] == 0.0


def _binomial(n: int, k: int) -> int:
    result = 1
    for j in range(k):
        result = result * (n - j) // (j + 1)
    return result
