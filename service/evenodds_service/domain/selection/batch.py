"""Which prompts to spend rollouts on: scores, diversity, quotas, forecast (algorithm section 4).

Pure functions of beliefs, features and the selection history; chance comes in as a generator, so that a choice is
deterministic in (state, arguments, seed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.distributions import target_moments
from evenodds_service.domain.settings import REPROBE_SHARE, Acquisition
from evenodds_service.errors import NotEnoughPrompts

REPROBE_SEEN = 0.25
SHORTLIST_FACTOR, SHORTLIST_LEAST = 8, 2_048
_ROUNDS = 64
_FEW = 8
_SAMPLE, _SAMPLE_MARGIN = 8_192, 32


@dataclass(frozen=True, slots=True)
class Choice:
    """A batch.

    Attributes:
        prompts: int64 [B], in the order of choice.
        informative_probabilities: Of these prompts, [B].
        pad_to: How many prompts to take, by score, for B informative groups in expectation; None if all eligible
            prompts together do not give that many.
        control: bool [B], which were chosen uniformly; they stand last.
        n_outstanding: How many of them are still waited for from earlier selections.
    """

    prompts: IntArray
    informative_probabilities: FloatArray
    pad_to: int | None
    control: BoolArray
    n_outstanding: int = 0

    @property
    def informative_share(self) -> float:
        """Forecast of the share of informative groups in the batch."""
        return float(self.informative_probabilities.mean())


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
    is_max_sum: bool = False,
    groups: Mapping[str, tuple[float, BoolArray]] | None = None,
    groups_at_most: Mapping[str, tuple[float, BoolArray]] | None = None,
    are_groups_strict: bool = True,
    reprobe_share: float | None = None,
    control_share: float = 0.0,
    control_eligible_N: BoolArray | None = None,
) -> Choice:
    """Choose a batch: the control arm, group minima, the least recently seen, then the most diverse of the best.

    The least recently seen are a floor that no belief lowers. Those never seen come first; but a quarter of the floor
    is kept for prompts that were seen before, however hopeless (or solved) they are believed to be, so that these are
    tried again though a large pool is not yet through.
    A policy that is trained on the batch learns more from unlike prompts that are nearly as good than from the best if
    these are all alike. So all prompts whose score is at most `diversity` below the best one's count as equally good,
    and of these the most unlike are taken. Where fewer are that good than the batch needs, the score alone decides:
    then they are unlike anyway.
    The limits of groups hold for the batch as a whole, the control arm with it.

    Args:
        scores_N: From `scores`.
        informative_N: Predictive probability of an informative group, for the forecast.
        eligible_N: Who may be chosen.
        batch_size: B, at least 1.
        last_seen_N: Step of the last selection or observation, -1 for never.
        generator: Breaks ties and draws among the equally long unseen.
        directions_of: Unit feature vectors [n, D] of n prompts; None switches diversity off, as a purely random or
            published acquisition wants.
        recent_batches: The previous batches, the anchors of diversity.
        diversity: How far below the best score a prompt is as good as the best, at least 0; with `is_max_sum`, of
            `greedy_diverse`.
        is_max_sum: Weigh diversity against the score as the paper does (GPS Eq. 12-14) instead.
        groups: Least share of the batch and membership by group name; at least floor(share B) prompts.
        groups_at_most: Largest share, likewise; at most ceil(share B) prompts.
        are_groups_strict: Whether a group with too few eligible prompts for its least share is an error; else it
            gets what there is.
        reprobe_share: Share of the batch for the least recently seen; None is .05 with diversity and 0 without.
        control_share: Share of the batch drawn uniformly, before all others, from the prompts that
            `control_eligible_N` says; all eligible ones by default. What merely rests should be among them, or the
            control arm would miss the prompts that were just found to be good.

    Raises:
        NotEnoughPrompts: fewer than B are eligible, or fewer than a group's share.
    """
    least = {g: (_share(share, batch_size), members) for g, (share, members) in (groups or {}).items()}
    most = {
        g: (math.ceil(share * batch_size - 1e-9), members) for g, (share, members) in (groups_at_most or {}).items()
    }
    fitting = int(eligible_N.sum())
    for cap, members_N in most.values():
        fitting -= max(0, int((eligible_N & members_N).sum()) - cap)
    if fitting < batch_size:
        raise NotEnoughPrompts(asked=batch_size, eligible=fitting)
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

    def best(among_N: BoolArray, n: int) -> IntArray:
        if directions_of is None or n == 0:
            return _top(scores_N, ties_N, among_N, n)
        if is_max_sum:
            shortlist = _top(scores_N, ties_N, among_N, max(SHORTLIST_FACTOR * n, SHORTLIST_LEAST))
            worth_S = scores_N[shortlist]
        else:
            shortlist = _good_enough(scores_N, ties_N, among_N, n, tolerance=diversity)
            worth_S = np.zeros(len(shortlist))
        weight = diversity if is_max_sum else 1.0
        order = greedy_diverse(worth_S, directions_of(shortlist), n, anchor_D=anchor_D, diversity=weight)
        return shortlist[order]

    def free() -> int:
        return batch_size - int(taken.sum())

    def allowed(order_N: FloatArray, among_N: BoolArray) -> BoolArray:
        """Who of these may still be taken: where a group has little room left, its first by this order."""
        return _with_room(eligible_N & among_N & ~taken, taken, most, order_N, ties_N)

    control = np.empty(0, dtype=np.int64)
    if control_share > 0.0:
        wanted = math.floor(control_share * batch_size + generator.random())
        among_N = eligible_N if control_eligible_N is None else control_eligible_N
        control = _uniform(among_N, min(wanted, batch_size), batch_size, least, most, generator)
        taken[control] = True
    for group, (wanted, members_N) in least.items():
        missing = max(0, wanted - int((taken & members_N).sum()))
        available = int((eligible_N & members_N & ~taken).sum())
        if available < missing and are_groups_strict:
            raise NotEnoughPrompts(asked=wanted, eligible=wanted - missing + available, group=group)
        missing = min(missing, available)
        take(best(eligible_N & members_N & ~taken, missing))
    if reprobe_share is None:
        reprobe_share = REPROBE_SHARE if directions_of is not None else 0.0
    if reprobe_share > 0.0:
        quota = min(free(), math.floor(reprobe_share * batch_size + generator.random()))
        rest = free() - quota
        of_seen = math.floor(REPROBE_SEEN * quota + generator.random())
        longest_N = -last_seen_N.astype(np.float64)
        take(_top(longest_N, ties_N, allowed(longest_N, last_seen_N >= 0), min(of_seen, quota)))
        take(_top(longest_N, ties_N, allowed(longest_N, eligible_N), free() - rest))
    take(best(allowed(scores_N, eligible_N), free()))

    prompts = np.concatenate((*chosen, control))
    is_control = np.arange(batch_size) >= batch_size - len(control)
    return Choice(prompts, informative_N[prompts], _pad_to(scores_N, informative_N, eligible_N, prompts), is_control)


def _share(share: float, batch_size: int) -> int:
    return math.floor(share * batch_size + 1e-9)


def _uniform(
    eligible_N: BoolArray,
    n: int,
    batch_size: int,
    least: Mapping[str, tuple[int, BoolArray]],
    most: Mapping[str, tuple[int, BoolArray]],
    generator: np.random.Generator,
) -> IntArray:
    """Up to n eligible prompts, all equally likely as far as the groups' limits leave the choice."""
    order = generator.permutation(np.flatnonzero(eligible_N))
    may, is_owed = np.ones(len(order), dtype=bool), np.zeros(len(order), dtype=bool)
    for cap, members_N in most.values():
        members = members_N[order]
        may &= ~members | (np.cumsum(members) <= cap)
    for owed, members_N in least.values():
        members = members_N[order]
        is_owed |= members & (np.cumsum(members) <= owed)
    # What is not owed to a group must leave room for what is.
    spends = may & ~is_owed
    may &= ~(spends & (np.cumsum(spends) > batch_size - sum(owed for owed, _ in least.values())))
    return np.asarray(order[may][:n])


