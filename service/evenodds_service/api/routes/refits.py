"""Refits as resources: ask for one, wait for it, see how they went."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from evenodds.schemas import RefitList, RefitRequest, RefitState
from evenodds_service.api.dependencies import PROBLEMS, Dependencies, RunPath
from evenodds_service.api.wire import now
from evenodds_service.domain.refits import is_due, is_open
from evenodds_service.storage.store import Refit

_POLL_SECONDS = 0.1

router = APIRouter(responses=PROBLEMS, tags=["runs"])


@router.post("/runs/{run}/refit", summary="Fit the shared model anew")
async def refit(run: RunPath, body: RefitRequest, services: Dependencies) -> RefitState:
    """Ask for a refit; a run has at most one that is open, which is returned. A worker (`evenodds work`) does it.

    With `wait_seconds`, the reply comes when the refit has ended. If the time is up before, it shows the refit as it
    stands.
    """
    stored = await run_in_threadpool(services.store.run, run)
    asked = await run_in_threadpool(lambda: services.store.request_refit(stored.id, now=now()))
    deadline = time.monotonic() + body.wait_seconds
    while is_open(asked) and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
        asked = await run_in_threadpool(services.store.refit, asked.id)
    return refit_state(asked)


@router.get("/runs/{run}/refits", summary="Refits of a run")
def list_refits(run: RunPath, services: Dependencies) -> RefitList:
    """The newest refits with what came of them."""
    stored = services.store.run(run)
    refits = services.store.refits(stored.id, limit=100)
    return RefitList(refits=tuple(refit_state(refit) for refit in refits), is_due=is_due(stored, refits, now=now()))


def refit_state(refit: Refit) -> RefitState:
    """In the words of the wire."""
    report = {name: value for name, value in (refit.report or {}).items() if isinstance(value, (int, float))}
    return RefitState(
        refit_id=refit.id,
        status=refit.status,
        worker=refit.worker,
        attempts=refit.attempts,
        requested_at=refit.requested_at,
        finished_at=refit.finished_at,
        model_version=refit.model_version,
        report=report if refit.report is not None else None,
        error=refit.error,
    )
