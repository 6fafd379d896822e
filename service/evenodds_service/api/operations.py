"""What operators and orchestrators ask: is it alive, can it answer, how is it doing."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from evenodds.schemas import Health
from evenodds_service.api.services import Hands
from evenodds_service.storage.errors import StoreError

router = APIRouter(tags=["operations"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok")


@router.get("/readyz", summary="Can the service answer?", responses={503: {"model": Health}})
def readyz(hands: Hands) -> JSONResponse:
    """200 where the database answers, else 503 with the reasons."""
    try:
        hands.store.ping()
    except StoreError as error:
        return JSONResponse(Health(status="unavailable", reasons=(str(error),)).model_dump(mode="json"), 503)
    return JSONResponse(Health(status="ok").model_dump(mode="json"))


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(hands: Hands) -> Response:
    """Requests, latencies and the runs that this process serves, in the Prometheus text format."""
    return Response(generate_latest(hands.registry), media_type=CONTENT_TYPE_LATEST)
