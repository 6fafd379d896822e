"""A run: its settings and state, its refits and alarms, and what of its log no longer counts."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.config import JsonValue

from evenodds.schemas.base import HasOlderNames, Reply, Request, example, older
from evenodds.schemas.fields import (
    INCARNATION_PATTERN,
    MAX_ITEMS,
    MAX_SOURCES,
    MAX_STEP,
    Acquisition,
    CategoryShares,
    GroupSize,
    Key,
    ModelSize,
    OlderGroups,
    OlderGroupsAtMost,
    Predictor,
    PromptId,
    Rate,
    RefitStatus,
    RunName,
    RunNames,
    Step,
    TargetRate,
    check_shares,
    storable,
)


class RefitPolicy(Request):
    """When the worker fits the shared model anew. A refit is due when either limit is reached."""

    every_observations: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        default=2_048, description="new observations since the last fit; sooner while there are few"
    )
    every_seconds: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        default=600, description="since the last fit, if anything was observed"
    )


class Retention(Request):
    """What a run's pool keeps. Prompts whose last outcome is the longest ago go first; what they taught stays."""

    prompts: Annotated[int, Field(ge=0, le=100_000_000)] = Field(
        default=0,
        description="most prompts that are kept; the pool is cut when it has a twentieth more. 0 sets no limit",
    )
    days: Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)] | None = Field(
        default=None, description="a prompt is kept for this long after its last outcome; null sets no limit"
    )


class RunUpdate(HasOlderNames, Request):
    """Settings of a run. On an existing run, a field that is left out keeps its value."""

    model_config = example(predictor="gps", group_size=8, acquisition="yield", control_share=0.05)

    predictor: Predictor | None = Field(
        default=None,
        description="gps: shared model fused with own evidence; gps-paper: the published model alone; "
        "mopps: per-prompt Beta; uniform: chance",
    )
    group_size: GroupSize | None = Field(default=None, description="attempts per prompt in training; 8 by default")
    target_rate: TargetRate | None = Field(
        default=None, description="the success rate to aim at, instead of the likeliest to be informative"
    )
    embedder: Key | None = Field(
        default=None,
        description="'builtin', 'caller' (every vector comes with its prompt), 'none', or a sentence-transformers "
        "model that the service's operator allows. Fixed once the pool has prompts",
    )
    embedder_prompt: Annotated[str, Field(max_length=2_000), AfterValidator(storable)] | None = Field(
        default=None, description="instruction that the embedder puts before each text"
    )
    acquisition: Acquisition | None = Field(
        default=None,
        description="yield by default under gps, paper under gps-paper, thompson (as published) under mopps",
    )
    optimism: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = Field(
        default=None, description="weight of the uncertainty in the yield score; 0.5 by default"
    )
    diversity: Rate | None = Field(
        default=None,
        description="how far below the best score a prompt counts as equally good; of these the most unlike are "
        "chosen. Under paper the weight of unlikeness against the score; 0.1 by default",
    )
    cooldown_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None,
        description="a prompt always rests for this many steps after it was chosen. By default it rests for "
        "25 steps, at most 0.4 of an epoch (pool / batch_size steps), under yield, while there are enough others; "
        "0: never",
    )
    lease_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None,
        description="steps for which a chosen prompt is not chosen again while its outcome has not come; "
        "8 by default, 0 waits for none",
    )
    max_visits: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None,
        description="most times that a prompt is chosen while there are enough others; 0, the default, sets no limit",
    )
    keep_text: bool | None = Field(
        default=None,
        description="false: texts are embedded and forgotten, only hashes and vectors are stored; true by default",
    )
    model_size: ModelSize | None = Field(
        default=None,
        description="size of the networks of gps-paper: small (0.15 million parameters, the default) or published "
        "(20 million, for a GPU worker); applies from the next refit on",
    )
    refit: RefitPolicy | None = Field(default=None, description="when the shared model is fitted anew")
    control_share: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] | None = Field(
        default=None,
        description="share of each batch that is drawn uniformly from the eligible prompts and marked, from which the "
        "report estimates what choosing brings; 0 by default",
    )
    reprobe_share: Rate | None = Field(
        default=None,
        description="least share of each batch for the prompts least recently seen, a quarter of it for those seen "
        "before, however hopeless they are believed to be; 0.05 by default under yield and paper, else 0",
    )
    categories: CategoryShares | None = Field(
        default=None,
        description="least share of each batch for a category, as far as its prompts go; the shares sum to at most 1",
    )
    categories_at_most: CategoryShares | None = Field(
        default=None, description="largest share of each batch for a category"
    )
    groups: OlderGroups = None
    groups_at_most: OlderGroupsAtMost = None
    fallback: bool | None = Field(
        default=None,
        description="choose uniformly while the gps predictor's skill against flat MoPPS stays negative; true by "
        "default",
    )
    learn_from: Annotated[tuple[RunNames, ...], Field(max_length=MAX_SOURCES)] | None = Field(
        default=None,
        description="other runs whose outcomes are used from the first batch on: names, and patterns such as "
        "'math-*' for all runs that match, also later ones. Prompts are the same if their letters and digits are. "
        "Only runs that the key may touch count. A worker reads them when prompts are loaded and at each refit; the "
        "empty list, like null, ends it",
    )
    data_set: Key | None = Field(
        default=None,
        description="names the prompts' origin: runs of one data set have the same prompts under the same ids",
    )

    retention: Retention | None = Field(
        default=None,
        description="what the pool keeps: everything by default, and 200,000 prompts from the first budget on in a run "
        "that has chosen no batch",
    )
    fork_of: RunName | None = Field(
        default=None, description="of a new run: start with the pool, settings and memory of this one"
    )
    at_step: Step | None = Field(
        default=None, description="with fork_of: what came after this step is left out; nothing by default"
    )

    @model_validator(mode="after")
    def _forks_from_a_run(self) -> RunUpdate:
        if self.at_step is not None and self.fork_of is None:
            raise ValueError("at_step needs fork_of, the run to start from")
        return self

    @model_validator(mode="after")
    def _shares_fit(self) -> RunUpdate:
        check_shares(self.categories, self.categories_at_most)
        return self


