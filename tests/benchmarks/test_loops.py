from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from benchmarks.loops import Reliability, closed_loop, log_loss, open_loop, thirds
from benchmarks.rivals import Forecast, MoPPS, Uniform
from benchmarks.worlds import World

from evenodds_service.commands.replay.driving import Plan
from evenodds_service.domain.arrays import FloatArray, IntArray


class Oracle:
    """Knows the rates of the made world."""

    rates = np.repeat([0.0, 0.5, 1.0], 20)

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        np.testing.assert_array_equal(successes / attempts, self.rates[prompts])

    def predict(self) -> Forecast:
        return Forecast(self.rates, (self.rates == 0.5).astype(float))

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        return candidates[np.argsort(self.rates[candidates] != 0.5, kind="stable")[:batch_size]]


def test_an_oracle_ranks_without_error_in_the_open_loop(plan: Plan) -> None:
    figures, reliability = open_loop(Oracle(), plan, seed=0, stages=thirds(plan.n_steps, first=1))

    assert figures["spearman last"] == pytest.approx(1.0)
    assert figures["MAE first"] == 0.0
    assert figures["calibration error"] == pytest.approx(0.0)
    assert reliability.counts.sum() == plan.rank_steps * plan.recording.n_prompts


def test_an_oracle_needs_one_group_for_an_informative_one(plan: Plan) -> None:
    figures, curve = closed_loop(Oracle(), plan, seed=0, stages=thirds(plan.n_steps, first=0))

    assert figures["groups per informative whole"] == 1.0
    assert figures["forecast error whole"] == 0.0
    assert figures["coverage"] == pytest.approx(12 / 60)
    assert curve.tolist() == [1.0] * plan.n_steps


def test_dynamic_sampling_pays_for_the_groups_it_throws_away(plan: Plan) -> None:
    stages = thirds(plan.n_steps, first=0)
    once, _ = closed_loop(Uniform(60), plan, seed=0, stages=stages)
    filled, _ = closed_loop(Uniform(60), plan, seed=0, stages=stages, fills_batch=True)

    assert filled["groups per informative whole"] >= 3.0  # a third is informative, and batches come whole
    assert filled["groups per informative whole"] >= once["groups per informative whole"]
    assert filled["coverage"] > once["coverage"] - 1e-9


def test_without_repeats_no_prompt_is_chosen_twice(plan: Plan) -> None:
    stages = thirds(5, first=0)

    figures, curve = closed_loop(MoPPS(60, 8), replace(plan, repeats=False), seed=0, stages=stages)

    assert figures["visits"] == 1.0
    assert len(curve) == 5  # twelve of sixty prompts a step


def test_held_out_groups_are_never_observed(world: World, plan: Plan) -> None:
    held_out = world.held_out(0, 0.4)
    method = MoPPS(60, 8)

    open_loop(method, plan, seed=0, stages=thirds(plan.n_steps, first=1), held_out_N=held_out)

    assert held_out.sum() == 24  # two of five groups
    assert (method.a_N[held_out] == 1.0).all()
    assert (method.a_N[~held_out] + method.b_N[~held_out]).sum() > 2 * (~held_out).sum()


def test_reliability_bins_include_both_ends() -> None:
    reliability = Reliability.new()
    reliability.add(np.array([0.0, 0.05, 1.0]), np.array([0.0, 0.1, 0.5]))

    assert reliability.counts[0] == 2
    assert reliability.counts[-1] == 1
    assert reliability.error() == pytest.approx((0.05 + 0.5) / 3)


def test_log_loss_is_the_cross_entropy() -> None:
    assert log_loss(np.array([0.5, 0.25]), np.array([1.0, 0.5])) == pytest.approx(
        -0.5 * (np.log(0.5) + 0.5 * np.log(0.25) + 0.5 * np.log(0.75))
    )


def test_thirds_cover_the_steps_without_gaps() -> None:
    assert thirds(44, first=1) == [("first", 1, 14), ("middle", 15, 28), ("last", 29, 43)]
