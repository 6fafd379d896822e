from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.regression import (
    INTERCEPT_VARIANCE,
    PRIOR_VARIANCE,
    OnlineLogistic,
    effective_count,
    further_count,
)

pytestmark = pytest.mark.numbers

quick = settings(max_examples=20)
SEED = st.integers(0, 2**32 - 1)


def features(rng: np.random.Generator, n: int, d: int) -> FloatArray:
    x = rng.normal(size=(n, d))
    x[:, 0] = 1
    return x


def outcomes(
    rng: np.random.Generator, x: FloatArray, weights: FloatArray, attempts: int
) -> tuple[FloatArray, FloatArray]:
    counts = np.full(len(x), float(attempts))
    return rng.binomial(attempts, special.expit(x @ weights)).astype(float), counts


def log_loss(rates: FloatArray, truth: FloatArray) -> float:
    return float(-(truth * np.log(rates) + (1 - truth) * np.log1p(-rates)).mean())


@given(st.lists(st.integers(1, 64), min_size=1, max_size=6))
def test_what_visits_add_to_the_worth_of_a_prompt_is_the_worth_of_all_its_attempts(visits: list[int]) -> None:
    counts = np.array(visits, dtype=np.float64)
    before = np.concatenate([[0.0], np.cumsum(counts)[:-1]])

    added = further_count(counts, before)

    assert added.sum() == pytest.approx(float(effective_count(counts.sum(keepdims=True))[0]))
    assert (added > 0).all()
    assert (np.diff(added / counts) < 0).all()


def test_a_regression_started_as_an_average_gives_the_mean_of_the_log_odds() -> None:
    log_odds = np.array([[0.5, -2.0], [3.0, 1.0]])
    x = np.concatenate([np.ones((2, 1)), log_odds], axis=1)

    assert OnlineLogistic.averaging(2).mode(x) == pytest.approx(special.expit(log_odds.mean(axis=1)))


def test_without_evidence_every_prediction_is_one_half() -> None:
    x = features(np.random.default_rng(0), 50, 4)

    assert OnlineLogistic.new(4).predict(x) == pytest.approx(0.5)


@quick
@given(SEED, st.integers(1, 80), st.integers(1, 6))
def test_the_order_of_the_observations_in_a_batch_does_not_matter(seed: int, n: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    x = features(rng, n, d)
    k, counts = outcomes(rng, x, rng.normal(size=d), 8)
    order = rng.permutation(n)
    one, other = OnlineLogistic.new(d), OnlineLogistic.new(d)

    one.update(x, k, counts)
    other.update(x[order], k[order], counts[order])

    assert one.weights == pytest.approx(other.weights, abs=1e-9)
    assert one.precision == pytest.approx(other.precision, abs=1e-8)


@quick
@given(SEED, st.integers(1, 300), st.integers(1, 8), st.sampled_from([1, 8, 64]))
def test_one_batch_leads_to_the_mode_of_the_posterior(seed: int, n: int, d: int, attempts: int) -> None:
    """The slow version: a general optimiser on the penalised log-likelihood written out."""
    rng = np.random.default_rng(seed)
    x = features(rng, n, d)
    k, counts = outcomes(rng, x, 2 * rng.normal(size=d), attempts)
    prior_precision = np.full(d, 1 / PRIOR_VARIANCE)
    prior_precision[0] = 1 / INTERCEPT_VARIANCE
    worth, rates = effective_count(counts), k / counts

    def loss(w: FloatArray) -> float:
        z = x @ w
        return float(worth @ (np.logaddexp(0, z) - rates * z) + 0.5 * prior_precision @ w**2)

    def gradient(w: FloatArray) -> FloatArray:
        return np.asarray(x.T @ (worth * (special.expit(x @ w) - rates)) + prior_precision * w)

    regression = OnlineLogistic.new(d)
    regression.update(x, k, counts)

    slow = optimize.minimize(loss, np.zeros(d), jac=gradient, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-8})
    assert regression.weights == pytest.approx(slow.x, abs=1e-3)
    assert gradient(regression.weights) == pytest.approx(0, abs=1e-2)


