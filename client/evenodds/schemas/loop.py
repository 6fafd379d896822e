"""The training loop: select a batch, and observe its outcomes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evenodds.schemas.base import HasOlderNames, Reply, Request, example, older
from evenodds.schemas.fields import (
    MAX_ID,
    MAX_ITEMS,
    Acquisition,
    CategoryShares,
    GroupSize,
    Key,
    OlderGroups,
    OlderGroupsAtMost,
    PromptId,
    Rate,
    Reward,
    RunName,
    Step,
    TargetRate,
    check_shares,
)
from evenodds.schemas.prompts import Described, Named


class Outcome(Named):
    successes: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="fractional rewards count as fractional successes"
    )
    attempts: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        default=None, description="instead of successes and attempts: a reward in [0, 1] per attempt (true counts as 1)"
    )


class Observation(Described, Outcome):
    """Outcomes of attempts on one prompt. Attempts that failed for other reasons than the policy stay out."""

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
    model_config = example(
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


class VerdictRequest(Request):
    """A verdict on an answer whose budget the service decided."""

    model_config = example(decision_id="served.6925a3c0.0f9d3a5c8a7e4a5e9d6b1c2f3a4b5c6d", rewards=[1])

    decision_id: Annotated[str, Field(min_length=1, max_length=MAX_ID)] = Field(
        description="of the budget's reply; kept for 24 hours, after which the answer is 410 decision_expired"
    )
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1, max_length=MAX_ITEMS)] = Field(
        description="in [0, 1], one for each attempt that was finished"
    )
    request_id: Key | None = Field(
        default=None, description="one verdict counts for a decision, however often it comes; a further one needs an id"
    )


class ObserveReply(Reply):
    model_config = example(run="math-7b", log_position=38, accepted=2, model_version=3, replayed=False)

    run: RunName
    log_position: int = Field(description="where the observations stand in the run's log")
    accepted: int
    model_version: int
    replayed: bool = Field(description="this request_id was accepted before; nothing was written again")


class SelectRequest(HasOlderNames, Request):
    model_config = example(run="math-7b", step=13, batch_size=2, seed=0, categories={"algebra": 0.5})

    run: RunName
    step: Step
    batch_size: Annotated[int, Field(ge=1, le=MAX_ITEMS)] | None = Field(
        default=None, description="prompts to choose", examples=[256]
    )
    informative_groups: Annotated[int, Field(ge=1, le=MAX_ITEMS)] | None = Field(
        default=None,
        description="instead of batch_size: choose as many prompts as are expected to give this many informative "
        "groups in one wave",
    )
    fill_factor: Annotated[float, Field(ge=0.1, le=4, allow_inf_nan=False)] | None = Field(
        default=None,
        description="with informative_groups: expected informative groups over those asked for; 1 by default",
    )
    max_prompts: Annotated[int, Field(ge=1, le=MAX_ITEMS)] | None = Field(
        default=None,
        description="with informative_groups: prompts at most; six times as many as informative_groups by default",
    )
    update_cost: Annotated[float, Field(ge=0, le=1_000, allow_inf_nan=False)] | None = Field(
        default=None,
        description="with informative_groups: what an update on a group costs, in units of the cost of its rollouts; "
        "the reply then says whether filling pays",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    candidates: Annotated[tuple[PromptId, ...], Field(min_length=1, max_length=MAX_ITEMS)] | None = Field(
        default=None, description="choose among these only; the whole pool otherwise"
    )
    exclude: Annotated[tuple[PromptId, ...], Field(max_length=MAX_ITEMS)] | None = None
    categories: CategoryShares | None = Field(
        default=None,
        description="least share of the batch for each category; the shares sum to at most 1. Instead of the run's, "
        "and unlike those an error where a category has too few prompts",
        serialization_alias="groups",
    )
    categories_at_most: CategoryShares | None = Field(
        default=None,
        description="largest share of the batch for each category; the run's by default",
        serialization_alias="groups_at_most",
    )
    groups: OlderGroups = None
    groups_at_most: OlderGroupsAtMost = None
    target_rate: TargetRate | None = None
    group_size: GroupSize | None = None
    acquisition: Acquisition | None = None
    optimism: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    diversity: Rate | None = None
    cooldown_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    max_visits: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    allow_outstanding: bool = Field(
        default=False, description="allow prompts whose outcomes from earlier selections have not come yet"
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> SelectRequest:
        check_shares(self.categories, self.categories_at_most)
        return self

    @model_validator(mode="after")
    def _has_one_size(self) -> SelectRequest:
        wanted = self.informative_groups
        if (self.batch_size is None) == (wanted is None):
            raise ValueError("send either batch_size or informative_groups")
        for name in FILL_FIELDS if wanted is None else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} goes with informative_groups: leave it out, or send those instead of batch_size"
                )
        if wanted is not None and self.max_prompts is not None and self.max_prompts < wanted:
            raise ValueError(
                f"max_prompts {self.max_prompts} is less than informative_groups {wanted}: raise it, or ask for fewer"
            )
        return self

    @property
    def least_prompts(self) -> int:
        """How many prompts the batch has at least: it has so many exactly, unless it is to be filled."""
        return self.batch_size or 1

    @property
    def most_prompts(self) -> int:
        """How many prompts the batch has at most."""
        if self.informative_groups is None:
            return self.batch_size or 0
        return min(self.max_prompts or FILL_MOST * self.informative_groups, MAX_ITEMS)


FILL_FIELDS = ("informative_groups", "fill_factor", "max_prompts", "update_cost")
"""Of a request for a batch that is to be filled."""

FILL_MOST = 6
"""Prompts for each informative group at most, by default."""


class SelectedPrompt(HasOlderNames, Reply):
    prompt_id: PromptId
    category: str | None = None
    group: Annotated[str | None, older("group")] = None
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
        description="prompts to take for batch_size (or informative_groups) informative groups in expectation; "
        "null if the pool cannot give them"
    )


class FillForecast(Reply):
    """What a batch that was to be filled lets expect. Unlike `forecast` it is corrected by what past batches found."""

    informative_groups: int = Field(description="as asked for")
    expected_informative: float = Field(description="expected number of informative groups")
    low: float = Field(description="with high: an interval that holds their number with a probability of 0.95")
    high: float
    relative_cost: float | None = Field(
        default=None,
        description="rollouts and updates to the same accuracy, as a share of what plain batches of informative_groups "
        "prompts cost: an estimate from small trainings, where update_cost was named",
    )
    pays: bool | None = Field(default=None, description="whether relative_cost is below 1")


class FallbackNotice(Reply):
    """What the service does instead of what was asked, and why."""

    to: Literal["uniform"] = "uniform"
    reason: str
    since_step: int


class SelectReply(Reply):
    model_config = example(
        run="math-7b",
        step=13,
        selection_id="5c8a7e4a5e9d",
        model_version=3,
        log_position=40,
        replayed=False,
        outstanding=0,
        forecast={"informative_share": 0.84, "informative_groups": 1.68, "pad_to": 3},
        fill=None,
        fallback=None,
        prompts=[
            {
                "prompt_id": prompt_id,
                "category": category,
                "success_rate": rate,
                "std": 0.13,
                "informative_probability": informative,
                "arm": "policy",
            }
            for prompt_id, category, rate, informative in (
                ("sum-1", "arithmetic", 0.71, 0.83),
                ("root-1", "algebra", 0.4, 0.85),
            )
        ],
    )

    run: RunName
    step: int
    selection_id: str
    model_version: int
    log_position: int = Field(description="the state that the choice was made in")
    replayed: bool = Field(description="this (run, step) was chosen before; the same batch is returned")
    outstanding: int = Field(
        default=0, description="number of these prompts whose outcomes of earlier selections have not come yet"
    )
    forecast: Forecast
    fill: FillForecast | None = Field(default=None, description="of a batch for informative_groups")
    fallback: FallbackNotice | None = Field(
        default=None, description="the batch is a uniform choice, because the model's skill stays negative"
    )
    prompts: tuple[SelectedPrompt, ...]
