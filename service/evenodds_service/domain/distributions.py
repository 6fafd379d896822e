"""Closed forms under a Beta distribution of the success rate: likelihoods, moments, chance of an informative group.

Everything works on arrays, elementwise, and knows nothing of prompts or runs. (x)_m is the rising factorial
x (x+1) ... (x+m-1), so that E[p^m] = (a)_m / (a+b)_m under Beta(a, b).
"""

from __future__ import annotations

import math

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray

_SHIFT = 8
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680)
_MAX_PRODUCT = 64
_MAX_FACTORS, _MAX_FACTOR = 32, 1e8
_MAX_LOG10 = 300
_BLOCK = 8_192
_FACTORS = 32_768
_HALF_LOG_TAU = 0.9189385332046727

MIN_CONCENTRATION, MAX_CONCENTRATION = 1e-2, 1e6
"""Limits of a + b of a belief that summarises others."""


def log_gamma(x: FloatArray) -> FloatArray:
    """log of the Gamma function for x > 0, any shape, within 1e-10 (Stirling's series after a shift)."""
    x = np.asarray(x, dtype=np.float64)
    small = x < _SHIFT
    product = np.ones_like(x)
    shifted = np.where(small, x, 1.0)
    for j in range(_SHIFT):
        product *= shifted + j
    z = np.where(small, x + _SHIFT, x)
    inverse = 1.0 / z
    square = inverse * inverse
    series = np.zeros_like(z)
    for coefficient in reversed(_STIRLING):
        series = series * square + coefficient
    stirling = (z - 0.5) * exact.log(z) - z + _HALF_LOG_TAU + series * inverse
    return np.asarray(stirling - np.where(small, exact.log(product), 0.0))


def log_rising(x: FloatArray, m: FloatArray) -> FloatArray:
    """log (x)_m, the log of the rising factorial, for x > 0 and m >= 0, m possibly fractional; broadcasts."""
    m = np.asarray(m, dtype=np.float64)
    if not _are_few_factors(x, m):
        return np.asarray(log_gamma(x + m) - log_gamma(x))
    return exact.log(_few_factors(x, m))


def log_rising_ratio(a: FloatArray, b: FloatArray, k: FloatArray, n: FloatArray) -> FloatArray:
    """log [ (a)_k (b)_{n-k} / (a+b)_n ], as `log_rising`."""
    total = a + b
    if not (_are_few_factors(total, n) and _are_few_factors(total, k)):
        return np.asarray(log_rising(a, k) + log_rising(b, n - k) - log_rising(total, n))
    # One logarithm instead of three: the product of all factors is in range where that of the total's is.
    return exact.log(_few_factors(a, k) * _few_factors(b, n - k) / _few_factors(total, n))


def _are_few_factors(x: FloatArray, m: FloatArray) -> bool:
    """Whether (x)_m is a product of few factors, so that it is in range. Whole numbers of attempts are the rule."""
    few = float(m.max(initial=0.0)) <= _MAX_FACTORS and float(np.max(x, initial=0.0)) <= _MAX_FACTOR
    return few and np.array_equal(m, np.floor(m))


def _few_factors(x: FloatArray, m: FloatArray) -> FloatArray:
    """(x)_m as a product, which costs less than two log-Gammas."""
    product = np.ones(np.broadcast_shapes(np.shape(x), np.shape(m)))
    for factor in range(int(m.max(initial=0.0))):
        product *= np.where(factor < m, x + factor, 1.0)
    return product


