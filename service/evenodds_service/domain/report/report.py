"""The report of a run, read from the sums that the fold keeps: how good the forecasts are, and what choosing brought.

Costs the same whatever the run has observed, save for coverage, which looks at each prompt's counters. Knows no HTTP:
`evenodds.schemas.report` describes the same figures to those who read them, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import others_weight, tried_share
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.learning.tallies import (
    ARM_COLUMNS,
    ARMS,
    GROUP_COLUMNS,
    MAX_GROUPS,
    N_BINS,
    N_WINDOWS,
    Tallies,
)
from evenodds_service.domain.prompts import MEAN
from evenodds_service.domain.ranks import spearman_of_table
from evenodds_service.domain.report.lift import LiftReport, Share, lift_of, share_of

LEAST_RANKED = 8
RECENT_OBSERVATIONS = 100
PRIOR_RATE = "prior_rate"
VISITS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None))


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Forecasts in [from, to), and what came of them; means are None where there are none."""

    from_forecast: float
    to_forecast: float
    count: int
    mean_forecast: float | None
    mean_outcome: float | None


@dataclass(frozen=True, slots=True)
class ForecastQuality:
    """How forecasts met outcomes.

    Attributes:
        calibration_error: Mean over the bins, by count, of |mean forecast - mean outcome|.
        squared_error: Mean of (forecast - outcome)^2; the Brier score where outcomes are 0 or 1.
    """

    count: int
    mean_forecast: float | None
    mean_outcome: float | None
    calibration_error: float | None
    squared_error: float | None
    reliability: tuple[ReliabilityBin, ...]


@dataclass(frozen=True, slots=True)
class StepsReport:
    """Steps `first_step` to `last_step`. Shares and means are None where nothing was observed."""

    first_step: int
    last_step: int
    observations: int
    rank_correlation: float | None
    success_rate_forecast: float | None
    success_rate: float | None
    informative_forecast: float | None
    informative_share: float | None


@dataclass(frozen=True, slots=True)
class WindowReport(StepsReport):
    """One window of steps.

    Attributes:
        believed_counts: How the `gps` beliefs about a sample of the pool were spread before the first outcome of these
            steps, in equal bins of the success rate.
    """

    policy_informative_share: Share | None
    control_informative_share: Share | None
    chosen: int
    fresh: int
    skill: float | None
    believed_counts: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class RecentReport(StepsReport):
    """The newest windows that hold a hundred observations, or all there are: what to show beside the whole run.

    Attributes:
        forecast_error: Mean informative forecast less the share that came.
        lift_missing: Why there is no lift, and what to do.
    """

    forecast_error: float | None
    lift: LiftReport | None
    lift_missing: str | None


@dataclass(frozen=True, slots=True)
class ArmReport:
    """One arm of the selections. `observed` counts prompts with at least two attempts."""

    arm: str
    selected: int
    observed: int
    attempts: int
    informative_forecast: float | None
    informative_share: Share | None


@dataclass(frozen=True, slots=True)
class VisitCount:
    """How many prompts were visited (chosen or observed) so often; `to_visits` None is no limit."""

    from_visits: int
    to_visits: int | None
    prompts: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the pool was ever chosen, observed, or either (tried), and how often."""

    pool_size: int
    chosen: int
    observed: int
    tried_share: float
    mean_visits: float
    visits: tuple[VisitCount, ...]


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One group over the whole run. `group` None: prompts without one, or the groups beyond the first 500."""

    group: str | None
    prompts: int
    tried: int
    chosen: int
    chosen_control: int
    observed: int
    attempts: int
    success_rate_forecast: float | None
    success_rate: float | None
    informative_forecast: float | None
    informative_share: Share | None


