"""Asking for a refit, waiting for it, and reading what came of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import Client, NotFound
from evenodds_service.model.refit import TrainingData
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store
from evenodds_service.worker import Fit, Worker

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

PENDING = {
    "status": "pending",
    "worker": None,
    "attempts": 0,
    "finished_at": None,
    "model_version": None,
    "report": None,
    "error": None,
}


def nothing_learned(data: TrainingData) -> SharedModel:
    return SharedModel(data.embedder, data.group_size, data.basis, {}, {}, {"loss": 0.5})


def broken(data: TrainingData) -> SharedModel:
    raise ArithmeticError("no good")


@contextmanager
def working(database_url: str, fit: Fit) -> Iterator[None]:
    """A worker runs in the background."""
    store = Store(open_engine(database_url, timeout_seconds=PATIENCE_SECONDS))
    worker = Worker(store, name="w", clock=lambda: datetime.now(timezone.utc), fit=fit, poll_seconds=0.02)
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        store.close()


@pytest.fixture
def own(database_url: str, start_service: Callable[[str], Service]) -> Service:
    """A service that no other test uses, with a run of one prompt: a worker takes up whatever it finds."""
    service = start_service(database_url)
    service.client.put_run("math", embedder="none")
    service.client.add_prompts("math", [{"prompt_id": "a"}])
    return service


def test_a_refit_is_said_to_be_due_where_no_worker_asks_for_it(caller: Caller) -> None:
    caller.load([{"prompt_id": f"p{i}"} for i in range(128)])
    before = caller.ok("GET", f"/runs/{caller.run}/refits")
    caller.observe(0, *({"prompt_id": f"p{i}", "successes": 4, "attempts": 8} for i in range(128)))

    assert before == {"refits": [], "is_due": False}
    assert caller.ok("GET", f"/runs/{caller.run}/refits") == {"refits": [], "is_due": True}


def test_a_run_has_one_open_refit_whoever_asks(caller: Caller) -> None:
    first = caller.ok("POST", f"/runs/{caller.run}/refit", json={})
    again = caller.ok("POST", f"/runs/{caller.run}/refit", json={"wait_seconds": 0})

    assert again == first
    assert {name: first[name] for name in PENDING} == PENDING
    assert set(first) == {*PENDING, "refit_id", "requested_at"}
    assert caller.ok("GET", f"/runs/{caller.run}/refits") == {"refits": [first], "is_due": False}
    assert caller.ok("GET", f"/runs/{caller.run}")["last_refit"] == first


def test_a_run_starts_without_refits(caller: Caller) -> None:
    assert caller.ok("GET", f"/runs/{caller.run}/refits") == {"refits": [], "is_due": False}
    assert caller.ok("GET", f"/runs/{caller.run}")["last_refit"] is None


def test_who_waits_in_vain_gets_the_refit_as_it_stands(caller: Caller) -> None:
    started = time.monotonic()
    refit = caller.ok("POST", f"/runs/{caller.run}/refit", json={"wait_seconds": 0.3})

    assert time.monotonic() - started >= 0.3
    assert refit["status"] == "pending"


def test_who_waits_gets_the_published_version(own: Service) -> None:
    with working(own.database_url, nothing_learned):
        refits = [own.client.refit("math", wait_seconds=PATIENCE_SECONDS) for _ in range(2)]

    assert [(refit.status, refit.model_version) for refit in refits] == [("done", 1), ("done", 2)]
    assert refits[0].refit_id != refits[1].refit_id
    assert refits[0].report is not None
    assert refits[0].report["loss"] == 0.5
    assert own.client.refits("math").refits == (refits[1], refits[0])
    run = own.client.run("math")
    assert (run.model_version, run.last_refit, run.log_position) == (2, refits[1], 3)
    assert own.client.predict("math", ["a"]).model_version == 2


def test_who_waits_for_a_refit_that_fails_gets_its_error(own: Service) -> None:
    with working(own.database_url, broken):
        refit = own.client.refit("math", wait_seconds=PATIENCE_SECONDS)

    assert (refit.status, refit.error, refit.model_version) == ("failed", "ArithmeticError: no good", None)
    assert own.client.run("math").model_version == 0
    assert own.client.refit("math").refit_id != refit.refit_id


def test_who_waits_for_a_run_that_is_deleted_meanwhile_learns_it(own: Service) -> None:
    raised: list[NotFound] = []

    def ask() -> None:
        with Client(own.base_url) as client:
            try:
                client.refit("math", wait_seconds=PATIENCE_SECONDS)
            except NotFound as error:
                raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: own.client.refits("math").refits, "the request for a refit")
    own.client.delete_run("math")
    thread.join(PATIENCE_SECONDS)

    assert [error.code for error in raised] == ["run_unknown"]


def test_a_refit_that_runs_names_its_worker(own: Service) -> None:
    store = Store(open_engine(own.database_url, timeout_seconds=PATIENCE_SECONDS))
    asked = own.client.refit("math")
    store.claim_refit(worker="gpu-3", lease=timedelta(minutes=1), now=datetime.now(timezone.utc))
    running = own.client.refit("math")
    store.close()

    assert (running.refit_id, running.status) == (asked.refit_id, "running")
    assert (running.worker, running.attempts) == ("gpu-3", 1)


@pytest.mark.parametrize(("method", "path"), [("POST", "refit"), ("GET", "refits")])
def test_an_unknown_run_has_no_refits(caller: Caller, method: str, path: str) -> None:
    problem = caller.refused(method, f"/runs/nowhere/{path}", **({"json": {}} if method == "POST" else {}))

    assert (problem.status, problem.code) == (404, "run_unknown")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"wait_seconds": -1}, "wait_seconds: Input should be greater than or equal to 0, got -1"),
        ({"wait_seconds": 300.5}, "wait_seconds: Input should be less than or equal to 300, got 300.5"),
        ({"wait_seconds": None}, "wait_seconds: Input should be a valid number"),
        ({"wait_seconds": "soon"}, "wait_seconds: Input should be a number, got 'soon'"),
        ({"wait": 5}, "wait: there is no field of this name, got 5"),
    ],
)
def test_a_malformed_wait_is_refused_and_nothing_is_asked_for(caller: Caller, body: dict[str, Any], fault: str) -> None:
    problem = caller.refused("POST", f"/runs/{caller.run}/refit", json=body)

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail.startswith(fault)
    assert caller.ok("GET", f"/runs/{caller.run}/refits") == {"refits": [], "is_due": False}


def test_nan_is_no_wait(caller: Caller) -> None:
    headers = {"content-type": "application/json"}

    problem = caller.refused("POST", f"/runs/{caller.run}/refit", content=b'{"wait_seconds": NaN}', headers=headers)

    assert problem.status == 422


def test_a_refit_policy_keeps_what_is_left_out(caller: Caller) -> None:
    policies = [
        caller.create(refit=sent)["refit"] for sent in ({"every_observations": 500}, {"every_seconds": 60}, None)
    ]

    assert policies == [
        {"every_observations": 500, "every_seconds": 600},
        {"every_observations": 500, "every_seconds": 60},
        {"every_observations": 2_048, "every_seconds": 600},
    ]


@pytest.mark.parametrize("name", ["every_observations", "every_seconds"])
@pytest.mark.parametrize("value", [0, 10_000_001, 1.5, "often"])
def test_a_refit_policy_out_of_range_is_refused(caller: Caller, name: str, value: object) -> None:
    problem = caller.refused("PUT", f"/runs/{caller.run}", json={"refit": {name: value}})

    assert problem.status == 422
    assert problem.detail.startswith(f"refit.{name}: ")
