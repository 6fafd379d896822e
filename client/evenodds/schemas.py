"""The wire contract, written once: what crosses HTTP between a trainer or gateway and the service.

Requests forbid unknown fields, so that a misspelt option is an error and not a silent default; replies ignore
them, so that an old client keeps working against a newer service. Nothing here knows HTTP or SQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.config import JsonValue

MAX_ITEMS = 10_000
"""Most items in one list. Larger pools are sent as NDJSON."""
MAX_TEXT = 200_000
"""Most characters in one prompt's text."""
MAX_ID = 256
MAX_VECTOR = 8_192
MAX_FEATURES = 64
MAX_GROUP_SIZE = 1_024
MAX_STEP = 2**62
MAX_ATTEMPTS = 1_024
"""Most attempts for one prompt."""
MAX_ALLOCATION = 2_000_000
"""Most attempts to choose among in one allocation: prompts times the most attempts for one of them."""
MAX_TIERS = 16

RUN_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


def _storable(value: str) -> str:
    """Refuse what no database column or UTF-8 reply can hold: NUL characters and lone surrogates."""
    if "\x00" in value:
        raise ValueError("a NUL character (\\u0000) cannot be stored: remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair cannot be stored: send valid Unicode") from error
    return value


RunName = Annotated[str, Field(pattern=RUN_PATTERN, examples=["math-7b"])]
Key = Annotated[str, Field(min_length=1, max_length=MAX_ID), AfterValidator(_storable)]
PromptId = Annotated[Key, Field(description="stable inside a run", examples=["gsm8k-00017"])]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_storable)]
Step = Annotated[int, Field(ge=0, le=MAX_STEP, description="the policy version", examples=[12])]
Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Reward = Annotated[
    Rate, WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "boolean"}]})
]
Finite = Annotated[float, Field(allow_inf_nan=False)]
GroupSize = Annotated[int, Field(ge=1, le=MAX_GROUP_SIZE, description="attempts per prompt in training")]
TargetRate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
GroupShares = Annotated[dict[Key, Rate], Field(min_length=1, max_length=1_000)]
Vector = Annotated[tuple[Finite, ...], Field(min_length=1, max_length=MAX_VECTOR)]
Features = Annotated[dict[Key, Finite], Field(max_length=MAX_FEATURES)]

Predictor = Literal["gps", "gps-paper", "mopps", "uniform"]
Acquisition = Literal["yield", "paper", "thompson", "uniform"]
ModelSize = Literal["small", "published"]
RefitStatus = Literal["pending", "running", "done", "failed"]
Objective = Literal["solve", "signal"]
AllocationMethod = Literal["greedy", "bins"]
BudgetMode = Literal["parallel", "sequential"]
Attempts = Annotated[int, Field(ge=0, le=MAX_ATTEMPTS)]
PolicyName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of a budget policy", examples=["default"])
]
Label = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_storable)]


class Request(BaseModel):
    """What a caller sends."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before", check_fields=False)
    @classmethod
    def _means_what_it_says(cls, value: object, info: ValidationInfo) -> object:
        """Refuse "1" and true where a number is meant, and "no" and 0 where true or false is: they would be taken."""
        kind = _kinds(cls).get(info.field_name or "")
        if kind is None:
            return value
        wrong = _WRONG[kind]
        if type(value) in wrong:
            raise ValueError(f"Input should be a {kind}")
        many: Iterable[tuple[object, object]] = ()
        if isinstance(value, (list, tuple)) and not wrong.isdisjoint(map(type, value)):
            many = ((f"item {i}", each) for i, each in enumerate(value))
        elif isinstance(value, dict) and not wrong.isdisjoint(map(type, value.values())):
            many = value.items()
        for name, each in many:
            if type(each) in wrong:
                raise ValueError(f"{name} should be a {kind}, got {each!r:.80}")
        return value


_Kind = Literal["number", "reward", "truth value"]
_WRONG: Mapping[_Kind, frozenset[type]] = {
    "number": frozenset({bool, str}),
    "reward": frozenset({str}),
    "truth value": frozenset({str, int, float}),
}


@cache
def _kinds(model: type[BaseModel]) -> Mapping[str, _Kind]:
    """Of fields that hold numbers or truth values, alone or in lists and by name, what they hold."""
    found: dict[str, _Kind] = {}
    for name, field in model.model_fields.items():
        leaves = set(_leaves(field.annotation))
        if leaves & {int, float}:
            found[name] = "reward" if name == "rewards" else "number"
        elif bool in leaves:
            found[name] = "truth value"
    return found


def _leaves(annotation: object) -> Iterator[object]:
    """The plain types in an annotation, without the names of a mapping."""
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        inner = inner[:1]
    elif get_origin(annotation) is dict:
        inner = inner[1:]
    elif get_origin(annotation) is Literal:
        return
    if not inner:
        yield annotation
    for each in inner:
        yield from _leaves(each)


def _example(**fields: JsonValue) -> ConfigDict:
    """Configuration of a request with an example for the documentation."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


