"""A thin proxy before any gateway or model server: writes Even Odds' judgement of a chat request into the request.

    pip install ../.. starlette uvicorn          # in this folder of a checkout
    UPSTREAM=http://127.0.0.1:8801 EVENODDS_URL=http://127.0.0.1:8000 EVENODDS_RUN=served uvicorn shim:app --port 8080

A request to `/chat/completions`, `/responses` or `/messages` goes on with `x-evenodds-effort`, `x-evenodds-attempts`
and `x-evenodds-success-rate` in its headers; the reply has them too. `EVENODDS_SHIM_METADATA=on` also writes the effort
into the body, as `metadata.difficulty`; some providers refuse metadata that they do not know. Which text is judged,
`evenodds.TextRule` says (`EVENODDS_TEXT_RULE`, JSON). What a caller sends under the names that the shim writes is
removed. All else goes on as it came, byte for byte, and so does every request while Even Odds does not answer within
the deadline. Answers are passed on as they come, streams too.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from evenodds import ConfigurationError, GatewayBudget, TextRule

HOP_BY_HOP = {
    *(b"host", b"content-length", b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer"),
    *(b"transfer-encoding", b"upgrade"),
}


JUDGED = ("/chat/completions", "/responses", "/messages")
OURS = b"x-evenodds-"


def create_app(
    upstream: str,
    evenodds: str,
    run: str,
    *,
    policy: str = "default",
    deadline_ms: float = 50.0,
    text_rule: TextRule | None = None,
    writes_metadata: bool = False,
) -> Starlette:
    rule = text_rule or TextRule()
    gateway = GatewayBudget(evenodds, run=run, policy=policy, deadline_ms=deadline_ms, text_rule=rule)
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)  # the upstream's to limit
    model = httpx.AsyncClient(base_url=upstream, limits=unlimited, timeout=httpx.Timeout(10.0, read=None, pool=None))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await gateway.close()
        await model.aclose()

    async def forward(request: Request) -> Response:
        content = await request.body()
        headers = _passed(request.headers.raw)
        judged: list[tuple[bytes, bytes]] = []
        if request.method == "POST" and request.url.path.endswith(JUDGED):
            content, judged = await judge(content)
        # Not by `build_request`, which adds headers of its own, and the cookies that other callers were given.
        asked = httpx.Request(request.method, _target(model, request), content=content, headers=headers + judged)
        try:
            reply = await model.send(asked, stream=True)
        except httpx.RequestError as error:
            return Response(f"upstream {upstream}: {str(error) or type(error).__name__}", 502, media_type="text/plain")
        answer = StreamingResponse(reply.aiter_raw(), reply.status_code, background=BackgroundTask(reply.aclose))
        answer.raw_headers = _passed(reply.headers.raw) + judged
        return answer

    async def judge(content: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """The body with the judgement and without what the caller claims to be one, and the headers that go with it."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            return content, []  # whatever it is, it is the upstream's to refuse
        if not isinstance(body, dict):
            return content, []
        budget = await gateway.budget(body) if "messages" in body or "input" in body else None
        metadata = body.get("metadata") or {}
        if writes_metadata and isinstance(metadata, dict) and (budget is not None or "difficulty" in metadata):
            own = {} if budget is None else {"difficulty": budget.effort}
            body["metadata"] = {**{name: value for name, value in metadata.items() if name != "difficulty"}, **own}
            content = json.dumps(body).encode()
        if budget is None:
            return content, []
        decision = [(b"x-evenodds-decision-id", budget.decision_id.encode())] if budget.decision_id else []
        return content, [
            *decision,
            (b"x-evenodds-effort", quote(budget.effort).encode()),
            (b"x-evenodds-attempts", str(budget.attempts).encode()),
            (b"x-evenodds-success-rate", f"{budget.success_rate:.3f}".encode()),
        ]

    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    app = Starlette(routes=[Route("/{path:path}", forward, methods=methods)], lifespan=lifespan)
    app.state.gateway = gateway
    return app


def _passed(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers as they came, repeated ones too, but for those of one connection and those that only we may write."""
    named = {
        name.strip().lower() for key, value in headers if key.lower() == b"connection" for name in value.split(b",")
    }
    return [
        (name, value)
        for name, value in headers
        if name.lower() not in HOP_BY_HOP | named and not name.lower().startswith(OURS)
    ]


def _target(model: httpx.AsyncClient, request: Request) -> httpx.URL:
    """Path and query byte for byte: a decoded `/v1/models/org%2Fmodel` would be another path."""
    path = model.base_url.raw_path.rstrip(b"/") + request.scope["raw_path"].partition(b"?")[0]
    query = request.scope["query_string"]
    return model.base_url.copy_with(raw_path=path + (b"?" + query if query else b""))


def _is_on(name: str) -> bool:
    value = os.environ.get(name, "off")
    if value not in ("on", "off"):
        raise ConfigurationError(f"{name} is {value!r}: set it to 'on' or 'off', or leave it out, which is 'off'")
    return value == "on"


if "UPSTREAM" in os.environ:
    app = create_app(
        os.environ["UPSTREAM"],
        os.environ.get("EVENODDS_URL", "http://127.0.0.1:8000"),
        os.environ.get("EVENODDS_RUN", "served"),
        policy=os.environ.get("EVENODDS_POLICY", "default"),
        deadline_ms=float(os.environ.get("EVENODDS_GATEWAY_DEADLINE_MS", "50")),
        text_rule=TextRule.model_validate_json(os.environ.get("EVENODDS_TEXT_RULE", "{}")),
        writes_metadata=_is_on("EVENODDS_SHIM_METADATA"),
    )
