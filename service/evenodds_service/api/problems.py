"""Every error reply is problem+json (RFC 9457) with a stable `code`; only this module knows status numbers.

422 is for malformed requests, 404, 409 and 413 for facts, 503 for what may pass.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from evenodds.schemas import Problem
from evenodds.validation import fault_lines
from evenodds_service.errors import ServiceError, StoreUnavailable

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_SHOWN_FAULTS = 20
_SOURCES = ("body", "query", "path", "by-run", "by-decision")
STATUS_OF: Mapping[str, int] = {
    "malformed": 422,
    "key_missing": 401,
    "key_invalid": 401,
    "scope_missing": 403,
    "run_forbidden": 403,
    "rate_limited": 429,
    "host_refused": 421,
    "origin_refused": 403,
    "run_unknown": 404,
    "prompt_unknown": 404,
    "selection_unknown": 404,
    "snapshot_unknown": 404,
    "policy_unknown": 404,
    "decision_unknown": 404,
    "decision_expired": 410,
    "run_exists": 409,
    "prompt_conflict": 409,
    "request_conflict": 409,
    "selection_conflict": 409,
    "selection_voided": 409,
    "step_jump": 409,
    "below_base": 409,
    "log_compacted": 503,
    "pool_changed": 503,
    "vectors_gone": 503,
    "not_enough_prompts": 409,
    "shares_conflict": 409,
    "fill_needs_rest": 409,
    "embedder_fixed": 409,
    "embedding_width": 409,
    "rate_names_limit": 409,
    "embedding_refused": 409,
    "vector_unstorable": 409,
    "embedder_unavailable": 409,
    "torch_missing": 409,
    "policy_limit": 409,
    "embedder_not_allowed": 422,
    "store_unavailable": 503,
    "schema_mismatch": 503,
    "overloaded": 503,
    "deadline_passed": 503,
}
"""The status of each error that a caller can meet, by its code. Any other is a fault of the service: 500."""

HTTP_CODES: Mapping[int, str] = {
    400: "body_incomplete",
    404: "route_unknown",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    415: "media_type",
    422: "malformed",
    500: "internal_error",
    503: "overloaded",
}
"""The codes of what goes wrong before a route is reached, or in a way that nobody foresaw."""


def problem(
    request: Request, status: int, code: str, detail: str, errors: Sequence[str] = (), **headers: str
) -> Response:
    """A problem+json reply.

    A route that works item by item leaves in `request.state` the `place` of the faulty item, and what it has `done`.
    """
    place, done = getattr(request.state, "place", ""), getattr(request.state, "done", "")
    detail = (f"{place}: " if place else "") + detail + (f"; {done}" if done else "")
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=request.scope.get("request_id"),
        errors=tuple(errors),
    )
    return Response(
        body.model_dump_json(exclude_none=True),
        status,
        media_type=MEDIA_TYPE,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ServiceError, _refused)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _unexpected)


def refusal(request: Request, error: ServiceError) -> Response:
    """The reply to a call that met this error.

    Raises:
        ServiceError: the error itself, where it is none that a caller should meet.
    """
    status = STATUS_OF.get(error.code)
    if status is None:
        raise error
    if isinstance(error, StoreUnavailable):
        logger.warning("%s", error)
    headers = {"WWW_Authenticate": "Bearer"} if status == 401 else {}
    if error.retry_after_seconds is not None:
        headers["Retry_After"] = str(error.retry_after_seconds)
    return problem(request, status, error.code, str(error), **headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return refusal(request, error)


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    lines = fault_lines([_in_words(request, fault) for fault in error.errors()])
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return problem(request, 422, "malformed", lines[0] + more, lines[:_SHOWN_FAULTS])


def _in_words(request: Request, fault: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fault at its place in the request, and what is wrong with a body that is no JSON object at all."""
    if fault["type"] == "json_invalid" and len(fault["loc"]) == 2 and isinstance(fault["loc"][1], int):
        return {
            "type": "",
            "loc": ("body",),
            "msg": f"invalid JSON at character {fault['loc'][-1]}: {fault['ctx']['error']}",
        }
    place = tuple(part for part in fault["loc"] if part not in _SOURCES)
    if fault["type"] == "model_attributes_type" and isinstance(fault["input"], bytes):
        given = request.headers.get("content-type")
        return {
            "type": "",
            "loc": ("body",),
            "msg": f"send it with Content-Type: application/json, got {given or 'none'}",
        }
    if not place and fault["type"] != "value_error":  # whose message names its fields
        place = ("body",)
    return {**fault, "loc": place}


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # what FastAPI makes of JSON that Python cannot hold: nested too deeply, say
        cause = error.__cause__
        if isinstance(cause, UnicodeDecodeError):
            where = f"byte 0x{cause.object[cause.start]:02x} at position {cause.start}"
            return problem(request, 422, "malformed", f"body: it is not UTF-8 ({where}): encode it as UTF-8")
        return problem(
            request,
            422,
            "malformed",
            "body: this JSON is nested too deeply, or has a number with too many digits: send simpler JSON",
        )
    details = {
        404: f"there is no operation {request.method} {request.url.path}: /docs lists all operations",
        405: f"{request.method} is not allowed on {request.url.path}: /docs lists all operations",
    }
    detail = error.detail if error.detail != HTTPStatus(error.status_code).phrase else ""
    response = problem(
        request,
        error.status_code,
        HTTP_CODES.get(error.status_code, "http_error"),
        detail or details.get(error.status_code, HTTPStatus(error.status_code).phrase),
    )
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["Allow"] = ", ".join(_allowed(request))
    return response


def _allowed(request: Request) -> list[str]:
    """The methods of every route at this path: the router names those of the first only."""
    methods: set[str] = set()
    for route in request.app.state.routes:
        if route.path_regex.match(request.scope["path"]):
            methods |= route.methods
    return sorted(methods)


async def _left(request: Request, error: Exception) -> Response:
    """Its caller has left in the middle of the body: nobody hears this, and it is no fault of the service."""
    return problem(request, 400, HTTP_CODES[400], "the connection ended before the body did: send it again")


async def _unexpected(request: Request, error: Exception) -> Response:
    # uvicorn tells too, outside of what knows the request's id; `logs` leaves that out.
    logger.error("failed to answer", exc_info=error, extra={"request_id": request.scope["request_id"]})
    return problem(
        request,
        500,
        HTTP_CODES[500],
        "the service failed to answer: its log names the cause under this request id",
        # Made outside of what gives every other reply its id and these headers.
        X_Request_ID=request.scope["request_id"],
        Cache_Control="no-store",
        X_Content_Type_Options="nosniff",
    )
