"""The callback that `config.yaml` names: budgets from Even Odds before each call, outcomes after it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from evenodds.integrations.litellm import BudgetHook, ServedModel


def verify(request: Mapping[str, Any], answers: Sequence[str]) -> list[float] | None:
    """Your verifier: a reward in [0, 1] for each finished answer, or None where it cannot tell.

    Here the caller sends the right answer along, as `metadata: {"answer": ...}`.
    """
    answer = (request.get("metadata") or {}).get("answer")
    return None if answer is None else [float(str(answer) in text) for text in answers]


hook = BudgetHook(
    os.environ.get("EVENODDS_URL", "http://127.0.0.1:8000"),
    # By the name that callers use, or that of the deployment. Raise the step when you deploy another version.
    models={"served": ServedModel("served", step=1)},
    verify=verify,
    deadline_ms=float(os.environ.get("EVENODDS_GATEWAY_DEADLINE_MS", "50")),
)
