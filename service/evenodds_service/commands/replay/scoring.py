"""The figures of a replay: pure functions of predictions and outcomes. Knows no HTTP and no recording."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

THIRDS = ("first", "middle", "last")


def mean_absolute_error(predicted: ArrayLike, actual: ArrayLike) -> float:
    """Mean of |predicted - actual|."""
    return float(np.mean(np.abs(np.asarray(predicted, dtype=float) - np.asarray(actual, dtype=float))))


def informative_share(successes: ArrayLike, group_size: int) -> float:
    """Share of groups with some but not all of `group_size` attempts successful."""
    k = np.asarray(successes)
    return float(np.mean((k > 0) & (k < group_size)))


def sampling_error(probabilities: ArrayLike) -> float:
    """Mean |forecast - share| that even a true forecast has, by chance alone.

    The share of n independent events of probabilities p_i has variance sum p_i (1 - p_i) / n^2; the mean absolute
    deviation of the normal distribution with this variance is sqrt(2 / pi) times its root.
    """
    p = np.asarray(probabilities, dtype=float)
    return math.sqrt(2 / math.pi * float((p * (1 - p)).sum())) / len(p)


def by_thirds(values: Sequence[float]) -> tuple[float, float, float]:
    """Means over the first, middle and last third of the steps; NaN values are left out, NaN if none remain.

    The thirds differ in length by at most one step, and the later ones are not shorter.
    """
    n = len(values)
    cuts = (0, n // 3, 2 * n // 3, n)
    means = [mean_of_known(values[start:stop]) for start, stop in pairwise(cuts)]
    return means[0], means[1], means[2]


def mean_of_known(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over seeds: mean and sample standard deviation; NaN where unknown (the deviation: of one seed)."""

    mean: float
    deviation: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Over the values that are not NaN."""
        known = [value for value in values if not math.isnan(value)]
        mean = mean_of_known(known)
        if len(known) < 2:
            return Spread(mean, math.nan)
        return Spread(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)))


@dataclass(frozen=True, slots=True)
class RankStep:
    """One step of the rank part: rank correlation over the pool and over never-seen prompts (NaN where too few are
    left), and mean absolute error."""

    pool: float
    never_seen: float
    absolute_error: float


@dataclass(frozen=True, slots=True)
class SelectStep:
    """One step of the select part.

    Attributes:
        informative: Share of informative groups in the batch.
        forecast: What the service forecast for it.
        sampling_error: Mean absolute error that a true forecast would have.
    """

    informative: float
    forecast: float
    sampling_error: float


def rank_figures(steps: Sequence[RankStep]) -> dict[str, float]:
    """Figures of the rank part, by name."""
    return {
        **_named("rank correlation", [step.pool for step in steps]),
        **_named("never-seen prompts", [step.never_seen for step in steps]),
        **_named("absolute error", [step.absolute_error for step in steps]),
    }


def select_figures(
    steps: Sequence[SelectStep], *, n_prompts: int, visits: Sequence[int], group_size: int
) -> dict[str, float]:
    """Figures of the select part, by name.

    Args:
        visits: How often each prompt that was ever chosen was chosen.
    """
    informative_groups = math.fsum(step.informative for step in steps) * sum(visits) / len(steps)
    rollouts = group_size * sum(visits)
    errors = [abs(step.forecast - step.informative) for step in steps]
    return {
        **_named("informative share", [step.informative for step in steps]),
        **_named("forecast |error|", errors),
        "forecast |error|": mean_of_known(errors),
        "forecast bias": mean_of_known([step.forecast - step.informative for step in steps]),
        "forecast chance": mean_of_known([step.sampling_error for step in steps]),
        "use coverage": len(visits) / n_prompts,
        "use visits": sum(visits) / len(visits),
        "use rollouts": rollouts / informative_groups if informative_groups else math.nan,
    }


def _named(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name} {third}": value for third, value in zip(THIRDS, by_thirds(values), strict=True)}
