"""A thin proxy before any gateway or model server: writes Even Odds' judgement of a chat request into the request.

    pip install ../.. starlette uvicorn          # in this folder of a checkout
    UPSTREAM=http://127.0.0.1:8801 EVENODDS_URL=http://127.0.0.1:8000 EVENODDS_RUN=served uvicorn shim:app --port 8080

A chat request goes on with `metadata.difficulty` in its body and `x-evenodds-effort`, `x-evenodds-attempts` and
`x-evenodds-success-rate` in its headers. All else goes on as it came, and so does every request while Even Odds does
not answer within the deadline. Answers are passed on as they come, streams too.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from evenodds import GatewayBudget

HOP_BY_HOP = {"host", "content-length", "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


def create_app(
    upstream: str, evenodds: str, run: str, *, policy: str = "default", deadline_ms: float = 50.0
) -> Starlette:
    gateway = GatewayBudget(evenodds, run=run, policy=policy, deadline_ms=deadline_ms)
    model = httpx.AsyncClient(base_url=upstream, timeout=httpx.Timeout(10.0, read=None))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await gateway.close()
        await model.aclose()

    async def forward(request: Request) -> Response:
        content = await request.body()
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_BY_HOP]
        if request.method == "POST" and request.url.path.endswith("/chat/completions"):
            content, judged = await judge(content)
            headers += judged
        asked = model.build_request(
            request.method, request.url.path, params=request.query_params, content=content, headers=headers
        )
        try:
            reply = await model.send(asked, stream=True)
        except httpx.RequestError as error:
            return Response(f"upstream {upstream}: {error or type(error).__name__}", 502, media_type="text/plain")
        passed = {name: value for name, value in reply.headers.items() if name not in HOP_BY_HOP}
        return StreamingResponse(reply.aiter_raw(), reply.status_code, passed, background=BackgroundTask(reply.aclose))

    async def judge(content: bytes) -> tuple[bytes, list[tuple[str, str]]]:
        try:
            body = json.loads(content)
            texts = [message["content"] for message in body["messages"] if message["role"] == "user"]
            text = texts[-1] if isinstance(texts[-1], str) else "\n".join(part.get("text", "") for part in texts[-1])
        except (ValueError, LookupError, TypeError, AttributeError):
            return content, []  # whatever it is, it is the upstream's to refuse
        budget = await gateway.budget(text)
        if budget is None:
            return content, []
        body["metadata"] = {"difficulty": budget.effort, **(body.get("metadata") or {})}
        return json.dumps(body).encode(), [
            ("x-evenodds-effort", budget.effort),
            ("x-evenodds-attempts", str(budget.attempts)),
            ("x-evenodds-success-rate", f"{budget.success_rate:.3f}"),
        ]

    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    app = Starlette(routes=[Route("/{path:path}", forward, methods=methods)], lifespan=lifespan)
    app.state.gateway = gateway
    return app


if "UPSTREAM" in os.environ:
    app = create_app(
        os.environ["UPSTREAM"],
        os.environ.get("EVENODDS_URL", "http://127.0.0.1:8000"),
        os.environ.get("EVENODDS_RUN", "served"),
        policy=os.environ.get("EVENODDS_POLICY", "default"),
        deadline_ms=float(os.environ.get("EVENODDS_GATEWAY_DEADLINE_MS", "50")),
    )