def beta_binomial_log_likelihood(k: FloatArray, n: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
    """log B(a + k, b + n - k) - log B(a, b): the log probability of one order of k successes in n attempts.

    The binomial coefficient is left out: it does not depend on the belief. `k` may be fractional.

    Args:
        k, n: 0 <= k <= n, broadcastable to a and b.
        a, b: Positive parameters.
    """
    return log_rising_ratio(np.asarray(a), np.asarray(b), np.asarray(k), np.asarray(n))


def beta_from_moments(mean: FloatArray, variance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The Beta parameters (a, b) with this mean in (0, 1) and variance; the concentration a + b is kept in limits."""
    spread = mean * (1.0 - mean)
    concentration = spread / np.maximum(variance, 1e-300) - 1.0
    concentration = np.clip(concentration, MIN_CONCENTRATION, MAX_CONCENTRATION)
    return mean * concentration, (1.0 - mean) * concentration


def mean_and_std(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Of Beta(a, b), elementwise."""
    mean = a / (a + b)
    return mean, np.sqrt(mean * (1.0 - mean) / (a + b + 1.0))


def rising_ratio(x: FloatArray, total: FloatArray, m: int) -> FloatArray:
    """(x)_m / (total)_m for 0 < x <= total: the m-th raw moment of the Beta with parameters x and total - x."""
    if m > _MAX_PRODUCT:
        return exact.exp(log_gamma(x + m) - log_gamma(x) - log_gamma(total + m) + log_gamma(total))
    ratio = np.ones(np.broadcast_shapes(np.shape(x), np.shape(total)))
    for j in range(m):
        ratio *= (x + j) / (total + j)
    return ratio


def informative_probability(a: FloatArray, b: FloatArray, group_size: int | FloatArray) -> FloatArray:
    """The mean that `informative_moments` gives, alone.

    Args:
        group_size: G, at least 1; or how many attempts each group has, at least 2, in the shape of a.
    """
    total = a + b
    if not isinstance(group_size, int):
        most = int(group_size.max(initial=1.0))
        if not (group_size == most).all():
            whole = log_rising(total, group_size)
            silent = exact.exp(log_rising(a, group_size) - whole) + exact.exp(log_rising(b, group_size) - whole)
            return np.maximum(1.0 - silent, 0.0)
        group_size = most
    if group_size == 1:
        return np.asarray(2.0 * a * b / (total * (total + 1.0)))
    if group_size > _MAX_PRODUCT or a.size * group_size > _FACTORS:
        silent = rising_ratio(a, total, group_size) + rising_ratio(b, total, group_size)
    else:  # for few, the number of array operations is what costs: all factors at once
        j = np.arange(group_size).reshape(-1, *[1] * a.ndim)
        silent = ((a + j) / (total + j)).prod(axis=0) + ((b + j) / (total + j)).prod(axis=0)
    return np.maximum(1.0 - silent, 0.0)


def informative_moments(a: FloatArray, b: FloatArray, group_size: int) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation, under the belief, of the chance V that a group is informative.

    V(p) = 1 - p^G - (1-p)^G. The mean is the predictive probability V_G of algorithm section 4 (MaPP's
    Beta-binomial score). For G = 1 no group can be informative by itself; V(p) = 2 p (1-p), the chance that two
    attempts differ, takes its place.

    Args:
        a, b: Positive parameters, any shape.
        group_size: G, at least 1.

    Returns:
        mean in [0, 1] and standard deviation >= 0, in the shape of a.
    """
    a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    if a.size <= _BLOCK:
        return _informative_moments(a, b, group_size)
    mean, deviation = np.empty(a.shape), np.empty(a.shape)
    flat = [array.reshape(-1) for array in (a, b, mean, deviation)]
    for first in range(0, a.size, _BLOCK):  # blocks that fit the processor's cache
        a_n, b_n, mean_n, deviation_n = (array[first : first + _BLOCK] for array in flat)
        mean_n[:], deviation_n[:] = _informative_moments(a_n, b_n, group_size)
    return mean, deviation


def _informative_moments(a: FloatArray, b: FloatArray, group_size: int) -> tuple[FloatArray, FloatArray]:
    s = a + b
    if group_size == 1:
        mean = 2.0 * a * b / (s * (s + 1.0))
        second = 2.0 * mean * (a + 1.0) * (b + 1.0) / ((s + 2.0) * (s + 3.0))
        return mean, np.sqrt(np.maximum(second - mean * mean, 0.0))
    # Below it (s)_2G is in range. Prompt by prompt, so that none is told something else in another company.
    most = math.floor(10.0 ** (_MAX_LOG10 / (2 * group_size))) - 2 * group_size
    is_in_range = s < most
    silent: FloatArray = np.empty(s.shape)
    square: FloatArray = np.empty(s.shape)
    for rows, moments in ((is_in_range, _silent_by_products), (~is_in_range, _silent_by_ratios)):
        if rows.all():
            silent, square = moments(a, b, s, group_size)
        elif rows.any():
            silent[rows], square[rows] = moments(a[rows], b[rows], s[rows], group_size)
    mean = np.clip(1.0 - silent, 0.0, 1.0)
    return mean, np.sqrt(np.maximum(square - silent * silent, 0.0))


def _silent_by_products(a: FloatArray, b: FloatArray, s: FloatArray, g: int) -> tuple[FloatArray, FloatArray]:
    """E[u] and E[u^2] of the chance u = p^G + (1-p)^G that a group of G is not informative; a + b = s."""
    # E[p^2G], E[(1-p)^2G] and E[p^G (1-p)^G] over the common denominator (s)_2G: few products, two divisions.
    right, wrong, total = _rising(a, g), _rising(b, g), _rising(s, g)
    total_twice = total * _rising(s + g, g)
    square = (right * _rising(a + g, g) + wrong * _rising(b + g, g) + 2.0 * right * wrong) / total_twice
    return (right + wrong) / total, square


def _silent_by_ratios(a: FloatArray, b: FloatArray, s: FloatArray, g: int) -> tuple[FloatArray, FloatArray]:
    """The same where (s)_2G is too large a number."""
    all_right, all_wrong = rising_ratio(a, s, g), rising_ratio(b, s, g)
    # (a)_2G / (s)_2G continues (a)_G / (s)_G from the G-th factor on.
    square = all_right * rising_ratio(a + g, s + g, g) + all_wrong * rising_ratio(b + g, s + g, g)
    square += 2.0 * all_right * rising_ratio(b, s + g, g)
    return all_right + all_wrong, square


def _rising(x: FloatArray, m: int) -> FloatArray:
    """(x)_m by pairs of factors from both ends: (x + j)(x + m-1-j) = x (x + m-1) + j (m-1-j)."""
    if m == 1:
        return x
    outer = x * (x + (m - 1.0))
    product = outer.copy()
    for j in range(1, m // 2):
        product *= outer + float(j * (m - 1 - j))
    if m % 2:
        product *= x + 0.5 * (m - 1)
    return product


def target_moments(a: FloatArray, b: FloatArray, target_rate: float) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation, under the belief, of 1 - ((p - target) / reach)^2.

    `reach` is the distance of the farthest rate from the target.

    The paper's utility -(p - 0.5)^2 (Eq. 12), for any target rate in (0, 1) and scaled to [0, 1].
    """
    s = np.asarray(a, dtype=np.float64) + b
    reach = max(target_rate, 1.0 - target_rate)
    m1 = a / s
    m2 = m1 * (a + 1.0) / (s + 1.0)
    m3 = m2 * (a + 2.0) / (s + 2.0)
    m4 = m3 * (a + 3.0) / (s + 3.0)
    t = target_rate
    square = m2 - 2 * t * m1 + t * t
    fourth = m4 - 4 * t * m3 + 6 * t * t * m2 - 4 * t * t * t * m1 + t * t * t * t
    deviation = np.sqrt(np.maximum(fourth - square * square, 0.0))
    return 1.0 - square / reach**2, deviation / reach**2
