"""Even Odds: predicts how hard each prompt is for one language model as it is right now.

This package is the thin client. It needs httpx and pydantic only and knows nothing of the service's insides.
The requests and replies of the wire contract stand whole in `evenodds.schemas`.
"""

from __future__ import annotations

from evenodds.client import AsyncClient, Client
from evenodds.errors import (
    ConfigurationError,
    Conflict,
    EvenOddsError,
    Invalid,
    InvalidRequest,
    NotFound,
    ProblemError,
    ReplyInvalid,
    ServerError,
    TimedOut,
    TooLarge,
    TransportError,
    Unavailable,
    Unreachable,
)
from evenodds.record import Counts
from evenodds.schemas import (
    Forecast,
    Health,
    Observation,
    ObserveReply,
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
    RunPage,
    RunState,
    SelectedPrompt,
    SelectReply,
    Visit,
    Voided,
)
from evenodds.selector import Batch, PromptSelector
from evenodds.version import __version__

__all__ = [
    "AsyncClient",
    "Batch",
    "Client",
    "ConfigurationError",
    "Conflict",
    "Counts",
    "EvenOddsError",
    "Forecast",
    "Health",
    "Invalid",
    "InvalidRequest",
    "NotFound",
    "Observation",
    "ObserveReply",
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
    "RefitList",
    "RefitPolicy",
    "RefitState",
    "ReplyInvalid",
    "RunPage",
    "RunState",
    "SelectReply",
    "SelectedPrompt",
    "ServerError",
    "TimedOut",
    "TooLarge",
    "TransportError",
    "Unavailable",
    "Unreachable",
    "Visit",
    "Voided",
    "__version__",
]
