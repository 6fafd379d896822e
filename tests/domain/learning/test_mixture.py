from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.mixture import (
    MEMORIES,
    N_EXPERTS,
    PRIORS,
    STRENGTHS,
    Mixture,
    batch_log_likelihoods,
    predict,
)

pytestmark = pytest.mark.numbers

quick = settings(max_examples=25)
SEED = st.integers(0, 2**32 - 1)
SHAPE = (len(PRIORS), len(STRENGTHS), len(MEMORIES))
FLAT, TWO, LASTING = PRIORS.index("flat"), STRENGTHS.index(2.0), MEMORIES.index(1.0)
EVERY = np.ones(len(PRIORS), dtype=bool)
FEW = np.array([prior in ("flat", "running mean", "surface") for prior in PRIORS])


def only(prior: str, strength: float, memory: float) -> FloatArray:
    weights = np.zeros(SHAPE)
    weights[PRIORS.index(prior), STRENGTHS.index(strength), MEMORIES.index(memory)] = 1
    return weights


def evidence(rng: np.random.Generator, n: int, attempts: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Prior means [C, n] and discounted own evidence [L, n], in single precision as the state keeps them."""
    means = rng.uniform(0.01, 0.99, size=(len(PRIORS), n))
    means[FLAT] = 0.5
    counts = rng.integers(0, attempts + 1, size=n)
    successes = rng.binomial(counts, rng.random(n))
    discount = np.asarray(MEMORIES)[:, None] ** rng.integers(0, 3, size=n)
    return tuple(a.astype(np.float32) for a in (means, discount * successes, discount * (counts - successes)))  # type: ignore[return-value]  # a generator of three


def slow_moments(
    weights: FloatArray, means: FloatArray, successes: FloatArray, failures: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Mean and variance of the mixture, expert by expert, by the law of total variance."""
    experts = []
    for c, s, m in itertools.product(*map(range, SHAPE)):
        a = means[c].astype(float) * STRENGTHS[s] + successes[m]
        b = (1 - means[c].astype(float)) * STRENGTHS[s] + failures[m]
        experts.append((weights[c, s, m], a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))))
    mean = sum(w * m for w, m, _ in experts)
    variance = sum(w * (v + (m - mean) ** 2) for w, m, v in experts)
    return np.asarray(mean), np.asarray(variance)


def moments(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    return a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))


@quick
@given(SEED, st.sampled_from([8, 1_000, 100_000]))
def test_the_mixture_has_the_moments_of_the_explicit_sum_over_its_experts(seed: int, attempts: int) -> None:
    rng = np.random.default_rng(seed)
    columns = evidence(rng, 20, attempts)
    weights = rng.uniform(0.1, 1, size=SHAPE)
    weights /= weights.sum()

    mean, variance = moments(*predict(weights, *columns))

    slow_mean, slow_variance = slow_moments(weights, *columns)
    assert mean == pytest.approx(slow_mean, rel=1e-4)
    assert variance == pytest.approx(np.maximum(slow_variance, slow_mean * (1 - slow_mean) / 1e6), rel=1e-3)