def _with_room(
    allowed_N: BoolArray,
    taken_N: BoolArray,
    most: Mapping[str, tuple[int, BoolArray]],
    order_N: FloatArray,
    ties_N: FloatArray,
) -> BoolArray:
    """Those allowed, of each limited group only so many as it has room for: the highest by `order`."""
    for cap, members_N in most.values():
        room = max(0, cap - int((taken_N & members_N).sum()))
        candidates = np.flatnonzero(allowed_N & members_N)
        if len(candidates) > room:
            kept = _top(order_N, ties_N, allowed_N & members_N, room)
            allowed_N[candidates] = False
            allowed_N[kept] = True
    return allowed_N


def _good_enough(
    scores_N: FloatArray, ties_N: FloatArray, allowed_N: BoolArray, n: int, *, tolerance: float
) -> IntArray:
    """Those allowed whose score is at most `tolerance` below the best, in random order; at least the n best.

    Of more than a shortlist takes, some by chance: they are as good as each other.
    """
    best = _top(scores_N, ties_N, allowed_N, n)
    if len(best) < n:
        return best
    good_N = allowed_N & (scores_N >= min(scores_N[best[-1]], scores_N[best[0]] - tolerance))
    return _top(ties_N, ties_N, good_N, max(SHORTLIST_FACTOR * n, SHORTLIST_LEAST))


