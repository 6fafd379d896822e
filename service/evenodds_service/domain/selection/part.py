"""Which prompts a choice looks at: all that may be chosen, or of a large pool a part that stands for all of them.

Pure functions. What is believed of a prompt costs most of the time of a choice, so that it is asked of no more prompts
than a choice needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.selection.batch import count_of
from evenodds_service.domain.selection.eligibility import Allowed, resting
from evenodds_service.domain.selection.pickers import at_least_best
from evenodds_service.domain.settings import RunSettings

LOOKED_AT = 16_384
"""Prompts that a choice looks at, where more may be chosen. (`benchmarks.quality --only parts` compares it
with looking at all.)"""

FOR_EACH = 64
"""More than that are looked at where the batch is so large that each of its prompts would have fewer to choose from."""

MOST_LOST = 0.02
"""Of score, by which the last prompt of a batch may be worse than if all had been looked at."""

_UNSEEN, _SEEN, _RESTING = range(3)


class PartTooSmall(Exception):
    """A sample of the pool has too few prompts that may be chosen, or too few good ones, to stand for it."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The prompts that a choice looks at.

    Attributes:
        rows: Their places in the pool, int64 [n], ascending; None: the whole pool.
        allowed: Of these prompts.
        weights: For how many prompts each stands, [n], at least 1; None: each for itself alone.
    """

    rows: IntArray | None
    allowed: Allowed
    weights: FloatArray | None = None


def part_of(
    allowed: Allowed,
    pool: Pool,
    settings: RunSettings,
    *,
    batch_size: int,
    step: int,
    rest: int,
    allow_outstanding: bool,
    may_sample: bool,
    generator: np.random.Generator,
) -> Part:
    """As many prompts as a choice of `batch_size` needs to look at: all that may be chosen, or a stratified sample.

    The strata are those never seen, those seen and those that rest, of each of the groups that have limits and of all
    others together. Small strata are in it whole: what is known of the few prompts that were tried is not thinned out.
    Within a stratum all are equally likely. Weights tell how many a prompt stands for, so that whatever is drawn by
    chance later is as likely as in the whole pool.

    Where prompts that are held back may have to come back, the whole pool says in which order.

    Args:
        rest: For how many steps chosen prompts rest, 0 for none.
        may_sample: Whether good prompts will do, and need not be the best ones of all.
    """
    n, n_prompts = max(LOOKED_AT, FOR_EACH * batch_size), len(allowed.eligible_N)
    whole = Part(None, allowed)
    if n_prompts <= n:
        return whole
    if np.count_nonzero(allowed.eligible_N) <= n:
        rows = np.flatnonzero(allowed.eligible_N)
        return Part(rows, allowed.of(rows))
    if not may_sample:
        return whole
    may_N = allowed.eligible_N & ~allowed.spent_N
    if not allow_outstanding:
        may_N &= ~allowed.waited_for_N
    resting_N = resting(allowed.last_seen_N, step=step, rest=rest)
    rested_N = may_N & ~resting_N
    least = settings.groups or {}
    members = {group: pool.members(group, n_prompts) for group in {**least, **(settings.groups_at_most or {})}}
    if np.count_nonzero(rested_N) <= n or any(
        np.count_nonzero(rested_N & members[group]) < count_of(share, batch_size) for group, share in least.items()
    ):
        return whole
    rows = np.flatnonzero(may_N)
    strata = np.where(resting_N[rows], _RESTING, np.where(allowed.last_seen_N[rows] >= 0, _SEEN, _UNSEEN))
    for i, members_N in enumerate(members.values(), start=1):
        strata[members_N[rows]] += 3 * i
    places, weights = stratified(strata, n, generator)
    return Part(rows[places], allowed.of(rows[places]), weights)


def stratified(strata_N: IntArray, n: int, generator: np.random.Generator) -> tuple[IntArray, FloatArray]:
    """A sample of n of N: the strata get equal numbers, and those with fewer members all of theirs.

    Args:
        strata_N: The number of each one's stratum, from 0.

    Returns:
        int64 [n], ascending, and how many each stands for: those of its stratum over the sampled ones, [n].
    """
    counts = np.bincount(strata_N)
    taken, left = np.zeros_like(counts), n
    by_size = np.argsort(counts, kind="stable")
    for i, stratum in enumerate(by_size.tolist()):
        taken[stratum] = min(counts[stratum], left // (len(counts) - i))
        left -= int(taken[stratum])
    members = np.split(np.argsort(strata_N.astype(np.int16), kind="stable"), np.cumsum(counts)[:-1])
    chosen = [
        each if k == len(each) else generator.choice(each, k, replace=False, shuffle=False)
        for each, k in zip(members, taken.tolist(), strict=True)
    ]
    weights = np.repeat(counts / np.maximum(taken, 1), taken)
    places = np.concatenate(chosen)
    order = np.argsort(places)
    return places[order], weights[order]


def check_stands_for_all(
    part: Part, scores_N: FloatArray, among_N: BoolArray, batch_size: int, *, tolerance: float
) -> None:
    """What the last prompt of a batch is worth, of the part and, as its weights tell, of the whole pool.

    Args:
        among_N: Who may be chosen.
        tolerance: By which a prompt may be worse than the best one and still count as good.

    Raises:
        PartTooSmall: the part has too few good prompts for the batch, and the pool seems to have better ones than those
            that would have to do.
    """
    if part.weights is None:
        return
    few = at_least_best(scores_N, among_N, batch_size)
    few = few[np.argsort(-scores_N[few], kind="stable")]
    if len(few) < batch_size:
        raise PartTooSmall
    last = scores_N[few[batch_size - 1]]
    last_of_all = scores_N[few[np.searchsorted(np.cumsum(part.weights[few]), batch_size)]]
    if last < min(scores_N[few[0]] - tolerance, last_of_all - MOST_LOST):
        raise PartTooSmall
