"""Alarms and the fallback: when they come, what they say, and when they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import special

from evenodds_service.domain.learning.checkpoint import from_bytes, to_bytes
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold, unseen_share
from evenodds_service.domain.learning.guardrails import (
    BLOCK_OBSERVATIONS,
    COVERAGE_SELECTIONS,
    FULL_BLOCK_OBSERVATIONS,
    MAX_GROUP_ALARMS,
    QUIET_SELECTIONS,
    SILENT_SELECTIONS,
    SKILL_BLOCKS,
    Alarm,
    Guardrails,
)
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

NAMES = ("math", "code", None)
MATH, CODE, NONE = range(3)
FLIP = 20


def alarms(
    guardrails: Guardrails, *, unseen: float = 0.0, is_mixed: bool = True, may_fall_back: bool = True
) -> dict[str, Alarm]:
    found = guardrails.alarms(NAMES, unseen_share=unseen, is_mixed=is_mixed, may_fall_back=may_fall_back)
    return {alarm.code: alarm for alarm in found}


def observe(guardrails: Guardrails, step: int, group: int, n: int, *, informative: int = 0, attempts: int = 8) -> None:
    guardrails.observe(step, np.full(n, float(attempts)), np.arange(n) < informative, np.full(n, group, dtype=np.int64))


def select(guardrails: Guardrails, step: int, groups: Sequence[int], *, fresh: int = 0) -> None:
    guardrails.select(step, np.arange(len(groups)) < fresh, np.array(groups, dtype=np.int64))


def test_a_new_run_has_no_alarms() -> None:
    assert alarms(Guardrails(), unseen=1.0) == {}
    assert Guardrails().fallback() is None


class TestSilentGroups:
    def test_a_group_without_an_informative_outcome_is_told_once_others_have_one(self) -> None:
        guardrails = Guardrails()
        observe(guardrails, 1, CODE, 63)
        observe(guardrails, 2, MATH, 4, informative=1)
        assert alarms(guardrails) == {}

        observe(guardrails, 3, CODE, 1)

        assert alarms(guardrails)["group_silent"] == Alarm(
            "group_silent",
            "category 'code': none of its last 64 outcomes was informative since step 1, while others' were: check its "
            "verifier and its difficulty, or lower its share with categories_at_most",
            since_step=1,
            value=64,
            limit=64,
        )

    def test_one_informative_outcome_ends_it(self) -> None:
        guardrails = Guardrails()
        observe(guardrails, 1, CODE, 100)
        observe(guardrails, 2, MATH, 4, informative=4)

        observe(guardrails, 3, CODE, 10, informative=1)

        assert alarms(guardrails) == {}

    def test_where_all_are_silent_no_group_is(self) -> None:
        guardrails = Guardrails()
        observe(guardrails, 0, MATH, 4, informative=4)
        for group in (MATH, CODE):
            observe(guardrails, 1, group, 100)

        assert alarms(guardrails) == {}

    def test_a_single_group_has_nobody_to_compare_with(self) -> None:
        """Even where a served model's step never moves on."""
        guardrails = Guardrails()
        observe(guardrails, 0, NONE, 10, informative=10)
        observe(guardrails, 0, NONE, 500)

        assert alarms(guardrails) == {}

    def test_a_group_that_is_selected_and_never_answered_is_silent_too(self) -> None:
        guardrails = Guardrails()
        for step in range(SILENT_SELECTIONS):
            assert alarms(guardrails) == {}
            select(guardrails, step, [MATH] * 16 + [NONE] * 16)
            observe(guardrails, step, MATH, 16, informative=8)

        alarm = alarms(guardrails)["group_silent"]
        assert alarm.message.startswith(
            "prompts without a category: none of its last 128 selected prompts was informative since step 0, while "
        )
        assert (alarm.since_step, alarm.value, alarm.limit) == (0, 128, 128)

    def test_single_attempts_say_nothing(self) -> None:
        guardrails = Guardrails()
        observe(guardrails, 0, CODE, 500, attempts=1)
        observe(guardrails, 0, MATH, 4, informative=4)

        assert alarms(guardrails) == {}

    def test_not_more_than_twenty_groups_are_named(self) -> None:
        guardrails = Guardrails()
        guardrails.observe(0, np.full(6_400, 8.0), np.zeros(6_400, dtype=bool), np.arange(6_400) % 100)
        guardrails.observe(0, np.array([8.0]), np.array([True]), np.array([100]))

        names = [f"g{i}" for i in range(101)]
        found = guardrails.alarms(names, unseen_share=0, is_mixed=True, may_fall_back=True)

        assert len(found) == MAX_GROUP_ALARMS