def _top(scores_N: FloatArray, ties_N: FloatArray, allowed_N: BoolArray, n: int) -> IntArray:
    """The n best of those allowed, or all of them if they are fewer, best first; ties by chance."""
    # Ties at the threshold must be broken by chance, not by index: perturb below any difference that matters.
    perturbed = scores_N + 1e-9 * ties_N
    perturbed[~allowed_N] = -np.inf
    candidates = _at_least_top(perturbed, n)
    if len(candidates) > n:
        candidates = candidates[np.argpartition(-perturbed[candidates], n - 1)[:n]] if n else candidates[:0]
    return candidates[np.lexsort((ties_N[candidates], -scores_N[candidates]))]


def _at_least_top(values_N: FloatArray, n: int) -> IntArray:
    """Indices of the n greatest values and of some more, in ascending order; never of -inf.

    Sorting a few is cheaper than partitioning all: what is clearly too small by a sample is left out first.
    """
    stride = len(values_N) // _SAMPLE
    if stride > 1:
        sample = values_N[::stride]
        rank = 2 * n // stride + _SAMPLE_MARGIN
        if rank < len(sample):
            threshold = np.partition(sample, len(sample) - rank)[len(sample) - rank]
            candidates = np.flatnonzero(values_N >= threshold) if threshold > -np.inf else np.zeros(0, np.int64)
            if len(candidates) >= n:
                return candidates
    return np.flatnonzero(values_N > -np.inf)


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
        current = gain.copy()
        if order:
            current += unit * _standardised(1.0 - directions_S_D @ chosen_sum / len(order))
        picks = _greatest(current, min(per_round if order else 1, n - len(order)))
        order.extend(picks)
        gain[picks] = -np.inf
        chosen_sum = chosen_sum + directions_S_D[picks].sum(axis=0)
    return np.asarray(order, dtype=np.int64)


def _greatest(values_S: FloatArray, k: int) -> list[int]:
    """Positions of the k greatest values, greatest first. Overwrites values."""
    if k > _FEW:
        partition = np.argpartition(-values_S, k - 1)[:k]
        return [int(i) for i in partition[np.argsort(-values_S[partition], kind="stable")]]
    picks = []
    for _ in range(k):
        picks.append(int(np.argmax(values_S)))
        values_S[picks[-1]] = -np.inf
    return picks


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
    values = np.where(eligible_N, scores_N, -np.inf)
    values[prompts] = -np.inf
    size = max(4 * len(prompts), 256)
    while True:
        best = _at_least_top(values, size)
        best = best[np.argsort(-values[best], kind="stable")]
        total = reached + np.cumsum(informative_N[best])
        if len(best) and total[-1] >= wanted - 1e-9:
            return len(prompts) + int(np.searchsorted(total, wanted - 1e-9)) + 1
        if len(best) < size or reached + float(informative_N[values > -np.inf].sum()) < wanted - 1e-9:
            return None
        size *= 8
