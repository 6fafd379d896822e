"""The endpoints of gateways: how many attempts, or how much effort, requests deserve.

Each translates the wire into values, asks for beliefs, lets `domain.allocation` decide, and translates back.
"""

from __future__ import annotations

import numpy as np
from fastapi import APIRouter

from evenodds.schemas import AllocateReply, AllocateRequest, Allocation
from evenodds_service.api.questions import beliefs_about
from evenodds_service.api.services import PROBLEMS, Hands
from evenodds_service.domain import allocation

router = APIRouter(responses=PROBLEMS, tags=["budgets"])


@router.post("/allocate", summary="Spend a budget of attempts on prompts")
def allocate(body: AllocateRequest, hands: Hands) -> AllocateReply:
    """How many attempts each prompt should get, now; nothing is stored.

    The belief about a prompt contains its own observed outcomes: attempts that were made and reported before are not
    counted again. `worthwhile` says whether to allocate at all.
    """
    run = hands.store.run(body.run)
    live = hands.live_runs.at_head(run)
    names = [f"prompts[{i}]" for i in range(len(body.prompts))]
    asked = beliefs_about(hands.featurizer, run, live, body.prompts, names=names)
    costs_N = np.array([prompt.cost for prompt in body.prompts])
    minimum_N, maximum_N = (np.array(limit) for limit in body.limits())
    # What is more than the whole budget pays for need not be looked through.
    spare = body.budget - float(costs_N @ minimum_N)
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
        spent=float(costs_N @ spending.attempts_N),
        expected_total=expected_total,
        uniform_total=uniform_total,
        shortfall=spending.shortfall if body.method == "greedy" else None,
        worthwhile=worthwhile,
        reason=reason,
    )