@quick
@given(SEED, st.integers(1, 300), st.booleans())
def test_a_prompt_is_believed_the_same_to_the_last_bit_alone_and_in_any_company(
    seed: int, n: int, shaped: bool
) -> None:
    rng = np.random.default_rng(seed)
    columns = evidence(rng, n, 3)  # a quarter of them unseen
    scales = np.ones((len(PRIORS), n), dtype=np.float32)
    if shaped:
        scales[PRIORS.index("ngrams")] = rng.uniform(0.2, 5.0, size=n)
        scales[PRIORS.index("latent"), : n // 2] = 3.0
    weights = np.where(rng.random(SHAPE) < 0.5, 0.0, rng.random(SHAPE))
    weights[rng.integers(0, len(PRIORS))] = 0.0
    weights /= weights.sum()

    among = predict(weights, *columns, scales)

    for size in (1, 2, 64, 65):
        rows = rng.choice(n, min(size, n), replace=False)
        means, own, lost = (column[:, rows] for column in columns)
        some = predict(weights, means, own, lost, scales[:, rows])
        np.testing.assert_array_equal(some, np.asarray(among)[:, rows])


@quick
@given(SEED)
def test_negligible_experts_are_skipped_with_an_error_below_their_weight(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = evidence(rng, 20, 30)
    weights = np.exp(rng.normal(scale=6, size=SHAPE))
    weights /= weights.sum()
    skipped = weights[weights < 1e-3 * weights.max()].sum()

    mean, variance = moments(*predict(weights, *columns))

    slow_mean, slow_variance = slow_moments(weights, *columns)
    assert np.abs(mean - slow_mean).max() <= skipped + 1e-5
    assert np.abs(variance - slow_variance).max() <= skipped + 1e-5


@quick
@given(SEED, st.sampled_from(PRIORS), st.sampled_from(STRENGTHS), st.sampled_from(MEMORIES))
def test_without_evidence_the_belief_is_the_prior(seed: int, prior: str, strength: float, memory: float) -> None:
    means, none, _ = evidence(np.random.default_rng(seed), 30, 0)

    a, b = predict(only(prior, strength, memory), means, none, none)

    assert a / (a + b) == pytest.approx(means[PRIORS.index(prior)], rel=1e-4)
    assert a + b == pytest.approx(strength, rel=1e-3)


@quick
@given(SEED, st.floats(0, 1))
def test_with_much_evidence_the_belief_is_the_rate(seed: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    means, _, _ = evidence(rng, 1, 0)
    counts = np.full((len(MEMORIES), 1), 1e5, dtype=np.float32)
    weights = rng.dirichlet(np.ones(N_EXPERTS)).reshape(SHAPE)

    mean, variance = moments(*predict(weights, means, rate * counts, (1 - rate) * counts))

    assert mean[0] == pytest.approx(rate, abs=1e-3)
    assert math.sqrt(variance[0]) < 2e-3


@quick
@given(st.integers(0, 100_000), st.integers(0, 100_000), SEED)
def test_mopps_is_a_corner_of_the_mixture(successes: int, failures: int, seed: int) -> None:
    means, _, _ = evidence(np.random.default_rng(seed), 1, 0)
    own = np.asarray(MEMORIES)[:, None] * 0 + successes
    lost = np.asarray(MEMORIES)[:, None] * 0 + failures

    a, b = predict(only("flat", 2.0, 1.0), means, own, lost)

    assert a[0] == pytest.approx(1 + successes, rel=1e-5)  # evidence is kept in single precision
    assert b[0] == pytest.approx(1 + failures, rel=1e-5)


@pytest.mark.parametrize("n", [1e-6, 1.0, 1e8])
@pytest.mark.parametrize("share", [0.0, 1e-6, 0.5, 1.0])
def test_beliefs_are_finite_and_positive_for_extreme_priors_and_evidence(n: float, share: float) -> None:
    means = np.tile(np.array([0.0, 1e-9, 0.5, 1.0]), (len(PRIORS), 1))
    own = np.full((len(MEMORIES), 4), share * n)
    lost = np.full((len(MEMORIES), 4), (1 - share) * n)

    a, b = predict(Mixture.new(EVERY).weights(), means, own, lost)

    assert np.isfinite([a, b]).all()
    assert (a > 0).all()
    assert (b > 0).all()


def test_the_likelihood_of_a_batch_is_the_sum_over_its_prompts_under_each_expert() -> None:
    rng = np.random.default_rng(0)
    means, own, lost = evidence(rng, 6, 20)
    k, counts = np.array([0, 8, 3, 2.5, 1, 0.3]), np.array([8.0, 8, 8, 8, 1, 1])

    ours = batch_log_likelihoods(means, own, lost, k, counts)

    assert ours.shape == SHAPE
    for c, s, m in itertools.product(*map(range, SHAPE)):
        a, b = means[c] * STRENGTHS[s] + own[m], (1 - means[c]) * STRENGTHS[s] + lost[m]
        slow = special.betaln(a + k, b + counts - k) - special.betaln(a, b)
        assert ours[c, s, m] == pytest.approx(slow.sum(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("present", [FEW, EVERY])
def test_a_new_mixture_is_equal_over_the_priors_that_are_present(present: np.ndarray) -> None:
    weights = Mixture.new(present).weights()

    k = present.sum() * len(STRENGTHS) * len(MEMORIES)
    assert weights.sum() == pytest.approx(1)
    assert (weights[~present] == 0).all()
    others = np.ones(SHAPE, dtype=bool)
    others[FLAT, TWO, LASTING] = False
    assert weights[present & others.any(axis=(1, 2))][0, 0, 1] == pytest.approx((1 - 1 / k) / k)
    assert weights[FLAT, TWO, LASTING] == pytest.approx(1 / k + (1 - 1 / k) / k)


@quick
@given(SEED, st.floats(0.01, 50))
def test_an_update_is_bayes_rule_on_the_effective_weights(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    mixture = Mixture.new(FEW)
    mixture.update(rng.normal(size=SHAPE))
    before, log_likelihoods = mixture.weights(), scale * rng.normal(size=SHAPE)

    ours, mopps = mixture.update(log_likelihoods)

    joint = before * np.exp(log_likelihoods - log_likelihoods.max())
    assert mixture.weights() == pytest.approx(joint / joint.sum(), abs=1e-12)
    assert ours == pytest.approx(math.log(joint.sum()) + log_likelihoods.max())
    assert mopps == log_likelihoods[FLAT, TWO, LASTING]


@pytest.mark.parametrize("change", ["update", "forget", "admit"])
def test_the_weights_that_are_kept_follow_each_change(change: str) -> None:
    mixture = Mixture.new(FEW)
    mixture.update(np.random.default_rng(0).normal(size=SHAPE))
    before = mixture.kept()
    acts: dict[str, Callable[[], object]] = {
        "update": lambda: mixture.update(np.random.default_rng(1).normal(size=SHAPE)),
        "forget": lambda: mixture.forget(0.5),
        "admit": lambda: mixture.admit(np.ones(len(PRIORS), dtype=bool)),
    }

    acts[change]()

    assert not np.array_equal(mixture.kept(), before)
    assert np.array_equal(mixture.kept(), Mixture(mixture.log_weights, mixture.log_guard).kept())


def test_forgetting_lets_a_poor_expert_return() -> None:
    mixture = Mixture.new(FEW)
    poor = PRIORS.index("surface")
    log_likelihoods = np.zeros(SHAPE)
    log_likelihoods[poor] = -20
    mixture.update(log_likelihoods)
    before = mixture.weights()

    for _ in range(200):
        mixture.forget()

    after = mixture.weights()
    assert before[poor].sum() < 1e-8
    assert after[poor].sum() > 0.2
    assert after.sum() == pytest.approx(1)
    assert (after[~FEW] == 0).all()


@pytest.mark.parametrize("present", [FEW, EVERY])
@settings(max_examples=20)
@given(SEED, st.sampled_from([0.1, 5.0, 500.0]), st.floats(0, 1))
def test_total_loss_never_exceeds_that_of_mopps_by_more_than_log_k(
    present: np.ndarray, seed: int, scale: float, forgetting: float
) -> None:
    rng = np.random.default_rng(seed)
    mixture = Mixture.new(present)
    bound = math.log(present.sum() * len(STRENGTHS) * len(MEMORIES))
    ours = mopps = 0.0

    for _ in range(60):
        step = mixture.update(-scale * rng.exponential(size=SHAPE) * rng.random(SHAPE[:1])[:, None, None])
        ours, mopps = ours + step[0], mopps + step[1]
        if rng.random() < forgetting:
            mixture.forget(rng.choice([0.0, 0.5, 0.97]))

        assert ours >= mopps - bound - 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("forgets", [False, True])
def test_an_adversary_who_fails_whatever_is_trusted_most_wins_no_more_than_log_k(seed: int, forgets: bool) -> None:
    """Every rival of MoPPS rises while it is right, and fails as soon as it is believed."""
    rng = np.random.default_rng(seed)
    mixture = Mixture.new(EVERY)
    ours = mopps = 0.0

    for _ in range(400):
        trusted = mixture.weights()
        trusted[FLAT, TWO, LASTING] = 0
        log_likelihoods = -3 * rng.random(SHAPE)
        log_likelihoods[FLAT, TWO, LASTING] = -5
        log_likelihoods[trusted > 0.2 * trusted.max()] = -40
        step = mixture.update(log_likelihoods)
        ours, mopps = ours + step[0], mopps + step[1]
        if forgets:
            mixture.forget()

        assert ours >= mopps - math.log(N_EXPERTS) - 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_outcomes_chosen_against_the_mixture_cost_no_more_than_log_k(seed: int) -> None:
    """Each outcome is the one that is worst for the mixture as compared with MoPPS."""
    rng = np.random.default_rng(seed)
    mixture = Mixture.new(EVERY)
    own, lost = np.zeros((2, len(MEMORIES), 1))
    counts = np.array([8.0])
    ours = mopps = 0.0

    for _ in range(150):
        means = rng.uniform(size=(len(PRIORS), 1))
        means[FLAT] = 0.5
        weights = mixture.weights()

        def regret(k: float) -> float:
            each = batch_log_likelihoods(means, own, lost, np.array([k]), counts)  # noqa: B023
            return float(each[FLAT, TWO, LASTING] - np.log((weights * np.exp(each)).sum()))  # noqa: B023

        k = np.array([max((float(k) for k in range(9)), key=regret)])
        step = mixture.update(batch_log_likelihoods(means, own, lost, k, counts))
        ours, mopps = ours + step[0], mopps + step[1]
        discount = np.asarray(MEMORIES)[:, None]
        own, lost = discount * own + k, discount * lost + (counts - k)
        mixture.forget()

        assert ours >= mopps - math.log(N_EXPERTS) - 1e-6


def test_priors_that_appear_get_an_equal_share_and_weights_stay_normalised() -> None:
    rng = np.random.default_rng(0)
    mixture = Mixture.new(FEW)
    mixture.update(rng.normal(size=SHAPE))
    before = np.exp(mixture.log_weights)

    mixture.admit(EVERY)

    after = np.exp(mixture.log_weights)
    share = 1 / len(PRIORS)
    assert after.sum() == pytest.approx(1)
    assert mixture.weights().sum() == pytest.approx(1)
    assert after[~FEW].sum(axis=(1, 2)) == pytest.approx(share)
    assert np.ptp(after[~FEW]) == pytest.approx(0, abs=1e-15)
    assert after[FEW] == pytest.approx(before[FEW] * (1 - (~FEW).sum() * share))


def test_admitting_what_is_present_changes_nothing() -> None:
    mixture = Mixture.new(EVERY)
    mixture.update(np.random.default_rng(0).normal(size=SHAPE))
    before = mixture.weights()

    mixture.admit(EVERY)
    mixture.admit(FEW)

    assert np.array_equal(mixture.weights(), before)