_REFIT: dict[str, JsonValue] = {
    "refit_id": 7,
    "status": "done",
    "worker": "worker-1",
    "attempts": 1,
    "requested_at": "2026-01-05T10:00:00Z",
    "finished_at": "2026-01-05T10:00:04Z",
    "model_version": 3,
    "report": {"seconds_loading": 0.4, "seconds_fitting": 3.1},
    "error": None,
}


class RefitState(Reply):
    """One fit of the shared model."""

    model_config = example(**_REFIT)

    refit_id: int
    status: RefitStatus
    worker: str | None = Field(description="the worker that works or worked on it")
    attempts: int = Field(description="number of times that a worker has claimed it")
    requested_at: datetime
    finished_at: datetime | None
    model_version: int | None = Field(description="the snapshot that it published")
    report: dict[str, float] | None = Field(description="figures of the fit")
    error: str | None


class RefitRequest(Request):
    model_config = example(wait_seconds=30)

    wait_seconds: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = Field(
        default=0.0, description="longest wait for the refit to end"
    )


class RefitList(Reply):
    model_config = example(refits=[_REFIT], is_due=False)

    refits: tuple[RefitState, ...] = Field(description="newest first, at most 100")
    is_due: bool = Field(
        default=False,
        description="another refit is due, and no worker has asked for it yet, as a running worker does at once",
    )


class Remedy(Reply):
    """A call that takes back what a run learned while something was wrong."""

    operation: Literal["retract", "rewind"] = Field(description="POST /runs/{run}/ followed by this word")
    body: dict[str, int] = Field(
        description="the body of the call", examples=[{"from_step": 20, "to_step": 23}, {"step": 79}]
    )


class Alarm(Reply):
    """Something that a person should know of."""

    code: str = Field(
        description="forecast_off, rewards_constant, outcomes_stopped, group_size_mismatch, run_restarted, "
        "category_silent, lift_not_positive, fallback, sources_mislead or coverage_stalls; a newer service may know "
        "more",
        examples=["outcomes_stopped"],
    )
    message: str = Field(description="what was seen, against what, since which step, and the next step to take")
    since_step: int = Field(description="the first step at which it was seen")
    value: float = Field(description="what was measured")
    limit: float = Field(description="where the alarm begins")
    next_step: str = Field(default="", description="the end of the message: what to do")
    scope: Literal["run", "category"] = Field(
        default="run", description="whether it speaks of the whole run, or of one category"
    )
    category: str | None = Field(
        default=None, description="the category that it speaks of; null: the run, or prompts without a category"
    )
    remedy: Remedy | None = Field(default=None, description="what takes back the harm that was done, if a call can")


_RUN: dict[str, JsonValue] = {
    "run": "math-7b",
    "predictor": "gps",
    "group_size": 8,
    "target_rate": None,
    "embedder": "builtin",
    "embedder_prompt": None,
    "acquisition": "yield",
    "optimism": 0.5,
    "diversity": 0.0,
    "cooldown_steps": None,
    "lease_steps": 8,
    "max_visits": 0,
    "keep_text": True,
    "model_size": "small",
    "refit": {"every_observations": 2048, "every_seconds": 600},
    "control_share": 0.05,
    "reprobe_share": 0.05,
    "fallback": True,
    "last_refit": _REFIT,
    "pool_size": 29_115,
    "log_position": 41,
    "head_step": 12,
    "model_version": 3,
    "observations": 512,
    "created_at": "2026-01-05T09:12:00Z",
    "verdict": "helping",
    "lift": {"value": 0.31, "low": 0.16, "high": 0.44},
    "rollouts_saved": {"value": 2433, "low": 1028, "high": 4843},
    "informative_shares": [{"first_step": 12, "last_step": 12, "share": 0.75}],
    "active_at": "2026-01-05T10:02:00Z",
    "began_at": "2026-01-04T10:02:00Z",
    "alarms": [],
}


