from __future__ import annotations

import numpy as np
from benchmarks.arms import InProportion
from scipy import stats


def test_draws_in_proportion_follow_the_power_of_the_score() -> None:
    scores_N = np.array([0.9, 0.6, 0.3, 0.0, 0.9])
    among_N = np.array([True, True, True, True, False])
    picker, generator, times = InProportion(3, factor=1), np.random.default_rng(0), np.zeros(5)

    for _ in range(4_000):
        times[picker(scores_N, generator.random(5), among_N, 1)] += 1

    expected = np.array([0.9, 0.6, 0.3]) ** 3
    assert times[3:].tolist() == [0, 0]
    assert stats.chisquare(times[:3], 4_000 * expected / expected.sum()).pvalue > 0.01


def test_draws_in_proportion_take_each_prompt_once_and_all_if_there_are_no_more() -> None:
    among_N = np.arange(40) % 2 == 0

    drawn = InProportion(3)(np.linspace(0, 1, 40), np.random.default_rng(0).random(40), among_N, 20)

    assert np.sort(drawn).tolist() == np.flatnonzero(among_N).tolist()
