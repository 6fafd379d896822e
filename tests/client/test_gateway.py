"""A gateway keeps its own deadline and its own requests, whatever the service does."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.waiting import PATIENCE_SECONDS, until_awaited

from evenodds import BudgetReply, ConfigurationError, GatewayBudget
from evenodds.gateway import FAULTS_TO_OPEN

if TYPE_CHECKING:
    from tests.conftest import Service

REPLY = {
    "run": "r",
    "policy": "default",
    "policy_version": 0,
    "mode": "parallel",
    "attempts": 4,
    "go_on": True,
    "effort": "medium",
    "max_tokens_scale": 1.0,
    "success_rate": 0.5,
    "std": 0.2,
    "solve_probability": 0.9,
    "price": 0.05,
    "attempts_seen": 0,
    "model_version": 0,
    "log_position": 3,
    "age_ms": 1.5,
}
OBSERVED = {"run": "r", "log_position": 7, "accepted": 2, "model_version": 0, "replayed": False}


@dataclass
class Script:
    """A service that answers as told, and the time that the gateway believes it is."""

    answer: Callable[[httpx.Request], Awaitable[httpx.Response]] | None = None
    now: float = 0.0
    requests: list[httpx.Request] = field(default_factory=list)

    def gateway(self, **options: Any) -> GatewayBudget:
        async def handle(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            if self.answer is not None:
                return await self.answer(request)
            return httpx.Response(200, json=REPLY if request.url.path == "/budget" else OBSERVED)

        options = {"deadline_ms": 60_000, **options}  # few tests are about the deadline
        return GatewayBudget(run="r", transport=httpx.MockTransport(handle), clock=lambda: self.now, **options)

    def bodies(self, path: str) -> list[Any]:
        return [json.loads(request.content) for request in self.requests if request.url.path == path]


async def broken(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


async def hanging(request: httpx.Request) -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.fixture
def script() -> Script:
    return Script()


def test_a_request_gets_its_budget(script: Script) -> None:
    async def ask() -> BudgetReply | None:
        async with script.gateway(policy="cheap", deadline_ms=30_000) as gateway:
            reply = await gateway.budget("What is 1 + 1?", failures=2)
            assert gateway.counts.answered == 1
            return reply

    reply = asyncio.run(ask())

    assert reply is not None
    assert (reply.attempts, reply.effort) == (4, "medium")
    (body,) = script.bodies("/budget")
    assert body == {
        "run": "r",
        "prompt": {"text": "What is 1 + 1?"},
        "policy": "cheap",
        "failures": 2,
        "deadline_ms": 30_000,
    }


def test_a_service_that_hangs_costs_the_deadline_and_no_more(script: Script) -> None:
    script.answer = hanging

    async def ask() -> None:
        async with script.gateway(deadline_ms=30) as gateway:
            assert await asyncio.wait_for(gateway.budget("a"), PATIENCE_SECONDS) is None
            assert gateway.counts.late == 1

    asyncio.run(ask())


def test_after_faults_in_a_row_nobody_waits_and_one_tries_now_and_then(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.answer = broken

    async def ask() -> None:
        async with script.gateway(open_seconds=5) as gateway:
            for _ in range(FAULTS_TO_OPEN + 10):
                assert await gateway.budget("a") is None
            assert gateway.is_open
            assert (gateway.counts.failed, gateway.counts.skipped) == (FAULTS_TO_OPEN, 10)

            script.now = 5.1
            assert [await gateway.budget("a") for _ in range(3)] == [None] * 3
            assert (gateway.counts.failed, gateway.counts.skipped) == (FAULTS_TO_OPEN + 1, 12)

            script.now, script.answer = 10.3, None
            assert await gateway.budget("a") is not None
            assert not gateway.is_open
            assert await gateway.budget("a") is not None

    with caplog.at_level(logging.WARNING):
        asyncio.run(ask())

    assert len(script.requests) == FAULTS_TO_OPEN + 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("5 requests in a row got no budget (POST /budget: service unreachable after 1 attempt")
    assert said[1] == "budgets are answered again"


def test_a_success_in_between_keeps_the_circuit_closed(script: Script) -> None:
    async def ask() -> None:
        async with script.gateway() as gateway:
            for _ in range(4):
                script.answer = broken
                for _ in range(FAULTS_TO_OPEN - 1):
                    await gateway.budget("a")
                script.answer = None
                assert await gateway.budget("a") is not None

    asyncio.run(ask())


def test_a_faulty_request_is_no_fault_of_the_service(script: Script) -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(422, json={"title": "x", "status": 422, "detail": "bad", "code": "malformed"})

    async def ask() -> None:
        async with script.gateway() as gateway:
            for _ in range(FAULTS_TO_OPEN):
                assert await gateway.budget("") is None  # not sent: an empty text
            script.answer = refuse
            for _ in range(FAULTS_TO_OPEN):
                assert await gateway.budget("a") is None
            script.answer = None
            assert await gateway.budget("a") is not None

    asyncio.run(ask())
    assert len(script.requests) == FAULTS_TO_OPEN + 1


def test_outcomes_are_sent_together_by_step_and_once(script: Script) -> None:
    async def report() -> None:
        async with script.gateway() as gateway:
            gateway.report("a", [1, 0], step=3)
            gateway.report({"prompt_id": "p", "text": "b", "category": "g"}, [0.5], step=3)
            gateway.report("c", [], step=3)
            gateway.report("d", [1], step=4)
        assert (gateway.counts.reported, gateway.counts.dropped) == (3, 0)

    asyncio.run(report())

    first, second = script.bodies("/observe")
    assert (first["step"], second["step"]) == (3, 4)
    assert first["observations"] == [
        {"text": "a", "rewards": [1.0, 0.0]},
        {"prompt_id": "p", "text": "b", "category": "g", "rewards": [0.5]},
    ]
    assert second["observations"] == [{"text": "d", "rewards": [1.0]}]


def test_outcomes_wait_for_a_service_that_is_down_and_keep_their_id(script: Script) -> None:
    script.answer = broken

    async def report() -> None:
        async with script.gateway() as gateway:
            gateway.report("a", [1], step=0)
            await until_awaited(lambda: script.requests, "a delivery that fails")
            script.answer = None
            await until_awaited(lambda: gateway.counts.reported > 0, "the delivery")

    asyncio.run(report())

    assert len({body["request_id"] for body in script.bodies("/observe")}) == 1
    assert len(script.bodies("/observe")) > 1


def test_outcomes_that_cannot_be_delivered_are_bounded_and_counted(script: Script) -> None:
    script.answer = hanging

    async def report() -> None:
        gateway = script.gateway(buffer=3)
        for i in range(5):
            gateway.report(f"text {i}", [1], step=0)
        gateway.report("too good", [2.0], step=0)
        assert gateway.counts.dropped == 3
        await gateway.close(seconds=0.05)
        assert gateway.counts.dropped == 6

    asyncio.run(report())


def test_what_a_closed_gateway_did_not_deliver_is_counted_as_dropped(script: Script) -> None:
    script.answer = broken

    async def report() -> None:
        gateway = script.gateway()
        for i in range(100):
            gateway.report(f"text {i}", [1], step=i // 50)
        await until_awaited(lambda: script.requests, "a delivery that fails")
        await gateway.close(seconds=0.05)
        assert (gateway.counts.reported, gateway.counts.dropped) == (0, 100)
        gateway.report("too late", [1], step=1)
        gateway.report("nothing to report", [], step=1)
        assert gateway.counts.dropped == 101

    asyncio.run(report())


def test_outcomes_that_are_too_much_for_one_call_arrive_in_parts_beside_a_full_buffer(script: Script) -> None:
    async def report() -> None:
        is_full = asyncio.Event()

        async def take_one(request: httpx.Request) -> httpx.Response:
            await is_full.wait()
            if len(json.loads(request.content)["observations"]) == 1:
                return httpx.Response(200, json=OBSERVED)
            return httpx.Response(413, json={"title": "x", "status": 413, "detail": "too much", "code": "too_large"})

        script.answer = take_one
        async with script.gateway(buffer=4) as gateway:
            for i in range(4):
                gateway.report(f"first {i}", [1], step=0)
            await until_awaited(lambda: script.requests, "the first call")
            for i in range(4):
                gateway.report(f"second {i}", [1], step=0)
            is_full.set()
        assert (gateway.counts.reported, gateway.counts.dropped) == (8, 0)

    asyncio.run(report())
    arrived = [body["observations"][0]["text"] for body in script.bodies("/observe") if len(body["observations"]) == 1]
    assert arrived == [f"{batch} {i}" for batch in ("first", "second") for i in range(4)]


def test_outcomes_that_are_refused_are_given_up_and_said(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json={"title": "x", "status": 404, "detail": "no run", "code": "run_unknown"})

    script.answer = refuse

    async def report() -> None:
        async with script.gateway() as gateway:
            for text in ("a", "b", "c"):
                gateway.report(text, [1], step=0)
        assert gateway.counts.dropped == 3

    asyncio.run(report())
    assert "the service refused 3 outcomes, and they are dropped: POST /observe: 404 run_unknown: no run" in caplog.text
    assert len(script.requests) == 1  # no outcome alone is the reason


def test_a_request_that_follows_what_only_the_provider_has_is_neither_asked_about_nor_reported(script: Script) -> None:
    kept = {"previous_response_id": "resp_1"}
    question = "Prove that 2 is the only even prime number."

    async def ask() -> None:
        async with script.gateway() as gateway:
            assert await gateway.budget({"input": "yes, go on", **kept}) is None
            gateway.report({"input": "yes, go on", **kept}, [1.0], step=1)
            assert await gateway.budget({"input": question, **kept}) is not None
            gateway.report({"input": question, **kept}, [1.0], step=1)
        assert (gateway.counts.without_text, gateway.counts.reported, gateway.counts.dropped) == (1, 1, 0)

    asyncio.run(ask())

    assert [body["prompt"] for body in script.bodies("/budget")] == [{"text": question}]
    assert [body["observations"] for body in script.bodies("/observe")] == [[{"text": question, "rewards": [1.0]}]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline_ms": 0}, "deadline_ms 0 must be finite and above 0"),
        ({"open_seconds": float("nan")}, "open_seconds nan must be finite and above 0"),
        ({"buffer": 0}, "buffer 0 must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GatewayBudget(run="r", **options)


@pytest.fixture
def sqlite_service(start_service: Callable[[str], Service], tmp_path_factory: pytest.TempPathFactory) -> Service:
    return start_service(f"sqlite:///{tmp_path_factory.mktemp('gateway')}/evenodds.db")


def test_against_the_real_service_until_it_is_stopped(sqlite_service: Service) -> None:
    """A served model: requests by text, outcomes back, what was reported is believed; then the service dies."""
    sqlite_service.client.put_run("served", predictor="mopps", embedder="none")
    sqlite_service.client.put_budget_policy("served", mode="sequential", price=0.15)

    async def serve() -> None:
        async with GatewayBudget(sqlite_service.base_url, run="served", deadline_ms=60_000) as gateway:
            first = await gateway.budget("What is new?")
            assert first is not None
            assert (first.attempts, first.attempts_seen) == (5, 0)
            gateway.report("What is new?", [0, 0, 0, 0], step=1)
            await until_awaited(lambda: gateway.counts.reported > 0, "the delivery")
            reply = await gateway.budget("What is new?")
            ends = time.monotonic() + PATIENCE_SECONDS
            while reply is not None and reply.attempts_seen == 0:  # the view may be 200 ms old
                assert time.monotonic() < ends
                reply = await gateway.budget("What is new?")
            assert reply is not None
            assert (reply.attempts, reply.attempts_seen, reply.effort) == (1, 4, "high")

            await asyncio.to_thread(sqlite_service.stop)
            assert [await gateway.budget("What is new?") for _ in range(20)] == [None] * 20
            assert gateway.is_open
            assert gateway.counts.skipped == 20 - FAULTS_TO_OPEN

    asyncio.run(serve())


def test_an_outcome_that_is_refused_for_good_costs_no_other(
    sqlite_service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    sqlite_service.client.put_run("served", predictor="mopps", embedder="none")

    async def report() -> None:
        async with GatewayBudget(sqlite_service.base_url, run="served") as gateway:
            for i in range(601):
                gateway.report({"prompt_id": "gone"} if i == 400 else f"What is {i} + 1?", [1.0], step=1)
            await until_awaited(lambda: gateway.counts.reported + gateway.counts.dropped == 601, "all outcomes")
            assert (gateway.counts.reported, gateway.counts.dropped) == (600, 1)

    asyncio.run(report())

    assert sqlite_service.client.run("served").observations == 600
    (said,) = [record.getMessage() for record in caplog.records if record.name == "evenodds.gateway"]
    assert said.startswith("the service refused the outcome of prompt 'gone', and it is dropped: POST /observe: 404")


def test_a_conversation_is_judged_and_reported_by_the_same_text(script: Script) -> None:
    turns = [
        {"role": "user", "content": "<system-reminder>Be short.</system-reminder>Prove that 2 is the only even prime."},
        {"role": "assistant", "content": "Suppose ..."},
        {"role": "user", "content": "yes, go on"},
    ]

    async def ask() -> None:
        async with script.gateway() as gateway:
            await gateway.budget(turns)
            gateway.report(turns, [1.0], step=1)
            await until_awaited(lambda: gateway.counts.reported == 1, "the outcome")
            assert await gateway.budget([{"role": "system", "content": "Be short."}]) is None
            gateway.report([{"role": "system", "content": "Be short."}], [1.0], step=1)
            assert (gateway.counts.without_text, gateway.counts.dropped) == (1, 0)

    asyncio.run(ask())

    text = "user: Prove that 2 is the only even prime.\n\nassistant: Suppose ...\n\nuser: yes, go on"
    assert [body["prompt"]["text"] for body in script.bodies("/budget")] == [text]
    assert script.bodies("/observe")[0]["observations"] == [{"text": text, "rewards": [1.0]}]
