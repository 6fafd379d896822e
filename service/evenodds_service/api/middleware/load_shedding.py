"""Sends requests away while too many wait for a thread: an early 503 can be repeated, a late one has timed out."""

from __future__ import annotations

from anyio.to_thread import current_default_thread_limiter
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from evenodds_service.api.problems import refusal
from evenodds_service.errors import Overloaded

MAX_WAITING = 120
"""Three times the threads: with a database that hangs, the last in line still hears so within seconds."""

_ALWAYS_ANSWERED = frozenset({"/healthz", "/readyz", "/metrics", "/budget", "/v1/chat/completions"})
"""They take none of these threads; budgets wait in a queue of their own."""


class LoadShedding:
    """Middleware in front of routes that run in threads."""

    def __init__(self, app: ASGIApp, *, max_waiting: int = MAX_WAITING) -> None:
        self._app = app
        self._max_waiting = max_waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _ALWAYS_ANSWERED:
            n_waiting = current_default_thread_limiter().statistics().tasks_waiting
            if n_waiting >= self._max_waiting:
                error = Overloaded(
                    f"{n_waiting} requests wait for their turn, the limit is {self._max_waiting}: repeat the call later"
                )
                await refusal(Request(scope), error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
