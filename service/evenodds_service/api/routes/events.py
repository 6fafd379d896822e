"""Server-sent events: that something has changed, for pages and dashboards that show it.

A stream says at once where things stand, then each change, and a heartbeat where nothing changes, so that no proxy
takes it for dead. Whoever comes back with `Last-Event-ID` hears only of what they have missed. All who listen to one
thing share one look at the database a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from evenodds_service.api.dependencies import PROBLEMS, Dependencies, RunPath
from evenodds_service.api.middleware.access import Caller
from evenodds_service.errors import Overloaded, RunForbidden, ServiceError
from evenodds_service.runtime.changes import LOOK_SECONDS, Changes

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
MOST_LISTENERS = 500
"""Streams of one process at a time."""

_LONGEST_SECONDS = 3_600
_EXAMPLE = 'id: 7.41.0\nevent: change\ndata: {"run": "math-7b", "log_position": 41, "observations": 512}\n\n'
_HEADERS = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
"""nginx and others keep back what they may buffer."""


class EventStream(StreamingResponse):
    media_type = "text/event-stream"


router = APIRouter(responses=PROBLEMS, tags=["runs"])
LastEvent = Annotated[str, Header(alias="Last-Event-ID", max_length=256, description="id of the last event heard")]
WaitSeconds = Annotated[
    float, Query(ge=0, le=_LONGEST_SECONDS, description="end the stream after so long; an hour at most")
]
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events", "content": {EventStream.media_type: {"example": _EXAMPLE}}}
}


@router.get("/events", summary="Changes of any run, as they happen", response_class=EventStream, responses=_STREAM)
async def all_events(
    request: Request,
    services: Dependencies,
    caller: Caller,
    last_event_id: LastEvent = "",
    wait_seconds: WaitSeconds = _LONGEST_SECONDS,
) -> EventStream:
    """Server-sent events, one whenever any run has changed. A key that is bound to certain runs may listen to those."""
    if caller is not None and caller.runs != "*":
        raise RunForbidden(
            f"key {caller.name!r} is bound to runs {caller.runs!r}, and this stream tells of all runs: listen to "
            f"/runs/{{run}}/events"
        )
    return await _listening(request, services.changes, None, last_event_id, wait_seconds)


@router.get(
    "/runs/{run}/events", summary="Changes of a run, as they happen", response_class=EventStream, responses=_STREAM
)
async def run_events(
    run: RunPath,
    request: Request,
    services: Dependencies,
    last_event_id: LastEvent = "",
    wait_seconds: WaitSeconds = _LONGEST_SECONDS,
) -> EventStream:
    """Server-sent events, one whenever the run has changed; a comment every 15 seconds where nothing does."""
    return await _listening(request, services.changes, run, last_event_id, wait_seconds)


async def _listening(
    request: Request, changes: Changes, run: str | None, last: str, wait_seconds: float
) -> EventStream:
    await changes.newest(run)  # what is wrong is told before the stream begins
    if changes.n_listeners >= MOST_LISTENERS:
        raise Overloaded(
            f"{changes.n_listeners} streams of events are open, the limit is {MOST_LISTENERS}: ask again later"
        )
    is_ending: Callable[[], bool] = getattr(request.app.state, "is_ending", lambda: False)
    until = time.monotonic() + wait_seconds
    return EventStream(_events(changes, run, last, lambda: is_ending() or time.monotonic() >= until), headers=_HEADERS)


async def _events(changes: Changes, run: str | None, last: str, is_over: Callable[[], bool]) -> AsyncIterator[str]:
    """The stream, until it is over, the listener leaves, or the run or the database is gone."""
    changes.n_listeners += 1
    try:
        yield ": events follow\n\n"  # something at once, which shows that nothing holds the stream back
        silent_since = time.monotonic()
        while not is_over():
            event_id, data = await changes.newest(run)
            if event_id != last:
                yield f"id: {event_id}\nevent: change\ndata: {data}\n\n"
                last, silent_since = event_id, time.monotonic()
            elif time.monotonic() - silent_since >= HEARTBEAT_SECONDS:
                yield ": nothing has changed\n\n"
                silent_since = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)
    except ServiceError as error:  # whoever comes back is told by a status
        logger.info("a stream of events ends: %s", error)
    finally:
        changes.forget(run)
