from __future__ import annotations

import asyncio
import threading

import httpx
from anyio.to_thread import current_default_thread_limiter
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tests.waiting import PATIENCE_SECONDS

from evenodds import Problem
from evenodds_service.api.middleware.load_shedding import LoadShedding


def test_who_would_be_last_in_a_long_line_for_a_thread_is_sent_away_at_once() -> None:
    go_on = threading.Event()

    async def work(_: Request) -> Response:
        await run_in_threadpool(go_on.wait, PATIENCE_SECONDS)
        return Response("done")

    async def alive(_: Request) -> Response:
        return Response("alive")

    app = LoadShedding(Starlette(routes=[Route("/work", work), Route("/healthz", alive)]), max_waiting=3)

    async def crowd() -> tuple[list[httpx.Response], httpx.Response, httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
            n = int(current_default_thread_limiter().total_tokens) + 3
            tasks = [asyncio.create_task(http.get("/work")) for _ in range(n)]
            while current_default_thread_limiter().statistics().tasks_waiting < 3:  # noqa: ASYNC110  (a thread's business)
                await asyncio.sleep(0)
            late, health = await http.get("/work"), await http.get("/healthz")
            go_on.set()
            return list(await asyncio.gather(*tasks)), late, health, await http.get("/work")

    served, late, health, later = asyncio.run(crowd())

    assert {reply.text for reply in served} == {"done"}
    problem = Problem.model_validate_json(late.content)
    assert (late.status_code, problem.code, late.headers["retry-after"]) == (503, "overloaded", "1")
    assert problem.detail == "3 requests wait for their turn, the limit is 3: repeat the call later"
    assert (health.text, later.text) == ("alive", "done")
