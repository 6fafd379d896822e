"""A conversation with a scripted service, held by the blocking and by the asynchronous client alike."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

import httpx
import pytest

from evenodds import AsyncClient, Client

RUN: dict[str, object] = {
    "run": "math-7b",
    "predictor": "gps",
    "group_size": 8,
    "target_rate": None,
    "embedder": "builtin",
    "embedder_prompt": None,
    "acquisition": "yield",
    "optimism": 0.5,
    "diversity": 0.1,
    "cooldown_steps": None,
    "max_visits": 0,
    "keep_text": True,
    "model_size": "small",
    "refit": {"every_observations": 2048, "every_seconds": 600},
    "last_refit": None,
    "pool_size": 3,
    "log_position": 1,
    "head_step": None,
    "model_version": 0,
    "observations": 0,
    "created_at": "2026-01-02T03:04:05Z",
}


@dataclass
class Conversation:
    """Replies in the order given; keeps what was asked and how long the client waited."""

    asynchronous: bool
    replies: list[httpx.Response | Exception] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=lambda: {"random": Random(0)})
    base_url: str = "http://service:8000"
    over_the_wire: bool = False
    run: dict[str, object] = field(default_factory=lambda: dict(RUN))

    def replies_with(self, body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.replies.append(httpx.Response(status, json=body, headers=headers))

    def replies_with_run(self, **changes: object) -> None:
        self.replies_with({**self.run, **changes})

    def refuses(
        self, status: int, code: str, detail: str, *, headers: dict[str, str] | None = None, **more: object
    ) -> None:
        body = {"title": code, "status": status, "detail": detail, "code": code, **more}
        self.replies_with(body, status=status, headers=headers)

    def fails(self, error: Exception) -> None:
        self.replies.append(error)

    def call(self, name: str, *args: object, **kwargs: object) -> Any:
        """The result of one method of a fresh client; a list where the method iterates."""
        return asyncio.run(self._await(name, args, kwargs)) if self.asynchronous else self._block(name, args, kwargs)

    def body(self, index: int = -1) -> Any:
        return json.loads(self.content(index))

    def content(self, index: int = -1) -> bytes:
        """The body of a request, unpacked."""
        request = self.requests[index]
        return gzip.decompress(request.content) if "content-encoding" in request.headers else request.content

    def _block(self, name: str, args: Sequence[object], kwargs: dict[str, object]) -> Any:
        with Client(self.base_url, transport=self._transport(), sleep=self.waits.append, **self.options) as client:
            result = getattr(client, name)(*args, **kwargs)
            return list(result) if isinstance(result, Iterator) else result

    async def _await(self, name: str, args: Sequence[object], kwargs: dict[str, object]) -> Any:
        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)

        async with AsyncClient(self.base_url, transport=self._transport(), sleep=sleep, **self.options) as client:
            result = getattr(client, name)(*args, **kwargs)
            return [item async for item in result] if hasattr(result, "__aiter__") else await result

    def _transport(self) -> Any:
        return None if self.over_the_wire else httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


@pytest.fixture(params=["Client", "AsyncClient"])
def talk(request: pytest.FixtureRequest) -> Conversation:
    return Conversation(asynchronous=request.param == "AsyncClient")


@dataclass
class LoopbackServer:
    """A real HTTP server on loopback: it answers each request with `body`, or does what `behave` says."""

    port: int
    targets: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    body: dict[str, object] = field(default_factory=lambda: RUN)
    behave: Callable[[BaseHTTPRequestHandler], None] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        content = json.dumps(self.body).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        self.released.wait()

    def hang_up(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            loopback.targets.append(self.path)
            (loopback.behave or loopback.answer)(self)

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        loopback = LoopbackServer(port=http_server.server_address[1])
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield loopback
        loopback.released.set()
        http_server.shutdown()
        thread.join()
