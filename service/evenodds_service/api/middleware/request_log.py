"""Gives every request an id, measures it and writes one line about it."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from evenodds_service.storage.store import ApiKey
from evenodds_service.timing import collected_phases

logger = logging.getLogger(__name__)


_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


QUIET_ROUTES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked every few seconds by machines."""


EVENT_STREAM = b"text/event-stream"

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def is_quiet(scope: MutableMapping[str, Any]) -> bool:
    return scope["path"] in QUIET_ROUTES


class RequestLog:
    """Gives every request an id (the caller's `X-Request-ID` where it is well-formed) and measures it.

    Every reply tells where its time went in `Server-Timing`, milliseconds by phase.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        labels = ("method", "route", "status")
        self._requests = Counter("evenodds_requests", "Requests answered.", labels, registry=registry)
        self._seconds = Histogram(
            "evenodds_request_seconds",
            "Time to answer.",
            ("method", "route"),
            registry=registry,
            buckets=_BUCKETS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        status, is_stream = 500, False
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] == "http.response.start":
                is_stream = (b"content-type", EVENT_STREAM) in [
                    (name, value[:17]) for name, value in message["headers"]
                ]
                status = message["status"]
                taken = {**phases, "total": time.perf_counter() - started}
                timing = ", ".join(f"{name};dur={1_000 * seconds:.2f}" for name, seconds in taken.items())
                own = [(b"x-request-id", request_id.encode()), (b"server-timing", timing.encode())]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            with bound_contextvars(request_id=request_id), collected_phases() as phases:
                await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            # The route's template, not the path, and known methods only: label values must stay few.
            route = getattr(scope.get("route"), "path_format", "unknown")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._requests.labels(method, route, str(status)).inc()
            if not is_stream:  # which goes on for as long as somebody listens
                self._seconds.labels(method, route).observe(seconds)
            _log(scope, method, route, status, seconds)


def _log(scope: Scope, method: str, route: str, status: int, seconds: float) -> None:
    """One line a request, of what it asked and how it went; never its body, its query or its key's secret."""
    level = logging.INFO
    if status >= 500:
        level = logging.WARNING
    elif route in QUIET_ROUTES:
        level = logging.DEBUG
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, object] = {
        "request_id": scope["request_id"],
        "method": method,
        "route": route,
        "status": status,
        "milliseconds": round(seconds * 1_000, 3),
    }
    key: ApiKey | None = scope.get("state", {}).get("api_key")
    if key is not None:
        fields["api_key"] = key.name
    run = scope.get("path_params", {}).get("run")
    if run is not None:
        fields["run"] = run
    logger.log(level, "request", extra=fields)
