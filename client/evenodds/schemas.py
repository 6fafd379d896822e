"""The wire contract, written once: what crosses HTTP between a trainer or gateway and the service.

Requests forbid unknown fields, so that a misspelt option is an error and not a silent default; replies ignore
them, so that an old client keeps working against a newer service. Nothing here knows HTTP or SQL.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
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
Finite = Annotated[float, Field(allow_inf_nan=False)]
GroupSize = Annotated[int, Field(ge=1, le=MAX_GROUP_SIZE, description="attempts per prompt in training")]
TargetRate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Vector = Annotated[tuple[Finite, ...], Field(min_length=1, max_length=MAX_VECTOR)]
Features = Annotated[dict[Key, Finite], Field(max_length=MAX_FEATURES)]

Predictor = Literal["gps", "gps-paper", "mopps", "uniform"]
Acquisition = Literal["yield", "paper", "thompson", "uniform"]
RefitStatus = Literal["pending", "running", "done", "failed"]


class Request(BaseModel):
    """What a caller sends."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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

    model_config = _example(predictor="gps", group_size=8, acquisition="yield")

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
        description="'builtin', 'caller' (every vector comes with its prompt), 'none', or the name or path "
        "of a sentence-transformers model. Fixed once the pool has prompts",
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
    max_visits: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None, description="a prompt is chosen at most so often; 0, the default, sets no limit"
    )
    refit: RefitPolicy | None = Field(default=None, description="when the shared model is fitted anew")


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
    max_visits: int
    refit: RefitPolicy
    last_refit: RefitState | None = Field(default=None, description="the newest refit, in whatever state")
    pool_size: int = Field(description="prompts that may be selected")
    log_position: int = Field(description="entries in the run's log")
    head_step: int | None = Field(description="the highest step seen")
    model_version: int = Field(description="the snapshot in use; 0 while only streaming beliefs exist")
    observations: int = Field(description="observations accepted")
    created_at: datetime


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
    rewards: Annotated[tuple[Rate, ...], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        default=None, description="instead of successes and attempts: one reward in [0, 1] per attempt"
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
    selection_id: Key | None = Field(default=None, description="the selection whose outcomes these are")
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
    groups: Annotated[dict[Key, Rate], Field(min_length=1, max_length=1_000)] | None = Field(
        default=None, description="least share of the batch for each group; the shares sum to at most 1"
    )
    target_rate: TargetRate | None = None
    group_size: GroupSize | None = None
    acquisition: Acquisition | None = None
    optimism: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    diversity: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    cooldown_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    max_visits: Annotated[int, Field(ge=0, le=1_000_000)] | None = None

    @model_validator(mode="after")
    def _shares_fit(self) -> SelectRequest:
        if self.groups is not None and sum(self.groups.values()) > 1 + 1e-9:
            raise ValueError(f"groups: the shares sum to {sum(self.groups.values()):g}, the limit is 1")
        return self


class SelectedPrompt(Reply):
    prompt_id: PromptId
    group: str | None = None
    success_rate: float
    std: float
    informative_probability: float
    arm: Literal["policy", "control"] = "policy"


class Forecast(Reply):
    informative_share: float = Field(description="expected share of informative groups in the batch")
    informative_groups: float = Field(description="expected number of informative groups in the batch")
    pad_to: int | None = Field(
        description="prompts to take for batch_size informative groups in expectation; "
        "null if the pool cannot give them"
    )


class SelectReply(Reply):
    run: RunName
    step: int
    selection_id: str
    model_version: int
    log_position: int = Field(description="the state that the choice was made in")
    replayed: bool = Field(description="this (run, step) was chosen before; the same batch is returned")
    forecast: Forecast
    prompts: tuple[SelectedPrompt, ...]


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
