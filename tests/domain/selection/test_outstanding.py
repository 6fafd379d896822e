"""Prompts that were chosen and whose outcomes have not come: when they are waited for, and what an outcome settles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry
from evenodds_service.domain.selection.batch import most_of, n_fitting
from evenodds_service.domain.selection.eligibility import held_back, outstanding, resting

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

N = 10


class Log:
    """Each call folds the next entry."""

    def __init__(self, make_block: MakeBlock) -> None:
        self.pool = Pool(surface_width=0, embedding_width=0)
        self.pool.append(make_block(N))
        self.state = fold(State(), PoolEntry(1, N), self.pool)

    def select(self, step: int, *prompts: int) -> None:
        fold(self.state, SelectEntry(self.state.position + 1, step, np.array(prompts)), self.pool)

    def observe(self, step: int, *prompts: int, of_selection: int | None = None) -> None:
        n = len(prompts)
        entry = ObserveEntry(
            self.state.position + 1,
            step,
            np.array(prompts),
            np.ones(n),
            np.full(n, 2.0),
            np.ones(n, dtype=bool),
            selection_id=None if of_selection is None else f"s{of_selection}",
            selection_step=of_selection,
        )
        fold(self.state, entry, self.pool)

    def outstanding(self) -> dict[int, int]:
        """The step for which each prompt is outstanding."""
        steps = self.state.outstanding_step_N
        return {int(i): int(steps[i]) for i in np.flatnonzero(steps >= 0)}


@pytest.fixture
def log(make_block: MakeBlock) -> Log:
    return Log(make_block)


def test_a_prompt_is_outstanding_from_its_choice_to_its_outcome(log: Log) -> None:
    log.select(3, 0, 1, 2)
    assert log.outstanding() == {0: 3, 1: 3, 2: 3}

    log.observe(3, 1, 5)

    assert log.outstanding() == {0: 3, 2: 3}


@pytest.mark.parametrize("step", [0, 3, 9])
def test_an_outcome_settles_the_choice_whichever_policy_made_it(log: Log, step: int) -> None:
    log.select(3, 0)
    log.select(4, 1)

    log.observe(step, 0)
    log.observe(step, 1, of_selection=4)

    assert log.outstanding() == {}


def test_an_outcome_of_an_older_selection_does_not_settle_a_newer_choice(log: Log) -> None:
    log.select(3, 0)
    log.select(20, 0)

    log.observe(3, 0, of_selection=3)
    assert log.outstanding() == {0: 20}
    log.observe(20, 0, of_selection=20)

    assert log.outstanding() == {}
    assert log.state.attempts_N[0] == 4


def test_a_choice_whose_outcome_never_came_is_no_visit_once_the_prompt_is_chosen_again(log: Log) -> None:
    log.select(3, 0, 1)
    log.observe(3, 1)

    log.select(20, 0, 1)

    assert log.state.selected_N[:2].tolist() == [1, 2]


def test_an_outcome_that_was_waited_for_is_a_visit_however_late(log: Log) -> None:
    log.select(5, 0)
    log.observe(5, 0, of_selection=5)
    log.select(3, 0)

    log.observe(3, 0, of_selection=3)
    log.observe(3, 0, of_selection=3)  # the rest of it

    assert log.state.visits_N[0] == 2
    assert log.state.last_step_N[0] == 5


def test_steps_may_be_chosen_in_any_order(log: Log) -> None:
    log.select(5, 0)
    log.select(3, 1)
    log.select(4, 0)

    assert log.outstanding() == {0: 5, 1: 3}
    assert log.state.last_selected_N[:2].tolist() == [5, 3]


def test_new_prompts_are_not_outstanding(make_block: MakeBlock) -> None:
    pool = Pool(surface_width=0, embedding_width=0)
    pool.append(make_block(N))
    state = fold(State(), PoolEntry(1, 4), pool)
    fold(state, PoolEntry(2, N), pool)

    assert state.outstanding_step_N.tolist() == [-1] * N


@pytest.mark.parametrize(
    ("step", "waited_for", "lost"),
    [(5, [0, 1], []), (7, [0, 1], []), (8, [1], [0]), (9, [1], [0]), (10, [], [0, 1]), (0, [0, 1], [])],
)
def test_a_prompt_is_waited_for_as_long_as_its_lease(step: int, waited_for: list[int], lost: list[int]) -> None:
    waiting, gone = outstanding(np.array([5, 7, -1]), step=step, lease_steps=3)

    assert np.flatnonzero(waiting).tolist() == waited_for
    assert np.flatnonzero(gone).tolist() == lost


def test_without_a_lease_none_is_waited_for_or_lost() -> None:
    waiting, gone = outstanding(np.array([5, -1]), step=9, lease_steps=0)

    assert not waiting.any()
    assert not gone.any()


def allowed(steps: list[int], batch_size: int, **groups: tuple[float, list[bool]]) -> list[int]:
    """Of prompts outstanding since these steps (-1: not), all eligible, the last the best."""
    step_N, scores_N = np.array(steps), np.arange(len(steps), dtype=float)
    members = {name: (share, np.array(members)) for name, (share, members) in groups.items()}
    everyone = np.ones(len(steps), dtype=bool)
    may = held_back(everyone, step_N >= 0, step_N, scores_N=scores_N, batch_size=batch_size, groups=members, caps={})
    return np.flatnonzero(may).tolist()


def test_where_enough_others_remain_none_that_is_waited_for_is_allowed() -> None:
    assert allowed([4, -1, 3, -1, -1], 3) == [1, 3, 4]


def test_where_too_few_remain_those_waited_for_the_longest_come_back_and_of_one_step_the_best() -> None:
    assert allowed([4, -1, 3, 2, 4], 2) == [1, 3]
    assert allowed([4, -1, 3, 2, 4], 3) == [1, 2, 3]
    assert allowed([4, -1, 3, 2, 4], 4) == [1, 2, 3, 4]
    assert allowed([4, -1, 3, 2, 4], 9) == [0, 1, 2, 3, 4]


def test_all_that_rest_since_the_same_step_come_back_together_so_that_there_is_a_choice() -> None:
    since_N, held_N = np.array([4, 9, 3, 2, 4, 4]), np.array([True, False, True, True, True, True])

    def back(n: int) -> list[int]:
        everyone, scores_N = np.ones(6, dtype=bool), np.arange(6.0)
        may = held_back(everyone, held_N, since_N, scores_N=scores_N, batch_size=n, groups={}, caps={}, all_alike=True)
        return np.flatnonzero(may).tolist()

    assert back(2) == [1, 3]
    assert back(3) == [1, 2, 3]
    assert back(4) == [0, 1, 2, 3, 4, 5]


def test_a_group_whose_others_are_too_few_for_its_share_gets_its_own_back() -> None:
    members = [True, True, True, False, False, False, False]

    assert allowed([7, 6, -1, 1, -1, -1, -1], 4, g=(0.25, members)) == [2, 4, 5, 6]
    assert allowed([7, 6, -1, 1, -1, -1, -1], 4, g=(0.5, members)) == [1, 2, 4, 5, 6]
    assert allowed([7, 6, -1, 1, -1, -1, -1], 6, g=(0.34, members)) == [1, 2, 3, 4, 5, 6]


@given(
    steps=st.lists(st.integers(-1, 6), min_size=1, max_size=20),
    eligible_N=st.lists(st.booleans(), min_size=20, max_size=20),
    batch_size=st.integers(1, 20),
)
def test_a_batch_is_short_only_where_all_eligible_together_are(
    steps: list[int], eligible_N: list[bool], batch_size: int
) -> None:
    step_N, may = np.array(steps), np.array(eligible_N[: len(steps)])
    waiting = step_N >= 0

    allowed_N = held_back(
        may, waiting, step_N, scores_N=np.zeros(len(steps)), batch_size=batch_size, groups={}, caps={}
    )

    assert not (allowed_N & ~may).any()
    assert (allowed_N | waiting | ~may).all()
    assert allowed_N.sum() == max((may & ~waiting).sum(), min(batch_size, may.sum()))
    back, left = step_N[allowed_N & waiting], step_N[may & waiting & ~allowed_N]
    if len(back):
        assert back.max() <= left.min(initial=99)


@pytest.mark.parametrize("all_alike", [False, True])
@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 9), st.sampled_from("abc")), min_size=1, max_size=40),
    st.integers(1, 8),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_those_come_back_that_a_batch_can_have_under_its_caps(
    all_alike: bool, prompts: list[tuple[int, str]], batch_size: int, most_of_a: float, most_of_b: float
) -> None:
    since_N = np.array([since for since, _ in prompts])
    held_N, everyone = since_N >= 0, np.ones(len(prompts), dtype=bool)
    of = {name: np.array([group == name for _, group in prompts]) for name in "ab"}
    caps = {"a": (most_of_a, of["a"]), "b": (most_of_b, of["b"])}
    most = [(most_of(share, batch_size), members_N) for share, members_N in caps.values()]

    may = held_back(
        everyone,
        held_N,
        since_N,
        scores_N=np.zeros(len(prompts)),
        batch_size=batch_size,
        groups={},
        caps=caps,
        all_alike=all_alike,
    )

    assert (may | held_N).all()
    assert min(n_fitting(may, most), batch_size) == min(n_fitting(everyone, most), batch_size)
    for cap, members_N in most:
        rested = int((members_N & ~held_N).sum())
        if rested >= cap:  # nobody needs more of this group
            assert not (may & held_N & members_N).any()
        elif not all_alike:
            assert int((may & members_N).sum()) <= cap
    if n_fitting(~held_N, most) >= batch_size:
        assert not (may & held_N).any()


def test_a_prompt_rests_on_both_sides_of_its_step() -> None:
    rested = [bool(resting(np.array([10]), step=step, rest=2)[0]) for step in range(6, 15)]

    assert rested == [False, False, True, True, True, True, True, False, False]
