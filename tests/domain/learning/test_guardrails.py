"""The skill against flat MoPPS and the fallback: when it comes, what it says, and when it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import special

from evenodds_service.domain.learning.checkpoint import from_bytes, to_bytes
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.guardrails import (
    BLOCK_OBSERVATIONS,
    FULL_BLOCK_OBSERVATIONS,
    SKILL_BLOCKS,
    Guardrails,
)
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

FLIP = 20


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

    def test_nothing_is_said_before_the_window_is_full(self) -> None:
        guardrails = Guardrails()
        for step in range(SKILL_BLOCKS):
            assert guardrails.skill_since == -1
            guardrails.compare(step, -0.1, BLOCK_OBSERVATIONS)

        assert guardrails.skill_since == 7
        assert guardrails.fallback() is None

    def test_the_fallback_says_why(self) -> None:
        guardrails = Guardrails()
        for step in range(SKILL_BLOCKS):
            guardrails.compare(step, 2.0 if step < 4 else -5.0, BLOCK_OBSERVATIONS)

        fallback = guardrails.fallback()

        assert fallback is not None
        assert fallback.since_step == 7
        assert fallback.reason == (
            "over the newest 512 observations the model's skill against flat MoPPS is -12.0 nats (limit -3.0), and "
            "-20.0 over their newer half. Batches are drawn uniformly since step 7, until the skill of the newer "
            "half is "
            "positive"
        )

    def test_the_fallback_ends_with_the_newer_half_and_the_note_with_the_whole(self) -> None:
        guardrails, raised = Guardrails(), []
        for step, nats in enumerate([-5.0] * 8 + [4.0] * 5):
            guardrails.compare(step, nats, BLOCK_OBSERVATIONS)
            raised.append((guardrails.skill_since >= 0, guardrails.fallback() is not None))

        both, one = (True, True), (True, False)
        assert raised[7:] == [both, both, both, one, one, (False, False)]

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
    assert FLIP + 4 <= fallen[-1] < FLIP + 20  # after that the model has learned what misleads now


def test_a_replica_that_starts_from_a_checkpoint_falls_back_at_the_same_position(make_block: MakeBlock) -> None:
    world = Turning(make_block, 0)
    for entry in world.entries[: FLIP + 1]:
        fold(world.state, entry, world.pool)
    replica = from_bytes(to_bytes(world.state))

    for entry in world.entries[FLIP + 1 :]:
        for state in (world.state, replica):
            fold(state, entry, world.pool)
        assert replica.guardrails.fallback() == world.state.guardrails.fallback()
    assert to_bytes(replica) == to_bytes(world.state)
