"""The application: routes, errors, request ids and metrics put together around the objects that it is given."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, MutableMapping
from functools import partial
from typing import Any, cast

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from evenodds.version import __version__
from evenodds_service.api import problems
from evenodds_service.api.dependencies import Services, now
from evenodds_service.api.middleware.access import Access, KeyRing, run_is_allowed
from evenodds_service.api.middleware.load_shedding import Crowding
from evenodds_service.api.middleware.request_body import MAX_BODY_MB, Bodies
from evenodds_service.api.page import router as page
from evenodds_service.api.routes import budgets, chat, operations, refits, reports, rewind, runs, training
from evenodds_service.api.run_metrics import RunMetrics
from evenodds_service.runtime.budgets import Desk
from evenodds_service.runtime.coalescer import Rounds
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.runtime.live_run import LiveRuns
from evenodds_service.runtime.live_runs import Views
from evenodds_service.storage.store import ApiKey, Store
from evenodds_service.timing import collected_phases

logger = logging.getLogger(__name__)

_DESCRIPTION = """
Even Odds predicts how hard each prompt is for one language model as it is right now, and chooses which prompts to
spend rollouts on. A trainer's step: `POST /select_batch`, roll out, `POST /observe`.

Errors are problem+json (RFC 9457) with a stable `code`. Repeating a call is safe.
"""
_TAGS = [
    {"name": "loop", "description": "What a trainer or gateway calls at each step."},
    {"name": "budgets", "description": "What a gateway asks: how many attempts, or how much effort, requests deserve."},
    {"name": "runs", "description": "One policy with its own pool, history and predictor."},
    {"name": "prompts", "description": "The pool of a run."},
    {"name": "operations", "description": "Health and metrics."},
]
DOCS_FILES = "/docs-files"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET_ROUTES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked every few seconds by machines."""
_COMPRESSED_FROM_BYTES = 100_000  # smaller replies are sent sooner than they are compressed
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def create_app(
    store: Store,
    *,
    live_runs: int = 32,
    max_body_mb: int = MAX_BODY_MB,
    asks_for_keys: bool = False,
    clock: Callable[[], float] = time.monotonic,
    telemetry: bool = False,
    predict_staleness_ms: float = 0.0,
    budget_staleness_ms: float = 200.0,
    budget_deadline_ms: float = 500.0,
    budget_queue: int = 256,
    embedders: Collection[str] = (),
) -> FastAPI:
    """The ASGI application over this store.

    Args:
        live_runs: How many runs' states the process keeps in memory.
        max_body_mb: Most millions of bytes in a request's body after decompression, at least 1.
        asks_for_keys: Whether a caller needs an API key of the store.
        telemetry: Whether traces go out by OTLP; the variables `OTEL_*` say where.
        clock: Seconds that never go back, for the limits of keys.
        predict_staleness_ms, budget_staleness_ms: How old a view of the log may be that answers `/predict`, `/budget`;
            0 reads the log for each answer.
        budget_deadline_ms: After so long a request for a budget is given up.
        budget_queue: Requests for a budget that may wait at a time.
        embedders: Models that runs may name as their embedder besides the built-in one.
    """
    featurizer = Featurizer(store, allowed=embedders)
    views_of_runs = LiveRuns(store, capacity=live_runs)
    views = Views(store, views_of_runs)
    registry = CollectorRegistry()
    app = FastAPIOffline(
        redoc_url=None,
        static_url=DOCS_FILES,
        title="Even Odds",
        version=__version__,
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        # Logs would hold what was refused, and so the texts of prompts; the metrics are Prometheus's.
        telemetry={"auto_configure": telemetry, "metrics": False, "logs": False, "exclude": _is_quiet},
    )
    run_registry = CollectorRegistry()
    run_registry.register(RunMetrics(store, views_of_runs, now))
    app.state.services = Services(
        store=store,
        featurizer=featurizer,
        live_runs=views_of_runs,
        views=views,
        desk=Desk(
            views,
            featurizer,
            staleness_seconds=budget_staleness_ms / 1_000,
            deadline_seconds=budget_deadline_ms / 1_000,
            capacity=budget_queue,
        ),
        predict_staleness_seconds=predict_staleness_ms / 1_000,
        registry=registry,
        run_registry=run_registry,
        predictions=Rounds(partial(training.predict_known, store, views_of_runs)),
    )
    bearer = HTTPBearer(auto_error=False, description="an API key, where the service asks for one")
    rooms = (training, budgets, chat, refits, reports, runs, rewind, operations)
    for room in rooms:
        app.include_router(room.router, dependencies=[Depends(bearer), Depends(run_is_allowed)])
    app.include_router(page)
    app.state.routes = tuple(route for room in rooms for route in room.router.routes)
    problems.install(app)
    # The last one that is added meets a request first.
    app.add_middleware(Bodies, max_bytes=max_body_mb * 1_000_000)
    app.add_middleware(GZipMiddleware, minimum_size=_COMPRESSED_FROM_BYTES, compresslevel=1)
    app.add_middleware(Crowding)
    if asks_for_keys:
        app.add_middleware(Access, ring=KeyRing(store, clock), refused=problems.refused)
    app.add_middleware(_Observed, registry=registry)
    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Let the description say what FastAPI cannot: errors are problem+json, and a key is asked for only where it is."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = FastAPI.openapi(app)
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["security"] = [{}, *operation.get("security", [])]
                    for response in operation["responses"].values():
                        schema = response.get("content", {}).get("application/json", {}).get("schema", {})
                        if schema.get("$ref") == "#/components/schemas/Problem":
                            response["content"] = {problems.MEDIA_TYPE: response["content"]["application/json"]}
        return cast("dict[str, Any]", app.openapi_schema)

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the description


def _is_quiet(scope: MutableMapping[str, Any]) -> bool:
    return scope["path"] in _QUIET_ROUTES


class _Observed:
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
        status = 500
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
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
            self._seconds.labels(method, route).observe(seconds)
            _log(scope, method, route, status, seconds)


def _log(scope: Scope, method: str, route: str, status: int, seconds: float) -> None:
    """One line a request, of what it asked and how it went; never its body, its query or its key's secret."""
    level = logging.INFO
    if status >= 500:
        level = logging.WARNING
    elif route in _QUIET_ROUTES:
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
