"""Between which rates a prompt's own rate lies with a given probability: quantiles of the mixture of the experts.

One Beta with the mixture's mean and variance will not do: near 0 and 1 a few experts that have forgotten much widen it
so far that nearly all of its mass lies at the very end, beyond the mean.
"""

from __future__ import annotations

import numpy as np
from scipy.special import betainc, betaincinv

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.mixture import Experts

TAILS = (0.05, 0.95)
_TOLERANCE = 1e-6
_MOST_ROUNDS = 60
_NEARBY = 0.01


def credible_intervals(experts: Experts, a_n: FloatArray, b_n: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Ends of the central 90% intervals of these beliefs, which always contain the mean, [n] each.

    Args:
        a_n, b_n: The Beta with each mixture's mean and variance: where the search begins.
    """
    n, mean = len(a_n), a_n / (a_n + b_n)
    tails_2n = np.repeat(TAILS, n)
    ends_2n = _quantiles(experts, np.tile(a_n, 2), np.tile(b_n, 2), tails_2n)
    return np.minimum(ends_2n[:n], mean), np.maximum(ends_2n[n:], mean)


def beta_intervals(a_n: FloatArray, b_n: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Ends of the central 90% intervals of these Betas, [n] each."""
    low_n, high_n = (betaincinv(a_n, b_n, tail) for tail in TAILS)
    return np.asarray(low_n), np.asarray(high_n)


def _quantiles(experts: Experts, a_m: FloatArray, b_m: FloatArray, tails_m: FloatArray) -> FloatArray:
    """Where the distribution functions of the mixtures have these values, within 1e-6 of them, [m].

    By secants inside a bracket. What the experts' arrays say of n prompts repeats m / n times.
    """
    x_m = betaincinv(a_m, b_m, tails_m)
    if len(experts.weights_K) == 1:
        return np.asarray(x_m)
    repeats = len(a_m) // experts.a_K_n.shape[1] if len(a_m) else 1
    a_K_m, b_K_m = np.tile(experts.a_K_n, repeats), np.tile(experts.b_K_n, repeats)
    near_m = tails_m + np.where(tails_m < 0.5, _NEARBY, -_NEARBY)
    slope_m = (near_m - tails_m) / (betaincinv(a_m, b_m, near_m) - x_m + 1e-300)
    last_m, last_excess_m = x_m.copy(), np.full(len(x_m), np.nan)
    low_m, high_m = np.zeros(len(x_m)), np.ones(len(x_m))
    open_m = np.arange(len(x_m))
    for _ in range(_MOST_ROUNDS):
        x = x_m[open_m]
        below = experts.weights_K[:, None] * betainc(a_K_m[:, open_m], b_K_m[:, open_m], x)
        excess = exact.in_order(below) - tails_m[open_m]
        low_m[open_m] = low = np.where(excess < 0.0, x, low_m[open_m])
        high_m[open_m] = high = np.where(excess < 0.0, high_m[open_m], x)
        run, rise = x - last_m[open_m], excess - last_excess_m[open_m]
        slope = np.where(rise * run > 0.0, rise / np.where(run == 0.0, 1.0, run), slope_m[open_m])
        step = x - excess / np.maximum(slope, 1e-300)
        last_m[open_m], last_excess_m[open_m], slope_m[open_m] = x, excess, slope
        is_found = (np.abs(excess) < _TOLERANCE) | (high - low < 1e-15)
        following = np.where((step > low) & (step < high), step, 0.5 * (low + high))
        x_m[open_m] = np.where(is_found, x, following)
        open_m = open_m[~is_found]
        if not len(open_m):
            break
    return np.asarray(x_m)
