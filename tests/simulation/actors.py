"""Who takes part: services, workers, a trainer and other callers. All of it is the product's own code; only its clock,
chance, threads, network and database are the world's (`simulated`).

A request reaches the function of its route, as a task of the service that got it. What stands before the routes is left
out, but for the keys.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar, cast
from unittest.mock import patch

import httpx
import numpy as np
from fastapi import BackgroundTasks, Response
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, Engine
from tests.simulation import world as simulation
from tests.simulation.world import Broken, Future, Killed, Process, World

import evenodds.calls
import evenodds.protocol
import evenodds.training.batch_requests
import evenodds.training.inputs
import evenodds.training.selector
import evenodds.training.sender
from evenodds import Client
from evenodds.schemas import PredictRequest as PredictBody
from evenodds.schemas import Problem, PromptsIn, RetractRequest, RewindRequest, RunUpdate, SelectRequest
from evenodds.training.outbox import Outbox
from evenodds_service import worker as workers
from evenodds_service.api import app, problems, wire
from evenodds_service.api.dependencies import Services
from evenodds_service.api.middleware import access
from evenodds_service.api.middleware.access import KeyRing
from evenodds_service.api.routes import prompts, refits, rewind, runs, training
from evenodds_service.domain.learning import fold
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry
from evenodds_service.domain.prompts import FittedPrior
from evenodds_service.errors import RefitLost, ServiceError
from evenodds_service.model.refit import TrainingData
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.runtime import live_run, live_runs, retention
from evenodds_service.settings import Settings
from evenodds_service.storage.store import NewSnapshot, Refit, Snapshot, Store

T = TypeVar("T")
ADDRESS = "http://service"
LEASE_SECONDS = 20.0
LATE_SECONDS = 5.0
KEPT_SNAPSHOTS = 1
"""So few that most are dropped."""
_OBSERVE: TypeAdapter[Any] = TypeAdapter(training.ObserveBody)
_SETTINGS = Settings(live_runs=2)


class SimulatedStore(Store):
    """The store, with a step before and after each transaction, where it may fail or its process may die."""

    def __init__(self, engine: Engine, world: World, committed: Callable[[], None]) -> None:
        super().__init__(engine, keep_snapshots=KEPT_SNAPSHOTS)
        self._world, self._committed = world, committed

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._world.point("before a read")
        with super()._reading() as connection:
            yield connection

    @contextmanager
    def _writing(self, *, in_bulk: bool = False, of_one_moment: bool = False) -> Iterator[Connection]:
        self._world.point("before a write")
        with super()._writing(in_bulk=in_bulk, of_one_moment=of_one_moment) as connection:
            yield connection
            self._world.fail_here("before a commit")
        self._committed()
        self._world.point("after a commit")

    def claim_refit(self, **how: Any) -> Refit | None:
        claimed = super().claim_refit(**how)
        if claimed is not None and claimed.attempts > 1:
            self._world.sometimes["a refit was taken over after its lease"] += 1
        return claimed

    def publish_refit(self, claimed: Refit, model: NewSnapshot, **how: Any) -> Snapshot:
        try:
            return super().publish_refit(claimed, model, **how)
        except RefitLost:
            self._world.sometimes["a fit was fenced"] += 1
            raise


class SimulatedOutbox(Outbox):
    """The outbox, whose process may die before and after each statement, and whose disk may fail."""

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        world = simulation.world()
        if self.path is not None:
            if world.happens("kill"):
                world.sometimes["killed at the outbox"] += 1
                world.kill(world.task.process)
                raise Killed
            if world.happens("disk"):
                world.sometimes["the outbox's disk failed"] += 1
                raise sqlite3.OperationalError("the simulated disk is full")
        result = super()._do(work)
        if self.path is not None and world.happens("kill"):
            world.sometimes["killed at the outbox"] += 1
            world.kill(world.task.process)
            raise Killed
        return result


async def _inline(work: Callable[..., T], *args: Any) -> T:
    return work(*args)


def _clients(network: httpx.BaseTransport) -> Callable[..., Client]:
    """Clients whose requests go through the simulated network."""

    def made(base_url: str = ADDRESS, **options: Any) -> Client:
        world = simulation.world()
        chance = Random(world.chance.random())
        return Client(base_url, **{"transport": network, "sleep": world.pause, "random": chance, **options})

    return made


def _remember_only(state: State, entry: ObserveEntry, pool: Pool) -> None:
    """The fold of an observation without what costs the most, the regressions and the mixture's weights: what was
    observed, when, and who is waited for no more.
    """
    found, place = np.unique(entry.prompts, return_inverse=True)
    successes, attempts = np.zeros(len(found)), np.zeros(len(found))
    np.add.at(successes, place, entry.successes)
    np.add.at(attempts, place, entry.attempts)
    state.head_step = max(state.head_step, entry.step)
    arrived = fold._arrive(state, entry.selection_step, found)
    fold._remember(state, entry.step, found, successes, attempts, arrived)
    state.n_observations += len(entry.prompts)


@contextmanager
def simulated(world: World, network: httpx.BaseTransport, *, learns: bool) -> Iterator[None]:
    """The product's modules see the world's clock, threads, network and chance.

    Args:
        learns: Whether the whole fold runs, or `_remember_only`.
    """
    simulation.begin(world)
    client = _clients(network)
    identity = SimpleNamespace(hex="")

    def uuid4() -> SimpleNamespace:
        return SimpleNamespace(**{**vars(identity), "hex": world.new_id()})

    named: list[tuple[Any, str, Any]] = [
        (live_run, "threading", simulation.Threading),
        (live_runs, "threading", simulation.Threading),
        (live_runs, "ThreadPoolExecutor", simulation.Threads),
        (retention, "threading", simulation.Threading),
        (workers, "threading", simulation.Threading),
        (workers, "time", simulation.Clock),
        (training, "uuid", SimpleNamespace(uuid4=uuid4)),
        (access, "run_in_threadpool", _inline),
        (evenodds.training.sender, "threading", simulation.Threading),
        (evenodds.training.sender, "time", simulation.Clock),
        (evenodds.training.sender, "in_thread", simulation.in_thread),
        (evenodds.training.sender, "SerialThread", simulation.SerialThread),
        (evenodds.training.sender, "Client", client),
        (evenodds.training.sender, "Outbox", SimulatedOutbox),
        (evenodds.training.sender, "Random", lambda: Random(0)),
        (evenodds.training.batch_requests, "time", simulation.Clock),
        (evenodds.training.batch_requests, "in_thread", simulation.in_thread),
        (evenodds.training.batch_requests, "Client", client),
        (evenodds.training.inputs, "Client", client),
        (evenodds.training.selector, "uuid4", uuid4),
        (evenodds.training.selector, "atexit", SimpleNamespace(register=_do_nothing, unregister=_do_nothing)),
        (evenodds.calls, "uuid4", uuid4),
        (evenodds.protocol, "uuid4", uuid4),
        *((module, "now", world.now) for module in (runs, prompts, training, rewind, refits, app, wire)),
    ]
    if not learns:
        named.append((fold, "_observe", _remember_only))
    with ExitStack() as stack:
        for module, name, value in named:
            stack.enter_context(patch.object(module, name, value))
        yield


def _do_nothing(*_: object) -> None:
    """In place of what happens at the program's end."""


