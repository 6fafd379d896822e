"""What the endpoints share: the objects that they work with, the clock, and the translation of beliefs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Path, Request
from prometheus_client import CollectorRegistry

from evenodds.schemas import RUN_PATTERN, PredictRequest, Problem
from evenodds_service.runtime.budgets import Desk
from evenodds_service.runtime.coalescer import Rounds
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.runtime.live_runs import LiveRuns, Views
from evenodds_service.storage.store import Store


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
