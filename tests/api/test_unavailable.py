"""A database that is busy, cut off, restarted, hung or full: honest 503s meanwhile, and answers again afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest
from benchmarks.bad_weather import RUNS, Writers, count, postgresql, prepare
from sqlalchemy import text

from evenodds import Client, Problem
from evenodds_service.storage.engine import WRITES, open_engine

if TYPE_CHECKING:
    from tests.conftest import Service


@contextmanager
def writes_are_locked(database_url: str) -> Iterator[None]:
    """Nobody else can write for as long as the body runs."""
    engine = open_engine(database_url)
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("LOCK TABLE runs IN EXCLUSIVE MODE"))
        yield
    engine.dispose()


def observation(i: int) -> dict[str, Any]:
    row = {"prompt_id": "a", "successes": 1, "attempts": 2}
    return {"run": "math", "step": 0, "request_id": f"r{i}", "observations": [row]}


def until_ready(client: Client) -> None:
    deadline = time.monotonic() + 30
    while client.readyz().status != "ok":
        assert time.monotonic() < deadline, "it did not recover"
        time.sleep(0.02)


def test_a_crowd_over_one_connection_is_sent_away_and_served_later(
    database_url: str, start_service: Callable[..., Service]
) -> None:
    service = start_service(database_url, pool_size=1, timeout_seconds=1)
    service.client.put_run("math", embedder="none")
    service.client.add_prompts("math", [{"prompt_id": "a"}])
    answered: list[str] = []

    async def crowd() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.base_url, timeout=60, limits=limits) as http:

            async def post(i: int) -> httpx.Response:
                reply = await http.post("/observe", json=observation(i))
                answered.append("/observe")
                return reply

            async def ask(path: str) -> httpx.Response:
                await asyncio.sleep(0.3)  # the crowd goes first
                reply = await http.get(path)
                answered.append(path)
                return reply

            return list(await asyncio.gather(*map(post, range(80)), *map(ask, ("/healthz", "/metrics", "/readyz"))))

    with writes_are_locked(database_url):
        *refused, alive, metrics, ready = asyncio.run(crowd())

    assert {reply.status_code for reply in refused} == {503}
    assert {reply.headers["retry-after"] for reply in refused} == {"1"}
    problems = [Problem.model_validate_json(reply.content) for reply in refused]
    assert {problem.code for problem in problems} == {"store_unavailable"}
    assert sum("all connections are in use" in problem.detail for problem in problems) >= 60
    assert (alive.status_code, metrics.status_code) == (200, 200)
    for path in ("/healthz", "/metrics"):  # while some of the crowd waited
        assert "/observe" in answered[answered.index(path) :]
    assert ready.status_code == 503 or database_url.startswith("postgresql")  # where /readyz may get the connection
    assert bool(ready.json()["reasons"]) == (ready.status_code == 503)
    with httpx.Client(base_url=service.base_url, timeout=30) as http:
        replies = [http.post("/observe", json=observation(i)) for i in range(20)]
    assert [reply.status_code for reply in replies] == [200] * 20
    assert service.client.run("math").observations == 20
    assert service.client.readyz().status == "ok"


def test_readers_are_served_while_writers_wait(database_url: str, start_service: Callable[..., Service]) -> None:
    service = start_service(database_url, timeout_seconds=1)
    service.client.put_run("math", embedder="none")
    service.client.add_prompts("math", [{"prompt_id": "a"}])

    with writes_are_locked(database_url):
        predicted = service.client.predict("math", ["a"])
        ready = service.client.readyz()

    assert predicted.log_position == 1
    if database_url.startswith("sqlite"):  # where one lock is on everything
        assert ready.status == "unavailable"
        assert ready.reasons == ("the database did not do its part (database is locked): repeat the call later",)


def faults(database_url: str, writers: Writers, client: Client) -> tuple[int, int, list[str]]:
    """Writes lost, writes duplicated, and whatever else is wrong."""
    engine = open_engine(database_url)
    counted = count(engine, writers, client)
    engine.dispose()
    return counted.lost, counted.duplicated, counted.faults


def test_cut_connections_cost_a_503_and_no_write(postgresql_server: str, start_service: Callable[..., Service]) -> None:
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE cut")
        url = postgresql_server.replace("/postgres?", "/cut?")
        service = start_service(url)
        prepare(service.client)
        n_cut = 0
        with Writers([service.base_url], 4, seed=0) as writers:
            for _ in range(20):
                time.sleep(0.05)
                cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = 'cut'"
                n_cut += connection.execute(cut).fetchall()[0][0]
            writers.bring_home(5)

        assert n_cut > 20
        assert set(writers.refusals) == {"store_unavailable"}
        assert faults(url, writers, service.client) == (0, 0, [])
        assert service.client.readyz().status == "ok"
        service.stop()
        connection.execute("DROP DATABASE cut WITH (FORCE)")


@pytest.mark.slow
def test_a_restarted_server_is_found_again_without_a_restart_of_the_service(
    tmp_path: Path, start_service: Callable[..., Service]
) -> None:
    with postgresql(tmp_path) as server:
        service = start_service(server.url)
        prepare(service.client)
        with Writers([service.base_url], 3, seed=0) as writers:
            writers.bring_home(5)
            server.kill()
            alive, ready, call = (service.http.get(path) for path in ("/healthz", "/readyz", f"/runs/{RUNS[0]}"))
            server.start()
            until_ready(service.client)
            writers.bring_home(5)

        assert (alive.status_code, ready.status_code, call.status_code) == (200, 503, 503)
        assert "connection" in ready.json()["reasons"][0]
        assert call.headers["retry-after"] == "1"
        assert set(writers.refusals) == {"store_unavailable"}
        assert faults(server.url, writers, service.client) == (0, 0, [])
        service.stop()


def test_a_server_that_takes_no_writes_is_not_ready_and_still_predicts(
    postgresql_server: str, start_service: Callable[..., Service]
) -> None:
    """As after a failover to a standby."""
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE standby")
        service = start_service(postgresql_server.replace("/postgres?", "/standby?"))
        service.client.put_run("math", embedder="none")
        service.client.add_prompts("math", [{"prompt_id": "a"}])
        connection.execute("ALTER DATABASE standby SET default_transaction_read_only = on")
        cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = 'standby'"
        connection.execute(cut)

        ready, refused = service.client.readyz(), service.http.post("/observe", json=observation(1))
        predicted = service.client.predict("math", ["a"])
        connection.execute("ALTER DATABASE standby RESET default_transaction_read_only")
        connection.execute(cut)
        until_ready(service.client)
        taken = service.http.post("/observe", json=observation(1))

        assert "(cannot execute UPDATE in a read-only transaction)" in ready.reasons[0]
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert predicted.log_position == 1
        assert (taken.status_code, taken.json()["replayed"]) == (200, False)
        service.stop()
        connection.execute("DROP DATABASE standby WITH (FORCE)")


def test_a_connection_that_hangs_is_given_up_and_another_one_answers(
    postgresql_server: str, start_service: Callable[..., Service]
) -> None:
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE hung")
        service = start_service(postgresql_server.replace("/postgres?", "/hung?"), pool_size=1, timeout_seconds=0.5)
        service.client.put_run("math", embedder="none")
        server_side = connection.execute("SELECT pid FROM pg_stat_activity WHERE datname = 'hung'").fetchall()
        os.kill(server_side[0][0], signal.SIGSTOP)
        try:
            reply = service.http.get("/runs/math")
        finally:
            os.kill(server_side[0][0], signal.SIGCONT)

        assert reply.status_code == 200
        service.stop()
        connection.execute("DROP DATABASE hung WITH (FORCE)")
