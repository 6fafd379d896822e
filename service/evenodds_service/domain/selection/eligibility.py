"""Who may be chosen at a step: who rests, who is waited for, and who comes back where too few others remain."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.selection.batch import count_of

REST_SHARE = 0.05


def eligible(
    selected_N: IntArray,
    last_selected_N: IntArray,
    visits_N: IntArray,
    last_step_N: IntArray,
    *,
    step: int,
    cooldown_steps: int,
    max_visits: int,
) -> BoolArray:
    """Prompts that are rested and below the visit cap, bool [N]. A visit is a selection or an observed step."""
    allowed = ~resting(np.maximum(last_selected_N, last_step_N), step=step, rest=cooldown_steps)
    if max_visits:
        allowed &= np.maximum(selected_N, visits_N) < max_visits
    return allowed


def resting(last_seen_N: IntArray, *, step: int, rest: int) -> BoolArray:
    """Prompts that were seen at most `rest` steps ago, bool [N]; none where that is 0.

    Steps may come out of order: a prompt rests on both sides of the step that it was chosen for.
    """
    return np.asarray((rest > 0) & (last_seen_N >= 0) & (np.abs(step - last_seen_N) <= rest))


def outstanding(outstanding_step_N: IntArray, *, step: int, lease_steps: int) -> tuple[BoolArray, BoolArray]:
    """Which prompts are waited for, and which were lost: chosen, and no outcome within the lease; bool [N] each.

    Args:
        outstanding_step_N: The step for which a prompt was chosen without an outcome yet, -1 for none.
        step: The newest known.
        lease_steps: A prompt chosen for step t is waited for while step < t + lease_steps. 0: none is waited for, and
            none is lost.
    """
    chosen = (outstanding_step_N >= 0) & (lease_steps > 0)
    waited_for = chosen & (step - outstanding_step_N < lease_steps)
    return waited_for, chosen & ~waited_for


def rest_steps(n_prompts: int, batch_size: int) -> int:
    """For how many steps a chosen prompt rests unless a cooldown is set: a twentieth of an epoch.

    So at most a twentieth of the pool rests at a time. Chosen in a training (examples/grpo_from_scratch), not on
    recorded rates: those do not answer to the choice, and reward to roll out the same prompts again and again.
    """
    return math.floor(REST_SHARE * n_prompts / batch_size + 1e-9)


def held_back(
    eligible_N: BoolArray,
    held_N: BoolArray,
    since_N: IntArray,
    scores_N: FloatArray,
    *,
    batch_size: int,
    groups: Mapping[str, tuple[float, BoolArray]],
) -> BoolArray:
    """The eligible prompts without those held back, bool [N]. A trainer is not stopped by it: as many as are missing
    for the batch, or for a group's share of it, come back, those held back the longest first.

    Args:
        held_N: Who is waited for, or rests.
        since_N: The step since when.
        scores_N: Of those held back since the same step, the best come back first.
        groups: Least share and membership by group, as in `Shares.least`.
    """
    allowed_N = eligible_N & ~held_N
    wanted = [(count_of(share, batch_size), eligible_N & members_N) for share, members_N in groups.values()]
    for n, among_N in (*wanted, (batch_size, eligible_N)):
        missing = n - int((allowed_N & among_N).sum())
        if missing > 0:
            back = np.flatnonzero(among_N & ~allowed_N)
            allowed_N[back[np.lexsort((-scores_N[back], since_N[back]))[:missing]]] = True
    return allowed_N
