"""Even Odds: predicts how hard each prompt is for one language model as it is right now.

This package is the thin client. It needs httpx and pydantic only and knows nothing of the service's insides.
The requests and replies of the wire contract stand whole in `evenodds.schemas`. A name of this package is imported when
it is first used, so that `import evenodds` alone costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from evenodds.agreement import agreement
from evenodds.errors import (
    ConfigurationError,
    Conflict,
    EvenOddsError,
    Forbidden,
    Invalid,
    InvalidRequest,
    NotFound,
    ProblemError,
    RateLimited,
    ReplyInvalid,
    ServerError,
    TimedOut,
    TooLarge,
    TransportError,
    Unauthorized,
    Unavailable,
    Unreachable,
)

if TYPE_CHECKING:
    from evenodds.answers import Answer, answers_of
    from evenodds.client import AsyncClient, Client
    from evenodds.gateway import GatewayBudget, GatewayCounts
    from evenodds.judged_text import TextRule
    from evenodds.schemas import (
        Alarm,
        AllocatePrompt,
        AllocateReply,
        Allocation,
        ArmReport,
        BeliefReport,
        BelievedPrompt,
        BudgetReply,
        Coverage,
        FallbackNotice,
        FillForecast,
        Forecast,
        ForecastQuality,
        GroupReport,
        Health,
        LiftReport,
        Observation,
        ObserveReply,
        PolicyList,
        PolicyState,
        Prediction,
        PredictReply,
        Problem,
        PromptIn,
        PromptInfo,
        PromptPage,
        PromptRef,
        PromptsAdded,
        PromptState,
        RefitList,
        RefitPolicy,
        RefitState,
        ReliabilityBin,
        Retention,
        RunPage,
        RunReport,
        RunState,
        SelectedPrompt,
        SelectReply,
        Share,
        SkillReport,
        Tier,
        Visit,
        VisitCount,
        Voided,
        WindowReport,
    )
    from evenodds.training.batch import Batch
    from evenodds.training.selector import PromptSelector
    from evenodds.training.status import Counts
    from evenodds.training.text import text_of
    from evenodds.version import __version__

__all__ = [
    "Alarm",
    "AllocatePrompt",
    "AllocateReply",
    "Allocation",
    "Answer",
    "ArmReport",
    "AsyncClient",
    "Batch",
    "BeliefReport",
    "BelievedPrompt",
    "BudgetReply",
    "Client",
    "ConfigurationError",
    "Conflict",
    "Counts",
    "Coverage",
    "EvenOddsError",
    "FallbackNotice",
    "FillForecast",
    "Forbidden",
    "Forecast",
    "ForecastQuality",
    "GatewayBudget",
    "GatewayCounts",
    "GroupReport",
    "Health",
    "Invalid",
    "InvalidRequest",
    "LiftReport",
    "NotFound",
    "Observation",
    "ObserveReply",
    "PolicyList",
    "PolicyState",
    "PredictReply",
    "Prediction",
    "Problem",
    "ProblemError",
    "PromptIn",
    "PromptInfo",
    "PromptPage",
    "PromptRef",
    "PromptSelector",
    "PromptState",
    "PromptsAdded",
    "RateLimited",
    "RefitList",
    "RefitPolicy",
    "RefitState",
    "ReliabilityBin",
    "ReplyInvalid",
    "Retention",
    "RunPage",
    "RunReport",
    "RunState",
    "SelectReply",
    "SelectedPrompt",
    "ServerError",
    "Share",
    "SkillReport",
    "TextRule",
    "Tier",
    "TimedOut",
    "TooLarge",
    "TransportError",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
    "Visit",
    "VisitCount",
    "Voided",
    "WindowReport",
    "__version__",
    "agreement",
    "answers_of",
    "text_of",
]

_MODULES = {
    "AsyncClient": "client",
    "Client": "client",
    "GatewayBudget": "gateway",
    "GatewayCounts": "gateway",
    "TextRule": "judged_text",
    "Answer": "answers",
    "answers_of": "answers",
    "Batch": "training.batch",
    "Counts": "training.status",
    "PromptSelector": "training.selector",
    "text_of": "training.text",
    "__version__": "version",
    "schemas": "schemas",
}
"""Where a name stands; every other one that is not here yet is of `schemas`."""

if not TYPE_CHECKING:  # or every misspelled name would pass

    def __getattr__(name: str) -> object:
        if name not in __all__ and name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_MODULES.get(name, 'schemas')}")
        value = module if name == "schemas" else getattr(module, name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