class _AllUsed(dict[str, float]):
    """As if each key's last use had just been noted: that is done on an event loop, which is not here."""

    def get(self, key: str, default: Any = None) -> Any:
        return math.inf


class Service:
    """One API process: what `create_app` builds, and the functions of its routes."""

    def __init__(self, name: str, world: World, store: Store, *, asks_for_keys: bool) -> None:
        self.process = Process(name)
        self._world, self._store = world, store
        self._services: Services = app._services(store, _SETTINGS)
        self._ring = KeyRing(store, simulation.Clock.monotonic, world.now) if asks_for_keys else None
        if self._ring is not None:
            self._ring._used = _AllUsed()

    @property
    def keys_read_at(self) -> float:
        """When this process last read the keys, in the world's seconds."""
        return -math.inf if self._ring is None else self._ring._known.read_at

    def answer(self, request: httpx.Request) -> tuple[int, bytes]:
        """Status and body of the reply. What comes after it is another task."""
        try:
            self._check_key(request)
            return self._routed(request)
        except ServiceError as error:
            status = problems.STATUS_OF.get(error.code)
            if status is None:
                raise
            return status, _problem(status, error.code, str(error))
        except ValidationError as error:
            return 422, _problem(422, "malformed", str(error))

    def _check_key(self, request: httpx.Request) -> None:
        if self._ring is None:
            return
        secret = request.headers.get("authorization", "").partition(" ")[2]
        check = self._ring.check(secret, request.method, request.url.path)
        try:
            check.send(None)
        except StopIteration:
            return
        raise AssertionError("the check of a key waits for something")

    def _routed(self, request: httpx.Request) -> tuple[int, bytes]:
        method, path, body = request.method, request.url.path, request.content
        if path == "/observe":
            return self._observe(body)
        if path == "/select_batch":
            return 200, bytes(training.select_batch(SelectRequest.model_validate_json(body), self._services).body)
        if path == "/predict":
            asked = PredictBody.model_validate_json(body)
            (answer,) = training._predict_known(self._services.live_runs, asked.run, [asked])
            if isinstance(answer, Exception):
                raise answer
            return 200, answer.encode()
        found = re.fullmatch(r"/runs/([^/]+)/prompts/([^/]+)", path)
        if found is not None:
            assert method == "DELETE", method
            return prompts.delete_prompt(found[1], found[2], self._services).status_code, b""
        found = re.fullmatch(r"/runs/([^/]+)(/[a-z]+)?", path)
        assert found is not None, path
        run, what = found.groups()
        return self._of_run(run, f"{method} {what or ''}", body, request.url.params)

    def _of_run(self, run: str, what: str, body: bytes, query: Mapping[str, str]) -> tuple[int, bytes]:
        services = self._services
        if what == "PUT ":
            reply = runs.put_run(run, RunUpdate.model_validate_json(body), services, caller=None)
            return reply.status_code, bytes(reply.body)
        if what == "DELETE ":
            return runs.delete_run(run, services).status_code, b""
        if what == "GET ":
            return 200, runs.get_run(run, services).model_dump_json().encode()
        if what == "GET /prompts":
            page = prompts.list_prompts(run, services, None, limit=int(query.get("limit", "100")))
            return 200, page.model_dump_json().encode()
        if what == "POST /prompts":
            items = PromptsIn.model_validate_json(body).prompts
            stored = services.store.run(run)
            names = [f"prompts[{i}]" for i in range(len(items))]
            keeps = query.get("keep_existing") == "true"
            return 200, prompts._add_block(services, stored, items, names, keeps).model_dump_json().encode()
        if what == "POST /rewind":
            return 200, rewind.rewind(run, RewindRequest.model_validate_json(body), services).model_dump_json().encode()
        if what == "POST /retract":
            retracted = rewind.retract(run, RetractRequest.model_validate_json(body), services)
            return 200, retracted.model_dump_json().encode()
        assert what == "POST /refit", what
        asked = services.store.request_refit(services.store.run(run).id, now=self._world.now())
        return 200, refits.refit_state(asked).model_dump_json().encode()

    def _observe(self, body: bytes) -> tuple[int, bytes]:
        afterwards = BackgroundTasks()
        reply = training.observe(_OBSERVE.validate_json(body), self._services, afterwards, Response())
        for each in afterwards.tasks:
            self._world.spawn(self.process, cast("Callable[[], None]", partial(each.func, *each.args, **each.kwargs)))
        return 200, reply.model_dump_json().encode()


