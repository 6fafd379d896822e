"""How good a run's forecasts were, what choosing brought, and how the beliefs are spread."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.config import JsonValue

from evenodds.schemas.base import HasOlderNames, Reply, example, older
from evenodds.schemas.fields import PromptId, RunName, Verdict
from evenodds.schemas.loop import FallbackNotice
from evenodds.schemas.runs import Alarm


class Share(Reply):
    """A share in [0, 1] with its 95% interval (Wilson's), of so many observations."""

    value: float
    interval: tuple[float, float]
    observations: int = Field(description="rounded, where observations are weighted")


class ReliabilityBin(Reply):
    """Forecasts in [from_forecast, to_forecast), and what came of them."""

    from_forecast: float
    to_forecast: float
    count: int
    mean_forecast: float | None = Field(description="null where count is 0")
    mean_outcome: float | None


class ForecastQuality(Reply):
    """How forecasts, made before the outcomes were known, met them."""

    count: int = Field(description="observations: one prompt's attempts under one selection or in one call")
    mean_forecast: float | None
    mean_outcome: float | None
    calibration_error: float | None = Field(description="mean over the bins of |mean forecast - mean outcome|")
    squared_error: float | None = Field(description="mean of (forecast - outcome)^2; the Brier score of 0-1 outcomes")
    reliability: tuple[ReliabilityBin, ...] = Field(description="in tenths of the forecast")


class WindowReport(Reply):
    """What happened in some consecutive steps. Outcomes of a selection count at its step."""

    first_step: int
    last_step: int
    observations: int
    rank_correlation: float | None = Field(
        description="Spearman's, of forecast and observed success rate, from 50 bins of the forecast and 17 of the "
        "rate; null with fewer than 8 observations"
    )
    success_rate_forecast: float | None
    success_rate: float | None
    informative_forecast: float | None = Field(description="of all observations of two attempts or more")
    informative_share: float | None
    policy_informative_share: Share | None
    control_informative_share: Share | None
    chosen: int = Field(description="prompts in selections")
    fresh: int = Field(description="of these, never chosen or observed before")
    skill: float | None = Field(description="nats per observation against flat MoPPS; see skill")
    believed_counts: tuple[int, ...] | None = Field(
        default=None,
        description="how the gps beliefs were spread before the first outcome of these steps: prompts by believed "
        "success rate, in 20 equal bins, of at most 2,048 prompts that stand evenly in the pool; null where only "
        "late outcomes came",
    )


class LiftReport(Reply):
    """The policy's choice against the control arm, over the selections that had one. Intervals hold 95%."""

    policy_share: Share
    control_share: Share = Field(description="weighted where the run's control_share was changed meanwhile")
    difference: float = Field(description="of the two informative shares: the lift")
    difference_interval: tuple[float, float]
    rollouts_saved_share: float | None = Field(
        description="share saved of the rollouts that uniform choice would have needed for as many informative groups; "
        "null where it was not measured: fewer than 20 observations of the control arm, or none informative"
    )
    rollouts_saved_share_interval: tuple[float | None, float | None] = Field(description="null: not finite")
    rollouts_saved: float | None = Field(
        description="as a number of rollouts, by the policy arm so far, in windows with an informative group; "
        "null: not measured"
    )
    rollouts_saved_interval: tuple[float | None, float | None] = Field(description="null: not finite")


class RecentReport(Reply):
    """The newest windows that hold a hundred observations, or all there are: what to show beside the whole run."""

    first_step: int
    last_step: int
    observations: int
    rank_correlation: float | None = Field(description="as in windows")
    success_rate_forecast: float | None
    success_rate: float | None
    informative_forecast: float | None = Field(description="of all observations of two attempts or more")
    informative_share: float | None
    forecast_error: float | None = Field(description="mean informative forecast less the share that came")
    lift: LiftReport | None = None
    lift_missing: str | None = Field(default=None, description="why there is no lift, and what to do")


class ArmReport(Reply):
    """One arm of the selections: the policy's choice, or the uniform control."""

    arm: Literal["policy", "control"]
    selected: int
    observed: int = Field(description="selected prompts with outcomes of two attempts or more")
    attempts: int
    informative_forecast: float | None = Field(description="mean forecast of the observed ones")
    informative_share: Share | None


class VisitCount(Reply):
    from_visits: int
    to_visits: int | None = Field(description="null: no limit")
    prompts: int


class Coverage(Reply):
    """How much of the pool was tried, and how often. A visit is a selection or an observed step."""

    pool_size: int
    chosen: int = Field(description="prompts ever selected")
    observed: int = Field(description="prompts ever observed")
    tried_share: float = Field(description="share of the pool that was either")
    mean_visits: float
    visits: tuple[VisitCount, ...]


class GroupReport(HasOlderNames, Reply):
    """The prompts of one category, over the whole run."""

    category: str | None = Field(description="null: prompts without a category")
    group: Annotated[str | None, older("group")] = None
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


class SkillReport(Reply):
    """Log likelihood of outcomes under the gps mixture less that under flat MoPPS, in nats, before they were known."""

    per_observation: float | None
    observations: int
    recent: float = Field(description="summed over the newest observations, which alarms and fallback look at")
    recent_observations: int


class SourceReport(Reply):
    """One of those who showed something on the pool's prompts: a run that is learned from, or a name in prior_rates."""

    name: str = Field(description="a run whose policy moved stands here as early and as late")
    run: str | None = Field(description="the run that is learned from; null for prior_rates and for the mean of many")
    weight: float | None = Field(description="how far it is believed; null where it counts in the mean alone")
    prompts: int | None = Field(description="of the pool's prompts, those that it has tried; null for the mean")
    prompts_share: float | None


class OthersReport(Reply):
    """What others showed (learn_from, prior_rates), and what it was worth."""

    weight: float = Field(description="of all together: 1 as they stand, 0 not at all, below 0 the contrary")
    per_observation: float | None = Field(
        description="log likelihood of outcomes less that without what others showed, in nats, before they were known"
    )
    observations: int
    sources: tuple[SourceReport, ...] = Field(description="those that the key may see")


_QUALITY: dict[str, JsonValue] = {
    "count": 512,
    "mean_forecast": 0.41,
    "mean_outcome": 0.43,
    "calibration_error": 0.021,
    "squared_error": 0.094,
    "reliability": [
        {"from_forecast": 0.4, "to_forecast": 0.5, "count": 512, "mean_forecast": 0.41, "mean_outcome": 0.43}
    ],
}
_POLICY: dict[str, JsonValue] = {"value": 0.78, "interval": [0.74, 0.82], "observations": 461}
_CONTROL: dict[str, JsonValue] = {"value": 0.47, "interval": [0.34, 0.61], "observations": 51}
_LIFT: dict[str, JsonValue] = {
    "policy_share": _POLICY,
    "control_share": _CONTROL,
    "difference": 0.31,
    "difference_interval": [0.16, 0.44],
    "rollouts_saved_share": 0.4,
    "rollouts_saved_share_interval": [0.22, 0.57],
    "rollouts_saved": 2433,
    "rollouts_saved_interval": [1028, 4843],
}
_REPORT: dict[str, JsonValue] = {
    "run": "math-7b",
    "log_position": 5,
    "model_version": 0,
    "observations": 512,
    "selections": 2,
    "since_step": 12,
    "window_steps": 1,
    "success_rate": _QUALITY,
    "informative": _QUALITY,
    "rank_correlation": 0.52,
    "windows": [
        {
            **{"first_step": 12, "last_step": 12, "observations": 512, "rank_correlation": 0.52},
            **{"success_rate_forecast": 0.41, "success_rate": 0.43},
            **{"informative_forecast": 0.73, "informative_share": 0.75},
            **{"policy_informative_share": _POLICY, "control_informative_share": _CONTROL},
            **{"chosen": 512, "fresh": 498, "skill": 0.21},
            "believed_counts": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2048, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        }
    ],
    "verdict": "helping",
    "notes": [],
    "newest": {
        **{"first_step": 12, "last_step": 12, "observations": 512, "rank_correlation": 0.52},
        **{"success_rate_forecast": 0.41, "success_rate": 0.43},
        **{"informative_forecast": 0.73, "informative_share": 0.75, "forecast_error": -0.02},
        **{"lift": _LIFT, "lift_missing": None},
    },
    "arms": [
        {
            **{"arm": "policy", "selected": 461, "observed": 461, "attempts": 3688},
            **{"informative_forecast": 0.76, "informative_share": _POLICY},
        },
        {
            **{"arm": "control", "selected": 51, "observed": 51, "attempts": 408},
            **{"informative_forecast": 0.46, "informative_share": _CONTROL},
        },
    ],
    "lift": _LIFT,
    "lift_missing": None,
    "coverage": {
        **{"pool_size": 29115, "chosen": 498, "observed": 498, "tried_share": 0.0171, "mean_visits": 0.0176},
        "visits": [{"from_visits": 1, "to_visits": 1, "prompts": 484}],
    },
    "categories": [
        {
            **{"category": "algebra", "prompts": 7473, "tried": 127, "chosen": 131, "chosen_control": 13},
            **{"observed": 131, "attempts": 1048, "success_rate_forecast": 0.44, "success_rate": 0.45},
            **{"informative_forecast": 0.77, "informative_share": _POLICY},
        }
    ],
    "other_categories": None,
    "skill": {"per_observation": 0.21, "observations": 512, "recent": 107.5, "recent_observations": 512},
    "others": {
        **{"weight": 0.91, "per_observation": 0.12, "observations": 512},
        "sources": [{"name": "math-1b", "run": "math-1b", "weight": 0.91, "prompts": 28000, "prompts_share": 0.96}],
    },
    "fallback": None,
}


class RunReport(HasOlderNames, Reply):
    """How good the forecasts of a run are, and what choosing brought. Outcomes count once they are observed."""

    model_config = ConfigDict(json_schema_extra={"examples": [_REPORT]})

    run: RunName
    log_position: int = Field(description="what the report has seen")
    model_version: int
    observations: int = Field(description="observations accepted")
    selections: int
    since_step: int | None = Field(description="first step of the first window that counts; null before any")
    window_steps: int = Field(description="width of a window; it doubles as the run grows, to at most 32 windows")
    success_rate: ForecastQuality
    informative: ForecastQuality = Field(
        description="of groups of two attempts or more; the forecast is for the number of attempts that were made"
    )
    rank_correlation: float | None = Field(description="as in windows, over all that count")
    verdict: Verdict | None = Field(
        default=None,
        description="no_data: nothing was observed yet. broken: an alarm says that the run does not do its work. "
        "helping, not_helping: chosen batches give more informative groups than uniform ones, or not more. learning: "
        "it is too early to tell, or there is no control arm to tell it by",
    )
    notes: tuple[Alarm, ...] = Field(
        default=(), description="what a person may want to know and need not act on; alarms stand in GET /runs/{run}"
    )
    windows: tuple[WindowReport, ...] = Field(description="those in which something happened, oldest first")
    newest: RecentReport | None = Field(default=None, description="null before any observation")
    arms: tuple[ArmReport, ...]
    lift: LiftReport | None = None
    lift_missing: str | None = Field(default=None, description="why there is no lift, and what to do")
    coverage: Coverage
    categories: tuple[GroupReport, ...] = Field(description="the first 500 categories, in the order in which they came")
    other_categories: GroupReport | None = Field(default=None, description="all later categories together")
    groups: Annotated[tuple[GroupReport, ...], older("groups")] = ()
    other_groups: Annotated[GroupReport | None, older("other_groups")] = None
    skill: SkillReport
    others: OthersReport | None = Field(default=None, description="null where nobody has shown anything")
    fallback: FallbackNotice | None = None


class BelievedPrompt(HasOlderNames, Reply):
    prompt_id: PromptId
    category: str | None
    group: Annotated[str | None, older("group")] = None
    text: str | None = Field(description="its first 500 characters")
    success_rate: float
    informative_probability: float
    attempts_seen: int


_BELIEVED: dict[str, JsonValue] = {
    "prompt_id": "root-1",
    "category": "algebra",
    "text": "Solve x^2 - 5x + 6 = 0.",
    "success_rate": 0.18,
    "informative_probability": 0.62,
    "attempts_seen": 8,
}


class BeliefReport(Reply):
    """How the beliefs about the whole pool are spread."""

    model_config = example(
        run="math-7b",
        model_version=3,
        log_position=41,
        pool_size=2,
        success_rate_counts=[1 if i in (3, 14) else 0 for i in range(20)],
        informative_counts=[1 if i in (12, 16) else 0 for i in range(20)],
        hardest=[_BELIEVED],
        easiest=[],
    )

    run: RunName
    model_version: int
    log_position: int
    pool_size: int
    success_rate_counts: tuple[int, ...] = Field(description="prompts by believed success rate, in 20 equal bins")
    informative_counts: tuple[int, ...] = Field(description="prompts by informative probability, in 20 equal bins")
    hardest: tuple[BelievedPrompt, ...] = Field(description="hardest first")
    easiest: tuple[BelievedPrompt, ...] = Field(description="easiest first")
