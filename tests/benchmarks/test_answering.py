from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from benchmarks.answering import AnsweringPolicy
from benchmarks.loops import closed_loop, thirds
from benchmarks.rivals import MoPPS, Uniform
from benchmarks.worlds import World

from evenodds_service.commands.replay.driving import Plan
from evenodds_service.commands.replay.recordings import Recording


@pytest.fixture(scope="module")
def improving(world: World) -> Recording:
    """Prompts begin at 0, a quarter and a half, and are solved at the ninth visit but for the first third."""
    share = np.linspace(0.0, 1.0, 9)[:, None]
    begin, end = np.repeat([0, 2, 4], 20), np.repeat([0, 8, 8], 20)
    return replace(world.recording, successes_V_N=np.rint(begin + share * (end - begin)).astype(np.int64))


def test_only_what_is_learned_from_moves_where_a_visit_moves_its_own_prompt_alone(improving: Recording) -> None:
    policy = AnsweringPolicy.of(improving, own=1.0)
    learned = np.zeros(60, dtype=np.int64)
    before = policy.rates(learned)
    learned[[25, 45]] = 3

    risen = policy.rates(learned) - before

    assert (risen[[25, 45]] > 0.1).all()
    np.testing.assert_array_equal(np.delete(risen, [25, 45]), 0.0)


def test_alike_visits_of_all_prompts_give_the_recorded_rates_however_much_is_a_prompts_own(
    improving: Recording,
) -> None:
    learned = np.full(60, 4)

    rates = [
        replace(AnsweringPolicy.of(improving, own=own), informative_share=1.0).rates(learned) for own in (0.0, 0.5, 1.0)
    ]

    np.testing.assert_allclose(rates, np.broadcast_to(AnsweringPolicy.of(improving, own=1.0).rates_V_N[4], (3, 60)))


def test_outcomes_come_at_the_rate_of_the_moment_and_by_the_same_chance(improving: Recording) -> None:
    policy = AnsweringPolicy.of(improving, own=1.0)
    few, many = np.zeros(60, dtype=np.int64), np.full(60, 8)

    early = np.stack([policy.outcomes(few, seed=0, step=step, group_size=8) for step in range(200)])
    late = np.stack([policy.outcomes(many, seed=0, step=step, group_size=8) for step in range(200)])

    np.testing.assert_allclose(early.mean(axis=0) / 8, policy.rates(few), atol=0.06)
    assert (late >= early).all()  # a rate that rose loses no attempt


def test_a_closed_loop_says_what_the_policy_gained(improving: Recording, plan: Plan) -> None:
    plan, stages = replace(plan, recording=improving), thirds(9, first=0)
    policy = AnsweringPolicy.of(improving, own=1.0)

    drawn, _ = closed_loop(Uniform(60), plan, seed=0, stages=stages, policy=policy)
    chosen, _ = closed_loop(MoPPS(60, 8, score="yield"), plan, seed=0, stages=stages, policy=policy)

    assert chosen["gain"] > drawn["gain"] > 0.0
    assert np.isnan(closed_loop(Uniform(60), plan, seed=0, stages=stages)[0]["gain"])
