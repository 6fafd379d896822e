"""A run in a few figures: its verdict, and what lists of runs and dashboards show. It is stored with the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from evenodds_service.domain.report.alarms import Alarm

Verdict = Literal["broken", "not_helping", "helping", "learning", "no_data"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value with the ends of its 95% interval; None for an end that is not finite."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class SharePoint:
    """Share of informative groups, among groups of two attempts or more, in the steps of one window."""

    first_step: int
    last_step: int
    share: float


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run stands.

    Attributes:
        verdict: `no_data`: nothing was observed yet. `broken`: an alarm says that the run does not do its work.
            `helping`, `not_helping`: chosen batches give more informative groups than uniform ones, or not more.
            `learning`: it is too early to tell, or there is no control arm to tell it by.
        head_step: The highest step that was observed.
        lift: Informative share of the policy arm less that of the control arm; None where it was not measured.
        rollouts_saved: Of the policy arm so far, against uniform choice; None where it was not measured.
        informative_shares: Of the newest windows, oldest first.
        figures: What dashboards plot, by name.
    """

    verdict: Verdict
    head_step: int | None = None
    alarms: tuple[Alarm, ...] = ()
    notes: tuple[Alarm, ...] = ()
    lift: Estimate | None = None
    rollouts_saved: Estimate | None = None
    informative_shares: tuple[SharePoint, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
