"""Between which rates a prompt's own rate lies with a given probability: quantiles of the mixture of the experts.

One Beta with the mixture's mean and variance will not do: near 0 and 1 a few experts that have forgotten much widen it
so far that nearly all of its mass lies at the very end, beyond the mean.
"""

from __future__ import annotations

import numpy as np
from scipy.special import betainc, betaincinv, betaln, expit, logit

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.mixture import Experts

TAIL = 0.05
"""Probability that is left out on each side."""

_TOLERANCE = 1e-6
_MOST_ROUNDS = 60
_NARROW = 1e-9
_FARTHEST = 40.0
"""Log-odds beyond which no end is looked for: a rate of 4e-18."""


def credible_intervals(experts: Experts, a_n: FloatArray, b_n: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Ends of the central 90% intervals of these beliefs, which always contain the mean, [n] each.

    Args:
        a_n, b_n: The Beta with each mixture's mean and variance: where the search begins.
    """
    n, mean = len(a_n), a_n / (a_n + b_n)
    # The upper end is 1 minus the lower end of the rate of failures.
    a_K_m = np.concatenate((experts.a_K_n, experts.b_K_n), axis=1)
    b_K_m = np.concatenate((experts.b_K_n, experts.a_K_n), axis=1)
    start_m = betaincinv(np.concatenate((a_n, b_n)), np.concatenate((b_n, a_n)), TAIL)
    most_m = np.concatenate((mean, 1.0 - mean))
    ends_m = start_m if len(experts.weights_K) == 1 else _lower_ends(experts.weights_K, a_K_m, b_K_m, start_m, most_m)
    return np.minimum(ends_m[:n], mean), np.maximum(1.0 - ends_m[n:], mean)


def _lower_ends(
    weights_K: FloatArray, a_K_m: FloatArray, b_K_m: FloatArray, start_m: FloatArray, most_m: FloatArray
) -> FloatArray:
    """Where the distribution functions F of the mixtures are within 1e-6 of the tail, or `most_m` if below it, [m].

    By Newton's method for log F as a function of the rate's log-odds, which is nearly straight at the ends, inside a
    bracket. Each mixture by itself, so that none is told something else in another company.
    """
    log_norm_K_m = np.log(np.maximum(weights_K, 1e-300))[:, None] - betaln(a_K_m, b_K_m)
    low_m = np.full(len(start_m), -_FARTHEST)
    with np.errstate(divide="ignore"):
        high_m = np.clip(logit(most_m), -_FARTHEST, _FARTHEST)
        t_m = np.clip(logit(start_m), -_FARTHEST, high_m)
    last_m = np.full(len(t_m), np.inf)
    open_m = np.arange(len(t_m))
    for _ in range(_MOST_ROUNDS):
        t, a, b, log_norm = t_m[open_m], a_K_m[:, open_m], b_K_m[:, open_m], log_norm_K_m[:, open_m]
        below = np.maximum(exact.in_order(weights_K[:, None] * betainc(a, b, expit(t))), 1e-300)
        # The density in log-odds, with log x = -log(1 + e^-t) and log(1 - x) = -log(1 + e^t).
        density = exact.in_order(np.exp(log_norm - a * np.logaddexp(0.0, -t) - b * np.logaddexp(0.0, t)))
        low_m[open_m] = low = np.where(below < TAIL, t, low_m[open_m])
        high_m[open_m] = high = np.where(below < TAIL, high_m[open_m], t)
        is_found = (np.abs(below - TAIL) < _TOLERANCE) | (high - low < _NARROW)
        following = t - np.log(below / TAIL) * below / np.maximum(density, 1e-300)
        halfway = np.where((following <= low) & (low == -_FARTHEST), low, 0.5 * (low + high))
        # A step that is not half of the one before it may turn round and round between two experts' ends.
        is_slow = (np.abs(following - t) > 0.5 * last_m[open_m]) & (low > -_FARTHEST)
        following = np.where((following > low) & (following < high) & ~is_slow, following, halfway)
        last_m[open_m] = np.abs(following - t)
        t_m[open_m] = np.where(is_found, t, following)
        open_m = open_m[~is_found]
        if not len(open_m):
            break
    return np.asarray(expit(t_m))
