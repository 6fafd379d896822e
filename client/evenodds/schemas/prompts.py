"""Prompts of a pool or from outside of it, and what is believed about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from evenodds.schemas.base import HasOlderNames, Reply, Request, example, older
from evenodds.schemas.fields import (
    MAX_ITEMS,
    MAX_RATE_NAMES,
    Answer,
    Features,
    GroupSize,
    Key,
    OlderGroup,
    PromptId,
    Rate,
    RunName,
    Step,
    Text,
    Vector,
)


class Named(Request):
    prompt_id: PromptId | None = None


class KnownCounts(Request):
    """What another showed on a prompt: successes of attempts."""

    successes: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    attempts: Annotated[int, Field(ge=1, le=1_000_000)]

    @model_validator(mode="after")
    def _not_more_than_all(self) -> KnownCounts:
        if self.successes > self.attempts:
            raise ValueError(f"{self.successes:g} successes of {self.attempts} attempts: at most all can succeed")
        return self


def _kind_of(known: object) -> str:
    return "counts" if isinstance(known, (Mapping, KnownCounts)) else "rate"


KnownRate = Annotated[Annotated[Rate, Tag("rate")] | Annotated[KnownCounts, Tag("counts")], Discriminator(_kind_of)]
"""Faults name what was meant: a rate, or counts."""


class Described(HasOlderNames, Request):
    """What may be known of a prompt besides its id."""

    text: Text | None = Field(default=None, description="needed for a prompt that the pool does not have yet")
    category: Key | None = Field(
        default=None, description="dataset, domain or environment", serialization_alias="group"
    )
    group: OlderGroup = None
    embedding: Vector | None = Field(default=None, description="the caller's own vector (embedder 'caller')")
    features: Features | None = Field(default=None, description="numeric features by name")
    prior_rate: Rate | None = Field(
        default=None, description="a success rate that is known beforehand, for example from a profile"
    )
    prior_rates: Annotated[dict[Key, KnownRate], Field(max_length=MAX_RATE_NAMES)] | None = Field(
        default=None,
        description="what other models or runs showed on the prompt, by name: a success rate, or successes of "
        "attempts. How far each can be believed is learned from the first groups; a run knows at most "
        f"{MAX_RATE_NAMES} names",
    )
    answer: Answer = Field(
        default=None,
        description="what a right answer is, as a string, a number, a list or any JSON: it tells much of how hard the "
        "prompt is. Kept with the text; a run that keeps no texts keeps features of it alone",
        examples=["42"],
    )


class PromptIn(Described, Named):
    """A prompt for the pool. Without `prompt_id` the id is a hash of the normalised text."""

    @model_validator(mode="after")
    def _has_identity(self) -> PromptIn:
        if self.prompt_id is None and self.text is None:
            raise ValueError("a prompt needs a prompt_id, a text, or both")
        return self


class PromptsIn(Request):
    model_config = example(
        prompts=[
            {"prompt_id": "sum-1", "text": "What is 17 + 25?", "category": "arithmetic", "answer": 42},
            {
                "prompt_id": "root-1",
                "text": "Solve x^2 - 5x + 6 = 0.",
                "category": "algebra",
                "prior_rates": {"qwen-7b": 0.4, "llama-8b": {"successes": 3, "attempts": 8}},
            },
        ]
    )

    prompts: Annotated[tuple[PromptIn, ...], Field(min_length=1, max_length=MAX_ITEMS)]


class PromptsAdded(Reply):
    model_config = example(run="math-7b", added=2, existing=0, pool_size=2, log_position=1, conflicts={})

    run: RunName
    added: int
    existing: int = Field(description="number of prompts of this call that the pool had already")
    pool_size: int
    log_position: int
    conflicts: dict[str, str] = Field(
        default={},
        description="with keep_existing: prompts that the pool has with another content, by id, and what differs",
    )


_PROMPT: dict[str, JsonValue] = {
    "prompt_id": "sum-1",
    "text": "What is 17 + 25?",
    "category": "arithmetic",
    "features": None,
    "prior_rate": None,
    "prior_rates": None,
}
_BELIEF: dict[str, JsonValue] = {
    "prompt_id": "sum-1",
    "success_rate": 0.71,
    "std": 0.13,
    "interval": [0.47, 0.9],
    "informative_probability": 0.83,
    "attempts_seen": 8,
}


class PromptInfo(HasOlderNames, Reply):
    prompt_id: PromptId
    text: str | None
    category: str | None
    group: Annotated[str | None, older("group")] = None
    features: dict[str, float] | None
    prior_rate: float | None
    prior_rates: dict[str, float | KnownCounts] | None = None
    answer: JsonValue = Field(default=None, description="null where the run keeps no texts")


class PromptPage(Reply):
    model_config = example(prompts=[_PROMPT], next_cursor=None)

    prompts: tuple[PromptInfo, ...]
    next_cursor: str | None = Field(description="pass as ?cursor= for the next page; null on the last")


class PromptRef(PromptIn):
    """A prompt of the pool by its id, or a new text."""


class PredictRequest(Request):
    model_config = example(run="math-7b", prompts=[{"prompt_id": "sum-1"}, {"text": "What is 18 + 24?"}])

    run: RunName
    prompts: Annotated[tuple[PromptRef, ...], Field(min_length=1, max_length=MAX_ITEMS)]
    step: Step | None = Field(
        default=None,
        description="the policy version to predict for, the run's newest by default: a prompt's own outcomes count the "
        "less the further it lies ahead of them; for a version before them they count in full",
    )
    group_size: GroupSize | None = None


class Prediction(Reply):
    prompt_id: PromptId | None = None
    success_rate: float = Field(description="mean of the belief")
    std: float = Field(description="standard deviation of the belief")
    interval: tuple[float, float] = Field(description="central 90% of the belief")
    informative_probability: float = Field(description="that a group of group_size attempts is not all equal")
    attempts_seen: int


class PredictReply(Reply):
    model_config = example(run="math-7b", model_version=3, log_position=41, predictions=[_BELIEF])

    run: RunName
    model_version: int
    log_position: int
    predictions: tuple[Prediction, ...] = Field(description="in the order asked")


class VisitForecast(Reply):
    """What was believed about a prompt when a batch chose it."""

    success_rate: float = Field(description="mean of the belief")
    interval: tuple[float, float] = Field(description="central 90% of the belief")


class Visit(Reply):
    """One observation of a prompt, as the log keeps it."""

    log_position: int
    step: int
    successes: float
    attempts: int
    selection_id: str | None
    forecast: VisitForecast | None = Field(default=None, description="null where no selection chose the prompt")


class PromptState(PromptInfo):
    """A prompt with the present belief about it and its own history."""

    model_config = example(
        **_PROMPT,
        run="math-7b",
        model_version=3,
        log_position=41,
        belief=_BELIEF,
        visits=1,
        last_step=12,
        history=[
            {
                **{"log_position": 38, "step": 12, "successes": 7, "attempts": 8, "selection_id": "5c8a7e4a5e9d"},
                "forecast": {"success_rate": 0.64, "interval": [0.31, 0.92]},
            }
        ],
    )

    run: RunName
    model_version: int
    log_position: int
    belief: Prediction
    visits: int
    last_step: int | None
    history: tuple[Visit, ...] = Field(description="newest first, at most 100")
