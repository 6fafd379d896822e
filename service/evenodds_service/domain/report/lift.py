"""What choosing brought: the policy's choice against the control arm, over any windows of steps.

A saving is stated as far as it was measured. Windows of steps in which no group of either arm was informative,
because the verifier was down, say, count in the shares, and nothing was saved in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.tallies import LIFT_COLUMNS, Tallies
from evenodds_service.domain.report.intervals import Proportion, Z, difference, ratio

MEASURED_CONTROLS = 20
"""A saving counts as measured from so many observations of the control arm on."""

JUDGED_CONTROLS = 4_000
"""The lift is judged by the newest windows with so many observations of the control arm."""

_Ends = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Share:
    """A share in [0, 1] with its 95% interval, of so many observations."""

    value: float
    interval: tuple[float, float]
    observations: int


@dataclass(frozen=True, slots=True)
class LiftReport:
    """The policy arm against the control arm, over the selections that had one; intervals hold 95%.

    Attributes:
        difference: Of the informative shares.
        rollouts_saved_share: Of the rollouts that uniform choice would have needed for as many informative groups.
            None where the control arm found nothing informative, so that no saving was measured.
        rollouts_saved: These rollouts less those of the policy arm, which made them in windows in which some group was
            informative. None for an end of an interval stands for one that is not finite.
    """

    policy_share: Share
    control_share: Share
    difference: float
    difference_interval: tuple[float, float]
    rollouts_saved_share: float | None
    rollouts_saved_share_interval: tuple[float | None, float | None]
    rollouts_saved: float | None
    rollouts_saved_interval: tuple[float | None, float | None]


def lift_of(tallies: Tallies, windows: Sequence[int]) -> tuple[LiftReport | None, str | None]:
    """The lift over these windows, or why there is none."""
    if tallies.n_selections == 0:
        return None, "no batch has been chosen yet: choose batches with POST /select_batch"
    values = _sums(tallies, windows)
    if values["policy"] <= 0.0 and values["control"] <= 0.0:
        return None, (
            "no outcome of two attempts or more has come from a batch with a control arm: set control_share "
            "with PUT /runs/{run}, and report outcomes with their selection_id"
        )
    for arm in ("control", "policy"):
        if values[arm] <= 0.0:
            return None, f"no outcome of the {arm} arm was observed yet, of two attempts or more: report its outcomes"
    if values["policy_informative"] <= 0.0 and values["control_informative"] <= 0.0:
        return None, "no group of either arm was informative, so the two arms cannot be compared: see the alarms"
    policy, control = _proportions(values)
    value, low, high = difference(policy, control)
    saving = _saving(tallies, alive(tallies, windows))
    report = LiftReport(as_share(policy), as_share(control), value, (low, high), *saving)
    return report, None


def _saving(tallies: Tallies, windows: Sequence[int]) -> tuple[float | None, _Ends, float | None, _Ends]:
    """The share saved and the rollouts saved, each with the ends of its interval; None where it was not measured."""
    values = _sums(tallies, windows)
    if n_controls(tallies, windows) < MEASURED_CONTROLS or values["policy"] <= 0.0:
        return None, (None, None), None, (None, None)
    policy, control = _proportions(values)
    relative, least, most = ratio(control, policy)
    attempts = values["policy_attempts"]

    def saved(of_uniform: float) -> float:
        """Rollouts that uniform choice would have needed beyond the policy's, which are this share of them."""
        return attempts * (1.0 / of_uniform - 1.0) if of_uniform > 0.0 else math.inf

    share = _finite(1.0 - relative) if relative > 0.0 else None
    shares = _finite(1.0 - most), _finite(1.0 - least)
    return share, shares, _finite(saved(relative)), (_finite(saved(most)), _finite(saved(least)))


def alive(tallies: Tallies, windows: Sequence[int]) -> list[int]:
    """Those of these windows in which some group of a selection with a control arm was informative."""
    informative = [LIFT_COLUMNS.index(f"{arm}_informative") for arm in ("policy", "control")]
    found = np.flatnonzero((tallies.lift[:, informative] > 0.0).any(axis=1)).tolist()
    return [w for w in windows if w in found]


def judged_windows(tallies: Tallies, windows: Sequence[int], *, controls: int = JUDGED_CONTROLS) -> list[int]:
    """The newest of these windows that hold so many observations of the control arm, or all; only those alive."""
    chosen: list[int] = []
    sums = tallies.lift[:, [LIFT_COLUMNS.index("control"), LIFT_COLUMNS.index("control_square")]].tolist()
    weight = square = 0.0
    for w in reversed(alive(tallies, windows)):
        if weight * weight >= controls * square > 0.0:  # Kish's effective size; see n_controls
            break
        chosen.insert(0, w)
        weight, square = weight + sums[w][0], square + sums[w][1]
    return chosen


def n_controls(tallies: Tallies, windows: Sequence[int]) -> float:
    """Observations of the control arm in these windows, as many as their weights leave (Kish's effective size)."""
    values = _sums(tallies, windows)
    return values["control"] ** 2 / values["control_square"] if values["control_square"] > 0.0 else 0.0


def most_lift(tallies: Tallies, windows: Sequence[int], *, z: float) -> float:
    """Upper end of the interval of the lift over these windows, z standard errors wide on either side."""
    policy, control = _proportions(_sums(tallies, windows), z)
    return difference(policy, control)[2]


def share_of(successes: float, n: float) -> Share | None:
    """The share with its interval; None of nothing."""
    return as_share(Proportion.of(successes, n)) if n > 0.0 else None


def as_share(share: Proportion) -> Share:
    return Share(share.value, (share.low, share.high), round(share.n))


def _sums(tallies: Tallies, windows: Sequence[int]) -> dict[str, float]:
    sums: FloatArray = tallies.lift[list(windows)].sum(axis=0)
    return dict(zip(LIFT_COLUMNS, sums.tolist(), strict=True))


def _proportions(values: dict[str, float], z: float = Z) -> tuple[Proportion, Proportion]:
    """Informative shares of the policy and of the control arm."""
    # Weighted observations are worth fewer where their weights differ (Kish's effective sample size).
    effective = values["control"] ** 2 / values["control_square"]
    control = Proportion.of(values["control_informative"] / values["control"] * effective, effective, z)
    return Proportion.of(values["policy_informative"], values["policy"], z), control


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
