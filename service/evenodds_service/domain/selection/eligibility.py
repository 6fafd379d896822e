"""Who may be chosen at a step: who rests, who is waited for, and who comes back where too few others remain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.selection.batch import count_of, most_of, n_fitting
from evenodds_service.domain.settings import RunSettings

REST_STEPS = 25
"""Steps that a chosen prompt rests. A prompt that comes back before the policy has moved on teaches little: with
batches of 8 from 6,000 a rest of 4 steps loses to uniform choice, and rests of 18 to 75 steps are alike
(`benchmarks.trainings`)."""

REST_MOST_OF_EPOCH = 0.4
"""The rest is at most this share of an epoch, so that a small pool leaves a choice: in a pool of 300 rests of a quarter
to a half of an epoch are best."""


@dataclass(frozen=True, slots=True, eq=False)
class Allowed:
    """Who may be chosen if need be, bool [N] each, and int64 [N].

    Attributes:
        eligible_N: Rested if a cooldown is set, among the candidates, not excluded.
        spent_N: Visited as often as the cap allows. A visit is a selection or an observed step.
        visits_N: How often, int64 [N].
        waited_for_N: Chosen before, and the outcome has not come.
        outstanding_step_N: For which step, -1 for none.
        last_seen_N: Step of the last selection or observation that counts, -1 for never.
    """

    eligible_N: BoolArray
    spent_N: BoolArray
    visits_N: IntArray
    waited_for_N: BoolArray
    outstanding_step_N: IntArray
    last_seen_N: IntArray

    def of(self, rows: IntArray) -> Allowed:
        """The same of these prompts."""
        return Allowed(*(getattr(self, each.name)[rows] for each in fields(self)))


def allowed_by(
    state: State,
    settings: RunSettings,
    *,
    step: int,
    candidates: IntArray | None,
    exclude: IntArray,
) -> Allowed:
    """Who of the pool may be chosen if need be. Arguments as in `SelectionRequest`."""
    waited_for, lost = outstanding(
        state.outstanding_step_N, step=max(step, state.head_step), lease_steps=settings.lease_steps
    )
    selected, last_selected = state.selected_N, state.last_selected_N
    if lost.any():  # whose outcome never came was not seen: it neither rests nor has spent a visit
        selected, last_selected = selected - lost, np.where(lost, -1, last_selected)
    last_seen = np.maximum(last_selected, state.last_step_N)
    may = left_by(state.n_prompts, candidates=candidates, exclude=exclude)
    may &= ~resting(last_seen, step=step, rest=settings.cooldown_steps or 0)
    visits = np.maximum(selected, state.visits_N)
    spent = visits >= settings.max_visits if settings.max_visits > 0 else np.zeros(len(visits), dtype=bool)
    return Allowed(may, spent, visits, waited_for, state.outstanding_step_N, last_seen)


def left_by(n_prompts: int, *, candidates: IntArray | None, exclude: IntArray) -> BoolArray:
    """The prompts that a request leaves to choose among, bool [N]. Arguments as in `SelectionRequest`."""
    left_N = np.ones(n_prompts, dtype=bool)
    if candidates is not None:
        left_N[:] = False
        left_N[candidates] = True
    left_N[exclude] = False
    return left_N


def resting(last_seen_N: IntArray, *, step: int, rest: int) -> BoolArray:
    """Prompts that were seen at most `rest` steps ago, bool [N]; none where that is 0.

    Steps may come out of order: a prompt rests on both sides of the step that it was chosen for.
    """
    if rest <= 0:
        return np.zeros(len(last_seen_N), dtype=bool)
    return np.asarray((last_seen_N >= max(0, step - rest)) & (last_seen_N <= step + rest))


def outstanding(outstanding_step_N: IntArray, *, step: int, lease_steps: int) -> tuple[BoolArray, BoolArray]:
    """Which prompts are waited for, and which were lost: chosen, and no outcome within the lease; bool [N] each.

    Args:
        outstanding_step_N: The step for which a prompt was chosen without an outcome yet, -1 for none.
        step: The newest known.
        lease_steps: A prompt chosen for step t is waited for while step < t + lease_steps. 0: none is waited for, and
            none is lost.
    """
    if lease_steps <= 0:
        return np.zeros(len(outstanding_step_N), dtype=bool), np.zeros(len(outstanding_step_N), dtype=bool)
    waited_for = outstanding_step_N >= max(0, step - lease_steps + 1)
    return waited_for, (outstanding_step_N >= 0) & ~waited_for


def rest_steps(n_prompts: int, batch_size: int) -> int:
    """For how many steps a chosen prompt rests unless a cooldown is set. An epoch has n_prompts / batch_size steps.

    Chosen in trainings, not on recorded rates: those do not answer to the choice, and reward to roll out the same
    prompts again and again.
    """
    return min(REST_STEPS, math.floor(REST_MOST_OF_EPOCH * n_prompts / batch_size + 1e-9))


def held_back(
    eligible_N: BoolArray,
    held_N: BoolArray,
    since_N: IntArray,
    *,
    scores_N: FloatArray,
    batch_size: int,
    groups: Mapping[str, tuple[float, BoolArray]],
    caps: Mapping[str, tuple[float, BoolArray]],
    all_alike: bool = False,
) -> BoolArray:
    """The eligible prompts without those held back, bool [N]. A trainer is not stopped by it: as many as are missing
    for the batch, or for a group's share of it, come back, those held back the longest first.

    Args:
        held_N: Who is waited for, rests, or had its visits.
        since_N: The step since when; or how many visits.
        scores_N: Of those held back since the same step, the best come back first.
        groups: Least share and membership by group, as in `Shares.least`.
        caps: Largest share and membership by group, as in `Shares.most`. More of a group than its share do not help.
        all_alike: Of those held back since the same step all come back where one does, and leave a choice.
    """
    allowed_N = eligible_N & ~held_N
    most = [(most_of(share, batch_size), members_N) for share, members_N in caps.values()]
    wanted = [(count_of(share, batch_size), eligible_N & members_N) for share, members_N in groups.values()]
    for n, among_N in (*wanted, (batch_size, eligible_N)):
        missing = n - n_fitting(allowed_N & among_N, most)
        if missing > 0:
            held = np.flatnonzero(among_N & ~allowed_N)
            held = held[np.lexsort((-scores_N[held], since_N[held]))]
            helps = np.ones(len(held), dtype=bool)
            is_open = helps.copy()  # whether its group may have more
            for cap, members_N in most:
                room = max(cap - int(np.count_nonzero(allowed_N & members_N)), 0)
                of_group = members_N[held]
                helps[of_group] = np.arange(int(of_group.sum())) < room
                is_open[of_group] = room > 0
            back = held[helps][:missing]
            if all_alike and len(back):
                back = held[is_open & (since_N[held] <= since_N[back[-1]])]
            allowed_N[back] = True
    return allowed_N
