"""How much each prompt is worth choosing (algorithm section 4). A score knows nothing of how a batch is chosen."""

from __future__ import annotations

import numpy as np

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.distributions import target_moments
from evenodds_service.domain.settings import Acquisition


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
    scores_N = optimism * informative_std_N
    scores_N += informative_N
    return np.asarray(scores_N)
