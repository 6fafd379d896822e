"""Bodies that do not end, in small pieces or in large numbers: they take neither the memory nor the time of others."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send
from tests.api.test_request_body import JSON, NDJSON, PACKED, in_pieces
from tests.waiting import PATIENCE_SECONDS, until

from evenodds_service.api.middleware.request_body import RequestBodyLimit

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service


def unfinished(service: Service, n: int, content: bytes, headers: dict[str, str]) -> list[socket.socket]:
    """Connections that have sent this much of a body and are silent now."""
    address = urlsplit(service.base_url)
    head = "POST /runs/math/prompts HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    connections = []
    for _ in range(n):
        connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=PATIENCE_SECONDS)
        connection.sendall(head.encode() + b"%x\r\n" % len(content) + content + b"\r\n")
        connection.setblocking(False)
        connections.append(connection)
    return connections


def test_unfinished_bodies_take_no_more_than_their_budget(
    start_service: Callable[..., Service], tmp_path: Path
) -> None:
    """As packed bodies whose end never comes: a megabyte of them would unpack to 48."""
    small = start_service(f"sqlite:///{tmp_path}/evenodds.db", max_body_mb=5, max_bodies_mb=10)
    small.client.put_run("math", embedder="none")
    content = gzip.compress(b"".join(os.urandom(1_000) * 100 for _ in range(40)))[:-12]
    assert len(content) < 150_000
    tracemalloc.start()

    held = unfinished(small, 12, content, {**JSON, **PACKED})

    replies = [b""] * len(held)

    def are_refused() -> bool:
        for i, connection in enumerate(held):
            with contextlib.suppress(BlockingIOError):
                replies[i] += connection.recv(65_536)
        return sum(b"overloaded" in reply for reply in replies) == 10

    until(are_refused, "503 for all but two")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(b" 503 " in reply and b"retry-after: 1" in reply.lower() for reply in replies) == 10
    assert most < 40_000_000
    assert small.http.get("/healthz").status_code == 200
    for connection in held:
        connection.close()
    body = {"prompts": [{"prompt_id": f"p{i}", "text": "x" * 100_000} for i in range(45)]}
    until(lambda: small.http.post("/runs/math/prompts", json=body).status_code == 200, "room for the next")


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
@pytest.mark.parametrize("media_type", [JSON, NDJSON], ids=["JSON", "NDJSON"])
def test_who_leaves_in_the_middle_of_a_body_is_no_fault_of_the_service(
    caller: Caller, service: Service, media_type: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def told(status: int) -> float:
        metrics = caller.http.get("/metrics").text
        pattern = rf'^evenodds_requests_total{{.*route="/runs/{{run}}/prompts",status="{status}"}} (.*)'
        return sum(map(float, re.findall(pattern, metrics, re.MULTILINE)))

    caller.client.put_run("math", embedder="none")
    before = told(400), told(500)
    for connection in unfinished(service, 2, b'{"prompts": [', media_type):
        connection.close()

    until(lambda: told(400) == before[0] + 2, "both to be told")
    assert told(500) == before[1]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_ndjson_holds_its_blocks_and_no_more(start_service: Callable[..., Service], tmp_path: Path) -> None:
    small = start_service(f"sqlite:///{tmp_path}/evenodds.db", max_body_mb=1, max_bodies_mb=25)
    small.client.put_run("math", embedder="none")
    lines = (json.dumps({"prompt_id": f"p{i}", "text": "x" * 20_000}).encode() + b"\n" for i in range(3_000))

    reply = small.http.post("/runs/math/prompts", content=lines, headers=NDJSON)

    assert (reply.status_code, reply.json()["added"]) == (200, 3_000)


def arrived(chunks: list[bytes | None], **limits: Any) -> list[bytes]:
    """What a route gets of a body whose chunks come like this, None where nothing more comes; "." is the last."""

    async def read() -> list[bytes]:
        left = iter(chunks)
        got: list[bytes] = []

        async def receive() -> Message:
            chunk = next(left)
            if chunk is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": chunk, "more_body": chunk != b"."}

        async def app(_: Scope, receive: Receive, __: Send) -> None:
            is_whole = False
            while not is_whole:
                message = await receive()
                got.append(message["body"])
                is_whole = not message["more_body"]

        async def send(_: Message) -> None:
            raise AssertionError

        middleware = RequestBodyLimit(app, **{"max_bytes": 10**9, "max_bytes_together": 10**9, **limits})
        await middleware({"type": "http", "headers": []}, receive, send)
        return got

    return asyncio.run(read())


def test_a_body_that_does_not_get_on_is_given_up() -> None:
    with pytest.raises(HTTPException) as caught:
        arrived([b"{", b'"', None], grace_seconds=0.05)

    assert caught.value.status_code == 408


def test_many_small_pieces_are_put_together() -> None:
    got = arrived([*([b"x"] * 100_000), b"."])

    assert b"".join(got) == b"x" * 100_000 + b"."
    assert len(got) == 7


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
def test_a_long_line_in_small_pieces_costs_no_more_than_in_large_ones(caller: Caller) -> None:
    """Joined anew with each piece, its seven million bytes were copied thousands of times."""
    line = json.dumps({"prompt_id": "a", "text": "x" * 199_000}).encode()
    line = line[:-1] + b" " * 7_000_000 + b"}\n"
    started = time.process_time()

    added = caller.ok("POST", f"/runs/{caller.run}/prompts", content=in_pieces(line, 2_000), headers=NDJSON)

    assert added["added"] == 1
    assert time.process_time() - started < 20
