"""A database that is busy, cut off, restarted, hung or full: honest 503s meanwhile, and answers again afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest
from benchmarks.bad_weather import RUNS, Writers, count, postgresql, prepare
from sqlalchemy import Engine, text
from tests.slow_database import REQUEST_SECONDS
from tests.waiting import PATIENCE_SECONDS, in_background, until, until_awaited

from evenodds import Client, Problem
from evenodds_service.errors import MigrationFailed
from evenodds_service.storage.engine import WRITES, open_engine
from evenodds_service.storage.migration import downgrade
from evenodds_service.storage.revisions import check_schema

if TYPE_CHECKING:
    from tests.conftest import Service


CUT = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = %s AND backend_type = 'client backend'
"""


@contextmanager
def writes_are_locked(database_url: str) -> Iterator[None]:
    """Nobody else can write for as long as the body runs."""
    engine = open_engine(database_url, timeout_seconds=10 * PATIENCE_SECONDS)  # or PostgreSQL ends who idles so long
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("LOCK TABLE runs IN EXCLUSIVE MODE"))
        yield
    engine.dispose()


def observation(i: int) -> dict[str, Any]:
    row = {"prompt_id": "a", "successes": 1, "attempts": 2}
    return {"run": "math", "step": 0, "request_id": f"r{i}", "observations": [row]}


def until_ready(client: Client) -> None:
    until(lambda: client.readyz().status == "ok", "a service that is ready again")


def test_a_crowd_over_one_connection_is_sent_away_and_served_later(
    database_url: str, start_service: Callable[..., Service]
) -> None:
    """One of the crowd has the connection, and waits for the lock; the others wait for the connection."""
    service = start_service(database_url, pool_size=1)
    service.client.put_run("math", embedder="none")
    service.client.add_prompts("math", [{"prompt_id": "a"}])
    service.client.observe("math", 0, [{"prompt_id": "a", "rewards": [1]}])
    until(lambda: service.client.run("math").active_at, "how the run stands; that is saved behind the calls")
    lock = ExitStack()

    async def crowd() -> tuple[list[httpx.Response], httpx.Response, list[httpx.Response]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.base_url, timeout=PATIENCE_SECONDS, limits=limits) as http:
            posts = [asyncio.create_task(http.post("/observe", json=observation(i))) for i in range(80)]
            await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)  # as soon as one of them is sent away
            asked = [await http.get(path) for path in ("/healthz", "/metrics", "/readyz")]
            await until_awaited(lambda: sum(post.done() for post in posts) >= 79, "the refusal of all but one")
            lock.close()
            await asyncio.wait(posts)
            replies = sorted((post.result() for post in posts), key=lambda reply: reply.status_code)
            return replies[1:], replies[0], asked

    is_served = False
    while not is_served:  # how the run stands may be saved once more, over the one connection: then all are refused
        with lock:
            lock.enter_context(writes_are_locked(database_url))
            refused, served, (alive, metrics, ready) = asyncio.run(crowd())
        is_served = served.status_code == 200

    assert {reply.status_code for reply in refused} == {503}
    assert {reply.headers["retry-after"] for reply in refused} == {"1"}
    problems = [Problem.model_validate_json(reply.content) for reply in refused]
    assert {problem.code for problem in problems} == {"store_unavailable"}
    assert {"(all connections are in use)" in problem.detail for problem in problems} == {True}
    assert (alive.status_code, metrics.status_code, served.status_code) == (200, 200, 200)
    assert (ready.status_code, len(ready.json()["reasons"])) == (503, 1)
    replies = [service.http.post("/observe", json=observation(i)) for i in range(80)]
    assert [reply.status_code for reply in replies] == [200] * 80
    assert [reply.json()["replayed"] for reply in replies].count(True) == 1  # of the one that was served
    assert service.client.run("math").observations == 81
    assert service.client.readyz().status == "ok"


def test_readers_are_served_while_writers_wait(database_url: str, start_service: Callable[..., Service]) -> None:
    is_sqlite = database_url.startswith("sqlite")  # where one lock is on everything, and /readyz waits for it
    service = start_service(database_url, timeout_seconds=2 if is_sqlite else PATIENCE_SECONDS)
    service.client.put_run("math", embedder="none")
    service.client.add_prompts("math", [{"prompt_id": "a"}])

    with writes_are_locked(database_url):
        predicted = service.client.predict("math", ["a"])
        ready = service.client.readyz()

    assert predicted.log_position == 1
    if is_sqlite:
        assert ready.status == "unavailable"
        assert ready.reasons == ("the database is unavailable (database is locked): repeat the call later",)


def faults(database_url: str, writers: Writers, client: Client) -> tuple[int, int, list[str]]:
    """Writes lost, writes duplicated, and whatever else is wrong."""
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
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

            def cut() -> bool:
                nonlocal n_cut
                n_cut += connection.execute(CUT, ["cut"]).fetchall()[0][0]
                return n_cut > 20 and bool(writers.refusals)

            until(cut, "cuts that cost some of the writers a 503")
            writers.bring_home(5)

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
        connection.execute(CUT, ["standby"])

        ready, refused = service.client.readyz(), service.http.post("/observe", json=observation(1))
        predicted = service.client.predict("math", ["a"])
        connection.execute("ALTER DATABASE standby RESET default_transaction_read_only")
        connection.execute(CUT, ["standby"])
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
        service = start_service(postgresql_server.replace("/postgres?", "/hung?"), pool_size=1, timeout_seconds=3)
        service.client.put_run("math", embedder="none")
        ours = "SELECT pid FROM pg_stat_activity WHERE datname = 'hung' AND backend_type = 'client backend'"
        server_side = connection.execute(ours).fetchall()
        os.kill(server_side[0][0], signal.SIGSTOP)
        try:
            reply = service.http.get("/runs/math")
        finally:
            os.kill(server_side[0][0], signal.SIGCONT)

        assert reply.status_code == 200
        service.stop()
        connection.execute("DROP DATABASE hung WITH (FORCE)")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_requests_behind_a_migration_are_sent_away_and_served_when_it_was_given_up(
    database_url: str, start_service: Callable[..., Service]
) -> None:
    service = start_service(database_url, timeout_seconds=REQUEST_SECONDS)
    service.client.put_run("math", embedder="none")
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    with psycopg.connect(database_url) as reader, psycopg.connect(database_url, autocommit=True) as operator:
        reader.execute("SELECT * FROM runs")
        with in_background(lambda: given_up(engine)):
            migration = until(lambda: operator.execute(waiting).fetchone(), "the migration at the table in use")
            refused = service.http.get("/runs/math")
            operator.execute("SELECT pg_cancel_backend(%s)", migration)

    check_schema(engine)
    engine.dispose()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert service.http.get("/runs/math").status_code == 200


def given_up(engine: Engine) -> None:
    with pytest.raises(MigrationFailed, match=r"\(canceling statement due to user request\): correct what"):
        downgrade(engine, "base")
