"""The zero-one-inflated Beta, spikes at never and always plus a slab: a rival of the matched Beta."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.distributions import (
    beta_binomial_log_likelihood,
    informative_moments,
    informative_probability,
)
from evenodds_service.domain.matched_prior import _MEAN_RANGE, matched_concentration

SLAB_CONCENTRATION = 1.0


_LOG_NEVER = -1e30


@dataclass(frozen=True, slots=True)
class InflatedBeta:
    """P(p = 0) = zero, P(p = 1) = one, otherwise p ~ Beta(a, b). Arrays of one shape.

    Attributes:
        zero, one: Masses of the spikes, >= 0, together at most 1.
        a, b: Parameters of the slab, positive.
    """

    zero: FloatArray
    one: FloatArray
    a: FloatArray
    b: FloatArray

    @property
    def slab(self) -> FloatArray:
        """Mass of the slab."""
        return np.asarray(np.maximum(1.0 - self.zero - self.one, 0.0))


def matched_inflated(
    mean: FloatArray, informative: FloatArray, group_size: int, *, slab_concentration: float = SLAB_CONCENTRATION
) -> InflatedBeta:
    """The zero-one-inflated Beta with this mean and probability of an informative group.

    The slab has the mean m. Where a slab of `slab_concentration` alone is informative more often than v, the spikes
    take the difference, split so that the mean stays m. Elsewhere there are no spikes, and the slab is as concentrated
    as v asks (`matched_concentration`).

    Args:
        mean, informative, group_size: As for `matched_concentration`.
        slab_concentration: a + b of a slab that has spikes beside it, in pseudo-attempts.
    """
    mean = np.clip(np.asarray(mean, dtype=np.float64), *_MEAN_RANGE)
    s = np.maximum(matched_concentration(mean, informative, group_size), slab_concentration)
    a, b = mean * s, (1.0 - mean) * s
    spikes = np.clip(1.0 - informative / informative_probability(a, b, group_size), 0.0, 1.0)
    spikes = np.where(s > slab_concentration, 0.0, spikes)
    return InflatedBeta(zero=spikes * (1.0 - mean), one=spikes * mean, a=a, b=b)


def updated(prior: InflatedBeta, successes: FloatArray, failures: FloatArray) -> InflatedBeta:
    """The exact posterior after this evidence, fractions allowed.

    A success rules out the spike at 0 and a failure the one at 1; failures alone raise the spike at 0.
    """
    own = np.asarray(beta_binomial_log_likelihood(successes, successes + failures, prior.a, prior.b))
    zero = np.where(successes > 0, 0.0, prior.zero)
    one = np.where(failures > 0, 0.0, prior.one)
    # The slab's likelihood is at most 1, where a spike that is left has exactly 1.
    slab = prior.slab * np.exp(own)
    only_slab = zero + one <= 0.0
    total = np.where(only_slab, 1.0, zero + one + slab)
    return InflatedBeta(zero=zero / total, one=one / total, a=prior.a + successes, b=prior.b + failures)


def log_likelihood(prior: InflatedBeta, k: FloatArray, n: FloatArray) -> FloatArray:
    """Log probability of one order of k successes in n attempts, 0 <= k <= n, as `beta_binomial_log_likelihood`.

    A mixed outcome under spikes alone has a probability of 0, given as -1e30, which stays finite in sums.
    """
    own = beta_binomial_log_likelihood(k, n, prior.a, prior.b)
    spikes = np.where(k == 0, prior.zero, 0.0) + np.where(k == n, prior.one, 0.0)
    slab = prior.slab
    log_slab = np.where(slab > 0, np.log(np.where(slab > 0, slab, 1.0)) + own, _LOG_NEVER)
    log_spikes = np.where(spikes > 0, np.log(np.where(spikes > 0, spikes, 1.0)), _LOG_NEVER)
    return np.asarray(np.maximum(np.logaddexp(log_slab, log_spikes), _LOG_NEVER))


def moments(belief: InflatedBeta) -> tuple[FloatArray, FloatArray]:
    """Mean and variance of the success rate."""
    s = belief.a + belief.b
    first = belief.a / s
    second = first * (belief.a + 1.0) / (s + 1.0)
    mean = belief.one + belief.slab * first
    return mean, np.maximum(belief.one + belief.slab * second - mean * mean, 0.0)


def inflated_informative_moments(belief: InflatedBeta, group_size: int) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation of the chance that a group is informative, as `informative_moments`.

    A rate at a spike gives no informative group: only the slab counts.
    """
    mean, deviation = informative_moments(belief.a, belief.b, group_size)
    slab = belief.slab
    square = slab * (deviation * deviation + mean * mean)
    return slab * mean, np.sqrt(np.maximum(square - (slab * mean) ** 2, 0.0))
