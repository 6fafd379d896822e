"""What the endpoints share: the objects that they work with, and the refusals that all of them may answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry

from evenodds import TextRule
from evenodds.schemas import RUN_PATTERN, PredictRequest, Problem
from evenodds.schemas.fields import storable
from evenodds_service.api.cursors import MOST_CHARACTERS
from evenodds_service.runtime.budgets import Budgets
from evenodds_service.runtime.coalescer import Coalescer
from evenodds_service.runtime.decisions import Decisions
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.runtime.retention import Tidying
from evenodds_service.runtime.run_states import RunStates
from evenodds_service.storage.store import Store


@dataclass(frozen=True, slots=True)
class Services:
    """What the endpoints work with; built once per application."""

    store: Store
    featurizer: Featurizer
    live_runs: LiveRuns
    budgets: Budgets
    decisions: Decisions
    tidying: Tidying
    run_states: RunStates
    predictions: Coalescer[PredictRequest, str]
    predict_staleness_seconds: float
    max_step_jump: int
    text_rule: TextRule
    registry: CollectorRegistry
    run_registry: CollectorRegistry


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def parameters_are_storable(request: Request) -> None:
    """Hold every string of the path and the query to what bodies are held to: SQL and files can keep it.

    Raises:
        RequestValidationError: one holds a NUL character or half of a surrogate pair.
    """
    name = ""
    try:
        for name, value in (*request.path_params.items(), *request.query_params.multi_items()):
            storable(name)
            storable(str(value))
    except ValueError as error:
        raise RequestValidationError([{"type": "value_error", "loc": (name,), "msg": str(error)}]) from error


Dependencies = Annotated[Services, Depends(_services)]
CursorQuery = Annotated[str | None, Query(max_length=MOST_CHARACTERS, description="next_cursor of the page before")]
RunPath = Annotated[str, Path(pattern=RUN_PATTERN, description="name of the run")]
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in (
        (404, "Unknown run or prompt"),
        (409, "Conflict"),
        (413, "Larger than a request may be"),
        (415, "A body that does not say that it is JSON, or is packed by another way than gzip"),
        (422, "Malformed request"),
        (503, "Cannot answer now: repeat after Retry-After"),
    )
}
