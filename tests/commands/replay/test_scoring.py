from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds_service.commands.replay.scoring import (
    RankStep,
    SelectStep,
    Spread,
    by_thirds,
    informative_share,
    mean_absolute_error,
    rank_figures,
    sampling_error,
    select_figures,
)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=50))
def test_thirds_are_contiguous_and_weigh_up_to_the_mean(numbers: list[float]) -> None:
    n = len(numbers)
    sizes = [n // 3, 2 * n // 3 - n // 3, n - 2 * n // 3]

    thirds = by_thirds(numbers)

    assert max(sizes) - min(sizes) <= 1
    assert thirds[0] == pytest.approx(float(np.mean(numbers[: sizes[0]])))
    assert sum(t * size for t, size in zip(thirds, sizes, strict=True)) / n == pytest.approx(float(np.mean(numbers)))


def test_thirds_leave_unknown_values_out() -> None:
    first, middle, last = by_thirds([0.2, math.nan, 0.5, 0.7, math.nan, math.nan])

    assert (first, middle) == pytest.approx((0.2, 0.6))
    assert math.isnan(last)


@given(st.integers(1, 16), st.data())
def test_informative_groups_have_some_but_not_all_successes(group_size: int, data: st.DataObject) -> None:
    successes = data.draw(st.lists(st.integers(0, group_size), min_size=1, max_size=40))

    expected = sum(0 < k < group_size for k in successes) / len(successes)

    assert informative_share(successes, group_size) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_absolute_error_is_the_mean_distance(pairs: list[tuple[float, float]]) -> None:
    expected = math.fsum(abs(p - q) for p, q in pairs) / len(pairs)

    assert mean_absolute_error(*zip(*pairs, strict=True)) == pytest.approx(expected)


def test_sampling_error_is_what_a_true_forecast_shows() -> None:
    chance = np.random.default_rng(0)
    probabilities = chance.random(128)

    shares = (chance.random((20_000, 128)) < probabilities).mean(axis=1)

    assert sampling_error(probabilities) == pytest.approx(np.abs(shares - probabilities.mean()).mean(), rel=0.03)
    assert sampling_error([0.0, 1.0]) == 0.0


def test_spread_over_seeds_is_the_mean_and_sample_deviation_of_known_values() -> None:
    spread = Spread.of([0.1, 0.3, math.nan])

    assert (spread.mean, spread.deviation) == pytest.approx((0.2, math.sqrt(0.02)))
    assert Spread.of([0.4]).mean == 0.4
    assert math.isnan(Spread.of([0.4]).deviation)
    assert math.isnan(Spread.of([math.nan]).mean)


def test_figures_of_the_rank_part() -> None:
    steps = [RankStep(0.1 * i, math.nan if i == 5 else 0.5, 0.3) for i in range(6)]

    figures = rank_figures(steps)

    assert figures["rank correlation first"] == pytest.approx(0.05)
    assert figures["rank correlation last"] == pytest.approx(0.45)
    assert figures["never-seen prompts last"] == 0.5
    assert figures["absolute error middle"] == pytest.approx(0.3)


def test_figures_of_the_select_part() -> None:
    steps = [SelectStep(0.5, 0.7, 0.03), SelectStep(0.5, 0.5, 0.03), SelectStep(1.0, 0.7, 0.03)]

    figures = select_figures(steps, n_prompts=20, visits=[3, 2, 1, 6], group_size=8)

    assert figures["informative share last"] == 1.0
    assert figures["forecast |error| first"] == pytest.approx(0.2)
    assert figures["forecast |error| last"] == pytest.approx(0.3)
    assert figures["forecast |error|"] == pytest.approx(0.5 / 3)
    assert figures["forecast bias"] == pytest.approx(-0.1 / 3)
    assert figures["use coverage"] == 0.2
    assert figures["use visits"] == 3.0
    # 12 groups of 8 attempts, two thirds of them informative.
    assert figures["use rollouts"] == pytest.approx(12.0)


def test_without_an_informative_group_the_rollouts_for_one_are_unknown() -> None:
    figures = select_figures([SelectStep(0.0, 0.1, 0.03)] * 3, n_prompts=9, visits=[1, 2], group_size=8)

    assert math.isnan(figures["use rollouts"])
