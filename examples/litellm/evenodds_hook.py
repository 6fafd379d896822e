"""The callbacks that `config.yaml` names: budgets from Even Odds before each call, outcomes after it; and a log."""

import logging
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from litellm.integrations.custom_logger import CustomLogger  # type: ignore[import-not-found]

from evenodds.integrations.litellm import METADATA, BudgetHook, ServedModel


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


class AccessLog(CustomLogger):  # type: ignore[misc]
    """Writes when each answered request came, its effort ("none" without a budget), its model and its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._log = logging.Logger("access")
        self._log.addHandler(logging.FileHandler("access.log"))

    async def async_log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: datetime, end_time: datetime
    ) -> None:
        told, params = kwargs.get("standard_logging_object") or {}, kwargs.get("litellm_params") or {}
        decisions = [(params.get(name) or {}).get(METADATA) for name in ("metadata", "litellm_metadata")]
        effort = next((decided["effort"] for decided in decisions if decided), "none")
        model, tokens = told.get("model_group"), told.get("completion_tokens")
        self._log.info("%s %s %s %s", f"{start_time:%Y-%m-%dT%H:%M}", effort, model, tokens)


access_log = AccessLog()
