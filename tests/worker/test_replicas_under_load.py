"""Several services, workers and clients at once over one database, held against the log by a checker that can fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest
from benchmarks.kills import serving, working
from benchmarks.linearisability import Call, Clients, check, prepare, run
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.storage.engine import open_engine

if TYPE_CHECKING:
    from tests.conftest import Service
    from tests.worker.conftest import Bench


@contextmanager
def workers(bench: Bench, n: int) -> Iterator[None]:
    """So many workers in threads of their own, by the real time."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=worker.run, args=(stop,))
        for worker in (
            bench.worker(name=f"w{i}", clock=lambda: datetime.now(timezone.utc), poll_seconds=0.2) for i in range(n)
        )
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("database_url", [pytest.param("sqlite", marks=pytest.mark.slow), "postgresql"], indirect=True)
def test_every_answer_is_the_one_of_its_log_position_and_none_is_older_than_what_was_acknowledged(
    bench: Bench, start_service: Callable[[str], Service]
) -> None:
    base_urls = [start_service(bench.database_url).base_url for _ in range(3)]

    with workers(bench, 2):
        verdict, _ = run(bench.database_url, base_urls, n_clients=4, n_requests=100)

    assert verdict.violations == []
    assert verdict.calls.total() >= 100
    assert {"observe", "select", "pool"} <= verdict.entries.keys()


@pytest.mark.slow
def test_the_same_holds_for_processes(bench: Bench) -> None:
    with ExitStack() as stack:
        base_urls = [stack.enter_context(serving(bench.database_url)) for _ in range(3)]
        for _ in range(2):
            stack.enter_context(working(bench.database_url))
        verdict, _ = run(bench.database_url, base_urls, n_clients=8, n_requests=1_500)

    assert verdict.violations == []
    assert verdict.entries["snapshot"] >= 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_checker_finds_what_is_wrong(bench: Bench, start_service: Callable[[str], Service]) -> None:
    service = start_service(bench.database_url)
    prepare(service.http)
    calls = Clients([service.base_url], 1, 30, seed=4).run()
    assert verdict_of(bench, calls) == set()

    def first(kind: str) -> int:
        return next(i for i, call in enumerate(calls) if call.kind == kind and call.status == 200 and i > 9)

    def with_reply(i: int, **changes: object) -> list[Call]:
        return [*calls[:i], replace(calls[i], reply={**calls[i].reply, **changes}), *calls[i + 1 :]]

    predict, observe, select = first("predict"), first("observe"), first("select")
    position = calls[predict].reply["log_position"]
    assert verdict_of(bench, with_reply(predict, log_position=position - 1)) == {"fold", "order"}
    assert verdict_of(bench, with_reply(predict, model_version=1)) == {"fold"}
    assert "log" in verdict_of(bench, with_reply(observe, log_position=calls[observe].reply["log_position"] + 1))
    assert "log" in verdict_of(bench, [*calls[:observe], *calls[observe + 1 :]])
    assert {"log", "repetition"} & verdict_of(bench, with_reply(select, selection_id="another"))
    assert verdict_of(bench, [*calls[:predict], replace(calls[predict], status=500), *calls[predict + 1 :]]) == {
        "refusal"
    }


def verdict_of(bench: Bench, calls: Sequence[Call]) -> set[str]:
    """The kinds of violations."""
    engine = open_engine(bench.database_url, timeout_seconds=PATIENCE_SECONDS)
    found = {violation.partition(":")[0] for violation in check(engine, calls).violations}
    engine.dispose()
    return found
