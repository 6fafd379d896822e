"""The whole decision for a step: who may be chosen, who rests or is waited for, and the batch.

Pure: a function of state, pool, settings and request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.guardrails import Fallback
from evenodds_service.domain.selection.batch import Choice, _share
from evenodds_service.domain.settings import Acquisition, Predictor

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
        groups: As in `choose`.
    """
    allowed_N = eligible_N & ~held_N
    wanted = [(_share(share, batch_size), eligible_N & members_N) for share, members_N in groups.values()]
    for n, among_N in (*wanted, (batch_size, eligible_N)):
        missing = n - int((allowed_N & among_N).sum())
        if missing > 0:
            back = np.flatnonzero(among_N & ~allowed_N)
            allowed_N[back[np.lexsort((-scores_N[back], since_N[back]))[:missing]]] = True
    return allowed_N


@dataclass(frozen=True, slots=True)
class SelectArguments:
    """Everything that a choice depends on besides the state."""

    step: int
    batch_size: int
    seed: int
    predictor: Predictor
    acquisition: Acquisition
    group_size: int
    target_rate: float | None
    optimism: float
    diversity: float
    cooldown_steps: int | None
    max_visits: int
    lease_steps: int
    allow_outstanding: bool
    candidates: Sequence[str] | None
    exclude: Sequence[str]
    groups: Mapping[str, float]
    groups_at_most: Mapping[str, float]
    are_groups_strict: bool
    reprobe_share: float
    control_share: float
    may_fall_back: bool


@dataclass(frozen=True, slots=True)
class Chosen:
    """A batch, what is believed of its prompts, and the state that it was chosen in.

    Attributes:
        a, b: Beta parameters of the beliefs, [B].
        prompt_ids, groups: Of the prompts, B of each.
        fallback: Why the batch is uniform, if it was to be another.
        position, model_version: Of that state.
    """

    choice: Choice
    a: FloatArray
    b: FloatArray
    prompt_ids: tuple[str, ...]
    groups: tuple[str | None, ...]
    fallback: Fallback | None
    position: int
    model_version: int


@dataclass(frozen=True, slots=True)
class _Allowed:
    """Who may be chosen: bool [N] each, and int64 [N].

    Attributes:
        eligible: Rested if a cooldown is set, below the visit cap, among the candidates.
        waited_for: Chosen before, and the outcome has not come.
        resting: Chosen a short while ago, where no cooldown is set.
        last_seen_N: Step of the last selection or observation that counts, -1 for never.
    """

    eligible: BoolArray
    waited_for: BoolArray
    resting: BoolArray
    last_seen_N: IntArray


def _members(shares: Mapping[str, float], pool: Pool, n_prompts: int) -> dict[str, tuple[float, BoolArray]]:
    return {group: (share, pool.members(group, n_prompts)) for group, share in shares.items()}


def _in_words(groups_at_most: Mapping[str, float]) -> str:
    shares = ", ".join(f"{group!r}: {share:g}" for group, share in list(groups_at_most.items())[:5])
    more = ", ..." if len(groups_at_most) > 5 else ""
    return f", groups_at_most {{{shares}{more}}}" if groups_at_most else ""
