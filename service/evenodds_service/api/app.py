"""The application: routes, errors, request ids and metrics put together around the objects that it is given."""

from __future__ import annotations

import re
import time
import uuid
from functools import partial

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evenodds.version import __version__
from evenodds_service.api import errors, loop, operations, refits, runs
from evenodds_service.api.features import Featurizer
from evenodds_service.api.rounds import Rounds
from evenodds_service.api.services import Services
from evenodds_service.live_run import LiveRuns
from evenodds_service.storage.store import Store
from evenodds_service.timing import collected_phases

_DESCRIPTION = """
Even Odds predicts how hard each prompt is for one language model as it is right now, and chooses which prompts to
spend rollouts on. A trainer's step: `POST /select_batch`, roll out, `POST /observe`.

Errors are problem+json (RFC 9457) with a stable `code`. Repeating a call is safe.
"""
_TAGS = [
    {"name": "loop", "description": "What a trainer or gateway calls at each step."},
    {"name": "runs", "description": "One policy with its own pool, history and predictor."},
    {"name": "prompts", "description": "The pool of a run."},
    {"name": "operations", "description": "Health and metrics."},
]
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def create_app(store: Store, *, live_runs: int = 32) -> FastAPI:
    """The ASGI application over this store.

    Args:
        live_runs: How many runs' states the process keeps in memory.
    """
    featurizer = Featurizer(store)
    registry = CollectorRegistry()
    app = FastAPI(
        title="Even Odds",
        version=__version__,
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    views = LiveRuns(store, capacity=live_runs)
    app.state.services = Services(
        store=store,
        featurizer=featurizer,
        live_runs=views,
        registry=registry,
        predictions=Rounds(partial(loop.predict_known, store, views)),
    )
    for room in (loop, refits, runs, operations):
        app.include_router(room.router)
    errors.install(app)
    app.add_middleware(_Observed, registry=registry)
    return app


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
            with collected_phases() as phases:
                await self._app(scope, receive, send_with_id)
        finally:
            # The route's template, not the path, and known methods only: label values must stay few.
            route = getattr(scope.get("route"), "path_format", "unknown")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._requests.labels(method, route, str(status)).inc()
            self._seconds.labels(method, route).observe(time.perf_counter() - started)
