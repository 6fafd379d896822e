"""Rewards from agreement alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds import agreement


@pytest.mark.parametrize(
    ("answers", "rewards"),
    [
        (["42", "42", "41"], (1, 1, 0)),
        (["42", None, "42"], (1, 0, 1)),
        (["42", "41", "41", "42"], (0.5, 0.5, 0.5, 0.5)),  # who is right is as likely
        (["1", "2", "3"], (0, 0, 0)),
        ([None, None], (0, 0)),
        (["42"], ()),  # one answer says nothing
        ([], ()),
    ],
)
def test_the_answer_that_most_attempts_gave_is_rewarded(answers: list[str | None], rewards: tuple[float, ...]) -> None:
    assert agreement(answers) == rewards


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=2, max_size=12), st.randoms())
def test_rewards_go_with_their_answers_in_any_order(answers: list[str | None], chance: object) -> None:
    order = list(range(len(answers)))
    chance.shuffle(order)  # type: ignore[attr-defined]  # hypothesis names no type for its random

    rewards = agreement(answers)

    assert agreement([answers[i] for i in order]) == tuple(rewards[i] for i in order)
    assert all(0.0 <= reward <= 1.0 for reward in rewards)
    assert sum(rewards) <= len(answers)
