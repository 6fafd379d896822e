"""What operators and orchestrators ask: is it alive, can it answer, how is it doing."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from evenodds.schemas import Health
from evenodds_service.api.dependencies import REFUSED, UNEXPECTED, Dependencies
from evenodds_service.errors import StoreError

_READY_SECONDS = 5
_METRICS_SECONDS = 3

router = APIRouter(responses=UNEXPECTED, tags=["operations"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Health:
    """Answers as long as the process runs."""
    return Health(status="ok")


@router.get("/readyz", summary="Can the service answer?", response_model=Health, responses={503: {"model": Health}})
async def readyz(services: Dependencies) -> JSONResponse:
    """200 if the database answers and keeps what is written to it; otherwise 503 with the reasons."""
    # In the event loop's own threads: the answer does not wait behind requests that wait for the database.
    probe = asyncio.to_thread(services.store.probe)
    try:
        await asyncio.wait_for(probe, _READY_SECONDS)
    except StoreError as error:
        return _unavailable(str(error))
    except asyncio.TimeoutError:
        return _unavailable(
            f"the database has not answered for {_READY_SECONDS} seconds: is it overloaded, or cut off?"
        )
    return JSONResponse(Health(status="ok").model_dump(mode="json"))


def _unavailable(reason: str) -> JSONResponse:
    return JSONResponse(Health(status="unavailable", reasons=(reason,)).model_dump(mode="json"), 503)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"example": 'evenodds_run_observations{run="math-7b"} 512.0\n'}}},
        **REFUSED,
    },
)
async def metrics(services: Dependencies) -> Response:
    """Requests and latencies of this process, and how every run stands, in the Prometheus text format.

    If the database does not answer, the runs are left out.
    """
    of_runs = asyncio.to_thread(generate_latest, services.run_registry)
    try:
        runs = await asyncio.wait_for(of_runs, _METRICS_SECONDS)
    except asyncio.TimeoutError:
        runs = b""
    return Response(generate_latest(services.registry) + runs, media_type=CONTENT_TYPE_LATEST)
