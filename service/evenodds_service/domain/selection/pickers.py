"""Rules by which n prompts are picked of those that may be: the best, drawn ones, the most unlike of these, or max-sum.

A picker sees scores and features. It knows neither what a score means nor anything of shares, groups and rests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray

DRAWN = 3
"""Prompts that are drawn for each one that is picked of them. The most unlike of all good ones are outliers: with
batches of 32 from 50,000 prompts the most unlike of 2,048 taught no faster than chance (1.04 times), those of 3 n 1.15
times. Filled batches are drawn likewise: docs/decisions.md, "domain/selection" (`benchmarks.trainings`)."""

SHORTLIST_FACTOR, SHORTLIST_LEAST = 8, 2_048
_ROUNDS = 64
_FEW = 8
_SAMPLE, _SAMPLE_MARGIN = 8_192, 32
_DIRECTION_STEPS = 2.0**16
_PERTURBATION = 1e-9


class Picker(Protocol):
    """Picks n prompts, n at least 1 and at most as many as there are among those given.

    Args:
        scores_N: Higher is better.
        ties_N: Drawn uniformly from [0, 1): what is equally good is ordered by it.
        among_N: Who may be picked.

    Returns:
        int64 [n], in the order of choice.
    """

    def __call__(self, scores_N: FloatArray, ties_N: FloatArray, among_N: BoolArray, n: int) -> IntArray: ...


@dataclass(frozen=True, slots=True, eq=False)
class Likeness:
    """How alike prompts are, to each other and to the previous batches.

    Attributes:
        directions_of: Unit feature vectors [n, D] of n prompts.
        anchor_D: Mean vector of the previous batches: 1 - x'anchor is the mean cosine distance of x to them. None
            before the first.
    """

    directions_of: Callable[[IntArray], FloatArray]
    anchor_D: FloatArray | None

    @staticmethod
    def to(
        recent_batches: Sequence[IntArray],
        directions_of: Callable[[IntArray], FloatArray],
        rows: IntArray | None = None,
    ) -> Likeness:
        """The likeness anchored in these batches, of the prompts in these rows of the pool; without rows of all."""
        of_places = directions_of if rows is None else lambda places: directions_of(rows[places])
        if not len(recent_batches):
            return Likeness(of_places, None)
        anchor_D = directions_of(np.concatenate(recent_batches)).mean(axis=0, dtype=np.float64)
        return Likeness(of_places, anchor_D)


def best(scores_N: FloatArray, ties_N: FloatArray, among_N: BoolArray, n: int) -> IntArray:
    """The n best by score alone, or all if they are fewer, best first; a picker, also for n = 0."""
    candidates = at_least_best(scores_N, among_N, n, slack=2.0 * _PERTURBATION)
    if len(candidates) > n:
        # Ties at the threshold must be broken by chance, not by index: perturb below any difference that matters.
        perturbed = scores_N[candidates] + _PERTURBATION * ties_N[candidates]
        few = at_least_best(perturbed, np.ones(len(perturbed), dtype=bool), n)  # where many scores are equal
        candidates = candidates[few[_greatest_of_many(perturbed[few], n)]]
    return candidates[np.lexsort((ties_N[candidates], -scores_N[candidates]))]


def _greatest_of_many(values: FloatArray, n: int) -> IntArray:
    """Positions of the n greatest values, ascending; of equal ones the first. (`np.argpartition` takes any of them.)"""
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    threshold = np.partition(values, len(values) - n)[len(values) - n]
    greater = np.flatnonzero(values > threshold)
    return np.sort(np.concatenate((greater, np.flatnonzero(values == threshold)[: n - len(greater)])))


class Draw(Protocol):
    """Draws prompts of which n are to be picked: n at least, or all if they are fewer. Arguments as of a `Picker`."""

    def __call__(self, scores_N: FloatArray, ties_N: FloatArray, among_N: BoolArray, n: int) -> IntArray: ...


@dataclass(frozen=True, slots=True, eq=False)
class Good:
    """`factor` n by chance of the good: all whose score is at most `tolerance` below the best one's are equally good.

    Where fewer than n are that good the score alone decides.
    """

    tolerance: float
    factor: int = DRAWN

    def __call__(self, scores_N: FloatArray, ties_N: FloatArray, among_N: BoolArray, n: int) -> IntArray:
        first = best(scores_N, ties_N, among_N, n)
        if len(first) < n:
            return first
        good_N = among_N & (scores_N >= min(scores_N[first[-1]], scores_N[first[0]] - self.tolerance))
        return best(ties_N, ties_N, good_N, self.factor * n)


@dataclass(frozen=True, slots=True, eq=False)
class MostUnlike:
    """The most unlike of some that are drawn.

    A policy that is trained on the batch learns more from unlike prompts that are nearly as good than from the best if
    these are all alike.
    """

    draw: Draw
    likeness: Likeness

    def __call__(self, scores_N: FloatArray, ties_N: FloatArray, among_N: BoolArray, n: int) -> IntArray:
        drawn = self.draw(scores_N, ties_N, among_N, n)
        worth_S, anchor_D = np.zeros(len(drawn)), self.likeness.anchor_D
        return drawn[greedy_diverse(worth_S, self.likeness.directions_of(drawn), n, anchor_D=anchor_D, weight=1.0)]


@dataclass(frozen=True, slots=True, eq=False)
class MaxSum:
    """The greatest sum of score and unlikeness, as published (GPS Eq. 12-14), over a shortlist of the best scores.

    Attributes:
        weight: Of unlikeness, as in `greedy_diverse`.
    """

    likeness: Likeness
    weight: float

    def __call__(self, scores_N: FloatArray, ties_N: FloatArray, among_N: BoolArray, n: int) -> IntArray:
        shortlist = best(scores_N, ties_N, among_N, max(SHORTLIST_FACTOR * n, SHORTLIST_LEAST))
        directions_S_D = self.likeness.directions_of(shortlist)
        worth_S, anchor_D = scores_N[shortlist], self.likeness.anchor_D
        return shortlist[greedy_diverse(worth_S, directions_S_D, n, anchor_D=anchor_D, weight=self.weight)]


def at_least_best(values_N: FloatArray, among_N: BoolArray, n: int, *, slack: float = 0.0) -> IntArray:
    """Indices of the n greatest values among these, or of all if they are fewer, and of some more, in ascending order.

    Sorting a few is cheaper than partitioning all: what is clearly too small by a sample is left out first.

    Args:
        slack: All that are less than this below one of the n greatest are there too.
    """
    stride = len(values_N) // _SAMPLE
    if stride > 1:
        sample = values_N[::stride][among_N[::stride]]
        rank = 2 * n // stride + _SAMPLE_MARGIN
        if rank < len(sample):
            threshold = np.partition(sample, len(sample) - rank)[len(sample) - rank]
            if np.count_nonzero(among_N & (values_N >= threshold)) >= n:
                return np.flatnonzero(among_N & (values_N >= threshold - slack))
    return np.flatnonzero(among_N)


def greedy_diverse(
    scores_S: FloatArray,
    directions_S_D: FloatArray,
    n: int,
    *,
    anchor_D: FloatArray | None = None,
    weight: float = 0.1,
) -> IntArray:
    """Greedy max-sum of score and history-anchored diversity (GPS Eq. 12-14; algorithm section 4).

    The marginal gain of a prompt is its score + its mean cosine distance to the chosen + half the mean distance to the
    previous batches, each scaled so that its spread over the shortlist is `weight` times the scores' spread.
    Distances to the chosen are brought up to date every n / 64 picks. Directions are taken as multiples of 2^-16, so
    that all distances are exact sums.

    Args:
        scores_S: [S], best first.
        directions_S_D: Unit vectors.
        n: How many to choose, at most S.
        anchor_D: Mean of the previous batches' unit vectors, or None.
        weight: At least 0.

    Returns:
        int64 [n] positions in the shortlist, in the order of choice.
    """
    unit = weight * max(float(scores_S.std()), 1e-3)
    gain = scores_S.astype(np.float64)
    steps_S_D = np.multiply(directions_S_D, _DIRECTION_STEPS, dtype=np.float64)
    np.rint(steps_S_D, out=steps_S_D)
    if anchor_D is not None:
        near = steps_S_D @ np.rint(anchor_D * _DIRECTION_STEPS) / _DIRECTION_STEPS**2
        gain = gain + 0.5 * unit * _standardised(1.0 - near)
    per_round = max(1, n // _ROUNDS)
    order: list[int] = []
    chosen_sum = np.zeros(steps_S_D.shape[1])
    while len(order) < n:
        current = gain.copy()
        if order:
            near = steps_S_D @ chosen_sum / (len(order) * _DIRECTION_STEPS**2)
            current += unit * _standardised(1.0 - near)
        picks = _greatest(current, min(per_round if order else 1, n - len(order)))
        order.extend(picks)
        gain[picks] = -np.inf
        chosen_sum = chosen_sum + steps_S_D[picks].sum(axis=0)
    return np.asarray(order, dtype=np.int64)


def _greatest(values_S: FloatArray, k: int) -> list[int]:
    """Positions of the k greatest values, greatest first. Overwrites values."""
    if k > _FEW:
        greatest = _greatest_of_many(values_S, k)
        return [int(i) for i in greatest[np.argsort(-values_S[greatest], kind="stable")]]
    picks = []
    for _ in range(k):
        picks.append(int(np.argmax(values_S)))
        values_S[picks[-1]] = -np.inf
    return picks


def _standardised(distances_S: FloatArray) -> FloatArray:
    """Distances in units of their spread; zeros where they do not differ beyond rounding."""
    centred = distances_S - distances_S.mean()
    spread = math.sqrt(float((centred * centred).sum()) / len(centred))
    return np.asarray(centred / spread if spread > 1e-6 else np.zeros_like(centred))