class Reply(BaseModel):
    """What the service answers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RefitPolicy(Request):
    """When the worker fits the shared model anew. A refit is due when either limit is reached."""

    every_observations: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        default=2_048, description="new observations since the last fit; sooner while there are few"
    )
    every_seconds: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        default=600, description="since the last fit, if anything was observed"
    )


class RunUpdate(Request):
    """Settings of a run. On an existing run, a field that is left out keeps its value."""

    model_config = _example(predictor="gps", group_size=8, acquisition="yield", control_share=0.05)

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
    embedder_prompt: Annotated[str, Field(max_length=2_000), AfterValidator(_storable)] | None = Field(
        default=None, description="instruction that the embedder puts before each text"
    )
    acquisition: Acquisition | None = Field(
        default=None,
        description="yield by default under gps, paper under gps-paper, thompson (as published) under mopps",
    )
    optimism: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = Field(
        default=None, description="weight of the uncertainty in the yield score; 0.5 by default"
    )
    diversity: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = Field(
        default=None,
        description="weight of unlikeness, in the batch and to the previous ones, against the score; 0.1 by default",
    )
    cooldown_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None, description="a prompt rests for this many steps after it was chosen; 0 by default"
    )
    lease_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None,
        description="for so many steps a chosen prompt is waited for and not chosen again before its outcome comes; "
        "8 by default, 0 waits for none",
    )
    max_visits: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None, description="a prompt is chosen at most so often; 0, the default, sets no limit"
    )
    keep_text: bool | None = Field(
        default=None,
        description="false: texts are embedded and forgotten, only hashes and vectors are stored; true by default",
    )
    model_size: ModelSize | None = Field(
        default=None,
        description="of the networks of gps-paper: small (0.15 million parameters, the default) or published "
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
    groups: GroupShares | None = Field(
        default=None,
        description="least share of each batch for a group, as far as its prompts go; the shares sum to at most 1",
    )
    groups_at_most: GroupShares | None = Field(default=None, description="largest share of each batch for a group")
    fallback: bool | None = Field(
        default=None,
        description="choose uniformly while the gps predictor's skill against flat MoPPS stays negative; true by "
        "default",
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
        _check_shares(self.groups, self.groups_at_most)
        return self


def _check_shares(least: dict[str, float] | None, most: dict[str, float] | None) -> None:
    """Raises ValueError: least shares that sum to more than 1, or one that is above its group's largest."""
    if least is not None and sum(least.values()) > 1 + 1e-9:
        raise ValueError(f"groups: the shares sum to {sum(least.values()):g}, the limit is 1")
    for group in (least or {}).keys() & (most or {}).keys():
        if (least or {})[group] > (most or {})[group]:
            raise ValueError(
                f"groups.{group}: {(least or {})[group]:g} is more than groups_at_most allows, "
                f"{(most or {})[group]:g}: lower the one or raise the other"
            )


class RefitState(Reply):
    """One fit of the shared model."""

    refit_id: int
    status: RefitStatus
    worker: str | None = Field(description="who works or worked on it")
    attempts: int = Field(description="how often a worker has claimed it")
    requested_at: datetime
    finished_at: datetime | None
    model_version: int | None = Field(description="the snapshot that it published")
    report: dict[str, float] | None = Field(description="figures of the fit")
    error: str | None


