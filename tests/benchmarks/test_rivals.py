from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from benchmarks.rivals import DPS, PARTLY, SOLVED, UNSOLVED, Arcus, Bots, Method, MoPPS, Uniform, arcsine, best
from hypothesis import given
from hypothesis import strategies as st

from evenodds_service.domain.arrays import IntArray

G = 8
METHODS: Mapping[str, Callable[[int], Method]] = {
    "uniform": lambda n: Uniform(n),
    "mopps": lambda n: MoPPS(n, G),
    "mopps-yield": lambda n: MoPPS(n, G, score="yield"),
    "bots": lambda n: Bots(np.linspace(0.0, 0.5, n), np.linspace(0.5, 1.0, n), G),
    "dps": lambda n: DPS(n),
    "arcus": lambda n: Arcus(n, G),
    "arcus-greedy": lambda n: Arcus(n, G, temperature=0.0),
}


def tell(method: Method, step: int, counts: dict[int, int]) -> None:
    prompts = np.array(list(counts), dtype=np.int64)
    method.observe(step, prompts, np.array(list(counts.values()), dtype=float), np.full(len(counts), float(G)))


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", METHODS)
@given(
    st.lists(st.dictionaries(st.integers(0, 11), st.integers(0, G), min_size=1, max_size=12), max_size=6),
    st.integers(1, 12),
)
def test_every_method_forecasts_probabilities_and_chooses_distinct_candidates(
    name: str, batches: list[dict[int, int]], n_candidates: int
) -> None:
    method = METHODS[name](12)
    for step, batch in enumerate(batches):
        tell(method, step, batch)
    candidates: IntArray = generator().permutation(12)[:n_candidates].astype(np.int64)

    forecast = method.predict()
    chosen = method.select(candidates, (n_candidates + 1) // 2, step=len(batches), generator=generator())

    for values in (forecast.mean_N, forecast.informative_N):
        assert values.shape == (12,)
        assert ((values >= 0.0) & (values <= 1.0)).all()
    assert len(set(chosen.tolist())) == len(chosen) == (n_candidates + 1) // 2
    assert set(chosen.tolist()) <= set(candidates.tolist())


@pytest.mark.parametrize("name", METHODS)
def test_a_choice_is_repeatable(name: str) -> None:
    method = METHODS[name](40)
    tell(method, 0, {3: 4, 5: 0, 7: 8})

    first = method.select(np.arange(40), 10, step=1, generator=generator())
    second = method.select(np.arange(40), 10, step=1, generator=generator())

    np.testing.assert_array_equal(first, second)


def test_uniform_forecasts_the_running_means() -> None:
    method = Uniform(3)
    tell(method, 0, {0: 4, 1: 8})

    forecast = method.predict()

    np.testing.assert_allclose(forecast.mean_N, (1.5 + 1.0) / (2.0 + 2.0))
    np.testing.assert_allclose(forecast.informative_N, (1.0 + 1.0) / (2.0 + 2.0))


def test_mopps_counts_successes_and_failures_of_what_was_trained_on_only() -> None:
    method = MoPPS(2, G)
    tell(method, 0, {0: 3})
    tell(method, 1, {0: 5})

    assert (method.a_N[0], method.b_N[0]) == (9.0, 9.0)
    assert (method.a_N[1], method.b_N[1]) == (1.0, 1.0)


def test_mopps_with_decay_returns_towards_the_flat_prior() -> None:
    method = MoPPS(1, G, decay=0.5)
    tell(method, 0, {0: 8})
    tell(method, 1, {0: 2})

    # a: 1 -> .5 + .5 + 8 = 9 -> 4.5 + .5 + 2 = 7; b: 1 -> 1 -> .5 + .5 + 6 = 7
    assert (method.a_N[0], method.b_N[0]) == (7.0, 7.0)


def test_mopps_learns_from_a_single_attempt() -> None:
    method = MoPPS(1, 1)
    method.observe(0, np.array([0]), np.array([1.0]), np.array([1.0]))

    assert (method.a_N[0], method.b_N[0]) == (2.0, 1.0)


def test_mopps_by_thompson_takes_the_prompt_near_one_half() -> None:
    method = MoPPS(3, G)
    for step in range(50):
        tell(method, step, {0: 0, 1: 4, 2: 8})

    assert method.select(np.arange(3), 1, step=50, generator=generator()).tolist() == [1]


def test_bots_adds_evidence_by_the_reference_models_to_every_prompt() -> None:
    method = Bots(np.array([0.2, 0.0]), np.array([0.6, 1.0]), G, forgetting=0.25, implicit=0.5, weight=4.0)
    tell(method, 0, {0: 4})

    assert method.place == pytest.approx(0.75)  # .5 lies there between .2 and .6
    # implicit: 2 attempts at .5 and at .75; explicit: half of 4 of 8; what was there stays, .75 + .25
    np.testing.assert_allclose(method.a_N, [1.0 + 1.0 + 2.0, 1.0 + 1.5])
    np.testing.assert_allclose(method.b_N, [1.0 + 1.0 + 2.0, 1.0 + 0.5])


def test_bots_moves_its_place_between_the_models_by_a_tenth() -> None:
    method = Bots(np.zeros(1), np.ones(1), G)
    tell(method, 0, {0: 4})
    tell(method, 1, {0: 8})

    assert method.place == pytest.approx(0.9 * 0.5 + 0.1)


def test_dps_starts_without_a_preference() -> None:
    method = DPS(4)

    np.testing.assert_allclose(method.states(), np.full((4, 3), 1.0 / 3.0))


def test_dps_adds_the_joint_of_the_two_states_to_its_counts() -> None:
    method = DPS(1, decay=0.7)

    tell(method, 0, {0: 4})  # before: every state equally likely, so each column gets a third
    counts = method.counts_N_3_3[0].copy()
    tell(method, 1, {0: 0})

    np.testing.assert_allclose(counts[PARTLY], 0.7 + 0.3 + 1.0 / 3.0)
    np.testing.assert_allclose(counts[[UNSOLVED, SOLVED]], 1.0)
    # Now the state before is known: the whole count goes to (unsolved <- partly).
    expected = 0.7 * counts + 0.3
    expected[UNSOLVED, PARTLY] += 1.0
    np.testing.assert_allclose(method.counts_N_3_3[0], expected)


def test_dps_predicts_with_the_column_of_the_last_state() -> None:
    method = DPS(1, decay=1.0)
    for step in range(4):
        tell(method, step, {0: 4})

    # Column "partly": 1 + 1/3 at the first visit, then 1 for each of three, of 3 + 1/3 + 3.
    assert method.states()[0, PARTLY] == pytest.approx((1 + 1 / 3 + 3) / (3 + 1 / 3 + 3))
    assert method.states()[0].sum() == pytest.approx(1.0)


def test_the_arcsine_of_a_mixed_group_has_the_published_value_and_variance() -> None:
    seen, noise = arcsine(np.array([2.0]), np.array([8.0]))

    assert seen[0] == pytest.approx(math.asin(math.sqrt(2.375 / 8.75)))
    assert noise[0] == pytest.approx(1.0 / 34.0)


def test_the_arcsine_of_a_group_without_contrast_is_the_end_with_its_own_variance() -> None:
    seen, noise = arcsine(np.array([0.0, 8.0]), np.array([8.0, 8.0]))

    np.testing.assert_allclose(seen, [0.0, math.pi / 2])
    np.testing.assert_allclose(noise, [1.0 / 16.0, 1.0 / 16.0])


def test_arcus_takes_one_kalman_step() -> None:
    method = Arcus(2, G)
    tell(method, 0, {0: 0})

    start = math.pi**2 / 48
    gain = start / (start + 1.0 / 16.0)
    assert method.mean_N[0] == pytest.approx(math.pi / 4 * (1.0 - gain))
    assert method.variance_N[0] == pytest.approx((1.0 - gain) * start)
    assert (method.mean_N[1], method.variance_N[1]) == (math.pi / 4, start)


def test_arcus_gives_the_unseen_the_moments_of_a_hundred_first_visits() -> None:
    method = Arcus(101, G)
    tell(method, 0, dict.fromkeys(range(100), 8))

    assert method.mean_N[100] == pytest.approx(math.pi / 2)
    assert method.variance_N[100] == pytest.approx(1e-3)


def test_arcus_learns_that_rates_rise() -> None:
    method = Arcus(50, G)
    for step, k in enumerate((2, 3, 4, 5)):
        tell(method, step, dict.fromkeys(range(50), k))

    assert method.drift > 0.0


def test_arcus_moves_its_target_by_at_most_five_thousandths() -> None:
    method = Arcus(50, G)
    tell(method, 0, {i: i % 9 for i in range(50)})
    before = method.target

    method.select(np.arange(50), 5, step=1, generator=generator())

    assert 0.0 < abs(method.target - before) <= 0.005 + 1e-12


def test_the_best_are_taken_in_order() -> None:
    chosen = best(np.array([10, 11, 12, 13]), np.array([0.1, 0.9, 0.5, 0.7]), 3, generator())

    assert chosen.tolist() == [11, 13, 12]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 30))
def test_the_best_are_those_of_a_whole_sort_also_where_scores_tie(scores: list[int], n: int) -> None:
    values, candidates = np.array(scores, dtype=float), np.arange(len(scores)) + 7

    order = np.lexsort((generator().random(len(scores)), -values))

    assert best(candidates, values, n, generator()).tolist() == candidates[order[:n]].tolist()