class Estimate(Reply):
    """A measured value with the ends of its 95% interval."""

    value: float
    low: float | None = Field(description="null: not finite")
    high: float | None = Field(description="null: not finite")


class SharePoint(Reply):
    """Share of informative groups in the steps of one window."""

    first_step: int
    last_step: int
    share: float


class RunState(HasOlderNames, Reply):
    """A run as it stands."""

    model_config = example(**_RUN)

    run: RunName
    predictor: Predictor
    group_size: int
    target_rate: float | None
    embedder: str
    embedder_prompt: str | None
    acquisition: Acquisition
    optimism: float
    diversity: float
    cooldown_steps: int | None
    lease_steps: int = 8
    max_visits: int
    keep_text: bool
    model_size: ModelSize
    refit: RefitPolicy
    control_share: float = 0.0
    reprobe_share: float = 0.05
    categories: dict[str, float] | None = None
    categories_at_most: dict[str, float] | None = None
    groups: Annotated[dict[str, float] | None, older("groups")] = None
    groups_at_most: Annotated[dict[str, float] | None, older("groups_at_most")] = None
    fallback: bool = True
    learn_from: tuple[str, ...] | None = Field(default=None, description="other runs whose outcomes are used")
    data_set: str | None = Field(default=None, description="runs that name the same one share ids of prompts")
    retention: Retention | None = Field(default=None, description="what the pool keeps; null: everything so far")
    base_step: int | None = Field(
        default=None, description="the log is compacted up to this step: a rewind or fork cannot go back behind it"
    )
    last_refit: RefitState | None = Field(default=None, description="the newest refit, in whatever state")
    pool_size: int = Field(description="prompts that may be selected")
    log_position: int = Field(description="entries in the run's log")
    head_step: int | None = Field(description="the highest step seen")
    model_version: int = Field(description="the snapshot in use; 0 while only streaming beliefs exist")
    observations: int = Field(description="observations that count: accepted, and not dropped since")
    fork_of: RunName | None = Field(default=None, description="the run that it started from")
    at_step: int | None = Field(default=None, description="the step of that run at which it started")
    created_at: datetime
    verdict: str | None = Field(
        default=None,
        description="broken: an alarm says that the run does not do its work; helping, not_helping: chosen batches "
        "give more informative groups than uniform ones, or not more; learning: too early to tell, or no control arm; "
        "no_data: no outcomes yet; null: not known yet. A newer service may know more",
    )
    lift: Estimate | None = Field(
        default=None, description="informative share of the policy arm less that of the control arm; null: not measured"
    )
    rollouts_saved: Estimate | None = Field(
        default=None, description="by the policy arm so far, against uniform choice; null: not measured"
    )
    informative_shares: tuple[SharePoint, ...] = Field(default=(), description="of the newest windows, oldest first")
    active_at: datetime | None = Field(default=None, description="when the newest batch was chosen or outcomes came")
    began_at: datetime | None = Field(
        default=None, description="when the first batch was chosen; null where no saving of rollouts is measured"
    )
    alarms: tuple[Alarm, ...] | None = Field(
        default=None, description="what a person should look at now; in lists up to some seconds old"
    )


class RewindRequest(Request):
    model_config = example(step=11)

    step: Annotated[int, Field(ge=-1, le=MAX_STEP)] = Field(
        description="the step of the checkpoint that the trainer restarted from; -1 forgets every step"
    )
    incarnation: Annotated[str, Field(pattern=INCARNATION_PATTERN)] | None = Field(
        default=None,
        description="names the restarted trainer: observations whose request_id begins with it and a dot are its own, "
        "reported before this call arrived, and are kept",
    )


class RetractRequest(Request):
    """At least one condition; several narrow it together."""

    model_config = example(from_step=10, to_step=12, prompt_ids=["sum-1"])

    from_step: Step | None = Field(default=None, description="the first step whose observations are dropped")
    to_step: Step | None = Field(default=None, description="the last one")
    prompt_ids: Annotated[tuple[PromptId, ...], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        default=None, description="prompts whose observations are dropped"
    )
    request_id: Key | None = Field(default=None, description="the observe request whose observations are dropped")

    @model_validator(mode="after")
    def _asks_for_something(self) -> RetractRequest:
        given = (self.from_step, self.to_step, self.prompt_ids, self.request_id)
        if all(condition is None for condition in given):
            raise ValueError("send at least one of from_step, to_step, prompt_ids and request_id")
        if self.from_step is not None and self.to_step is not None and self.from_step > self.to_step:
            raise ValueError(f"from_step {self.from_step} is behind to_step {self.to_step}")
        return self


class Voided(Reply):
    """What a run has forgotten."""

    model_config = example(run="math-7b", log_position=42, head_step=11, voided_observations=512, voided_selections=2)

    run: RunName
    log_position: int = Field(description="head of the run's log afterwards")
    head_step: int | None = Field(description="the highest step that is left")
    voided_observations: int
    voided_selections: int


class RunPage(Reply):
    model_config = example(runs=[_RUN], next_cursor=None)

    runs: tuple[RunState, ...]
    next_cursor: str | None = Field(description="pass as ?cursor= for the next page; null on the last")