class RefitRequest(Request):
    model_config = _example(wait_seconds=30)

    wait_seconds: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = Field(
        default=0.0, description="wait so long for the refit to end"
    )


class RefitList(Reply):
    refits: tuple[RefitState, ...] = Field(description="newest first, at most 100")


class Alarm(Reply):
    """Something that a person should look at."""

    code: str = Field(
        description="group_silent, outcomes_stopped, skill_not_positive, fallback or coverage_stalls; a newer service "
        "may know more",
        examples=["outcomes_stopped"],
    )
    message: str = Field(description="what was seen, and what to check")
    since_step: int = Field(description="since when")
    value: float = Field(description="what was measured")
    limit: float = Field(description="where the alarm begins")


class RunState(Reply):
    """A run as it stands."""

    run: RunName
    predictor: Predictor
    group_size: int
    target_rate: float | None
    embedder: str
    embedder_prompt: str | None
    acquisition: Acquisition
    optimism: float
    diversity: float
    cooldown_steps: int
    lease_steps: int = 8
    max_visits: int
    keep_text: bool
    model_size: ModelSize
    refit: RefitPolicy
    control_share: float = 0.0
    reprobe_share: float = 0.05
    groups: dict[str, float] | None = None
    groups_at_most: dict[str, float] | None = None
    fallback: bool = True
    last_refit: RefitState | None = Field(default=None, description="the newest refit, in whatever state")
    pool_size: int = Field(description="prompts that may be selected")
    log_position: int = Field(description="entries in the run's log")
    head_step: int | None = Field(description="the highest step seen")
    model_version: int = Field(description="the snapshot in use; 0 while only streaming beliefs exist")
    observations: int = Field(description="observations that count: accepted, and not dropped since")
    fork_of: RunName | None = Field(default=None, description="the run that it started from")
    at_step: int | None = Field(default=None, description="the step of that run at which it started")
    created_at: datetime
    alarms: tuple[Alarm, ...] | None = Field(
        default=None, description="what a person should look at now; null in lists, which do not look"
    )


class RewindRequest(Request):
    model_config = _example(step=11)

    step: Step = Field(description="the step of the checkpoint that the trainer restarted from")


class RetractRequest(Request):
    """At least one condition; several narrow it together."""

    model_config = _example(from_step=10, to_step=12, prompt_ids=["sum-1"])

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

    run: RunName
    log_position: int = Field(description="head of the run's log afterwards")
    head_step: int | None = Field(description="the highest step that is left")
    voided_observations: int
    voided_selections: int


class RunPage(Reply):
    runs: tuple[RunState, ...]
    next_cursor: str | None = Field(description="pass as ?cursor= for the next page; null on the last")


class PromptIn(Request):
    """A prompt for the pool. Without `prompt_id` the id is a hash of the normalised text."""

    prompt_id: PromptId | None = None
    text: Text | None = None
    group: Key | None = Field(default=None, description="dataset, domain or environment")
    embedding: Vector | None = Field(default=None, description="the caller's own vector (embedder 'caller')")
    features: Features | None = Field(default=None, description="numeric features by name")
    prior_rate: Rate | None = Field(default=None, description="a success rate known beforehand, say of a profile")

    @model_validator(mode="after")
    def _has_identity(self) -> PromptIn:
        if self.prompt_id is None and self.text is None:
            raise ValueError("a prompt needs a prompt_id, a text, or both")
        return self


class PromptsIn(Request):
    model_config = _example(
        prompts=[
            {"prompt_id": "sum-1", "text": "What is 17 + 25?", "group": "arithmetic"},
            {"prompt_id": "root-1", "text": "Solve x^2 - 5x + 6 = 0.", "group": "algebra", "prior_rate": 0.4},
        ]
    )

    prompts: Annotated[tuple[PromptIn, ...], Field(min_length=1, max_length=MAX_ITEMS)]


class PromptsAdded(Reply):
    run: RunName
    added: int
    existing: int = Field(description="prompts of this call that the pool had already")
    pool_size: int
    log_position: int


