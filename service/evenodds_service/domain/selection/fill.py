"""How many prompts make a batch of B informative groups, rolled out in one wave; what to expect of it, what it costs.

Groups whose attempts are all right or all wrong teach nothing. Who asks for M prompts, so that B informative groups are
expected of them, trains on full batches without a second wave. Pure; a batch of n prompts is chosen elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.selection.batch import Choice
from evenodds_service.errors import NotEnoughPrompts

_FIRST_SHARE, _LEAST_SHARE = 0.5, 0.1
_PRIOR_GROUPS = 2.0
_QUANTILE = 1.959964

_GAIN, _GAIN_BATCH, _GAIN_DECLINE = 0.63, 8, 0.2
"""The speed of a training grows with the informative groups of its batches to the power of .63 where B is 8 and .48
where it is 32 (`benchmarks.trainings`): .63 (8 / B)^.2."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How many informative groups past selections found, and how many they had let expect, newer ones counting more.

    Two groups each are added to both: c is 1 before anything was found.
    """

    found: float
    foreseen: float

    @property
    def ratio(self) -> float:
        """c, by which a forecast is multiplied."""
        return (_PRIOR_GROUPS + self.found) / (_PRIOR_GROUPS + self.foreseen)

    def variance(self, share: float) -> float:
        """Of c, where this share of the groups is expected to be informative."""
        return self.ratio * max(1.0 - share, 0.0) / (_PRIOR_GROUPS + self.foreseen)


@dataclass(frozen=True, slots=True)
class Fill:
    """A batch that is to be filled.

    Attributes:
        most: Prompts at most, at least 1.
        factor: Expected informative groups over those asked for, above 0.
        update_cost: What an update on a group costs, in units of its rollouts; None where it is not known.
    """

    most: int
    factor: float = 1.0
    update_cost: float | None = None


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a filled batch lets expect.

    Attributes:
        expected: Informative groups.
        low, high: Whole numbers; from one to the other their number lies with a probability of .95 at least.
        relative_cost: Of rollouts and updates to the same accuracy, against plain batches of B prompts; None where the
            cost of an update is not known.
    """

    expected: float
    low: float
    high: float
    relative_cost: float | None = None


def filled(
    n_wanted: int, fill: Fill, calibration: Calibration, of_size: Callable[[int], Choice], *, n_eligible: int
) -> Choice:
    """A batch of M = min(most, ceil(factor B / s)) prompts, or of all eligible ones if they are fewer.

    s = max(.1, c x mean V_G) is the share of informative groups to expect, of a batch that is chosen for s = .5 first.

    Args:
        n_wanted: B, at least 1.
        of_size: Chooses a batch of that many prompts.

    Raises:
        NotEnoughPrompts: nothing may be selected, or too few of a category.
    """
    most = min(fill.most, n_eligible)
    if most == 0:
        raise NotEnoughPrompts(asked=n_wanted, eligible=0, what="informative_groups")

    def at_share(share: float) -> int:
        return min(most, max(1, math.ceil(fill.factor * n_wanted / share - 1e-9)))

    choice = _all_that_fit(of_size, at_share(_FIRST_SHARE))
    n = at_share(max(_LEAST_SHARE, calibration.ratio * choice.informative_share))
    return choice if n == len(choice.prompts) else _all_that_fit(of_size, n)


def most_prompts(n_wanted: int, fill: Fill) -> int:
    """How many prompts a batch of so many informative groups has at most, and is tried with at most."""
    return min(fill.most, math.ceil(fill.factor * n_wanted / _LEAST_SHARE))


def _all_that_fit(of_size: Callable[[int], Choice], n: int) -> Choice:
    """A batch of n, or of as many as the limits of categories leave."""
    try:
        return of_size(n)
    except NotEnoughPrompts as error:
        if error.group is not None or error.eligible == 0:
            raise
        return of_size(error.eligible)


def outlook(
    chosen: FloatArray,
    plain: Callable[[], FloatArray],
    n_wanted: int,
    update_cost: float | None,
    calibration: Calibration,
) -> Outlook:
    """What a filled batch lets expect, and what it costs.

    The groups' outcomes vary, independently of each other, and c is not known exactly; both variances add up. What is
    counted are whole groups, so the interval ends at whole numbers.

    Args:
        chosen: Probabilities V_G that a group is informative, of the batch's prompts, [M].
        plain: Likewise of the B prompts that would be chosen without filling; asked for where the cost is.
        n_wanted: B.
        update_cost: As in `Fill`.
    """
    n, c = len(chosen), calibration.ratio
    rates = np.minimum(c * chosen, 1.0)
    expected = float(rates.sum())
    variance = float((rates * (1.0 - rates)).sum())
    variance += float(chosen.sum()) ** 2 * calibration.variance(expected / n)
    reach = _QUANTILE * math.sqrt(variance)
    cost = None
    if update_cost is not None:
        found = float(np.minimum(c * plain(), 1.0).sum())
        cost = relative_cost(n_wanted, n, expected=expected, plain=found, update_cost=update_cost)
    low, high = math.floor(expected - reach + 1e-9), math.ceil(expected + reach - 1e-9)
    return Outlook(expected, float(max(0, low)), float(min(n, high)), cost)


def relative_cost(n_wanted: int, n_prompts: int, *, expected: float, plain: float, update_cost: float) -> float:
    """What a training by filled batches costs to the same accuracy, as a share of what plain batches of B cost.

    A filled step costs M + r E, M groups rolled out and E informative ones updated on; a plain one B (1 + r), and finds
    P informative ones. Speed grows with informative groups to the power of a: (M + r E) / (B (1 + r)) (P / E)^a.

    Args:
        n_wanted, n_prompts: B and M.
        expected, plain: E and P.
        update_cost: r.
    """
    if expected <= 0.0 or plain <= 0.0:
        return math.inf
    gain = _GAIN * (_GAIN_BATCH / max(n_wanted, _GAIN_BATCH)) ** _GAIN_DECLINE
    cost = (n_prompts + update_cost * expected) / (n_wanted * (1.0 + update_cost))
    return float(cost * (plain / expected) ** gain)
