"""What the endpoints share: the objects that they work with, and the refusals that all of them may answer."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry

from evenodds import TextRule
from evenodds.schemas import RUN_PATTERN, PredictRequest, Problem
from evenodds.schemas.fields import storable
from evenodds_service.api.cursors import MOST_CHARACTERS
from evenodds_service.runtime.budgets import Budgets
from evenodds_service.runtime.changes import Changes
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
    changes: Changes


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
_REQUEST_ID = "0f9d3a5c8a7e4a5e9d6b1c2f3a4b5c6d"


def described(status: int, description: str, code: str, detail: str) -> dict[int | str, dict[str, Any]]:
    """An error that operations may answer, for the description of the interface."""
    title = HTTPStatus(status).phrase
    example = {"title": title, "status": status, "detail": detail, "code": code, "request_id": _REQUEST_ID}
    content = {"application/json": {"example": example}}
    return {status: {"model": Problem, "description": description, "content": content}}


UNEXPECTED = described(
    500, "The service failed: its log names the cause under the request id", "internal_error", "the service failed"
)
REFUSED = {
    **described(401, "The API key is missing or not valid", "key_missing", "this service requires an API key"),
    **described(403, "The key may not do this", "scope_missing", "key 'reader' has the scope read"),
    **described(
        429,
        "The key's limit of requests is reached: repeat after Retry-After",
        "rate_limited",
        "key 'reader': wait 3 s",
    ),
    **UNEXPECTED,
    **described(503, "The service cannot answer now: repeat after Retry-After", "overloaded", "repeat the call later"),
}
"""What every operation may answer that asks for a key."""

PROBLEMS = {
    **REFUSED,
    **described(404, "Unknown run or prompt", "run_unknown", "run 'math-7b' does not exist: create it first"),
    **described(409, "Conflict", "request_conflict", "request_id 'step-12' was used with another body"),
    **described(413, "Larger than a request may be", "too_large", "body: the limit is 64,000,000 bytes"),
    **described(
        415,
        "A body without a JSON media type, or with another compression than gzip",
        "media_type",
        "body: send it with Content-Type: application/json, got none",
    ),
    **described(422, "Malformed request", "malformed", "step: Input should be greater than or equal to 0"),
}
"""Of operations on runs, in addition what is wrong with the request."""

EVENT_HEADER = "X-EvenOdds-Event"
FOLLOWED: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": {
            EVENT_HEADER: {
                "description": "id of the newest event that the reply shows: sent to the stream of events as "
                "Last-Event-ID, only what comes after it is told",
                "schema": {"type": "string"},
            }
        }
    }
}
"""Replies that show things as of an event."""

REPLAYED_HEADER = "Idempotent-Replayed"
REPLAYABLE: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": {
            REPLAYED_HEADER: {
                "description": "true where the call is a repetition, and the reply the first one's; else left out",
                "schema": {"type": "string", "enum": ["true"]},
            }
        }
    }
}