class PromptInfo(Reply):
    prompt_id: PromptId
    text: str | None
    group: str | None
    features: dict[str, float] | None
    prior_rate: float | None


class PromptPage(Reply):
    prompts: tuple[PromptInfo, ...]
    next_cursor: str | None = Field(description="pass as ?cursor= for the next page; null on the last")


class Observation(Request):
    """Outcomes of attempts on one prompt. Attempts that failed for other reasons than the policy stay out."""

    prompt_id: PromptId | None = None
    successes: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="fractional rewards count as fractional successes"
    )
    attempts: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        default=None, description="instead of successes and attempts: a reward in [0, 1] per attempt (true counts as 1)"
    )
    text: Text | None = Field(default=None, description="for a prompt that the pool does not have yet")
    group: Key | None = None
    embedding: Vector | None = None
    features: Features | None = None
    prior_rate: Rate | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Observation:
        if self.prompt_id is None and self.text is None:
            raise ValueError("an observation needs a prompt_id, a text, or both")
        if self.rewards is not None:
            if self.successes is not None or self.attempts is not None:
                raise ValueError("send either rewards or successes and attempts, not both")
            return self
        if self.successes is None or self.attempts is None:
            raise ValueError("send successes and attempts, or rewards")
        if self.successes > self.attempts:
            raise ValueError(f"successes {self.successes:g} exceeds attempts {self.attempts}")
        return self


class ObserveRequest(Request):
    model_config = _example(
        run="math-7b",
        step=12,
        request_id="step-12-rank-0",
        observations=[
            {"prompt_id": "sum-1", "successes": 7, "attempts": 8},
            {"prompt_id": "root-1", "rewards": [0, 1, 0.5, 0, 0, 1, 0, 0]},
        ],
    )

    run: RunName
    step: Step
    request_id: Key | None = Field(default=None, description="makes the call repeatable: send the same id again")
    selection_id: Key | None = Field(
        default=None, description="the selection whose outcomes these are; other prompts may come along"
    )
    observations: Annotated[tuple[Observation, ...], Field(min_length=1, max_length=MAX_ITEMS)]


class ObserveReply(Reply):
    run: RunName
    log_position: int = Field(description="where the observations stand in the run's log")
    accepted: int
    model_version: int
    replayed: bool = Field(description="this request_id was accepted before; nothing was written again")


class PromptRef(Request):
    """A prompt of the pool by its id, or a new text."""

    prompt_id: PromptId | None = None
    text: Text | None = None
    group: Key | None = None
    embedding: Vector | None = None
    features: Features | None = None
    prior_rate: Rate | None = None

    @model_validator(mode="after")
    def _has_identity(self) -> PromptRef:
        if self.prompt_id is None and self.text is None:
            raise ValueError("a prompt needs a prompt_id, a text, or both")
        return self


class PredictRequest(Request):
    model_config = _example(run="math-7b", prompts=[{"prompt_id": "sum-1"}, {"text": "What is 18 + 24?"}])

    run: RunName
    prompts: Annotated[tuple[PromptRef, ...], Field(min_length=1, max_length=MAX_ITEMS)]
    step: Step | None = None
    group_size: GroupSize | None = None


class Prediction(Reply):
    prompt_id: PromptId | None = None
    success_rate: float = Field(description="mean of the belief")
    std: float = Field(description="standard deviation of the belief")
    interval: tuple[float, float] = Field(description="central 90% of the belief")
    informative_probability: float = Field(description="that a group of group_size attempts is not all equal")
    attempts_seen: int


class PredictReply(Reply):
    run: RunName
    model_version: int
    log_position: int
    predictions: tuple[Prediction, ...] = Field(description="in the order asked")