class TestStoppedOutcomes:
    def test_eight_selections_without_an_outcome_are_told(self) -> None:
        guardrails = Guardrails()
        select(guardrails, 4, [MATH])
        observe(guardrails, 4, MATH, 1)
        for step in range(5, 5 + QUIET_SELECTIONS):
            assert alarms(guardrails) == {}
            select(guardrails, step, [MATH])

        assert alarms(guardrails) == {
            "outcomes_stopped": Alarm(
                "outcomes_stopped",
                "8 batches were selected since step 5 and no outcome was observed: check that the trainer reports to "
                "POST /observe of this run",
                since_step=5,
                value=8,
                limit=8,
            )
        }

    def test_any_outcome_ends_it(self) -> None:
        guardrails = Guardrails()
        for step in range(QUIET_SELECTIONS):
            select(guardrails, step, [MATH])

        observe(guardrails, 3, CODE, 1)

        assert alarms(guardrails) == {}


class TestStalledCoverage:
    def test_sixteen_selections_without_new_prompts_are_told(self) -> None:
        guardrails = Guardrails()
        for step in range(COVERAGE_SELECTIONS):
            assert alarms(guardrails, unseen=0.9).keys() <= {"outcomes_stopped"}
            select(guardrails, step, [MATH] * 8)

        assert alarms(guardrails, unseen=0.9)["coverage_stalls"] == Alarm(
            "coverage_stalls",
            "of the 128 prompts in the last 16 selections 0 were new, though 90% of the pool was never tried: raise "
            "reprobe_share or optimism, or set max_visits",
            since_step=0,
            value=0.0,
            limit=0.01,
        )

    @pytest.mark.parametrize(("fresh", "unseen"), [(1, 0.9), (0, 0.005)])
    def test_not_where_there_are_new_ones_or_none_is_left(self, fresh: int, unseen: float) -> None:
        guardrails = Guardrails()
        for step in range(2 * COVERAGE_SELECTIONS):
            select(guardrails, step, [MATH] * 8, fresh=fresh)

        assert "coverage_stalls" not in alarms(guardrails, unseen=unseen)


