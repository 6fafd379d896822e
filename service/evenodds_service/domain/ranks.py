"""Spearman's rank correlation, of pairs and of a table of counts; equal values share the mean of their ranks.

Ranks are whole multiples of one half, so that their products add up without rounding in any order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from evenodds_service.domain.arrays import FloatArray, IntArray


def mean_ranks(values: ArrayLike) -> FloatArray:
    """Ranks from 1 to n, [n]."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return np.asarray(_ranks_of(counts)[inverse])


def spearman(predicted: ArrayLike, actual: ArrayLike) -> float:
    """Rank correlation in [-1, 1].

    Where one side is constant the correlation is undefined; it counts as 0: such a prediction ranks nothing.
    """
    x, y = mean_ranks(predicted), mean_ranks(actual)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return min(1.0, max(-1.0, float(x @ y) / scale)) if scale > 0 else 0.0


def spearman_of_table(counts: FloatArray) -> float | None:
    """Rank correlation of two ordered variables, from how often each pair of their values came; None if undefined."""
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    x, y = (_ranks_of(sums) - (float(counts.sum()) + 1.0) / 2.0 for sums in (rows, columns))
    spread = float((rows * x * x).sum()) * float((columns * y * y).sum())
    return float((x[:, None] * counts * y).sum()) / math.sqrt(spread) if spread > 0.0 else None


def _ranks_of(counts: FloatArray | IntArray) -> FloatArray:
    """The rank of each value, in their order, where so many have it."""
    return np.asarray(np.cumsum(counts) - (counts - 1.0) / 2.0)