def _problem(status: int, code: str, detail: str) -> bytes:
    return Problem(title="", status=status, detail=detail, code=code).model_dump_json(exclude_none=True).encode()


class Network(httpx.BaseTransport):
    """Brings requests to one of the services, and replies back: late, twice, or not at all."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.services: list[Service] = []

    def answered(self, service: Service, request: httpx.Request) -> tuple[int, bytes]:
        """What the service answers."""
        return service.answer(request)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        world = self._world
        request.read()
        service = world.chance.choice(self.services)
        world.pause(0.001)
        if not service.process.is_alive or world.happens("refused"):
            raise httpx.ConnectError("the simulated connection is refused", request=request)
        if world.happens("twice"):  # a proxy that repeats, while the first is still under way
            world.sometimes["a request came twice"] += 1
            self._bring(world.chance.choice(self.services), request, after=world.chance.choice((0.0, 0.05, 1.0)))
        after = 0.0
        if world.happens("late"):
            world.sometimes["a request came late"] += 1
            after = world.chance.uniform(0.0, LATE_SECONDS)
        if world.happens("lost"):
            world.sometimes["a request was lost"] += 1
            answer: Future[tuple[int, bytes]] = Future()
        else:
            answer = self._bring(service, request, after=after)
        timeout = float(request.extensions["timeout"]["read"])
        try:
            status, body = answer.result(timeout)
        except FutureTimeout:
            raise httpx.ReadTimeout("the simulated reply did not come", request=request) from None
        except Broken:
            raise httpx.RemoteProtocolError("the simulated service died", request=request) from None
        if world.happens("broken"):
            world.sometimes["a reply was lost"] += 1
            raise httpx.ReadError("the simulated reply was lost", request=request)
        kind = "application/json" if status < 400 else problems.MEDIA_TYPE
        return httpx.Response(status, headers={"content-type": kind}, content=body, request=request)

    def _bring(self, service: Service, request: httpx.Request, *, after: float) -> Future[tuple[int, bytes]]:
        """The reply to come of this service."""
        answer: Future[tuple[int, bytes]] = Future()
        service.process.owed.add(answer)

        def work() -> None:
            try:
                answer.set(self.answered(service, request))
            except Killed:
                raise
            except Exception as error:
                self._world.violated(
                    f"500 to {request.method} {request.url.path} {request.content!r:.300}: {error!r:.300}"
                )
                answer.set((500, _problem(500, "internal_error", repr(error))))
            finally:
                service.process.owed.discard(answer)

        if service.process.is_alive:
            self._world.spawn(service.process, work, after=after)
        else:
            answer.fail(Broken(service.process.name))
        return answer


def stub_fit(world: World, seconds: Callable[[], float]) -> workers.Fit:
    """A fit that takes so long, and finds one rate for every prompt."""

    def fit(data: TrainingData) -> SharedModel:
        ends = world.time + seconds()
        while world.time < ends:
            world.pause(1.0)
            world.fail_here("while it fits")
        n = len(data.x_N_d)
        prior = FittedPrior(np.full(n, 0.5, np.float32), np.full(n, 4.0, np.float32))
        return SharedModel(
            embedder=data.embedder,
            group_size=data.group_size,
            basis=data.basis,
            priors={"ngrams": prior},
            weights={},
            report={"rate": 0.5},
        )

    return fit
