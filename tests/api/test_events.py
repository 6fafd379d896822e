"""Server-sent events: every change is told once, silence is filled, and listeners leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from starlette.types import Message, Receive, Scope, Send
from tests.waiting import until

from evenodds_service.api.middleware.request_body import RequestBodyLimit
from evenodds_service.api.routes import events

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import Caller
    from tests.conftest import Service

one_backend = pytest.mark.parametrize("service", ["sqlite"], indirect=True)


@contextmanager
def listening(
    service: Service, path: str, *, last: str | None = None, **query: Any
) -> Iterator[Iterator[dict[str, str]]]:
    """Blocks of a stream as their fields; a comment is the field without a name."""
    headers = {"Last-Event-ID": last} if last is not None else {}
    with service.http.stream("GET", path, headers=headers, params=query) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["x-accel-buffering"] == "no"
        assert "no-transform" in reply.headers["cache-control"]

        def blocks() -> Iterator[dict[str, str]]:
            fields: dict[str, str] = {}
            for line in reply.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.strip()
                else:
                    yield fields
                    fields = {}

        yield blocks()


def test_a_change_is_told_once_and_who_comes_back_hears_what_they_missed(caller: Caller, service: Service) -> None:
    caller.load_texts("a")
    path = f"/runs/{caller.run}/events"
    with listening(service, path) as blocks:
        assert "" in next(blocks), "something comes at once"
        first = next(blocks)
        assert first["event"] == "change"
        assert json.loads(first["data"]) == {"run": caller.run, "log_position": 1, "observations": 0}
        caller.observe(0, {"prompt_id": "a", "rewards": [1]})
        second = next(blocks)
        assert json.loads(second["data"])["observations"] == 1
        assert second["id"] != first["id"]

    with listening(service, path, last=second["id"], wait_seconds=0.1) as blocks:
        assert ["id" in block for block in blocks] == [False], "nothing was missed"
    with listening(service, path, last=first["id"], wait_seconds=0.1) as blocks:
        assert [block.get("id") for block in blocks] == [None, second["id"]]


def test_what_a_reply_shows_is_not_told_again(caller: Caller, service: Service) -> None:
    caller.load_texts("a")
    run = f"/runs/{caller.run}"

    def is_told_by(view: str, path: str) -> bool:
        shown = service.http.get(view).headers["x-evenodds-event"]
        with listening(service, path) as blocks:
            return [next(blocks).get("id"), next(blocks)["id"]] == [None, shown]

    assert is_told_by(f"{run}/prompt?prompt_id=a", f"{run}/events")
    until(lambda: is_told_by("/runs", "/events"), "how the run stands is saved behind the reply, which is an event too")


def test_all_runs_are_listened_to_together(caller: Caller, service: Service) -> None:
    with listening(service, "/events") as blocks:
        next(blocks)
        before = next(blocks)
        caller.load_texts("a")
        assert next(blocks)["id"] != before["id"]


@one_backend
def test_silence_is_filled(caller: Caller, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.01)

    with listening(service, f"/runs/{caller.run}/events") as blocks:
        told = [next(blocks) for _ in range(3)]

    assert ["event" in block for block in told] == [False, True, False]


def test_a_stream_goes_on_for_longer_than_a_body_may_take() -> None:
    """The wait for the listener's leaving is no wait for a body."""

    async def received() -> Message:
        messages: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        found: list[Message] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            found.extend([await receive(), await receive()])

        async def send(message: Message) -> None: ...

        limit = RequestBodyLimit(app, max_bytes=10, max_bytes_together=10, grace_seconds=0.01)
        await limit({"type": "http", "headers": []}, receive, send)
        return found[-1]

    assert asyncio.run(received()) == {"type": "http.disconnect"}


@one_backend
def test_an_unknown_run_has_no_events(caller: Caller) -> None:
    assert caller.refused("GET", "/runs/nowhere/events").code == "run_unknown"


def test_streams_end_with_the_service(start_service: Callable[..., Service], database_url: str) -> None:
    """It does not wait for those who listen."""
    service = start_service(database_url)
    service.client.put_run("a", embedder="none")

    with listening(service, "/runs/a/events") as blocks:
        next(blocks)
        began = time.monotonic()
        service.stop()
        assert all("data" in block for block in blocks)
    assert time.monotonic() - began < 4.5, "after its next look, and not when it is given up after 5 s"


@one_backend
def test_a_stream_is_counted_at_its_end_and_in_no_latency(caller: Caller, service: Service) -> None:
    def counted(name: str) -> float:
        """Over all statuses."""
        pattern = rf'^{name}{{.*route="/runs/{{run}}/events".*}} (.*)$'
        return sum(map(float, re.findall(pattern, service.http.get("/metrics").text, re.M)))

    requests, latencies = counted("evenodds_requests_total"), counted("evenodds_request_seconds_count")
    with listening(service, f"/runs/{caller.run}/events") as blocks:
        next(blocks)

    until(lambda: counted("evenodds_requests_total") != requests, "the end of the stream")
    assert counted("evenodds_request_seconds_count") == latencies
