"""Which prompts to spend rollouts on: scores, diversity, quotas, forecast (algorithm section 4).

Pure functions of beliefs, features and the selection history; chance comes in as a generator, so that a choice is
deterministic in (state, arguments, seed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evenodds_service.domain.distributions import target_moments
from evenodds_service.domain.types import Acquisition, BoolArray, FloatArray, IntArray

LEAST_RECENTLY_SEEN_SHARE = 0.05
SHORTLIST_FACTOR, SHORTLIST_LEAST = 8, 2_048
_ROUNDS = 64


class NotEnoughPrompts(ValueError):
    """Fewer prompts may be selected than were asked for. `group` is None for the batch as a whole."""

    def __init__(self, *, asked: int, eligible: int, group: str | None = None, advice: str = "") -> None:
        self.asked, self.eligible, self.group = asked, eligible, group
        what = "batch_size" if group is None else f"groups: the share of {group!r}"
        super().__init__(f"{what} asks for {asked} prompts, {eligible} may be selected{advice}")


@dataclass(frozen=True, slots=True)
class Choice:
    """A batch.

    Attributes:
        prompts: int64 [B], in the order of choice.
        informative_probabilities: Of these prompts, [B].
        pad_to: How many prompts to take, by score, for B informative groups in expectation; None if all eligible
            prompts together do not give that many.
    """

    prompts: IntArray
    informative_probabilities: FloatArray
    pad_to: int | None

    @property
    def informative_share(self) -> float:
        """Forecast of the share of informative groups in the batch."""
        return float(self.informative_probabilities.mean())


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
    allowed = np.ones(len(selected_N), dtype=bool)
    if cooldown_steps:
        last = np.maximum(last_selected_N, last_step_N)
        allowed &= (last < 0) | (step - last > cooldown_steps)
    if max_visits:
        allowed &= np.maximum(selected_N, visits_N) < max_visits
    return allowed


def scores(
    a_N: FloatArray,
    b_N: FloatArray,
    informative_N: FloatArray,
    informative_std_N: FloatArray,
    *,
    acquisition: Acquisition,
    target_rate: float | None,
    optimism: float,
    generator: np.random.Generator,
) -> FloatArray:
    """How much each prompt is worth choosing, [N]; higher is better.

    `yield`: V_G + c sd(V_G), or with a target rate the expected closeness plus c times its sd. `thompson`:
    -|p~ - target| for one draw p~ of each belief (MoPPS as published, target .5). `paper`: -(p - target)^2 of the
    mean (GPS Eq. 12, target .5). `uniform`: chance.

    Args:
        a_N, b_N: Beta parameters of the beliefs.
        informative_N, informative_std_N: From `informative_moments`.
        target_rate: In (0, 1), or None.
        optimism: c, at least 0.
    """
    if acquisition == "uniform":
        return generator.random(len(a_N))
    target = 0.5 if target_rate is None else target_rate
    if acquisition == "thompson":
        return np.asarray(-np.abs(generator.beta(a_N, b_N) - target))
    if acquisition == "paper":
        return np.asarray(-((a_N / (a_N + b_N) - target) ** 2))
    if target_rate is not None:
        informative_N, informative_std_N = target_moments(a_N, b_N, target_rate)
    return np.asarray(informative_N + optimism * informative_std_N)


def choose(
    scores_N: FloatArray,
    informative_N: FloatArray,
    eligible_N: BoolArray,
    *,
    batch_size: int,
    last_seen_N: IntArray,
    generator: np.random.Generator,
    directions_of: Callable[[IntArray], FloatArray] | None = None,
    recent_batches: Sequence[IntArray] = (),
    diversity: float = 0.1,
    groups: Mapping[str, tuple[float, BoolArray]] | None = None,
) -> Choice:
    """Choose a batch: group minima, the least recently seen, then score plus diversity.

    Args:
        scores_N: From `scores`.
        informative_N: Predictive probability of an informative group, for the forecast.
        eligible_N: Who may be chosen.
        batch_size: B, at least 1.
        last_seen_N: Step of the last selection or observation, -1 for never.
        generator: Breaks ties and draws among the equally long unseen.
        directions_of: Unit feature vectors [n, D] of n prompts; None switches diversity and the least-recently-seen
            quota off, as a purely random or published acquisition wants.
        recent_batches: The previous batches, the anchors of diversity.
        diversity: Of `greedy_diverse`.
        groups: Least share of the batch and membership by group name.

    Raises:
        NotEnoughPrompts: fewer than B are eligible, or fewer than a group's share.
    """
    if int(eligible_N.sum()) < batch_size:
        raise NotEnoughPrompts(asked=batch_size, eligible=int(eligible_N.sum()))
    anchor_D = None
    if directions_of is not None and len(recent_batches):
        # 1 - x'anchor is the mean cosine distance of x to the previous batches.
        anchor_D = directions_of(np.concatenate(recent_batches)).mean(axis=0)
    ties_N = generator.random(len(scores_N))
    taken = np.zeros(len(scores_N), dtype=bool)
    chosen: list[IntArray] = []

    def take(prompts: IntArray) -> None:
        taken[prompts] = True
        chosen.append(prompts)

    for group, (share, members_N) in (groups or {}).items():
        wanted = math.floor(share * batch_size + 1e-9)
        allowed = eligible_N & members_N & ~taken
        if int(allowed.sum()) < wanted:
            raise NotEnoughPrompts(asked=wanted, eligible=int(allowed.sum()), group=group)
        take(_best(scores_N, ties_N, allowed, wanted, directions_of, anchor_D, diversity))
    if directions_of is not None:
        free = batch_size - int(taken.sum())
        quota = min(free, math.floor(LEAST_RECENTLY_SEEN_SHARE * batch_size + generator.random()))
        take(_first(last_seen_N, ties_N, eligible_N & ~taken, quota))
    free = batch_size - int(taken.sum())
    take(_best(scores_N, ties_N, eligible_N & ~taken, free, directions_of, anchor_D, diversity))

    prompts = np.concatenate(chosen)
    return Choice(prompts, informative_N[prompts], _pad_to(scores_N, informative_N, eligible_N, prompts))


def _first(last_seen_N: IntArray, ties_N: FloatArray, allowed_N: BoolArray, n: int) -> IntArray:
    """The n least recently seen."""
    candidates = np.flatnonzero(allowed_N)
    return _top(candidates, -last_seen_N.astype(np.float64), ties_N, n)


def _best(
    scores_N: FloatArray,
    ties_N: FloatArray,
    allowed_N: BoolArray,
    n: int,
    directions_of: Callable[[IntArray], FloatArray] | None,
    anchor_D: FloatArray | None,
    diversity: float,
) -> IntArray:
    """The n best by score, or by greedy score plus diversity over a shortlist."""
    candidates = np.flatnonzero(allowed_N)
    if directions_of is None:
        return _top(candidates, scores_N, ties_N, n)
    shortlist = _top(candidates, scores_N, ties_N, max(SHORTLIST_FACTOR * n, SHORTLIST_LEAST))
    order = greedy_diverse(scores_N[shortlist], directions_of(shortlist), n, anchor_D=anchor_D, diversity=diversity)
    return shortlist[order]


def _top(candidates: IntArray, scores_N: FloatArray, ties_N: FloatArray, n: int) -> IntArray:
    """The n best candidates, best first; ties by chance."""
    if len(candidates) > n:
        # Ties at the threshold must be broken by chance, not by index: perturb below any difference that matters.
        perturbed = scores_N[candidates] + 1e-9 * ties_N[candidates]
        candidates = candidates[np.argpartition(-perturbed, n - 1)[:n]] if n else candidates[:0]
    return candidates[np.lexsort((ties_N[candidates], -scores_N[candidates]))]


def greedy_diverse(
    scores_S: FloatArray,
    directions_S_D: FloatArray,
    n: int,
    *,
    anchor_D: FloatArray | None = None,
    diversity: float = 0.1,
) -> IntArray:
    """Greedy max-sum of score and history-anchored diversity (GPS Eq. 12-14; algorithm section 4).

    The marginal gain of a prompt is its score + its mean cosine distance to the chosen + half the mean distance to the
    previous batches, each scaled so that its spread over the shortlist is `diversity` times the scores' spread.
    Distances to the chosen are brought up to date every n / 64 picks.

    Args:
        scores_S: [S], best first.
        directions_S_D: Unit vectors.
        n: How many to choose, at most S.
        anchor_D: Mean of the previous batches' unit vectors, or None.
        diversity: At least 0.

    Returns:
        int64 [n] positions in the shortlist, in the order of choice.
    """
    unit = diversity * max(float(scores_S.std()), 1e-3)
    gain = scores_S.astype(np.float64)
    if anchor_D is not None:
        gain = gain + 0.5 * unit * _standardised(1.0 - directions_S_D @ anchor_D)
    per_round = max(1, n // _ROUNDS)
    order: list[int] = []
    chosen_sum = np.zeros(directions_S_D.shape[1], dtype=directions_S_D.dtype)
    while len(order) < n:
        current = gain
        if order:
            current = gain + unit * _standardised(1.0 - directions_S_D @ chosen_sum / len(order))
        k = min(per_round if order else 1, n - len(order))
        if k == 1:
            picks = [int(np.argmax(current))]
        else:
            partition = np.argpartition(-current, k - 1)[:k]
            picks = [int(i) for i in partition[np.argsort(-current[partition], kind="stable")]]
        order.extend(picks)
        gain[picks] = -np.inf
        chosen_sum = chosen_sum + directions_S_D[picks].sum(axis=0)
    return np.asarray(order, dtype=np.int64)


def _standardised(distances_S: FloatArray) -> FloatArray:
    """Distances in units of their spread; zeros where they do not differ beyond rounding."""
    centred = distances_S - distances_S.mean()
    spread = math.sqrt(float(centred @ centred) / len(centred))
    return np.asarray(centred / spread if spread > 1e-6 else np.zeros_like(centred))


def _pad_to(scores_N: FloatArray, informative_N: FloatArray, eligible_N: BoolArray, prompts: IntArray) -> int | None:
    """The batch, then the best of the others, until the expected number of informative groups reaches B."""
    wanted = float(len(prompts))
    reached = float(informative_N[prompts].sum())
    if reached >= wanted - 1e-9:
        return len(prompts)
    others = eligible_N.copy()
    others[prompts] = False
    rest = np.flatnonzero(others)
    if reached + float(informative_N[rest].sum()) < wanted:
        return None
    size = max(4 * len(prompts), 256)
    while True:
        best = rest if size >= len(rest) else rest[np.argpartition(-scores_N[rest], size - 1)[:size]]
        best = best[np.argsort(-scores_N[best], kind="stable")]
        total = reached + np.cumsum(informative_N[best])
        if total[-1] >= wanted or size >= len(rest):
            return len(prompts) + min(int(np.searchsorted(total, wanted - 1e-9)), len(rest) - 1) + 1
        size *= 4
