"""Priors with a shape: how sure a prior is, and how much of it lies at "never" and "always", differs by prompt.

A shared prior says two things of a prompt: its mean success rate m and the probability v that a group of G attempts is
informative. Success is bimodal, so v says more than m. Two families match both: a Beta of mean m whose
concentration depends on the prompt, and a zero-one-inflated Beta, spikes at 0 and 1 plus a slab. Everything works on
arrays, elementwise, and knows nothing of prompts or runs.
"""

from __future__ import annotations

import math

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.distributions import informative_probability

MIN_MATCHED, MAX_MATCHED = 0.05, 64.0
"""Limits of the matched concentration, in pseudo-attempts: a text is never worth more than a few visits."""

MOST_SECTIONS = 64
"""More at a time cost more than they save, even for one prompt."""

_LOG_MIN_MATCHED, _LOG_RANGE = float(exact.log(MIN_MATCHED)), float(exact.log(MAX_MATCHED / MIN_MATCHED))
_HALVINGS = 24
_CELLS = 4_096
_MEAN_RANGE = (1e-3, 1.0 - 1e-3)


def matched_concentration(
    mean: FloatArray, informative: FloatArray, group_size: int, *, sections: int | None = None
) -> FloatArray:
    """The concentration s for which a group under Beta(m s, (1 - m) s) is informative with this probability.

    The probability grows with s from 0 towards 1 - m^G - (1 - m)^G (2 m (1 - m) for G = 1), so that s is unique. What
    no s in [`MIN_MATCHED`, `MAX_MATCHED`] reaches gets the nearest limit.

    Args:
        mean: m in [0, 1]; taken as at least .001 away from either end.
        informative: Probability in [0, 1], in the shape of the mean.
        group_size: G, at least 1.
        sections: Into how many parts an interval is cut at a time, at least 2; without it as many as cost least for so
            many. With a number, a prompt's s does not depend on the others, not even in its last bits.

    Returns:
        s, float64, to a relative 1e-6.
    """
    mean = np.clip(np.asarray(mean, dtype=np.float64), *_MEAN_RANGE)[..., None]
    informative = np.asarray(informative)[..., None]
    # Bisection, in as many sections at a time as fit: for a few prompts fewer, wider passes take a tenth of the time.
    if sections is None:
        sections = int(np.clip(_CELLS // max(mean.size, 1), 2, MOST_SECTIONS))
    inner = np.arange(1, sections) / sections
    low, width = np.full(mean.shape, _LOG_MIN_MATCHED), _LOG_RANGE
    for _ in range(math.ceil(_HALVINGS / math.log2(sections))):
        s = exact.exp(low + width * inner)
        short = informative_probability(mean * s, (1.0 - mean) * s, group_size) < informative
        width /= sections
        low = low + width * short.sum(axis=-1, keepdims=True)
    return exact.exp(low + 0.5 * width)[..., 0]
