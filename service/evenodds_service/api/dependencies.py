"""What the endpoints share: the objects that they work with, the clock, and the translation of beliefs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import Depends, Path, Request
from prometheus_client import CollectorRegistry
from scipy.special import betaincinv

from evenodds.schemas import RUN_PATTERN, Prediction, PredictRequest, Problem
from evenodds_service.domain.distributions import informative_moments, mean_and_std
from evenodds_service.domain.settings import FloatArray
from evenodds_service.runtime.budgets import Desk
from evenodds_service.runtime.coalescer import Rounds
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.runtime.live_run import LiveRuns
from evenodds_service.runtime.live_runs import Views
from evenodds_service.storage.store import Store

_INTERVAL = (0.05, 0.95)


@dataclass(frozen=True, slots=True)
class Services:
    """What the endpoints work with; built once per application."""

    store: Store
    featurizer: Featurizer
    live_runs: LiveRuns
    views: Views
    desk: Desk
    predict_staleness_seconds: float
    registry: CollectorRegistry
    run_registry: CollectorRegistry
    predictions: Rounds[PredictRequest, str]


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Hands = Annotated[Services, Depends(_services)]
RunPath = Annotated[str, Path(pattern=RUN_PATTERN, description="name of the run")]
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in (
        (404, "Unknown run or prompt"),
        (409, "Conflict"),
        (413, "Larger than a request may be"),
        (422, "Malformed request"),
        (503, "Cannot answer now: repeat after Retry-After"),
    )
}


def now() -> datetime:
    """The one clock of the API."""
    return datetime.now(timezone.utc)


def content_hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def predictions(
    ids: Sequence[str], a: FloatArray, b: FloatArray, seen: FloatArray, group_size: int
) -> tuple[Prediction, ...]:
    """Beliefs in the words of the wire. `seen` holds the attempts observed; all arrays are [n]."""
    mean, std = mean_and_std(a, b)
    informative, _ = informative_moments(a, b, group_size)
    low, high = (betaincinv(a, b, tail) for tail in _INTERVAL)
    columns = (mean.tolist(), std.tolist(), low.tolist(), high.tolist(), informative.tolist(), seen.tolist())
    return tuple(
        Prediction(
            prompt_id=prompt_id,
            success_rate=rate,
            std=deviation,
            interval=(lower, upper),
            informative_probability=probability,
            attempts_seen=int(attempts),
        )
        for prompt_id, rate, deviation, lower, upper, probability, attempts in zip(ids, *columns, strict=True)
    )
