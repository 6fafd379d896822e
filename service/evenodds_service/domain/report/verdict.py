"""How a run stands, in a few figures: what is stored with each run, and shown in lists and on dashboards."""

from __future__ import annotations

from collections.abc import Sequence

from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import tried_share
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.learning.tallies import Tallies
from evenodds_service.domain.report.alarms import KINDS, Alarm
from evenodds_service.domain.report.findings import alarms, notes
from evenodds_service.domain.report.lift import LiftReport, judged_windows, lift_of
from evenodds_service.domain.report.report import (
    first_step_of,
    last_step_of,
    recent_report,
    used_windows,
    window_report,
)
from evenodds_service.domain.report.summary import Estimate, SharePoint, Summary, Verdict
from evenodds_service.domain.settings import RunSettings

LEAST_JUDGED = 100
"""Observations of the control arm before a lift below 0 is taken for more than chance."""


def summarised(state: State, pool: Pool, settings: RunSettings) -> Summary:
    """How the run stands in this state. Some figures of the report, without the rest of it: this follows every step."""
    used, raised = used_windows(state.tallies), alarms(state, pool, settings)
    lift, (saved, _) = judged_lift(state), lift_of(state.tallies, used)
    return Summary(
        verdict=verdict_of(state, raised, lift),
        head_step=state.head_step if state.head_step >= 0 else None,
        alarms=raised,
        notes=notes(state, settings),
        lift=None if lift is None else Estimate(lift.difference, *lift.difference_interval),
        rollouts_saved=None
        if saved is None or saved.rollouts_saved is None
        else Estimate(saved.rollouts_saved, *saved.rollouts_saved_interval),
        informative_shares=_informative_shares(state.tallies, used),
        figures=_figures(state, used, saved),
    )


def _informative_shares(tallies: Tallies, used: Sequence[int]) -> tuple[SharePoint, ...]:
    scored_w, _, informative_w, _ = tallies.informative_bins[used].sum(axis=1).T.tolist()
    return tuple(
        SharePoint(first_step_of(tallies, w), last_step_of(tallies, w), informative / scored)
        for w, scored, informative in zip(used, scored_w, informative_w, strict=True)
        if scored > 0.0
    )


def judged_lift(state: State) -> LiftReport | None:
    """The lift by which the run is judged: of the newest windows with enough of the control arm."""
    windows = judged_windows(state.tallies, used_windows(state.tallies))
    return lift_of(state.tallies, windows)[0] if windows else None


def verdict_of(state: State, raised: Sequence[Alarm], lift: LiftReport | None) -> Verdict:
    """The one word about the run; see `Summary`."""
    codes = {alarm.code for alarm in raised if alarm.scope == "run"}
    if state.n_observations == 0 and not codes:
        return "no_data"
    if any(KINDS[code].is_broken for code in codes):
        return "broken"
    if "lift_not_positive" in codes:
        return "not_helping"
    if lift is None:
        return "learning"
    low, high = lift.difference_interval
    if low > 0.0:
        return "helping"
    return "not_helping" if high <= 0.0 and lift.control_share.observations >= LEAST_JUDGED else "learning"


def _figures(state: State, used: Sequence[int], saved: LiftReport | None) -> dict[str, float]:
    """What is plotted of a run; what was not measured is left out."""
    nats, n = state.tallies.skill[used].sum(axis=0).tolist()
    values = {
        "coverage": tried_share(state),
        "skill": nats / n if n else None,
        "rollouts_saved_share": saved.rollouts_saved_share if saved is not None else None,
    }
    if used:
        last = window_report(state.tallies, used[-1])
        arms = last.policy_informative_share, last.control_informative_share
        shares = [share.value if share is not None else None for share in arms]
        values |= {"informative_share_policy": shares[0], "informative_share_control": shares[1]}
    newest = recent_report(state.tallies, used)
    if newest is not None:
        values |= {"forecast_error": newest.forecast_error, "rank_correlation": newest.rank_correlation}
    return {name: value for name, value in values.items() if value is not None}
