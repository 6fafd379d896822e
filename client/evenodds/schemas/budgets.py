"""Attempts for one request of a gateway, by a policy."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.config import JsonValue

from evenodds.schemas.base import Reply, Request, example
from evenodds.schemas.fields import MAX_ATTEMPTS, MAX_TIERS, BudgetMode, Label, PolicyName, Rate, RunName, Step
from evenodds.schemas.prompts import PromptRef


class Tier(Request):
    """An effort for requests of at least this predicted success rate."""

    label: Label = Field(description="what the gateway sends on, a reasoning effort say", examples=["low"])
    at_least: Rate = Field(description="predicted success rate")
    max_tokens_scale: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = Field(
        default=1.0, description="what to multiply the usual length limit with"
    )


class PolicyUpdate(Request):
    """A budget policy, whole: what is left out has its default."""

    model_config = example(
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
        _check_tiers(self.tiers)
        return self


def _check_tiers(tiers: tuple[Tier, ...]) -> None:
    """Raises ValueError: a tier that no prediction reaches, or that changes nothing; names it with its neighbour."""
    if tiers[0].at_least == 1.0:
        raise ValueError(
            f"tiers: tiers[0] ({tiers[0].label!r}) has at_least 1, which no predicted success rate reaches: lower it"
        )
    for place, (upper, lower) in enumerate(pairwise(tiers)):
        pair = f"tiers: tiers[{place}] ({upper.label!r}) and tiers[{place + 1}] ({lower.label!r})"
        if lower.at_least >= upper.at_least:
            raise ValueError(
                f"{pair} have at_least {upper.at_least:g} and {lower.at_least:g}, so that the second is never reached: "
                "at_least must fall from tier to tier"
            )
        if (lower.label, lower.max_tokens_scale) == (upper.label, upper.max_tokens_scale):
            raise ValueError(f"{pair} have the same label and max_tokens_scale: leave one out")
    if tiers[-1].at_least != 0.0:
        raise ValueError(
            f"tiers: the last one, tiers[{len(tiers) - 1}] ({tiers[-1].label!r}), has at_least {tiers[-1].at_least:g}: "
            "give it 0, so that every request falls into a tier"
        )


_POLICY: dict[str, JsonValue] = {
    "run": "math-7b",
    "policy": "default",
    "version": 1,
    "mode": "sequential",
    "target_attempts": 4,
    "min_attempts": 1,
    "max_attempts": 16,
    "price": None,
    "tiers": [
        {"label": "low", "at_least": 0.8, "max_tokens_scale": 0.5},
        {"label": "high", "at_least": 0.0, "max_tokens_scale": 2},
    ],
}


class PolicyState(Reply):
    """A budget policy as the run stores it."""

    model_config = example(**_POLICY)

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
    model_config = example(policies=[_POLICY])

    policies: tuple[PolicyState, ...] = Field(description="by name; default is always there")


class BudgetRequest(Request):
    model_config = example(run="math-7b", prompt={"text": "What is 19 + 23?"})

    run: RunName
    prompt: PromptRef
    policy: PolicyName = "default"
    failures: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="failed attempts of this request that are not reported by /observe"
    )
    step: Step | None = Field(
        default=None,
        description="version of the served model, for a verdict by decision_id; the newest by default",
    )
    deadline_ms: Annotated[float, Field(gt=0, le=60_000, allow_inf_nan=False)] | None = Field(
        default=None, description="time after which the answer is 503 instead; the service's own limit by default"
    )


BUDGET: dict[str, JsonValue] = {
    "run": "math-7b",
    "policy": "default",
    "policy_version": 1,
    "mode": "sequential",
    "attempts": 6,
    "go_on": True,
    "effort": "high",
    "max_tokens_scale": 2,
    "success_rate": 0.31,
    "std": 0.2,
    "solve_probability": 0.79,
    "price": 0.05,
    "attempts_seen": 0,
    "model_version": 3,
    "log_position": 41,
    "age_ms": 12.5,
    "decision_id": "math-7b.6925a3c0.0f9d3a5c8a7e4a5e9d6b1c2f3a4b5c6d",
}
"""An example, which the chat facade's reply holds too."""


class BudgetReply(Reply):
    model_config = example(**BUDGET)

    run: RunName
    policy: PolicyName
    policy_version: int
    mode: BudgetMode
    attempts: int = Field(
        description="attempts still to make: all at once, or when sequential, at most this many until a success"
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
    decision_id: str | None = Field(
        default=None,
        description="for 24 hours POST /observe takes a verdict under this id alone; null where the run keeps no texts "
        "and its pool does not have the prompt",
    )