class SelectRequest(Request):
    model_config = _example(run="math-7b", step=13, batch_size=2, seed=0, groups={"algebra": 0.5})

    run: RunName
    step: Step
    batch_size: Annotated[int, Field(ge=1, le=MAX_ITEMS, examples=[256])]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    candidates: Annotated[tuple[PromptId, ...], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        default=None, description="choose among these only; the whole pool otherwise"
    )
    exclude: Annotated[tuple[PromptId, ...], Field(max_length=MAX_ITEMS)] | None = None
    groups: GroupShares | None = Field(
        default=None,
        description="least share of the batch for each group; the shares sum to at most 1. Instead of the run's, and "
        "unlike those an error where a group has too few prompts",
    )
    groups_at_most: GroupShares | None = Field(
        default=None, description="largest share of the batch for each group; the run's by default"
    )
    target_rate: TargetRate | None = None
    group_size: GroupSize | None = None
    acquisition: Acquisition | None = None
    optimism: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    diversity: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    cooldown_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    max_visits: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    allow_outstanding: bool = Field(
        default=False, description="choose prompts again whose outcomes from earlier selections have not come yet"
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> SelectRequest:
        _check_shares(self.groups, self.groups_at_most)
        return self


class SelectedPrompt(Reply):
    prompt_id: PromptId
    group: str | None = None
    success_rate: float
    std: float
    informative_probability: float
    arm: Literal["policy", "control"] = Field(
        default="policy", description="control: drawn uniformly, whatever is believed about it"
    )


class Forecast(Reply):
    informative_share: float = Field(description="expected share of informative groups in the batch")
    informative_groups: float = Field(description="expected number of informative groups in the batch")
    pad_to: int | None = Field(
        description="prompts to take for batch_size informative groups in expectation; "
        "null if the pool cannot give them"
    )


class FallbackNotice(Reply):
    """What the service does instead of what was asked, and why."""

    to: Literal["uniform"] = "uniform"
    reason: str
    since_step: int


class SelectReply(Reply):
    run: RunName
    step: int
    selection_id: str
    model_version: int
    log_position: int = Field(description="the state that the choice was made in")
    replayed: bool = Field(description="this (run, step) was chosen before; the same batch is returned")
    outstanding: int = Field(
        default=0, description="how many of the prompts are still waited for from earlier selections"
    )
    forecast: Forecast
    fallback: FallbackNotice | None = Field(
        default=None, description="the batch is a uniform choice, because the model's skill stays negative"
    )
    prompts: tuple[SelectedPrompt, ...]


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


class ArmReport(Reply):
    """One arm of the selections: the policy's choice, or the uniform control."""

    arm: Literal["policy", "control"]
    selected: int
    observed: int = Field(description="selected prompts with outcomes of two attempts or more")
    attempts: int
    informative_forecast: float | None = Field(description="mean forecast of the observed ones")
    informative_share: Share | None


class LiftReport(Reply):
    """The policy's choice against the control arm, over the selections that had one. Intervals hold 95%."""

    policy_share: Share
    control_share: Share = Field(description="weighted where the run's control_share was changed meanwhile")
    difference: float = Field(description="of the two informative shares: the lift")
    difference_interval: tuple[float, float]
    rollouts_saved_share: float | None = Field(
        description="share saved of the rollouts that uniform choice would have needed for as many informative groups"
    )
    rollouts_saved_share_interval: tuple[float | None, float | None] = Field(description="null: not finite")
    rollouts_saved: float | None = Field(description="as a number of rollouts, by the policy arm so far")
    rollouts_saved_interval: tuple[float | None, float | None] = Field(description="null: not finite")


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


class GroupReport(Reply):
    """One group of prompts, over the whole run."""

    group: str | None = Field(description="null: prompts without a group")
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
        }
    ],
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
    "lift": {
        "policy_share": _POLICY,
        "control_share": _CONTROL,
        "difference": 0.31,
        "difference_interval": [0.16, 0.44],
        "rollouts_saved_share": 0.4,
        "rollouts_saved_share_interval": [0.22, 0.57],
        "rollouts_saved": 2433,
        "rollouts_saved_interval": [1028, 4843],
    },
    "lift_missing": None,
    "coverage": {
        **{"pool_size": 29115, "chosen": 498, "observed": 498, "tried_share": 0.0171, "mean_visits": 0.0176},
        "visits": [{"from_visits": 1, "to_visits": 1, "prompts": 484}],
    },
    "groups": [
        {
            **{"group": "algebra", "prompts": 7473, "tried": 127, "chosen": 131, "chosen_control": 13},
            **{"observed": 131, "attempts": 1048, "success_rate_forecast": 0.44, "success_rate": 0.45},
            **{"informative_forecast": 0.77, "informative_share": _POLICY},
        }
    ],
    "other_groups": None,
    "skill": {"per_observation": 0.21, "observations": 512, "recent": 107.5, "recent_observations": 512},
    "fallback": None,
}


