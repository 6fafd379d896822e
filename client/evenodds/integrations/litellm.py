"""LiteLLM's proxy: budgets before each call, outcomes after it.

`BudgetHook` is a callback of the proxy. Name an instance of it under `litellm_settings: callbacks` in the proxy's
configuration; `examples/litellm` shows one. Importing this module imports LiteLLM (1.80 or newer).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from litellm.integrations.custom_logger import CustomLogger  # type: ignore[import-not-found]  # see BudgetHook

from evenodds.errors import ConfigurationError
from evenodds.gateway import GatewayBudget
from evenodds.schemas import BudgetReply

logger = logging.getLogger(__name__)

Parameter = Literal["n", "reasoning_effort", "max_tokens"]
Rewards = Sequence[float] | None
Verify = Callable[[Mapping[str, Any], Any], "Rewards | Awaitable[Rewards]"]

_CALL_TYPES = frozenset({"completion", "acompletion"})
_DECISION = {"run", "policy", "policy_version", "attempts", "effort", "success_rate", "price", "log_position"}
_LIMITS = ("max_completion_tokens", "max_tokens")
EFFORT_ONLY: tuple[Parameter, ...] = ("reasoning_effort",)
METADATA = "evenodds"
"""Under this key of the request's metadata stands the decision, for the proxy's logs."""


class BudgetHook(CustomLogger):  # type: ignore[misc]  # LiteLLM is not installed where this is checked
    """Sets what a chat request may spend by `POST /budget`, and reports what came of it.

    What the caller has set itself stays, but for a length limit, which is scaled. Where the service gives no budget
    within the deadline the request passes as it came. Nothing here raises into the proxy.

    Args:
        base_url: Where Even Odds is.
        run: The run that stands for the served model.
        policy: Name of the run's budget policy; of mode `parallel` where it sets `n`.
        sets: Which parameters it sets: `reasoning_effort` to the tier's label, `n` to the number of attempts,
            `max_tokens` to the caller's limit (else `default_max_tokens`) times the tier's scale.
        default_max_tokens: Length limit of requests that come without one, at least 1; without it those stay without.
        verify: Scores a finished response: (request, response) -> a reward in [0, 1] for each choice, or None where it
            cannot tell. May be a coroutine function. Without it nothing is reported.
        step: Version of the served model: a number that never falls.
        deadline_ms: A request waits no longer than this, above 0.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        run: str,
        policy: str = "default",
        sets: Collection[Parameter] = EFFORT_ONLY,
        default_max_tokens: int | None = None,
        verify: Verify | None = None,
        step: int = 0,
        deadline_ms: float = 50.0,
    ) -> None:
        super().__init__()
        unknown = sorted(set(sets) - {"n", "reasoning_effort", "max_tokens"})
        if unknown:
            raise ConfigurationError(f"sets {unknown!r} is none of 'n', 'reasoning_effort', 'max_tokens'")
        if default_max_tokens is not None and default_max_tokens < 1:
            raise ConfigurationError(f"default_max_tokens {default_max_tokens!r} must be at least 1")
        self._sets, self._default_max_tokens = frozenset(sets), default_max_tokens
        self._verify, self._step = verify, step
        self.gateway = GatewayBudget(base_url, run=run, policy=policy, deadline_ms=deadline_ms)

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """The request with its budget. LiteLLM calls this before each call."""
        try:
            text = newest_user_text(data.get("messages"))
            if call_type in _CALL_TYPES and text:
                budget = await self.gateway.budget(text)
                if budget is not None:
                    self._apply(data, budget)
        except Exception:  # an exception here would be the caller's error
            logger.warning("a request passes without a budget", exc_info=True)
        return data

    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> Any:
        """Report what came of the request. LiteLLM calls this with each whole response (not with streams)."""
        try:
            text = newest_user_text(data.get("messages"))
            if self._verify is not None and text:
                rewards = self._verify(data, response)
                if inspect.isawaitable(rewards):
                    rewards = await rewards
                if rewards is not None:
                    self.gateway.report(text, rewards, step=self._step)
        except Exception:
            logger.warning("an outcome is not reported", exc_info=True)
        return response

    def _apply(self, data: dict[str, Any], budget: BudgetReply) -> None:
        if "reasoning_effort" in self._sets and data.get("reasoning_effort") is None:
            data["reasoning_effort"] = budget.effort
        if "n" in self._sets and data.get("n") is None:
            data["n"] = max(1, budget.attempts)
        if "max_tokens" in self._sets:
            name = next((name for name in _LIMITS if data.get(name) is not None), "max_tokens")
            limit = data.get(name) or self._default_max_tokens
            if limit is not None:
                data[name] = max(1, round(limit * budget.max_tokens_scale))
        if not isinstance(data.get("metadata"), dict):
            data["metadata"] = {}
        data["metadata"][METADATA] = budget.model_dump(include=_DECISION)


def newest_user_text(messages: object) -> str:
    """The text of the last user message; empty where there is none."""
    for message in reversed(messages if isinstance(messages, Sequence) else ()):
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            parts = content if isinstance(content, Sequence) else ()
            texts = [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
            if texts:
                return "\n".join(texts)
    return ""
