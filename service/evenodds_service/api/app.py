"""The application: routes, errors, request ids and metrics put together around the objects that it is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry
from starlette.middleware.gzip import GZipMiddleware

from evenodds.version import __version__
from evenodds_service.api import problems
from evenodds_service.api.dependencies import Services
from evenodds_service.api.middleware.access import Access, KeyRing, run_is_allowed
from evenodds_service.api.middleware.load_shedding import Crowding
from evenodds_service.api.middleware.request_body import MAX_BODY_MB, Bodies
from evenodds_service.api.middleware.request_log import RequestLog, is_quiet
from evenodds_service.api.page import router as page
from evenodds_service.api.routes import budgets, chat, operations, prompts, refits, reports, rewind, runs, training
from evenodds_service.api.run_metrics import RunMetrics
from evenodds_service.api.wire import now
from evenodds_service.runtime.budgets import Desk
from evenodds_service.runtime.coalescer import Rounds
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.runtime.live_runs import LiveRuns, Views
from evenodds_service.storage.store import Store

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
_COMPRESSED_FROM_BYTES = 100_000  # smaller replies are sent sooner than they are compressed


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
        telemetry={"auto_configure": telemetry, "metrics": False, "logs": False, "exclude": is_quiet},
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
    rooms = (training, budgets, chat, refits, reports, runs, prompts, rewind, operations)
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
    app.add_middleware(RequestLog, registry=registry)
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