class RunReport(Reply):
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
    windows: tuple[WindowReport, ...] = Field(description="those in which something happened, oldest first")
    arms: tuple[ArmReport, ...]
    lift: LiftReport | None = None
    lift_missing: str | None = Field(default=None, description="why there is no lift, and what to do")
    coverage: Coverage
    groups: tuple[GroupReport, ...] = Field(description="the first 500 groups, in the order in which they came")
    other_groups: GroupReport | None = Field(default=None, description="all later groups together")
    skill: SkillReport
    fallback: FallbackNotice | None = None


class BelievedPrompt(Reply):
    prompt_id: PromptId
    group: str | None
    text: str | None = Field(description="its first 500 characters")
    success_rate: float
    informative_probability: float
    attempts_seen: int


class BeliefReport(Reply):
    """How the beliefs about the whole pool are spread."""

    run: RunName
    model_version: int
    log_position: int
    pool_size: int
    success_rate_counts: tuple[int, ...] = Field(description="prompts by believed success rate, in 20 equal bins")
    informative_counts: tuple[int, ...] = Field(description="prompts by informative probability, in 20 equal bins")
    hardest: tuple[BelievedPrompt, ...] = Field(description="hardest first")
    easiest: tuple[BelievedPrompt, ...] = Field(description="easiest first")


class Visit(Reply):
    """One observation of a prompt, as the log keeps it."""

    log_position: int
    step: int
    successes: float
    attempts: int
    selection_id: str | None


class PromptState(PromptInfo):
    """A prompt with the present belief about it and its own history."""

    run: RunName
    model_version: int
    log_position: int
    belief: Prediction
    visits: int
    last_step: int | None
    history: tuple[Visit, ...] = Field(description="newest first, at most 100")


class AllocatePrompt(PromptRef):
    """A prompt to spend attempts on."""

    cost: Annotated[float, Field(ge=0.01, le=10_000, allow_inf_nan=False)] = Field(
        default=1.0, description="of one attempt, in the unit of the budget (expected tokens, say)"
    )
    min_attempts: Attempts | None = Field(default=None, description="of this prompt, instead of the call's")
    max_attempts: Attempts | None = Field(default=None, description="of this prompt, instead of the call's")


