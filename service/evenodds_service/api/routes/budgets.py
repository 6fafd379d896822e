"""The endpoints of gateways: how many attempts, or how much effort, requests deserve.

Each translates the wire into values, asks for beliefs, lets `domain.allocation` decide, and translates back.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path
from fastapi.responses import Response

from evenodds.schemas import (
    AllocateReply,
    AllocateRequest,
    Allocation,
    BudgetReply,
    BudgetRequest,
    PolicyList,
    PolicyName,
    PolicyState,
    PolicyUpdate,
    PromptRef,
    Tier,
)
from evenodds_service.api.dependencies import PROBLEMS, Dependencies, RunPath, Services, described
from evenodds_service.domain.budgets import allocation
from evenodds_service.domain.prompts import text_key
from evenodds_service.domain.settings import BudgetPolicy, EffortTier
from evenodds_service.runtime.beliefs import beliefs_about
from evenodds_service.runtime.budgets import DEFAULT_POLICY, Budget

router = APIRouter(responses=PROBLEMS, tags=["budgets"])
PolicyPath = Annotated[PolicyName, Path(description="name of the budget policy")]
_BUSY = described(503, "Too busy, or the deadline passed", "deadline_passed", "no budget within 500 ms")


@router.post("/allocate", summary="Spend a budget of attempts on prompts")
def allocate(body: AllocateRequest, services: Dependencies) -> AllocateReply:
    """How many attempts each prompt should get, now; nothing is stored.

    The belief about a prompt contains its own observed outcomes: attempts that were made and reported before are not
    counted again. `worthwhile` says whether to allocate at all.
    """
    run, live, _ = services.live_runs.at_head(body.run)
    names = [f"prompts[{i}]" for i in range(len(body.prompts))]
    asked = beliefs_about(services.featurizer, run, live, body.prompts, names=names)
    costs_N = np.array([prompt.cost for prompt in body.prompts])
    minimum_N, maximum_N = (np.array(limit) for limit in body.limits())
    # What is more than the whole budget pays for need not be looked through.
    spare = body.budget - float((costs_N * minimum_N).sum())
    affordable_N = minimum_N + np.floor(spare / costs_N + 1e-6).astype(np.int64)
    depth = max(1, int(np.minimum(maximum_N, affordable_N).max()))
    worth = allocation.gains(body.objective, asked.a, asked.b, depth)
    mean_N = asked.a / (asked.a + asked.b)
    spending = allocation.spend(
        worth if body.method == "greedy" else allocation.bin_gains(mean_N, depth),
        costs_N=costs_N,
        minimum_N=minimum_N,
        maximum_N=np.minimum(maximum_N, depth),
        budget=body.budget,
    )
    gained_N = allocation.expected(worth, spending.attempts_N)
    uniform_N = allocation.uniform_attempts(costs_N, minimum_N, maximum_N, body.budget)
    expected_total, uniform_total = float(gained_N.sum()), float(allocation.expected(worth, uniform_N).sum())
    worthwhile, reason = allocation.verdict(
        expected_total,
        uniform_total,
        n_observations=asked.n_observations,
        is_capped=bool((spending.attempts_N == maximum_N).all()),
    )
    return AllocateReply(
        run=body.run,
        model_version=asked.model_version,
        log_position=asked.log_position,
        objective=body.objective,
        method=body.method,
        allocations=tuple(
            Allocation(prompt_id=prompt_id, attempts=attempts, success_rate=rate, expected_gain=gain)
            for prompt_id, attempts, rate, gain in zip(
                asked.ids, spending.attempts_N.tolist(), mean_N.tolist(), gained_N.tolist(), strict=True
            )
        ),
        attempts=int(spending.attempts_N.sum()),
        spent=float((costs_N * spending.attempts_N).sum()),
        expected_total=expected_total,
        uniform_total=uniform_total,
        shortfall=spending.shortfall if body.method == "greedy" else None,
        worthwhile=worthwhile,
        reason=reason,
    )


@router.post("/budget", summary="The budget of one request", response_model=BudgetReply, responses=_BUSY)
async def budget(body: BudgetRequest, services: Dependencies) -> Response:
    """How many attempts, and how much effort, one request deserves, by a budget policy of the run. Nothing is stored.

    Answers from memory: the view may be `EVENODDS_BUDGET_STALENESS_MS` behind the log, `log_position` and `age_ms` say
    how far. In sequential mode ask before each attempt, with the number of `failures` so far, and go on while `go_on`.
    Report what came of the attempts with POST /observe, under the served model's version as the step.
    """
    reply = await budget_reply(body, services)
    return Response(reply.model_dump_json(), media_type="application/json")


async def budget_reply(body: BudgetRequest, services: Services) -> BudgetReply:
    """The budget in the words of the wire."""
    budget = await services.budgets.ask(
        body.run,
        body.prompt,
        policy=body.policy,
        failures=body.failures,
        deadline_seconds=None if body.deadline_ms is None else body.deadline_ms / 1_000,
    )
    tier = budget.policy.tier(budget.success_rate)
    step = budget.head_step if body.step is None else body.step
    return BudgetReply(
        run=body.run,
        policy=budget.policy.name,
        policy_version=budget.policy.version,
        mode=budget.policy.mode,
        attempts=budget.attempts,
        go_on=budget.attempts > 0,
        effort=tier.label,
        max_tokens_scale=tier.max_tokens_scale,
        success_rate=budget.success_rate,
        std=budget.std,
        solve_probability=budget.solve_probability,
        price=budget.price,
        attempts_seen=budget.seen,
        model_version=budget.model_version,
        log_position=budget.log_position,
        age_ms=1_000 * budget.age_seconds,
        decision_id=_decision_id(body, budget, step, services),
    )


def _decision_id(body: BudgetRequest, budget: Budget, step: int, services: Services) -> str | None:
    """Keep the decision for a verdict. Where the run keeps no texts, only of prompts that the pool has.

    A text that was asked about is kept where the pool has it, too: its prompt may be retired when the verdict comes.
    """
    if budget.is_new and not budget.keeps_text:
        return None
    is_text = budget.keeps_text and body.prompt.prompt_id is None
    prompt = body.prompt if budget.is_new or is_text else PromptRef(prompt_id=budget.prompt_id)
    content = prompt.model_dump_json(exclude_none=True, by_alias=True)
    return services.decisions.keep(
        body.run,
        budget.run_id,
        step=step,
        prompt_id=budget.prompt_id,
        prompt=content,
        text_key=None if prompt.text is None else text_key(prompt.text),
    )


@router.put("/runs/{run}/budget_policies/{policy}", summary="Store a budget policy")
def put_budget_policy(run: RunPath, policy: PolicyPath, body: PolicyUpdate, services: Dependencies) -> PolicyState:
    """Create the policy or replace it whole. A policy that changes gets the next version; the same one keeps its own.

    Other replicas use it after EVENODDS_BUDGET_STALENESS_MS at the latest.
    """
    stored = services.store.put_budget_policy(
        run,
        BudgetPolicy(
            name=policy,
            mode=body.mode,
            target_attempts=body.target_attempts,
            min_attempts=body.min_attempts,
            max_attempts=body.max_attempts,
            price=body.price,
            tiers=tuple(EffortTier(tier.label, tier.at_least, tier.max_tokens_scale) for tier in body.tiers),
        ),
    )
    services.live_runs.forget(run)
    return _policy_state(run, stored)


@router.get("/runs/{run}/budget_policies", summary="Budget policies of a run")
def list_budget_policies(run: RunPath, services: Dependencies) -> PolicyList:
    """All of them, by name."""
    policies = {policy.name: policy for policy in services.store.run(run).settings.budget_policies}
    policies.setdefault(DEFAULT_POLICY, BudgetPolicy())
    return PolicyList(policies=tuple(_policy_state(run, policies[name]) for name in sorted(policies)))


def _policy_state(run: str, policy: BudgetPolicy) -> PolicyState:
    return PolicyState(
        run=run,
        policy=policy.name,
        version=policy.version,
        mode=policy.mode,
        target_attempts=policy.target_attempts,
        min_attempts=policy.min_attempts,
        max_attempts=policy.max_attempts,
        price=policy.price,
        tiers=tuple(
            Tier(label=tier.label, at_least=tier.at_least, max_tokens_scale=tier.max_tokens_scale)
            for tier in policy.tiers
        ),
    )
