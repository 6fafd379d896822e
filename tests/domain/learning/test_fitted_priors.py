"""What a snapshot brings into the fold: fitted priors with a shape, and the published model's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pytest

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning import mixture
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.mixture import FITTED, MATCHED, PRIORS, STACKED, STRENGTHS
from evenodds_service.domain.learning.prediction import (
    beliefs_of,
    shared_priors,
)
from evenodds_service.domain.learning.predictors import PAPER, Gps, GpsPaper
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SnapshotEntry
from evenodds_service.domain.prompts import FittedPrior

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

pytestmark = pytest.mark.numbers

N = 30
ALL = np.ones(len(PRIORS), dtype=bool)
BROUGHT = (*FITTED, STACKED)


def prior(means: FloatArray, concentrations: FloatArray | float = MATCHED) -> FittedPrior:
    means = np.asarray(means, dtype=np.float32)
    return FittedPrior(means, np.broadcast_to(np.float32(concentrations), means.shape).astype(np.float32))


@pytest.fixture
def rates() -> FloatArray:
    return np.linspace(0.05, 0.95, N)


@pytest.fixture
def pool(make_block: MakeBlock) -> Pool:
    rng = np.random.default_rng(0)
    pool = Pool(surface_width=3, embedding_width=0)
    pool.append(make_block(N, surface=rng.normal(size=(N, 3))))
    return pool


def started(pool: Pool) -> State:
    return fold(State(), PoolEntry(1, N), pool)


def publish(state: State, pool: Pool, version: int, fitted: Mapping[str, FittedPrior]) -> None:
    pool.attach(version, fitted)
    fold(state, SnapshotEntry(state.position + 1, version), pool)


def observe(state: State, pool: Pool, rates: FloatArray, *, steps: int, counts: float = 8.0) -> None:
    everyone = np.arange(N)
    for _ in range(steps):
        k = np.round(rates * counts)
        entry = ObserveEntry(
            state.position + 1, state.head_step + 1, everyone, k, np.full(N, counts), (k > 0) & (k < counts)
        )
        fold(state, entry, pool)


def features(state: State, pool: Pool) -> FloatArray | None:
    return pool.rows(state.basis, slice(0, N)) if state.basis is not None else None


def log_odds(rates: FloatArray) -> FloatArray:
    return np.asarray(np.log(rates / (1 - rates)))


def shares(state: State) -> dict[str, float]:
    """Weight of each prior in the mixture."""
    return dict(zip(PRIORS, np.exp(state.mixture.log_weights).sum(axis=(1, 2)).tolist(), strict=True))


def test_a_fitted_prior_is_admitted_with_the_share_of_an_equal_start(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    observe(state, pool, rates, steps=3)
    before = shares(state)
    assert all(before[name] == 0 for name in BROUGHT)

    publish(state, pool, 1, {"ngrams": prior(rates), "latent": prior(rates)})

    after = shares(state)
    n_present = int(state.mixture.present().sum())
    assert [after[name] for name in BROUGHT] == pytest.approx([1 / n_present] * 3)
    assert sum(after.values()) == pytest.approx(1)
    rest = 1 - 3 / n_present
    assert {name: after[name] / rest for name in PRIORS if name not in BROUGHT} == pytest.approx(
        {name: before[name] for name in PRIORS if name not in BROUGHT}
    )


def test_a_later_snapshot_keeps_the_weights_that_its_priors_have_earned(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    publish(state, pool, 1, {"ngrams": prior(rates)})
    observe(state, pool, rates, steps=3)
    earned = shares(state)

    publish(state, pool, 2, {"ngrams": prior(rates)})

    assert shares(state) == earned
    assert state.model_version == 2


def test_a_good_fitted_prior_gains_weight_and_a_bad_one_loses_it(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    publish(state, pool, 1, {"ngrams": prior(rates), "latent": prior(1 - rates)})
    before = shares(state)

    observe(state, pool, rates, steps=1)

    after = shares(state)
    assert after["ngrams"] > 2 * before["ngrams"]
    assert after["latent"] < 0.01 * before["latent"]


def test_the_stack_starts_as_the_mean_of_the_log_odds(pool: Pool, rates: FloatArray) -> None:
    """Of the fitted priors and of the online regression, which says 0 before the first observation."""
    state = started(pool)
    flipped = 1 - rates**2
    publish(state, pool, 1, {"ngrams": prior(rates, 2.0), "latent": prior(flipped, 8.0)})

    means, scales, _ = shared_priors(state, features(state, pool), pool.prior_rates(N), pool.fitted(1), ALL)

    c = PRIORS.index(STACKED)
    np.testing.assert_allclose(log_odds(means[c]), (0 + log_odds(rates) + log_odds(flipped)) / 3, atol=1e-5)
    np.testing.assert_allclose(scales[c] * MATCHED, np.full(N, 4.0), rtol=1e-6)


def test_the_stack_is_believed_also_where_what_it_reads_has_no_weight_of_its_own(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    publish(state, pool, 1, {"ngrams": prior(rates), "latent": prior(rates)})
    weights = np.full(state.mixture.log_weights.shape, -np.inf)
    weights[PRIORS.index(STACKED)] = -np.log(weights[0].size)
    state.mixture = mixture.Mixture(weights, -50.0)

    a, b = beliefs_of(state, pool)

    assert np.corrcoef(a / (a + b), rates)[0, 1] > 0.9


def test_the_stack_follows_a_policy_that_left_the_snapshot_behind(pool: Pool, rates: FloatArray) -> None:
    """Rates rise for all prompts after the fit: the fitted priors stay behind, the stack does not."""
    state = started(pool)
    publish(state, pool, 1, {"ngrams": prior(rates), "latent": prior(rates)})
    risen = 1 / (1 + np.exp(-log_odds(rates) - 2.0))

    observe(state, pool, risen, steps=10)

    means, *_ = shared_priors(state, features(state, pool), pool.prior_rates(N), pool.fitted(1), ALL)
    errors = np.abs(means - risen).mean(axis=1)
    assert errors[PRIORS.index(STACKED)] < 0.5 * errors[PRIORS.index("ngrams")]
    assert shares(state)[STACKED] > shares(state)["ngrams"]


def test_the_stack_prefers_the_fitted_prior_that_is_right(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    shuffled = np.random.default_rng(0).permutation(rates)
    publish(state, pool, 1, {"ngrams": prior(shuffled), "latent": prior(rates)})

    observe(state, pool, rates, steps=10)

    assert state.stack is not None
    _, _, of_ngrams, of_latent = state.stack.weights
    assert of_latent > 0.5
    assert abs(of_ngrams) < 0.2


def test_what_the_stack_has_learned_outlives_the_next_snapshot(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    publish(state, pool, 1, {name: prior(rates) for name in FITTED})
    observe(state, pool, rates**2, steps=3)
    assert state.stack is not None
    before = state.stack.weights.copy()

    publish(state, pool, 2, {name: prior(rates) for name in FITTED})

    np.testing.assert_array_equal(state.stack.weights, before)


def test_strengths_are_relative_to_the_concentration_of_each_prompt(pool: Pool, rates: FloatArray) -> None:
    concentrations = np.geomspace(0.1, 60, N)
    state = started(pool)
    publish(state, pool, 1, {"ngrams": prior(rates, concentrations)})
    x = pool.rows(state.basis, slice(0, N)) if state.basis is not None else None

    means, scales, _ = shared_priors(state, x, pool.prior_rates(N), pool.fitted(1), ALL)

    c = PRIORS.index("ngrams")
    np.testing.assert_allclose(means[c], rates, rtol=1e-6)
    np.testing.assert_allclose(scales[c] * MATCHED, concentrations, rtol=1e-6)
    assert (scales[[PRIORS.index("flat"), PRIORS.index("latent")]] == 1).all()


def test_at_strength_two_a_fitted_prior_has_its_own_concentration(rates: FloatArray) -> None:
    concentrations = np.geomspace(0.1, 60, N)
    weights = np.zeros((len(PRIORS), len(STRENGTHS), len(mixture.MEMORIES)))
    weights[PRIORS.index("ngrams"), STRENGTHS.index(2.0), 0] = 1.0
    means, scales = np.full((len(PRIORS), N), 0.5), np.ones((len(PRIORS), N))
    means[PRIORS.index("ngrams")], scales[PRIORS.index("ngrams")] = rates, concentrations / MATCHED
    own = np.zeros((len(mixture.MEMORIES), N))

    a, b = mixture.predict(weights, means, own, own, scales)

    np.testing.assert_allclose(a, rates * concentrations, rtol=1e-6)
    np.testing.assert_allclose(b, (1 - rates) * concentrations, rtol=1e-6)


def test_prompts_newer_than_the_snapshot_get_the_online_regression_in_its_stead(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    observe(state, pool, rates, steps=3)
    publish(state, pool, 1, {"ngrams": prior(rates[:20], 40.0)})
    x = pool.rows(state.basis, slice(0, N)) if state.basis is not None else None
    padded = prior(np.append(rates[:20], [np.nan] * 10), 40.0)

    means, scales, _ = shared_priors(state, x, pool.prior_rates(N), {"ngrams": padded}, ALL)

    c, stand_in = PRIORS.index("ngrams"), PRIORS.index("surface")
    np.testing.assert_array_equal(means[c, 20:], means[stand_in, 20:])
    np.testing.assert_allclose(means[c, :20], rates[:20], rtol=1e-6)
    assert (scales[c, :20] == 40.0 / MATCHED).all()
    assert (scales[c, 20:] == 1).all()


def test_a_snapshot_that_knows_a_part_of_the_pool_leaves_no_nan(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    publish(state, pool, 1, {name: prior(rates[:4]) for name in FITTED})
    observe(state, pool, rates, steps=2)

    for a, b in (beliefs_of(state, pool), beliefs_of(state, pool, np.array([29, 0]))):
        assert (a > 0).all()
        assert (b > 0).all()
    assert np.isfinite(state.mixture.log_weights[state.mixture.present()]).all()
    assert np.isfinite(state.mixture.log_guard)


def test_a_snapshot_without_priors_leaves_the_beliefs_as_they_are(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    observe(state, pool, rates, steps=2)
    before = beliefs_of(state, pool)

    publish(state, pool, 1, {})

    for ours, theirs in zip(beliefs_of(state, pool), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_snapshot_that_lost_its_priors_still_leaves_an_answer(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    publish(state, pool, 1, {name: prior(rates) for name in FITTED})
    observe(state, pool, rates, steps=2)

    publish(state, pool, 2, {})
    observe(state, pool, rates, steps=1)

    a, b = beliefs_of(state, pool)
    assert np.isfinite([a, b]).all()
    assert np.corrcoef(a / (a + b), rates)[0, 1] > 0.9


def test_the_fold_refuses_another_snapshot_than_the_one_attached(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    pool.attach(3, {"ngrams": prior(rates)})

    with pytest.raises(ValueError, match=r"^the pool has the priors of snapshot 3, asked for were those of 1$"):
        fold(state, SnapshotEntry(2, 1), pool)


def test_a_new_prompt_gets_what_the_snapshot_says_of_it(pool: Pool, rates: FloatArray, make_block: MakeBlock) -> None:
    state = started(pool)
    publish(state, pool, 1, {"ngrams": prior(rates, 20.0)})
    observe(state, pool, rates, steps=3)
    outside = make_block(2, surface=np.zeros((2, 3)))

    a, b = Gps().new_beliefs(state, outside, lambda _: {"ngrams": prior(np.array([0.1, 0.9]), 20.0)})

    low, high = a / (a + b)
    assert low < 0.3
    assert high > 0.7


def test_before_its_first_fit_the_published_model_says_nothing(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    observe(state, pool, rates, steps=2)

    a, b = GpsPaper().beliefs(state, pool)

    assert (a == 1).all()
    assert (b == 1).all()


def test_own_evidence_has_no_part_in_the_published_models_belief(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    publish(state, pool, 1, {PAPER: prior(rates, 4.0)})
    before = GpsPaper().beliefs(state, pool)
    observe(state, pool, 1 - rates, steps=5)

    a, b = GpsPaper().beliefs(state, pool)
    some_a, some_b = GpsPaper().beliefs(state, pool, np.array([7, 3]))

    np.testing.assert_allclose(a, 4 * rates, rtol=1e-6)
    np.testing.assert_allclose(b, 4 * (1 - rates), rtol=1e-6)
    np.testing.assert_array_equal([a, b], before)
    np.testing.assert_array_equal([some_a, some_b], [a[[7, 3]], b[[7, 3]]])


def test_the_published_model_is_no_part_of_the_mixture(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    present = state.mixture.present()

    publish(state, pool, 1, {PAPER: prior(rates, 4.0)})

    np.testing.assert_array_equal(state.mixture.present(), present)


def test_prompts_that_the_published_model_has_not_seen_are_even_odds(pool: Pool, rates: FloatArray) -> None:
    state = started(pool)
    publish(state, pool, 1, {PAPER: prior(rates[:10], 4.0)})

    a, b = GpsPaper().beliefs(state, pool)

    np.testing.assert_array_equal(a[10:], b[10:])
    assert (a > 0).all()
    assert np.isfinite([a, b]).all()


def test_a_rate_that_was_rounded_to_never_or_always_is_still_a_belief(pool: Pool) -> None:
    """A snapshot keeps rates in half precision, in which .9999 is 1."""
    fitted = {PAPER: prior(np.array([0.0, 1.0, 0.5]), 4.0)}

    a, b = GpsPaper().new_beliefs(started(pool), pool.raw(0, 3), lambda _: fitted)

    assert (a > 0).all()
    assert (b > 0).all()
