"""The application: routes, errors, request ids and metrics put together around the objects that it is given."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from evenodds import TextRule, schemas
from evenodds.version import __version__
from evenodds_service.api import problems
from evenodds_service.api.dependencies import Services, parameters_are_storable
from evenodds_service.api.middleware.access import Access, KeyRing, run_is_allowed
from evenodds_service.api.middleware.browsers import ANY_HOST, Browsers, is_loopback
from evenodds_service.api.middleware.load_shedding import LoadShedding
from evenodds_service.api.middleware.prefix import Prefix
from evenodds_service.api.middleware.request_body import RequestBodyLimit
from evenodds_service.api.middleware.request_log import RequestLog, is_quiet
from evenodds_service.api.page import DOCS_FILES, docs_files
from evenodds_service.api.page import router as page
from evenodds_service.api.routes import (
    budgets,
    chat,
    events,
    operations,
    prompts,
    refits,
    reports,
    rewind,
    runs,
    training,
)
from evenodds_service.api.run_metrics import RunMetrics
from evenodds_service.api.wire import now
from evenodds_service.runtime.budgets import Budgets
from evenodds_service.runtime.changes import Changes
from evenodds_service.runtime.decisions import Decisions
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.runtime.retention import Tidying
from evenodds_service.runtime.run_states import RunStates
from evenodds_service.settings import Settings
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
DEFAULTS = Settings()
_COMPRESSED_FROM_BYTES = 100_000  # smaller replies are sent sooner than they are compressed


def create_app(
    store: Store,
    settings: Settings = DEFAULTS,
    *,
    asks_for_keys: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The ASGI application over this store.

    Args:
        settings: Those of the process; the environment is not looked at.
        asks_for_keys: Whether a caller needs an API key of the store.
        clock: Seconds that never go back, for the limits of keys.
    """
    services = _services(store, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services.run_states.start()
        try:
            yield
            await run_in_threadpool(services.decisions.close)
        finally:
            await run_in_threadpool(services.run_states.close)

    app = FastAPI(
        # The page serves these under relative addresses.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        title="Even Odds",
        version=__version__,
        lifespan=lifespan,
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        # Logs would hold what was refused, and so the texts of prompts; the metrics are Prometheus's.
        telemetry={"auto_configure": settings.telemetry, "metrics": False, "logs": False, "exclude": is_quiet},
    )
    app.state.services = services
    bearer = HTTPBearer(auto_error=False, description="an API key, where the service asks for one")
    modules = (training, budgets, chat, refits, reports, runs, prompts, rewind, events, operations)
    dependencies = [Depends(bearer), Depends(parameters_are_storable), Depends(run_is_allowed)]
    for module in modules:
        app.include_router(module.router, dependencies=dependencies)
    app.include_router(page)
    app.mount(DOCS_FILES, docs_files, name="docs-files")
    app.state.routes = tuple(route for module in modules for route in module.router.routes)
    problems.install(app)
    _add_middleware(app, settings, services, KeyRing(store, clock) if asks_for_keys else None)
    _describe(app)
    return app


def _add_middleware(app: FastAPI, settings: Settings, services: Services, ring: KeyRing | None) -> None:
    # The last one that is added meets a request first.
    app.add_middleware(
        RequestBodyLimit,
        max_bytes=settings.max_body_mb * 1_000_000,
        max_bytes_together=settings.max_bodies_mb * 1_000_000,
    )
    app.add_middleware(GZipMiddleware, minimum_size=_COMPRESSED_FROM_BYTES, compresslevel=1)
    app.add_middleware(LoadShedding)
    if ring is not None:
        app.add_middleware(Access, ring=ring)
    if settings.origins():
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins(), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(
        Browsers,
        hosts=_hosts(settings),
        answers_probes=not is_loopback(settings.host),
        origins=settings.origins(),
    )
    app.add_middleware(RequestLog, registry=services.registry)
    app.add_middleware(Prefix, root_path=settings.root_path or "", proxies=settings.proxies())


def _services(store: Store, settings: Settings) -> Services:
    """What the routes share."""
    featurizer = Featurizer(store, allowed=settings.allowed_embedders())
    live_runs = LiveRuns(store, capacity=settings.live_runs)
    run_states = RunStates(store, live_runs, now=now)
    run_registry = CollectorRegistry()
    run_registry.register(RunMetrics(store, live_runs, run_states, now))
    return Services(
        store=store,
        featurizer=featurizer,
        live_runs=live_runs,
        budgets=Budgets(
            live_runs,
            featurizer,
            staleness_seconds=settings.budget_staleness_ms / 1_000,
            deadline_seconds=settings.budget_deadline_ms / 1_000,
            capacity=settings.budget_queue,
            settle_retention=store.settle_retention,
        ),
        decisions=Decisions(store, now=now, most=settings.decisions),
        tidying=Tidying(store, tidied=run_states.look_at),
        run_states=run_states,
        predictions=training.prediction_coalescer(live_runs),
        max_step_jump=settings.max_step_jump,
        predict_staleness_seconds=settings.predict_staleness_ms / 1_000,
        text_rule=settings.text_rule or TextRule(),
        registry=CollectorRegistry(),
        run_registry=run_registry,
        changes=Changes(store),
    )


def _hosts(settings: Settings) -> tuple[str, ...]:
    """Names that `Host` may have besides loopback's. Elsewhere than on loopback only the operator knows them."""
    return settings.host_names() or (() if is_loopback(settings.host) else (ANY_HOST,))


def _describe(app: FastAPI) -> None:
    """Let the description say what FastAPI cannot: errors are problem+json, and a key is asked for only where it is."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = FastAPI.openapi(app)
            # FastAPI lists only the models that it reads itself, and this one is read by its route.
            body = schemas.PromptsIn.model_json_schema(ref_template="#/components/schemas/{model}")
            document["components"]["schemas"] |= {**body.pop("$defs"), "PromptsIn": body}
            for name, schema in document["components"]["schemas"].items():
                if "examples" in schema:  # from which FastAPI has left out what is null
                    schema.update(getattr(schemas, name).model_config["json_schema_extra"])
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["security"] = [{}, *operation.get("security", [])]
                    for response in operation["responses"].values():
                        content = response.get("content", {})
                        refs = {kind.get("schema", {}).get("$ref") for kind in content.values()}
                        if "#/components/schemas/Problem" in refs:
                            whole = {name: value for kind in content.values() for name, value in kind.items()}
                            response["content"] = {problems.MEDIA_TYPE: whole}
        return cast("dict[str, Any]", app.openapi_schema)

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the description