@dataclass(frozen=True, slots=True)
class SkillReport:
    """Log likelihood of outcomes under the mixture less that under flat MoPPS, in nats, before they were known."""

    per_observation: float | None
    observations: int
    recent: float
    recent_observations: int


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One of those who showed something on the pool's prompts.

    Attributes:
        run: The run that is learned from; None for a name among the `prior_rates`, and for the mean of many.
        weight: How far its column is believed; None where it counts in the mean alone.
        prompts: Of the pool's prompts, those that it has tried; None for the mean.
    """

    name: str
    run: str | None
    weight: float | None
    prompts: int | None
    prompts_share: float | None


@dataclass(frozen=True, slots=True)
class OthersReport:
    """What others showed, and what it was worth.

    Attributes:
        weight: Of all columns together: 1 is as they stand, 0 not at all.
        per_observation: Log likelihood of outcomes under the mixture less that without those priors that read what
            others showed, in nats, before they were known.
    """

    weight: float
    per_observation: float | None
    observations: int
    sources: tuple[SourceReport, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """`since_step` is the first step that counts, of what is counted by step; None before any."""

    since_step: int | None
    window_steps: int
    selections: int
    success_rate: ForecastQuality
    informative: ForecastQuality
    rank_correlation: float | None
    windows: tuple[WindowReport, ...]
    newest: RecentReport | None
    arms: tuple[ArmReport, ...]
    lift: LiftReport | None
    lift_missing: str | None
    coverage: Coverage
    groups: tuple[GroupReport, ...]
    other_groups: GroupReport | None
    skill: SkillReport
    others: OthersReport | None


def report(state: State, pool: Pool, *, since_step: int = 0, in_common: Mapping[str, int] | None = None) -> Report:
    """The report of the run in this state.

    Args:
        since_step: Leave out windows that end before this step; coverage and groups are of the whole run.
        in_common: How many of the pool's prompts each run has tried that is learned from.
    """
    tallies = state.tallies
    used = used_windows(tallies, since_step=since_step)
    ranks = tallies.ranks[used].sum(axis=0)
    lift, missing = lift_of(tallies, used)
    groups, others = _groups(state, pool)
    nats, n = tallies.skill[used].sum(axis=0).tolist()
    recent, n_recent = state.guardrails.skill()
    return Report(
        since_step=first_step_of(tallies, used[0]) if used else None,
        window_steps=tallies.width,
        selections=tallies.n_selections,
        success_rate=_quality(tallies.rate_bins[used].sum(axis=0)),
        informative=_quality(tallies.informative_bins[used].sum(axis=0)),
        rank_correlation=rank_correlation(ranks),
        windows=tuple(window_report(tallies, w) for w in used),
        newest=recent_report(tallies, used),
        arms=tuple(_arm(name, tallies.arms[used, arm].sum(axis=0)) for arm, name in enumerate(ARMS)),
        lift=lift,
        lift_missing=missing,
        coverage=_coverage(state),
        groups=groups,
        other_groups=others,
        skill=SkillReport(nats / n if n else None, round(n), recent, n_recent),
        others=_others(state, pool, in_common or {}),
    )


def _others(state: State, pool: Pool, in_common: Mapping[str, int]) -> OthersReport | None:
    columns, regression = state.columns, state.runs
    if columns is None or regression is None:
        return None
    tried = np.isfinite(pool.told(columns.names, slice(0, state.n_prompts)).rates_N_R).sum(axis=0)
    named = dict(zip(columns.names, tried.tolist(), strict=True))
    n_named = len(columns.read) - len(columns.sources)
    sources: list[SourceReport] = []
    for i, (name, weight) in enumerate(zip(columns.read, regression.weights[1:].tolist(), strict=True)):
        run = name.partition(" ")[0] if i >= n_named and name != MEAN else None
        known = named.get(name) if i < n_named else in_common.get(run or "")
        sources.append(_source(name, run, weight, known, state.n_prompts))
    shown = {source.name for source in sources} | {source.run for source in sources}
    rest = [(name, None, n) for name, n in named.items()] + [(run, run, n) for run, n in in_common.items()]
    sources += [_source(name, run, None, n, state.n_prompts) for name, run, n in rest if name not in shown]
    n = state.others_counts
    return OthersReport(others_weight(state), state.others_nats / n if n else None, n, tuple(sources))


def _source(name: str, run: str | None, weight: float | None, prompts: int | None, n_prompts: int) -> SourceReport:
    share = None if prompts is None else prompts / n_prompts
    return SourceReport(name or PRIOR_RATE, run, weight, prompts, share)


def rank_correlation(counts: FloatArray) -> float | None:
    """As `spearman_of_table`; None with fewer than eight observations too."""
    return spearman_of_table(counts) if counts.sum() >= LEAST_RANKED else None


def used_windows(tallies: Tallies, *, since_step: int = 0) -> list[int]:
    """The windows in which something happened, oldest first, but for those that end before this step."""
    return [w for w in range(N_WINDOWS) if last_step_of(tallies, w) >= since_step and is_counted(tallies, w)]


def first_step_of(tallies: Tallies, w: int) -> int:
    return tallies.first_step + w * tallies.width


def last_step_of(tallies: Tallies, w: int) -> int:
    return first_step_of(tallies, w + 1) - 1


def is_counted(tallies: Tallies, w: int) -> bool:
    return bool(tallies.arms[w].any() or tallies.rate_bins[w].any())


def _mean(total: float, n: float) -> float | None:
    return total / n if n > 0.0 else None


def _quality(bins: FloatArray) -> ForecastQuality:
    counts, forecasts, outcomes, squares = bins.T
    n = float(counts.sum())
    return ForecastQuality(
        count=round(n),
        mean_forecast=_mean(float(forecasts.sum()), n),
        mean_outcome=_mean(float(outcomes.sum()), n),
        calibration_error=_mean(float(np.abs(forecasts - outcomes).sum()), n),
        squared_error=_mean(float(squares.sum()), n),
        reliability=tuple(
            ReliabilityBin(i / N_BINS, (i + 1) / N_BINS, round(count), _mean(forecast, count), _mean(outcome, count))
            for i, (count, forecast, outcome, _) in enumerate(bins.tolist())
        ),
    )


def _steps(tallies: Tallies, windows: Sequence[int]) -> dict[str, Any]:
    """The fields of `StepsReport` over these windows, oldest first."""
    n, forecast, rate, _ = tallies.rate_bins[windows].sum(axis=(0, 1)).tolist()
    scored, informative_forecast, informative, _ = tallies.informative_bins[windows].sum(axis=(0, 1)).tolist()
    return {
        "first_step": first_step_of(tallies, windows[0]),
        "last_step": last_step_of(tallies, windows[-1]),
        "observations": round(n),
        "rank_correlation": rank_correlation(tallies.ranks[windows].sum(axis=0)),
        "success_rate_forecast": _mean(forecast, n),
        "success_rate": _mean(rate, n),
        "informative_forecast": _mean(informative_forecast, scored),
        "informative_share": _mean(informative, scored),
    }


def window_report(tallies: Tallies, w: int) -> WindowReport:
    policy, control = (dict(zip(ARM_COLUMNS, sums, strict=True)) for sums in tallies.arms[w].tolist())
    nats, compared = tallies.skill[w].tolist()
    return WindowReport(
        **_steps(tallies, [w]),
        policy_informative_share=share_of(policy["informative"], policy["scored"]),
        control_informative_share=share_of(control["informative"], control["scored"]),
        chosen=round(policy["selected"] + control["selected"]),
        fresh=round(policy["fresh"] + control["fresh"]),
        skill=_mean(nats, compared),
        believed_counts=tuple(round(n) for n in tallies.believed[w].tolist()) if tallies.believed[w].any() else None,
    )


def recent_report(tallies: Tallies, used: Sequence[int]) -> RecentReport | None:
    """Of the newest of these windows; None before any observation."""
    newest = recent_windows(tallies, used)
    if not newest:
        return None
    scored, informative_forecast, informative, _ = tallies.informative_bins[newest].sum(axis=(0, 1)).tolist()
    lift, missing = lift_of(tallies, newest)
    return RecentReport(
        **_steps(tallies, newest),
        forecast_error=_mean(informative_forecast - informative, scored),
        lift=lift,
        lift_missing=missing,
    )


def recent_windows(tallies: Tallies, used: Sequence[int], *, least: int = RECENT_OBSERVATIONS) -> list[int]:
    """The newest of these windows with so many observations, or all; from the newest one on that has any."""
    chosen: list[int] = []
    n = 0.0
    for w in reversed(used):
        n += float(tallies.rate_bins[w, :, 0].sum())
        if n > 0.0:
            chosen.insert(0, w)
        if n >= least:
            break
    return chosen


def _arm(name: str, sums: FloatArray) -> ArmReport:
    values = dict(zip(ARM_COLUMNS, sums.tolist(), strict=True))
    return ArmReport(
        arm=name,
        selected=round(values["selected"]),
        observed=round(values["scored"]),
        attempts=round(values["attempts"]),
        informative_forecast=_mean(values["forecast"], values["scored"]),
        informative_share=share_of(values["informative"], values["scored"]),
    )


def _coverage(state: State) -> Coverage:
    n = state.n_prompts
    visits = np.maximum(state.selected_N, state.visits_N)
    counts = np.bincount(np.minimum(visits, 17), minlength=18) if n else np.zeros(18, np.int64)
    return Coverage(
        pool_size=n,
        chosen=int((state.selected_N > 0).sum()),
        observed=int((state.visits_N > 0).sum()),
        tried_share=tried_share(state),
        mean_visits=float(visits.mean()) if n else 0.0,
        visits=tuple(
            VisitCount(first, last, int(counts[first : 18 if last is None else last + 1].sum()))
            for first, last in VISITS
        ),
    )


def _groups(state: State, pool: Pool) -> tuple[tuple[GroupReport, ...], GroupReport | None]:
    """The first 500 groups by name in the order in which they came, and the others together."""
    codes = np.minimum(pool.group_codes(slice(0, state.n_prompts)), MAX_GROUPS)
    sizes = np.bincount(codes)
    tried = np.bincount(codes, weights=(state.selected_N > 0) | (state.visits_N > 0))
    sums = np.zeros((len(sizes), len(GROUP_COLUMNS)))
    sums[: len(state.tallies.groups)] = state.tallies.groups
    names: Sequence[str | None] = pool.group_names
    rows = [
        _group(names[row] if row < MAX_GROUPS else None, int(sizes[row]), int(tried[row]), sums[row])
        for row in range(len(sizes))
    ]
    return tuple(rows[:MAX_GROUPS]), rows[MAX_GROUPS] if len(rows) > MAX_GROUPS else None


def _group(name: str | None, prompts: int, tried: int, sums: FloatArray) -> GroupReport:
    values = dict(zip(GROUP_COLUMNS, sums.tolist(), strict=True))
    return GroupReport(
        group=name,
        prompts=prompts,
        tried=tried,
        chosen=round(values["policy"] + values["control"]),
        chosen_control=round(values["control"]),
        observed=round(values["observed"]),
        attempts=round(values["attempts"]),
        success_rate_forecast=_mean(values["rate_forecast"], values["observed"]),
        success_rate=_mean(values["rate"], values["observed"]),
        informative_forecast=_mean(values["forecast"], values["scored"]),
        informative_share=share_of(values["informative"], values["scored"]),
    )