class TestSkill:
    def test_blocks_end_with_a_step_once_they_are_full(self) -> None:
        guardrails = Guardrails()
        for step in range(6):
            guardrails.compare(step, 1.0, BLOCK_OBSERVATIONS // 2)

        assert guardrails.skill_counts.tolist() == [0, 0, 0, 0, 0, 64, 64, 64]
        assert guardrails.skill_nats.tolist() == [0, 0, 0, 0, 0, 2, 2, 2]

    def test_blocks_of_one_step_end_too(self) -> None:
        guardrails = Guardrails()
        for _ in range(FULL_BLOCK_OBSERVATIONS + 5):
            guardrails.compare(0, 0.5, 1)

        assert guardrails.skill_counts[-2:].tolist() == [FULL_BLOCK_OBSERVATIONS, 5]

    def test_no_alarm_before_the_window_is_full(self) -> None:
        guardrails = Guardrails()
        for step in range(SKILL_BLOCKS):
            assert alarms(guardrails) == {}
            guardrails.compare(step, -0.1, BLOCK_OBSERVATIONS)

        assert alarms(guardrails) == {
            "skill_not_positive": Alarm(
                "skill_not_positive",
                "over the newest 512 observations the model foresaw outcomes no better than flat MoPPS does (-0.8 "
                "nats): texts, categories or rates sent beforehand may mislead; compare GET /runs/{run}/report",
                since_step=7,
                value=float(np.full(SKILL_BLOCKS, -0.1).sum()),
                limit=0.0,
            )
        }
        assert guardrails.fallback() is None

    def test_without_a_mixture_there_is_no_skill_to_miss(self) -> None:
        guardrails = Guardrails()
        for step in range(SKILL_BLOCKS):
            guardrails.compare(step, -10.0, BLOCK_OBSERVATIONS)

        assert alarms(guardrails, is_mixed=False) == {}
        assert set(alarms(guardrails, may_fall_back=False)) == {"skill_not_positive"}
        assert set(alarms(guardrails)) == {"skill_not_positive", "fallback"}

    def test_the_fallback_says_why(self) -> None:
        guardrails = Guardrails()
        for step in range(SKILL_BLOCKS):
            guardrails.compare(step, 2.0 if step < 4 else -5.0, BLOCK_OBSERVATIONS)

        fallback = guardrails.fallback()

        assert fallback is not None
        assert fallback.since_step == 7
        assert fallback.reason == (
            "over the newest 512 observations the model's skill against flat MoPPS is -12.0 nats (limit -3.0), over "
            "the newer half of these -20.0: the choice is uniform since step 7, until the newer half is positive"
        )

    def test_the_fallback_ends_with_the_newer_half_and_the_alarm_with_the_whole(self) -> None:
        guardrails, raised = Guardrails(), []
        for step, nats in enumerate([-5.0] * 8 + [4.0] * 5):
            guardrails.compare(step, nats, BLOCK_OBSERVATIONS)
            raised.append(set(alarms(guardrails)))

        both, one = {"skill_not_positive", "fallback"}, {"skill_not_positive"}
        assert raised[7:] == [both, both, both, one, one, set()]

    def test_an_old_fault_that_was_mended_is_no_reason(self) -> None:
        guardrails = Guardrails()
        for step in range(SKILL_BLOCKS):
            guardrails.compare(step, -100.0 if step < 4 else 1.0, BLOCK_OBSERVATIONS)

        assert guardrails.fallback() is None


class Turning:
    """A world where one feature of the text says a lot, and from step 20 on the contrary. No prompt comes twice."""

    def __init__(self, make_block: MakeBlock, seed: int) -> None:
        rng = np.random.default_rng(seed)
        n, batch = 50 * 64, 64
        x = rng.normal(size=(n, 3))
        self.pool = Pool(surface_width=3, embedding_width=0)
        self.pool.append(make_block(n, surface=x))
        self.entries = [
            ObserveEntry(step + 2, step, prompts, k, np.full(batch, 8.0), (k > 0) & (k < 8))
            for step in range(50)
            for prompts in [np.arange(step * batch, (step + 1) * batch)]
            for k in [rng.binomial(8, special.expit((3 if step < FLIP else -3) * x[prompts, 0])).astype(np.float64)]
        ]
        self.state = fold(State(), PoolEntry(1, n), self.pool)


@pytest.mark.parametrize("seed", range(4))
def test_where_the_text_begins_to_mislead_the_choice_falls_back_and_comes_back(
    make_block: MakeBlock, seed: int
) -> None:
    world = Turning(make_block, seed)
    fallen = []
    for entry in world.entries:
        fold(world.state, entry, world.pool)
        if world.state.guardrails.fallback() is not None:
            fallen.append(entry.step)

    assert fallen == list(range(fallen[0], fallen[-1] + 1))
    assert FLIP < fallen[0] <= FLIP + 4
    assert FLIP + 6 < fallen[-1] < FLIP + 20


def test_a_replica_that_starts_from_a_checkpoint_falls_back_at_the_same_position(make_block: MakeBlock) -> None:
    world = Turning(make_block, 0)
    for entry in world.entries[: FLIP + 1]:
        fold(world.state, entry, world.pool)
    replica = from_bytes(to_bytes(world.state))

    for entry in world.entries[FLIP + 1 :]:
        for state in (world.state, replica):
            fold(state, entry, world.pool)
        assert replica.guardrails.fallback() == world.state.guardrails.fallback()
        assert replica.guardrails.alarms(
            NAMES, unseen_share=unseen_share(replica), is_mixed=True, may_fall_back=True
        ) == (
            world.state.guardrails.alarms(
                NAMES, unseen_share=unseen_share(world.state), is_mixed=True, may_fall_back=True
            )
        )
    assert to_bytes(replica) == to_bytes(world.state)