class AllocateRequest(Request):
    model_config = _example(
        run="math-7b",
        prompts=[{"prompt_id": "sum-1"}, {"prompt_id": "root-1"}, {"text": "What is 18 + 24?"}],
        budget=24,
        objective="solve",
    )

    run: RunName
    prompts: Annotated[tuple[AllocatePrompt, ...], Field(min_length=1, max_length=MAX_ITEMS)]
    budget: Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)] = Field(
        description="to be spent on all prompts together: attempts, or the unit of the costs"
    )
    objective: Objective = Field(
        default="solve",
        description="solve: one success is enough (best of k); signal: the chance that a training group is informative",
    )
    method: AllocationMethod = Field(
        default="greedy", description="greedy: the greatest gain per cost first; bins: by bins of predicted difficulty"
    )
    min_attempts: Attempts | None = Field(default=None, description="of each prompt; 1 under solve, 2 under signal")
    max_attempts: Attempts | None = Field(
        default=None, description="of each prompt; by default 1,024, or 2,000,000 over the number of prompts"
    )

    def limits(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Least and most attempts of each prompt."""
        usual_least = 2 if self.objective == "signal" else 1
        least = usual_least if self.min_attempts is None else self.min_attempts
        most = self.max_attempts
        if most is None:
            most = max(least, min(MAX_ATTEMPTS, MAX_ALLOCATION // len(self.prompts)))
        return (
            tuple(least if prompt.min_attempts is None else prompt.min_attempts for prompt in self.prompts),
            tuple(most if prompt.max_attempts is None else prompt.max_attempts for prompt in self.prompts),
        )

    @model_validator(mode="after")
    def _can_be_spent(self) -> AllocateRequest:
        minimum, maximum = self.limits()
        for i, (least, most) in enumerate(zip(minimum, maximum, strict=True)):
            if self.objective == "signal" and least < 2:
                raise ValueError(
                    f"prompts[{i}]: min_attempts {least}: a training group of fewer than 2 attempts carries no signal; "
                    "send 2 or more, and leave out prompts that should get none"
                )
            if least > most:
                raise ValueError(f"prompts[{i}]: min_attempts {least} exceeds max_attempts {most}")
        needed = sum(least * prompt.cost for least, prompt in zip(minimum, self.prompts, strict=True))
        if needed > self.budget * (1 + 1e-9):
            raise ValueError(
                f"budget {self.budget:g} does not pay for the least attempts of {len(self.prompts)} prompts, which "
                f"cost {needed:g}: raise it, or lower min_attempts"
            )
        if len(self.prompts) * max(maximum) > MAX_ALLOCATION:
            raise ValueError(
                f"max_attempts {max(maximum)} for {len(self.prompts)} prompts: at most "
                f"{MAX_ALLOCATION // len(self.prompts)} attempts each can be looked through; lower it, or send fewer "
                "prompts"
            )
        return self


class Allocation(Reply):
    prompt_id: PromptId | None = None
    attempts: int
    success_rate: float = Field(description="mean of the belief")
    expected_gain: float = Field(
        description="of these attempts: the probability of a success, or of an informative group"
    )


class AllocateReply(Reply):
    run: RunName
    model_version: int
    log_position: int
    objective: Objective
    method: AllocationMethod
    allocations: tuple[Allocation, ...] = Field(description="in the order asked")
    attempts: int = Field(description="of all prompts together")
    spent: float = Field(description="of the budget; less than all of it where the limits or the costs leave a rest")
    expected_total: float = Field(description="expected number of solved prompts, or of informative groups")
    uniform_total: float = Field(description="the same if every prompt got equally many attempts for the same budget")
    shortfall: float | None = Field(
        description="no spending of the budget has an expected total of more than this above expected_total: 0 with "
        "equal costs; null under bins, which promises nothing"
    )
    worthwhile: bool = Field(description="whether to allocate at all, instead of spending uniformly")
    reason: str


class Tier(Request):
    """An effort for requests of at least this predicted success rate."""

    label: Label = Field(description="what the gateway sends on, a reasoning effort say", examples=["low"])
    at_least: Rate = Field(description="predicted success rate")
    max_tokens_scale: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = Field(
        default=1.0, description="what to multiply the usual length limit with"
    )


class PolicyUpdate(Request):
    """A budget policy, whole: what is left out has its default."""

    model_config = _example(
        mode="sequential",
        target_attempts=4,
        max_attempts=16,
        tiers=[
            {"label": "low", "at_least": 0.8, "max_tokens_scale": 0.5},
            {"label": "high", "at_least": 0.05, "max_tokens_scale": 2},
            {"label": "low", "at_least": 0},
        ],
    )

    mode: BudgetMode = Field(
        default="parallel",
        description="parallel: all attempts at once; sequential: one after another until the first success",
    )
    target_attempts: Annotated[float, Field(ge=1, le=MAX_ATTEMPTS, allow_inf_nan=False)] = Field(
        default=4.0, description="attempts per request on average; the price is fitted to recent traffic so"
    )
    min_attempts: Annotated[int, Field(ge=1, le=MAX_ATTEMPTS)] = 1
    max_attempts: Annotated[int, Field(ge=1, le=MAX_ATTEMPTS)] = 32
    price: Rate | None = Field(
        default=None, description="a fixed price instead: least gain in the probability of a success per attempt"
    )
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1, max_length=MAX_TIERS)] = (
        Tier(label="low", at_least=0.8, max_tokens_scale=0.5),
        Tier(label="medium", at_least=0.3),
        Tier(label="high", at_least=0.0, max_tokens_scale=2.0),
    )

    @model_validator(mode="after")
    def _is_ordered(self) -> PolicyUpdate:
        if not self.min_attempts <= self.target_attempts <= self.max_attempts:
            raise ValueError(
                f"target_attempts {self.target_attempts:g} must lie between min_attempts {self.min_attempts} and "
                f"max_attempts {self.max_attempts}"
            )
        bounds = [tier.at_least for tier in self.tiers]
        if bounds[-1] != 0.0 or any(low >= high for high, low in pairwise(bounds)):
            raise ValueError(
                f"tiers: at_least must fall from tier to tier and end with 0, got {', '.join(f'{b:g}' for b in bounds)}"
            )
        return self


class PolicyState(Reply):
    """A budget policy as the run stores it."""

    run: RunName
    policy: PolicyName
    version: int = Field(description="a new one whenever the policy changes; 0 is built in")
    mode: BudgetMode
    target_attempts: float
    min_attempts: int
    max_attempts: int
    price: float | None = Field(description="null: fitted to recent traffic")
    tiers: tuple[Tier, ...]


class PolicyList(Reply):
    policies: tuple[PolicyState, ...] = Field(description="by name; default is always there")


class BudgetRequest(Request):
    model_config = _example(run="math-7b", prompt={"text": "What is 19 + 23?"})

    run: RunName
    prompt: PromptRef
    policy: PolicyName = "default"
    failures: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="attempts of this request that failed, as long as they are not reported by /observe"
    )
    deadline_ms: Annotated[float, Field(gt=0, le=60_000, allow_inf_nan=False)] | None = Field(
        default=None, description="a reply after so long is of no use: 503 instead; the service's own limit by default"
    )


class BudgetReply(Reply):
    run: RunName
    policy: PolicyName
    policy_version: int
    mode: BudgetMode
    attempts: int = Field(
        description="how many more to make; one after another, at most so many until the first success"
    )
    go_on: bool = Field(description="whether to make one more attempt; false when attempts is 0")
    effort: str = Field(description="label of the tier")
    max_tokens_scale: float
    success_rate: float = Field(description="of one attempt, failures of this request included")
    std: float
    solve_probability: float = Field(description="that at least one of these attempts succeeds")
    price: float = Field(description="the gain below which an attempt is not bought")
    attempts_seen: int = Field(description="of this prompt, in the run's history")
    model_version: int
    log_position: int
    age_ms: float = Field(description="how old the view of the log is that answered")


class Lenient(BaseModel):
    """A part of a request in another party's protocol: what we do not know we do not look at."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ChatPart(Lenient):
    text: str | None = None


class ChatTurn(Lenient):
    role: str
    content: str | tuple[ChatPart, ...] | None = None


class ChatRequest(Lenient):
    """As much of OpenAI's chat completion request as a classifier needs."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "math-7b",
                    "messages": [
                        {"role": "system", "content": "Answer with the difficulty of the request."},
                        {"role": "user", "content": "What is 19 + 23?"},
                    ],
                }
            ]
        }
    )

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(:[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")] = (
        Field(description="a run, or run:policy", examples=["math-7b", "math-7b:cheap"])
    )
    messages: Annotated[tuple[ChatTurn, ...], Field(min_length=1, max_length=MAX_ITEMS)]
    stream: bool | None = None
    response_format: dict[str, Any] | None = None


class ChatMessage(Reply):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Reply):
    index: int = 0
    message: ChatMessage
    finish_reason: Literal["stop"] = "stop"


class ChatUsage(Reply):
    """Nothing is generated."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: ChatUsage
    budget: BudgetReply = Field(description="what the label rests on; not part of OpenAI's reply")


class Health(Reply):
    status: Literal["ok", "unavailable"]
    reasons: tuple[str, ...] = ()


class Problem(Reply):
    """RFC 9457 problem+json. `code` is stable; `detail` is for people."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
    errors: tuple[str, ...] = Field(default=(), description="one line per fault, where there are several")
