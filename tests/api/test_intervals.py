"""The intervals of rates: they cover what they promise, contain the mean, and fit to what else is said of a prompt."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import betainc

from evenodds_service.api.intervals import TAIL, credible_intervals
from evenodds_service.domain.arrays import BoolArray, FloatArray
from evenodds_service.domain.distributions import beta_from_moments, informative_moments
from evenodds_service.domain.learning.mixture import (
    AGEING,
    MEMORIES,
    PRIORS,
    STRENGTHS,
    Experts,
    Mixture,
    batch_log_likelihoods,
    experts,
    predict,
)

GROUP = 8
BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
LEAST, MOST = 0.87, 0.93
IN_A_BIN = 300
PRESENT = np.array([prior in ("flat", "running mean", "surface") for prior in PRIORS])
KEEP_L = (np.asarray(MEMORIES) * np.asarray(AGEING))[:, None]
Told = tuple[FloatArray, FloatArray, Experts]


def visited(
    chance: np.random.Generator, rates_n: FloatArray, n_attempts: int, means_C_n: FloatArray, mixture: Mixture | None
) -> tuple[FloatArray, FloatArray]:
    """Own evidence [L, n] after so many attempts, 8 at a step; a mixture learns from them."""
    own, lost = np.zeros((2, len(MEMORIES), len(rates_n)))
    for first in range(0, n_attempts, GROUP):
        counts = min(GROUP, n_attempts - first)
        k = chance.binomial(counts, rates_n).astype(float)
        if mixture is not None:
            mixture.update(batch_log_likelihoods(means_C_n, own, lost, k, np.full(len(k), float(counts))))
            mixture.forget()
        own, lost = own * KEEP_L + k, lost * KEEP_L + (counts - k)
    return own, lost


def world(n_attempts: int, n: int = 8_000) -> tuple[FloatArray, Told]:
    """True rates over the whole range, and what a mixture believes that has learned from 150 other prompts."""
    chance = np.random.default_rng(n_attempts)

    def drawn(n: int) -> tuple[FloatArray, FloatArray]:
        means_C_n = np.full((len(PRIORS), n), 0.5)
        shared_n = chance.uniform(0.02, 0.98, n)
        means_C_n[PRIORS.index("surface")] = shared_n
        return chance.beta(4.0 * shared_n, 4.0 * (1.0 - shared_n)), means_C_n

    mixture = Mixture.new(PRESENT)
    others_n, means_C_n = drawn(150)
    visited(chance, others_n, max(80, min(n_attempts, 400)), means_C_n, mixture)
    rates_n, means_C_n = drawn(n)
    inputs = (mixture.kept(), means_C_n, *visited(chance, rates_n, n_attempts, means_C_n, None))
    return rates_n, (*predict(*inputs), experts(*inputs))


def shares(inside_n: BoolArray, rates_n: FloatArray) -> list[float]:
    """Of those in each bin of rates that holds enough."""
    bins = np.digitize(rates_n, BINS[1:-1])
    return [float(inside_n[bins == i].mean()) for i in range(len(BINS) - 1) if (bins == i).sum() >= IN_A_BIN]


@pytest.mark.parametrize("n_attempts", [0, 1, 8, 80, 800])
def test_nine_of_ten_rates_lie_inside_over_the_whole_range(n_attempts: int) -> None:
    """By believed rate; and by true rate where there are attempts enough to tell it.

    With few attempts no method covers every true rate alike: the interval of who knows nothing leaves out the ends.
    """
    rates_n, (a_n, b_n, mixed) = world(n_attempts)

    low_n, high_n = credible_intervals(mixed, a_n, b_n)

    inside_n = (low_n <= rates_n) & (rates_n <= high_n)
    by_belief, by_truth = shares(inside_n, a_n / (a_n + b_n)), shares(inside_n, rates_n)
    assert len(by_belief) >= 5
    assert all(LEAST <= share <= MOST for share in by_belief), by_belief
    if n_attempts >= 80:
        assert len(by_truth) == len(BINS) - 1
        assert all(LEAST <= share <= MOST for share in by_truth), by_truth


def learned() -> Mixture:
    """With weight on experts that forget: the policy has moved."""
    mixture = Mixture.new(PRESENT)
    mixture.log_weights += np.where(np.isin(MEMORIES, [1.0]), 0.0, -1.0)
    return mixture


def after(successes: int, attempts: int) -> Told:
    """A prompt that has been tried in visits of eight."""
    own, lost = np.zeros((2, len(MEMORIES), 1))
    for first in range(0, attempts, GROUP):
        k = min(max(successes - first, 0), GROUP, attempts - first)
        own, lost = own * KEEP_L + k, lost * KEEP_L + min(GROUP, attempts - first) - k
    inputs = (learned().kept(), np.full((len(PRIORS), 1), 0.5), own, lost)
    return *predict(*inputs), experts(*inputs)


@pytest.mark.parametrize("attempts", [0, 1, 8, 80, 800])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_interval_is_the_mixtures_contains_the_mean_and_has_a_width(attempts: int, share: float) -> None:
    a, b, mixed = after(int(share * attempts), attempts)
    mean = float(a[0] / (a[0] + b[0]))

    low, high = (float(end[0]) for end in credible_intervals(mixed, a, b))

    assert 0.0 <= low <= mean <= high <= 1.0
    assert high - low > 0.5 / (attempts + 2)
    for end, tail in ((low, TAIL), (high, 1.0 - TAIL)):
        below = float(mixed.weights_K @ betainc(mixed.a_K_n[:, 0], mixed.b_K_n[:, 0], end))
        assert below == pytest.approx(tail, abs=1e-5) or end == mean


@pytest.mark.parametrize(("successes", "attempts"), [(800, 800), (0, 800), (400, 800), (8, 8), (0, 0), (799, 800)])
def test_the_chance_of_an_informative_group_is_that_of_rates_in_the_interval(successes: int, attempts: int) -> None:
    a, b, mixed = after(successes, attempts)

    low, high = (float(end[0]) for end in credible_intervals(mixed, a, b))
    told = float(informative_moments(a, b, GROUP)[0][0])

    rates = np.linspace(low, high, 1_001)
    possible = 1.0 - rates**GROUP - (1.0 - rates) ** GROUP
    assert possible.min() <= told <= possible.max()
    of_experts, _ = informative_moments(mixed.a_K_n[:, 0], mixed.b_K_n[:, 0], GROUP)
    assert told == pytest.approx(float(mixed.weights_K @ of_experts), abs=0.03)


def test_a_prompt_is_told_the_same_alone_and_in_company() -> None:
    _, (a_n, b_n, mixed) = world(8, n=300)

    low_n, high_n = credible_intervals(mixed, a_n, b_n)

    for i in (0, 7, 299):
        one = Experts(mixed.weights_K, mixed.a_K_n[:, [i]], mixed.b_K_n[:, [i]])
        low, high = credible_intervals(one, a_n[[i]], b_n[[i]])
        assert (low[0], high[0]) == (low_n[i], high_n[i])


def test_all_strengths_are_experts() -> None:
    weights = np.where(PRESENT[:, None, None], 1.0, 0.0) + np.zeros((len(PRIORS), len(STRENGTHS), len(MEMORIES)))
    weights /= weights.sum()
    inputs = (weights, np.full((len(PRIORS), 2), 0.25), np.ones((len(MEMORIES), 2)), np.zeros((len(MEMORIES), 2)))

    mixed, (a_n, b_n) = experts(*inputs), predict(*inputs)

    assert len(mixed.weights_K) == PRESENT.sum() * len(STRENGTHS) * len(MEMORIES)
    means = mixed.a_K_n / (mixed.a_K_n + mixed.b_K_n)
    np.testing.assert_allclose(mixed.weights_K @ means, a_n / (a_n + b_n), rtol=1e-12)


def test_experts_that_are_sure_of_unlike_rates_leave_the_tails_their_probability() -> None:
    rng = np.random.default_rng(3)
    for n_experts in (2, 5, 9):
        rates_K_n, sizes_K_n = (
            rng.uniform(0.002, 0.998, (n_experts, 400)),
            10 ** rng.uniform(0.5, 4.0, (n_experts, 400)),
        )
        weights_K = rng.dirichlet(np.ones(n_experts))
        mixed = Experts(weights_K, rates_K_n * sizes_K_n, (1.0 - rates_K_n) * sizes_K_n)
        mean_n = weights_K @ rates_K_n
        variance_n = weights_K @ (rates_K_n * (1.0 - rates_K_n) / (sizes_K_n + 1.0) + rates_K_n**2) - mean_n**2

        low_n, high_n = credible_intervals(mixed, *beta_from_moments(mean_n, variance_n))

        for end_n, a_K_n, b_K_n in ((low_n, mixed.a_K_n, mixed.b_K_n), (1.0 - high_n, mixed.b_K_n, mixed.a_K_n)):
            outside_n = weights_K @ betainc(a_K_n, b_K_n, end_n)
            is_cut = np.isclose(end_n, mean_n, atol=1e-9) | np.isclose(end_n, 1.0 - mean_n, atol=1e-9) | (end_n < 1e-9)
            assert np.all(is_cut | (np.abs(outside_n - TAIL) < 1e-5))
            assert is_cut.mean() < 0.2