@quick
@given(SEED)
def test_the_precision_is_the_prior_plus_the_curvature_at_the_mode(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = features(rng, 40, 3)
    k, counts = outcomes(rng, x, np.array([0.0, 1.0, -1.0]), 4)
    regression = OnlineLogistic.new(3)
    prior = regression.precision.copy()

    regression.update(x, k, counts)

    curvature = np.zeros((3, 3))
    for row, worth in zip(x, effective_count(counts), strict=True):
        s = special.expit(row @ regression.weights)
        curvature += worth * s * (1 - s) * np.outer(row, row)
    assert regression.precision == pytest.approx(prior + curvature)


@pytest.mark.parametrize("attempts", [1, 8])
def test_much_data_recovers_the_weights_of_a_made_world(attempts: int) -> None:
    rng = np.random.default_rng(1)
    truth = np.array([-0.5, 1.0, -0.7, 0.0, 0.3])
    regression = OnlineLogistic.new(5)

    for _ in range(40):
        x = features(rng, 500, 5)
        regression.update(x, *outcomes(rng, x, truth, attempts))

    assert regression.weights == pytest.approx(truth, abs=0.08)


@quick
@given(SEED, st.floats(0, 1))
def test_forgetting_moves_the_precision_towards_the_prior_and_leaves_the_weights(seed: int, keep: float) -> None:
    rng = np.random.default_rng(seed)
    x = features(rng, 60, 4)
    regression = OnlineLogistic.new(4)
    regression.update(x, *outcomes(rng, x, rng.normal(size=4), 8))
    weights, learned = regression.weights.copy(), regression.precision - np.diag(regression.prior_precision)

    regression.forget(keep)

    assert regression.weights == pytest.approx(weights)
    assert regression.precision - np.diag(regression.prior_precision) == pytest.approx(keep * learned, abs=1e-9)


@quick
@given(SEED, st.floats(0.1, 100))
def test_predictions_lie_strictly_between_nought_and_one(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    x = features(rng, 200, 5)
    regression = OnlineLogistic.new(5)
    regression.update(x, *outcomes(rng, x, size * rng.normal(size=5), 8))

    rates = regression.predict(size * x)

    assert ((rates > 0) & (rates < 1)).all()


def test_a_prediction_is_close_to_the_mean_over_the_posterior() -> None:
    rng = np.random.default_rng(2)
    x = features(rng, 30, 3)
    regression = OnlineLogistic.new(3)
    regression.update(x, *outcomes(rng, x, np.array([1.0, 2.0, -1.0]), 8))

    rates = regression.predict(3 * x)

    draws = rng.multivariate_normal(regression.weights, np.linalg.inv(regression.precision), size=20_000)
    assert rates == pytest.approx(special.expit(3 * x @ draws.T).mean(axis=1), abs=0.02)


def test_single_precision_features_give_single_precision_predictions_of_the_same_value() -> None:
    rng = np.random.default_rng(3)
    x = features(rng, 100, 4)
    regression = OnlineLogistic.new(4)
    regression.update(x, *outcomes(rng, x, rng.normal(size=4), 8))

    single = regression.predict(x.astype(np.float32))

    assert single.dtype == np.float32
    assert single == pytest.approx(regression.predict(x), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_single_attempts_and_fractional_rewards_are_learned_from(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.array([0.3, 1.0, -1.0])
    x, unseen = features(rng, 600, 3), features(rng, 400, 3)
    rates, unseen_rates = special.expit(x @ truth), special.expit(unseen @ truth)
    fractional = np.clip(rates + rng.normal(scale=0.2, size=600), 0, 1)
    before = log_loss(np.full(400, 0.5), unseen_rates)

    for rewards in (rng.binomial(1, rates).astype(float), fractional):
        regression = OnlineLogistic.new(3)
        regression.update(x, rewards, np.ones(600))

        assert log_loss(regression.predict(unseen), unseen_rates) < before - 0.03


@pytest.mark.parametrize("seed", range(3))
def test_other_features_of_the_same_prompts_take_over_the_function(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old_x = features(rng, 400, 4)
    mixing = np.eye(4) + 0.3 * rng.normal(size=(4, 4))
    mixing[:, 0] = [1, 0, 0, 0]
    new_x = np.column_stack([old_x @ mixing, rng.normal(size=(400, 2))])
    old, new = OnlineLogistic.new(4), OnlineLogistic.new(6)
    old.update(old_x, *outcomes(rng, old_x, np.array([0.5, 1.0, -1.0, 0.5]), 8))

    new.adopt(old, old_x, new_x)

    assert new.predict(new_x) == pytest.approx(old.predict(old_x), abs=0.02)


def test_rescaled_features_take_over_the_evidence_with_the_function() -> None:
    """What was seen is worth as much as if it had been seen under the new features."""
    rng = np.random.default_rng(4)
    old_x = features(rng, 400, 3)
    new_x = old_x * np.array([1.0, 4.0, 0.25])
    k, counts = outcomes(rng, old_x, np.array([0.2, 0.8, -0.8]), 8)
    old, new = OnlineLogistic.new(3), OnlineLogistic.new(3)
    old.update(old_x, k, counts)

    new.adopt(old, old_x, new_x)

    s = special.expit(old_x @ old.weights)
    seen = (new_x.T * (effective_count(counts) * s * (1 - s))) @ new_x
    assert new.precision - np.diag(new.prior_precision) == pytest.approx(seen, rel=0.05, abs=1)


def test_features_that_the_old_ones_do_not_show_stay_as_unsure_as_the_prior() -> None:
    rng = np.random.default_rng(5)
    old_x = features(rng, 2_000, 3)
    new_x = np.column_stack([old_x, rng.normal(size=2_000)])
    old, new = OnlineLogistic.new(3), OnlineLogistic.new(4)
    old.update(old_x, *outcomes(rng, old_x, np.array([0.2, 0.8, -0.8]), 8))

    new.adopt(old, old_x, new_x)

    assert new.precision[3, 3] == pytest.approx(1 / PRIOR_VARIANCE, rel=0.05)


def test_attempts_on_one_prompt_repeat_one_another() -> None:
    counts = np.arange(1.0, 200)

    worth = effective_count(counts)

    assert worth[0] == 0.5
    assert worth[7] == pytest.approx(8 / 9)
    assert (np.diff(worth) > 0).all()
    assert worth.max() < 1


def test_a_row_is_predicted_alike_alone_and_in_any_company() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1_000, 70)).astype(np.float32)
    regression = OnlineLogistic.new(70)
    regression.update(x, rng.binomial(8, 0.5, size=1_000).astype(float), np.full(1_000, 8.0))
    whole, log_odds = regression.predict(x), regression.log_odds(x)
    small = OnlineLogistic.averaging(3)
    mode = small.mode(x[:, :4])

    for n in (1, 2, 3, 17, 63, 64, 65, 200):
        rows = rng.choice(1_000, n, replace=False)
        np.testing.assert_array_equal(regression.predict(x[rows]), whole[rows])
        np.testing.assert_array_equal(regression.log_odds(x[rows]), log_odds[rows])
        np.testing.assert_array_equal(small.mode(x[rows, :4]), mode[rows])
    np.testing.assert_allclose(regression.predict(np.tile(x, (3, 1)))[:1_000], whole, rtol=1e-6)


def test_a_copy_is_left_alone_by_updates_and_predictions_follow_them() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 5)).astype(np.float32)
    regression = OnlineLogistic.new(5)
    regression.update(x, rng.integers(0, 9, size=30).astype(float), np.full(30, 8.0))
    before, copy = regression.predict(x), regression.copy()

    regression.forget(0.9)
    forgotten = regression.predict(x)
    regression.update(x, np.full(30, 8.0), np.full(30, 8.0))

    np.testing.assert_array_equal(copy.predict(x), before)
    assert np.abs(forgotten - before).max() > 1e-6
    assert regression.predict(x).mean() > before.mean() + 0.01
