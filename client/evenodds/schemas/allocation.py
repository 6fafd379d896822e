"""Attempts for many prompts at once, from one budget."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from evenodds.schemas.base import Reply, Request, example
from evenodds.schemas.fields import (
    MAX_ALLOCATION,
    MAX_ATTEMPTS,
    MAX_ITEMS,
    AllocationMethod,
    Attempts,
    Objective,
    PromptId,
    RunName,
)
from evenodds.schemas.prompts import PromptRef


class AllocatePrompt(PromptRef):
    """A prompt to spend attempts on."""

    cost: Annotated[float, Field(ge=0.01, le=10_000, allow_inf_nan=False)] = Field(
        default=1.0, description="of one attempt, in the unit of the budget (for example expected tokens)"
    )
    min_attempts: Attempts | None = Field(default=None, description="of this prompt, instead of the call's")
    max_attempts: Attempts | None = Field(default=None, description="of this prompt, instead of the call's")


class AllocateRequest(Request):
    model_config = example(
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
                f"budget {self.budget:g} is less than the minimum attempts of {len(self.prompts)} prompts cost, "
                f"{needed:g}: raise it, or lower min_attempts"
            )
        if len(self.prompts) * max(maximum) > MAX_ALLOCATION:
            raise ValueError(
                f"max_attempts {max(maximum)} for {len(self.prompts)} prompts: at most "
                f"{MAX_ALLOCATION // len(self.prompts)} attempts each are possible: lower it, or send fewer prompts"
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
    model_config = example(
        run="math-7b",
        model_version=3,
        log_position=41,
        objective="solve",
        method="greedy",
        allocations=[
            {"prompt_id": "sum-1", "attempts": 2, "success_rate": 0.71, "expected_gain": 0.9},
            {"prompt_id": "root-1", "attempts": 6, "success_rate": 0.4, "expected_gain": 0.92},
        ],
        attempts=8,
        spent=8,
        expected_total=1.82,
        uniform_total=1.79,
        shortfall=0,
        worthwhile=True,
        reason="1.7% more than uniform attempts",
    )

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
