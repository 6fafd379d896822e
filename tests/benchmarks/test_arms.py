from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from benchmarks.arms import InProportion, Rule, Ruled
from benchmarks.contenders import Gps
from benchmarks.worlds import World
from scipy import stats

from evenodds_service.domain.arrays import FloatArray, IntArray


@dataclass
class Made:
    world: World
    batch_size: int = 8
    seed: int = 0

    def rates(self, prompts: IntArray) -> FloatArray:
        return np.full(len(prompts), 0.5)


def test_a_refit_of_the_arms_reads_each_outcome_once(world: World) -> None:
    arm, told_once = Ruled(Made(world), Rule(refit=1)), Gps(world)
    prompts = np.arange(60)
    successes = np.repeat([0.0, 4.0, 8.0], 20)
    for step in range(3):  # the third passes the number at which a worker fits first
        for method in (arm, told_once):
            method.observe(step, prompts, successes, np.full(60, 8.0))

    told_once.refit(2)

    assert (arm.weights() == told_once.weights()).all()
    assert (arm.predict().mean_N == told_once.predict().mean_N).all()


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
