"""Intervals of proportions and of what is made of two of them: Wilson's score interval, and the method of variance
estimates recovery (MOVER) on top of it, after Newcombe (1998, differences) and Donner and Zou (2012, ratios).

They hold for few observations and for proportions of 0 and 1 too. Counts may be effective, so fractional.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95%."""


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share in [0, 1] of n observations, n > 0, with its interval."""

    value: float
    low: float
    high: float
    n: float

    @staticmethod
    def of(successes: float, n: float, z: float = Z) -> Proportion:
        """Wilson's score interval of `successes` of n, 0 <= successes <= n, n > 0; of 95%, unless z says otherwise."""
        value = min(max(successes / n, 0.0), 1.0)
        centre = value + z * z / (2.0 * n)
        reach = z * math.sqrt(value * (1.0 - value) / n + z * z / (4.0 * n * n))
        scale = 1.0 + z * z / n
        return Proportion(value, max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale), n)


def difference(one: Proportion, other: Proportion) -> tuple[float, float, float]:
    """one - other of independent proportions, with the ends of its 95% interval (Newcombe's method 10)."""
    value = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return value, value - below, value + above


def ratio(one: Proportion, other: Proportion) -> tuple[float, float, float]:
    """one / other of independent proportions, with the ends of its 95% interval; infinite where `other` may be 0."""
    product = one.value * other.value
    low_scale = other.high * (2.0 * other.value - other.high)
    high_scale = other.low * (2.0 * other.value - other.low)
    under_low = product**2 - one.low * (2.0 * one.value - one.low) * low_scale
    under_high = product**2 - one.high * (2.0 * one.value - one.high) * high_scale
    value = one.value / other.value if other.value > 0.0 else math.inf
    low = (product - math.sqrt(max(under_low, 0.0))) / low_scale if low_scale != 0.0 else 0.0
    high = (product + math.sqrt(max(under_high, 0.0))) / high_scale if high_scale > 0.0 else math.inf
    return value, max(0.0, low), high
