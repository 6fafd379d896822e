"""The callback that `config.yaml` names: budgets from Even Odds before each call, outcomes after it."""

import os
from collections.abc import Mapping
from typing import Any

from evenodds.integrations.litellm import BudgetHook


def verify(request: Mapping[str, Any], response: Any) -> list[float] | None:
    """Your verifier: a reward in [0, 1] for each choice, or None where it cannot tell.

    Here the caller sends the right answer along, as `metadata: {"answer": ...}`.
    """
    answer = (request.get("metadata") or {}).get("answer")
    if answer is None:
        return None
    return [float(str(answer) in (choice.message.content or "")) for choice in response.choices]


hook = BudgetHook(
    os.environ.get("EVENODDS_URL", "http://127.0.0.1:8000"),
    run="served",
    sets=("reasoning_effort", "n", "max_tokens"),
    default_max_tokens=1_000,
    verify=verify,
    step=1,  # the version of the served model: raise it when you deploy another one
    deadline_ms=float(os.environ.get("EVENODDS_GATEWAY_DEADLINE_MS", "50")),
)
