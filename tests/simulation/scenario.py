"""One seed: who takes part, what they do, and what comes of it."""

from __future__ import annotations

import atexit
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import httpx
from sqlalchemy import Engine, event
from tests.simulation.actors import ADDRESS, LEASE_SECONDS, Network, Service, SimulatedStore, simulated, stub_fit
from tests.simulation.checks import MARK, History
from tests.simulation.world import Event, Process, World

from evenodds import Client, EvenOddsError, ProblemError
from evenodds.training.selector import PromptSelector
from evenodds_service.api.middleware.access import KEYS_SECONDS, hash_of
from evenodds_service.errors import StoreUnavailable
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store
from evenodds_service.worker import Worker

TRAINED, SHARED, BRIEF, MISLED, SERVED = "trained", "shared", "brief", "misled", "served"
"""Runs: one of a trainer, one that others write to, one that is deleted again and again, one whose prompts mislead, and
one that keeps few of its prompts."""

GROUP_SIZE = 8
POOL = {TRAINED: 40, SHARED: 24, BRIEF: 4}
KEPT = 8
"""Prompts that the served run keeps; a few more until it has let go of them."""

STEPS = (40, 60, 80, 100, 300)
"""How long a seed may be."""

LEARNS_EVERY = 8
"""One seed in so many folds observations whole; the others only remember them, and take half of the time."""

MOST_SECONDS_OF_PEACE = 900.0
RESTART_SECONDS = (6.0, 12.0)
"""How long a dead process stays away: longer than any request is under way."""

RAILS = (
    "killed before a read",
    "killed before a write",
    "killed before a commit",
    "killed after a commit",
    "killed while it fits",
    "killed at the outbox",
    "database failed before a commit",
    "database failed after a commit",
    "the outbox's disk failed",
    "a request was lost",
    "a reply was lost",
    "a request came late",
    "a request came twice",
    "a report was repeated",
    "a batch was asked for again",
    "a process was frozen",
    "a clock was wrong",
    "a process was started anew",
    "a refit was taken over after its lease",
    "a fit was fenced",
    "a rewind came during a refit",
    "a snapshot was published",
    "a snapshot was dropped",
    "a checkpoint was saved",
    "a rewind took something",
    "a retract took something",
    "a trainer went back to a checkpoint",
    "a batch was uniform",
    "a batch was the service's",
    "an outbox row was refused",
    "a key was rotated",
    "an old secret was refused",
    "texts were erased",
    "a prompt was erased",
    "a run let go of prompts",
    "a run was deleted",
    "a run fell back to uniform choice",
    "answered request_conflict",
    "answered selection_conflict",
    "answered selection_voided",
    "answered store_unavailable",
)
"""What has to happen in some seed of a long run: where it never does, nobody knows whether it works."""


@dataclass(frozen=True)
class Outcome:
    """What came of a seed."""

    seed: int
    steps: int
    sometimes: Mapping[str, int]
    violations: tuple[str, ...]
    forecasts: tuple[tuple[float, float], ...]
    events: tuple[str, ...]


@cache
def _migrated() -> bytes:
    """A database with its tables: a migration takes longer than most seeds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "migrated.db"
        engine = open_engine(f"sqlite:///{path}")
        upgrade(engine)
        engine.dispose()
        with sqlite3.connect(path) as file:
            file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.read_bytes()


@cache
def _database() -> tuple[Path, Engine]:
    """Folder and engine of all seeds of this process: an engine has to compile each statement once."""
    folder = Path(tempfile.mkdtemp(prefix="evenodds-simulation-", dir=_memory()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    engine = open_engine(f"sqlite:///{folder / 'evenodds.db'}")
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
    return folder, engine


def run_seed(seed: int, *, steps: int | None = None) -> Outcome:
    """Let one seed happen.

    Args:
        steps: How many; what is owed then is delivered in some more. None leaves it to the seed.
    """
    folder, engine = _database()
    (folder / "evenodds.db").write_bytes(_migrated())
    world = World(seed, most_steps=steps or Random(f"steps {seed}").choice(STEPS))
    scenario = _Scenario(world, engine, folder)
    try:
        with simulated(world, scenario.network, learns=seed % LEARNS_EVERY == 0):
            scenario.run()
    finally:
        engine.dispose()
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return Outcome(
        seed,
        world.steps,
        dict(world.sometimes),
        tuple(world.violations),
        tuple(scenario.history.forecasts),
        tuple(world.events),
    )


def _memory() -> str | None:
    """A folder that is no disk, where there is one: what is lost with the machine is not simulated."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def true_rate(run: str, i: int) -> float:
    return Random(f"{run} {i}").betavariate(1.2, 1.2)


def text_of(run: str, i: int) -> str:
    return f"{'Prove' if i % 2 else 'Compute'} canary of {run} {i}."


def pool_of(run: str) -> list[dict[str, Any]]:
    return [{"prompt_id": f"{run}-{i}", "text": text_of(run, i)} for i in range(POOL[run])]


class _Scenario:
    """The processes of one seed, and who watches over them."""

    def __init__(self, world: World, engine: Engine, folder: Path) -> None:
        self.world, self.engine, self.folder = world, engine, folder
        chance = world.chance
        self.is_over = False
        self.rates = {f"{run}-{i}": true_rate(run, i) for run, n in POOL.items() for i in range(n)}
        shown = {prompt_id: rate * (GROUP_SIZE - 1) / GROUP_SIZE for prompt_id, rate in self.rates.items()}
        self.history = History(world, folder / "evenodds.db", shown, is_skewed=world.rates["skew"] > 0)
        self.keys = _Keys(self) if chance.random() < 0.3 else None
        self.network = _WatchedNetwork(world, self.history, self.keys)
        self.processes: list[Process] = []
        self.n_services, self.n_workers = chance.choice((1, 2, 2, 3)), chance.choice((1, 2))
        self.trainer = _Trainer(self)
        self.writers = [_Writer(self, n) for n in range(chance.choice((1, 2)))]
        self.gateway = _Gateway(self) if chance.random() < 0.5 else None
        self.fit_seconds = chance.choice((2.0, 10.0, 40.0))

    def successes(self, prompt_id: str, mark: int) -> float:
        """What came of a group of attempts at a prompt. One of them always fails, so that a mark fits in."""
        rate, chance = self.rates[prompt_id], self.world.chance
        return sum(chance.random() < rate for _ in range(GROUP_SIZE - 1)) + mark * MARK

    def store(self) -> SimulatedStore:
        return SimulatedStore(self.engine, self.world, self.history.committed)

    def run(self) -> None:
        world = self.world
        world.is_calm = True
        plain = Store(self.engine)
        if self.keys is not None:
            self.keys.begin(plain)
        for n in range(self.n_services):
            self._keep_alive(f"service {n}", partial(self._service, n))
        self._create_runs()
        world.is_calm = False
        for n in range(self.n_workers):
            self._keep_alive(f"worker {n}", self._worker)
        self._keep_alive("trainer", self._trainer)
        for writer in self.writers:
            world.spawn(Process("writer"), writer.work)
        if self.gateway is not None:
            world.spawn(Process("gateway"), self.gateway.work)
        world.spawn(Process("operator"), self._trouble)
        if self.keys is not None:
            world.spawn(Process("operator"), self.keys.rotate)
        if world.chance.random() < 0.04:
            world.spawn(Process("misleader"), lambda: _mislead(self))
        while world.steps < world.most_steps and not world.violations:
            world.pause(1.0)
        self._make_peace()
        self.history.check_the_whole(self.engine)
        self.trainer.check()
        for writer in self.writers:
            writer.check()
        if self.gateway is not None:
            self.gateway.check()
        world.end()
        self.history.close()

    def _make_peace(self) -> None:
        """No more faults: what is owed is delivered, and what is not finished is finished."""
        world = self.world
        world.is_calm = True
        self.is_over = True
        for process in self.processes:
            process.frozen_until = 0.0
        ends = world.time + MOST_SECONDS_OF_PEACE
        waited_for = [self.trainer.has_ended, *(writer.has_ended for writer in self.writers)]
        while not all(each.is_set() for each in waited_for) and world.time < ends and not world.violations:
            world.pause(1.0)
        if world.time >= ends:
            world.violated("after the last fault, something was never delivered")

    # Processes.

    def _keep_alive(self, name: str, begin: Callable[[str], Process]) -> None:
        """Start a process, and again a while after each of its deaths."""

        def watch() -> None:
            process = begin(name)
            self.processes.append(process)
            while True:
                while process.is_alive:
                    self.world.pause(0.5)
                self.processes.remove(process)
                self.world.pause(self.world.chance.uniform(*RESTART_SECONDS))
                self.world.sometimes["a process was started anew"] += 1
                process = begin(name)
                self.processes.append(process)

        self.world.spawn(Process(f"init of {name}"), watch)
        self.world.pause(0.01)

    def _service(self, n: int, name: str) -> Process:
        service = Service(name, self.world, self.store(), asks_for_keys=self.keys is not None)
        self.network.services[n : n + 1] = [service]
        self._set_clock(service.process)
        return service.process

    def _worker(self, name: str) -> Process:
        world, process = self.world, Process(name)
        worker = Worker(
            self.store(),
            name=f"{name} since {world.time:.0f}",
            clock=world.now,
            fit=stub_fit(world, lambda: world.chance.uniform(0, self.fit_seconds)),
            lease=timedelta(seconds=LEASE_SECONDS),
        )

        def work() -> None:
            while True:
                try:
                    worked = worker.work_once()
                    world.sometimes["a snapshot was published"] += worked
                except StoreUnavailable:
                    worked = False
                if not worked:
                    world.pause(2.0)

        world.spawn(process, work)
        self._set_clock(process)
        return process

    def _trainer(self, name: str) -> Process:
        process = Process(name)
        self.world.spawn(process, self.trainer.live)
        return process

    def _set_clock(self, process: Process) -> None:
        if self.world.happens("skew"):
            self.world.sometimes["a clock was wrong"] += 1
            process.skew = self.world.chance.choice((-3_600.0, -5.0, 5.0, 60.0, 86_400.0))

    def _create_runs(self) -> None:
        client = self.client()
        for run in (TRAINED, SHARED):
            client.put_run(
                run,
                predictor="mopps" if self.world.chance.random() < 0.2 else "gps",
                embedder="none",
                group_size=GROUP_SIZE,
                refit={"every_observations": 64},
            )
            client.add_prompts(run, pool_of(run))

    def client(self) -> Client:
        """For somebody who is no trainer."""
        world = self.world
        return Client(
            ADDRESS,
            timeout_seconds=2.0,
            retries=2,
            transport=self.network,
            sleep=world.pause,
            random=Random(world.chance.random()),
        )

    def _trouble(self) -> None:
        """Machines that are suspended; and an operator who deletes, erases and asks for refits."""
        world, client = self.world, self.client()
        while not self.is_over:
            world.pause(world.chance.expovariate(0.2))
            victims = [process for process in self.processes if process.is_alive]
            if victims and world.happens("freeze"):
                victim = world.chance.choice(victims)
                victim.frozen_until = world.time + world.chance.choice((1.0, 30.0, 100.0))
                world.sometimes["a process was frozen"] += 1
                world.say(f"{victim.name} is frozen until {victim.frozen_until:.1f}")
            try:
                self._operate(client)
            except EvenOddsError as error:
                world.say(f"operator: {error}")

    def _operate(self, client: Client) -> None:
        chance = self.world.chance
        what = chance.random()
        if what < 0.15:
            client.refit(chance.choice((TRAINED, SHARED)))
        elif what < 0.3:
            client.put_run(BRIEF, embedder="none")
            client.add_prompts(BRIEF, pool_of(BRIEF))
            client.observe(BRIEF, 0, [{"prompt_id": f"{BRIEF}-0", "successes": 1, "attempts": 2}], request_id="same")
        elif what < 0.4:
            client.delete_run(BRIEF)
            self.world.sometimes["a run was deleted"] += 1
        elif what < 0.44:
            client.put_run(SHARED, keep_text=False)
            self.world.sometimes["texts were erased"] += 1
            self.history.erased.add(f"canary of {SHARED}")
        elif what < 0.55:
            run = chance.choice((TRAINED, SHARED))
            is_fitting = self.history.rows(
                "SELECT 1 FROM refits JOIN runs ON run_id = runs.id WHERE name = ? AND status = 'running'", run
            )
            voided = client.rewind(run, max(0, (client.run(run).head_step or 0) - chance.choice((0, 1, 2, 4))))
            if is_fitting and voided.voided_observations:
                self.world.sometimes["a rewind came during a refit"] += 1


class _WatchedNetwork(Network):
    """The network, with the keys that callers send, and somebody who writes down all answers."""

    def __init__(self, world: World, history: History, keys: _Keys | None) -> None:
        super().__init__(world)
        self._history, self._keys = history, keys

    def answered(self, service: Service, request: httpx.Request) -> tuple[int, bytes]:
        with self._history.answering(request) as before:
            secret = self._keys.sign(request) if self._keys is not None else ""
            is_dead = self._keys is not None and not self._keys.is_good(secret)
            status, body = service.answer(request)
            if self._keys is not None:
                self._keys.check(service, status, secret, is_dead)
            self._history.answered(before, request, status, body)
        return status, body


class _Keys:
    """The key of all callers, and an operator who gives it another secret from time to time."""

    def __init__(self, scenario: _Scenario) -> None:
        self._scenario, self._world = scenario, scenario.world
        self._secrets = [self._new(), ""]
        self._dead: tuple[str, float] = ("", 0.0)

    def _new(self) -> str:
        return f"eo_{self._world.new_id()}"

    def begin(self, store: Store) -> None:
        self._store = store
        store.create_key(
            "callers",
            secret_hash=hash_of(self._secrets[0]),
            scopes=frozenset({"read", "write", "admin"}),
            runs="*",
            requests_per_minute=None,
            max_body_bytes=None,
            now=self._world.now(),
        )

    def rotate(self) -> None:
        world = self._world
        while not self._scenario.is_over:
            world.pause(world.chance.uniform(1, 10))
            fresh = self._new()
            self._store.rotate_key("callers", secret_hash=hash_of(fresh))
            world.sometimes["a key was rotated"] += 1
            old = self._secrets[0]
            self._secrets = [old, ""]  # the new one is known everywhere a little later
            world.pause(KEYS_SECONDS + 1)
            self._secrets = [fresh, old]
            world.pause(world.chance.uniform(1, 10))
            self._secrets = [fresh, ""]
            self._store.finish_rotation("callers")
            self._dead = (old, world.time)

    def sign(self, request: httpx.Request) -> str:
        """Put a secret into the request as it arrives: a good one, or sometimes the one that was ended last."""
        chance = self._world.chance
        secret, _ = self._dead
        if not secret or chance.random() >= 0.05:
            secret = chance.choice([each for each in self._secrets if each])
        request.headers["authorization"] = f"Bearer {secret}"
        return secret

    def is_good(self, secret: str) -> bool:
        return secret in self._secrets

    def check(self, service: Service, status: int, secret: str, is_dead: bool) -> None:
        """A secret that is good is never refused; one that has ended opens nothing once the service knows of it.

        Args:
            secret: Of the request.
            is_dead: Whether it had ended when the request came. It may have ended since.
        """
        world, (_, since) = self._world, self._dead
        if not is_dead:
            if status == 401 and self.is_good(secret):
                world.violated("a secret was answered 401, and it is good")
        elif status == 401:
            world.sometimes["an old secret was refused"] += 1
        elif self._should_be_known(since) or (status != 503 and service.keys_read_at > since):
            world.violated(f"a secret was answered {status}, and it is dead")

    def _should_be_known(self, since: float) -> bool:
        """Whether each service has read the keys since then: it cannot while the database fails."""
        return self._world.rates["store"] == 0 and self._world.time > since + KEYS_SECONDS + 1


@dataclass
class _Told:
    """An observation that somebody made: what became of it is looked up by its mark."""

    mark: int
    step: int
    selection_id: str | None
    is_certain: bool = False
    is_forgotten: bool | None = False


class _Trainer:
    """A trainer with a real `PromptSelector`: it dies, and the next one goes on from a checkpoint or without one."""

    def __init__(self, scenario: _Scenario) -> None:
        self._scenario, self._world = scenario, scenario.world
        self.has_ended = Event()
        self._told: list[_Told] = []
        self._marks = 0
        self._step = 0
        self._saved: tuple[int, dict[str, Any]] | None = None
        self._going_back: tuple[int, dict[str, Any]] | None = None
        self._refused = 0
        self._n_disk_faults = 0

    def live(self) -> None:
        """One process of it, from its start to its end."""
        world = self._world
        if world.chance.random() < 0.3 and world.rates["disk"]:
            self._poison()
        selector = PromptSelector(
            ADDRESS,
            TRAINED,
            pool_of(TRAINED),
            run_settings={"group_size": GROUP_SIZE},
            outbox=self._scenario.folder / "outbox",
            existing="resume",
            prefetch=world.chance.random() < 0.3,
        )
        try:
            self._begin(selector)
            while not self._scenario.is_over:
                self._train(selector)
            if not selector.flush(MOST_SECONDS_OF_PEACE / 2):
                world.violated("the trainer could not deliver what it had")
            self._refused = len(selector.refusals())
            world.sometimes["an outbox row was refused"] += self._refused
            self.has_ended.set()
            world.pause(10 * MOST_SECONDS_OF_PEACE)
        finally:
            running = selector._running
            for outbox in running.sender._outboxes() if running is not None else ():
                outbox.close()  # as the system does when a process dies

    def _begin(self, selector: PromptSelector) -> None:
        world = self._world
        if self._going_back is None and self._saved is not None and world.chance.random() < 0.7:
            self._going_back = self._saved
        if self._going_back is None:
            return
        step, state = self._going_back
        before = self._faults()
        with self._uncertain(lambda told: told.step > step):
            selector.load_state_dict(state)
        if self._faults() == before:
            for told in self._told:
                told.is_forgotten = told.is_forgotten if told.step <= step else True
        self._going_back, self._step = None, step + 1
        world.sometimes["a trainer went back to a checkpoint"] += 1

    @contextmanager
    def _uncertain(self, which: Callable[[_Told], bool]) -> Iterator[None]:
        """Until it has succeeded, nobody knows what of these is forgotten."""
        for told in self._told:
            if which(told) and told.is_forgotten is False:
                told.is_forgotten = None
        yield

    def _train(self, selector: PromptSelector) -> None:
        world, chance, step = self._world, self._world.chance, self._step
        batch = selector.select(step, 4)
        world.sometimes["a batch was uniform" if batch.source == "uniform" else "a batch was the service's"] += 1
        world.pause(chance.choice((0.5, 2.0, 2.0, 40.0 if chance.random() < 0.05 else 2.0)))
        outcomes, made = [], []
        for prompt_id in batch.prompt_ids:
            self._marks += 1
            successes = self._scenario.successes(prompt_id, self._marks)
            outcomes.append({"prompt_id": prompt_id, "successes": successes, "attempts": GROUP_SIZE})
            made.append(_Told(self._marks, step, batch.selection_id))
        self._told += made
        before = self._faults()
        selector.observe(step, outcomes)
        running = selector._running
        for told in made:  # else they are in memory alone, and die with the process
            told.is_certain = self._faults() == before and running is not None and running.sender._disk is not None
        self._step = step + 1
        if chance.random() < 0.2:
            self._saved = step, selector.state_dict()

    def _faults(self) -> int:
        return self._world.sometimes["the outbox's disk failed"]

    def _poison(self) -> None:
        """A row that nobody can send: of another release, or what a broken disk made of it."""
        path = self._scenario.folder / "outbox" / f"{TRAINED}.outbox"
        if path.exists():
            row = ("observe", 0, self._world.new_id(), None, self._world.chance.choice(("[{", '[{"prompt_id": 7}]')))
            with suppress(sqlite3.OperationalError), sqlite3.connect(path) as outbox:  # no table where it died early
                outbox.execute(
                    "INSERT INTO deliveries (kind, step, request_id, selection_id, body) VALUES (?, ?, ?, ?, ?)", row
                )
            outbox.close()

    def check(self) -> None:
        """What the trainer was told is kept stands once, unless it or somebody else has forgotten it."""
        history = self._scenario.history
        standing, voided = history.standing_marks(TRAINED)
        gone = {row["selection_id"] for row in history.rows("SELECT * FROM selections WHERE voided_at IS NOT NULL")}
        for told in self._told:
            n = standing[told.mark]
            if n > 1:
                self._world.violated(f"an observation of the trainer counts {n} times: {told}")
            if n and told.is_forgotten:
                self._world.violated(f"an observation counts that the trainer has forgotten: {told}")
            is_due = told.is_certain and told.is_forgotten is False
            if is_due and not n and not voided[told.mark] and told.selection_id not in gone:
                self._world.violated(f"an observation of the trainer is lost: {told}")


class _Writer:
    """Somebody who calls without an outbox, repeats what failed, and sometimes what did not."""

    def __init__(self, scenario: _Scenario, number: int) -> None:
        self._scenario, self._world, self._number = scenario, scenario.world, number
        self.has_ended = Event()
        self._sent: list[dict[str, Any]] = []
        self._failed: list[dict[str, Any]] = []
        self._n = 0
        self._step = 0

    def work(self) -> None:
        client = self._scenario.client()
        while not self._scenario.is_over:
            self._world.pause(self._world.chance.expovariate(1.0))
            try:
                self._act(client)
            except EvenOddsError as error:
                self._world.say(f"failed: {error!r:.120}")
        while self._failed:
            self._report(client, self._failed.pop())
        self.has_ended.set()

    def _act(self, client: Client) -> None:
        chance = self._world.chance
        what = chance.random()
        prompts = chance.sample(range(POOL[SHARED]), chance.choice((1, 2, 4)))
        ids = [f"{SHARED}-{i}" for i in prompts]
        if what < 0.35:
            self._observe_anew(client, ids)
        elif what < 0.45 and self._failed:
            self._report(client, self._failed.pop(0))
        elif what < 0.5 and self._sent:
            self._report(client, chance.choice(self._sent))
        elif what < 0.53 and self._sent:
            other = chance.choice(self._sent)
            client.observe(**{**other, "step": other["step"] + 1})
        elif what < 0.7:
            client.predict(SHARED, ids)
        elif what < 0.75:
            client.predict(TRAINED, [f"{TRAINED}-{i}" for i in prompts])
        elif what < 0.9:
            self._choose(client)
        elif what < 0.94:
            self._retract(client, ids)
        else:
            client.run(SHARED)

    def _rows(self, ids: list[str], mark: int) -> list[dict[str, Any]]:
        """Outcomes of these prompts, the first of them with the mark."""
        counts = [self._scenario.successes(prompt_id, mark * (i == 0)) for i, prompt_id in enumerate(ids)]
        return [
            {"prompt_id": prompt_id, "successes": successes, "attempts": GROUP_SIZE}
            for prompt_id, successes in zip(ids, counts, strict=True)
        ]

    def _observe_anew(self, client: Client, ids: list[str]) -> None:
        self._n += 1
        mark = 100_000 * (1 + self._number) + self._n
        chance, rows = self._world.chance, self._rows(ids, mark)
        if chance.random() < 0.05:
            rows.append({"text": text_of(SHARED, mark), "successes": 1, "attempts": 2})
        self._step += chance.random() < 0.4
        step = max(0, self._step - chance.choice((0, 0, 0, 1, 5)))
        self._report(
            client, {"run": SHARED, "step": step, "observations": rows, "request_id": f"w{self._number}-{self._n}"}
        )

    def _report(self, client: Client, call: dict[str, Any]) -> None:
        try:
            client.observe(**call)
        except ProblemError as error:
            if error.status == 503:
                self._failed.append(call)
        except EvenOddsError:
            self._failed.append(call)
        else:
            self._sent.append(call)

    def _choose(self, client: Client) -> None:
        chance = self._world.chance
        step = max(0, self._step + chance.choice((-1, 0, 1)))
        if chance.random() < 0.5:  # at the same time as another one, whose prompts it must not choose

            def choose_another() -> None:
                with suppress(EvenOddsError):
                    client.select_batch(SHARED, step + 1, 2, seed=self._number)

            self._world.spawn(self._world.task.process, choose_another)
        asked = client.select_batch(SHARED, step, chance.choice((2, 2, 2, 3)), seed=self._number)
        if chance.random() < 0.7 and not asked.replayed:
            self._n += 1
            mark = 100_000 * (1 + self._number) + self._n
            ids = [prompt.prompt_id for prompt in asked.prompts if prompt.prompt_id in self._scenario.rates]
            if ids:
                call = {"run": SHARED, "step": step, "observations": self._rows(ids, mark)}
                name = f"w{self._number}-{self._n}"
                self._report(client, {**call, "request_id": name, "selection_id": asked.selection_id})

    def _retract(self, client: Client, ids: list[str]) -> None:
        chance = self._world.chance
        if chance.random() < 0.5 and self._sent:
            client.retract(SHARED, request_id=chance.choice(self._sent)["request_id"])
        else:
            client.retract(SHARED, prompt_ids=ids, from_step=max(0, self._step - 2))

    def check(self) -> None:
        standing, _ = self._scenario.history.standing_marks(SHARED)
        for mark, n in standing.items():
            if n > 1:
                self._world.violated(f"report {mark} counts {n} times")


class _Gateway:
    """Reports outcomes of one new text after the other, so that its run has to let go of prompts; erases some."""

    def __init__(self, scenario: _Scenario) -> None:
        self._scenario, self._world = scenario, scenario.world
        self._n = 0
        self._known: list[int] = []

    def work(self) -> None:
        client, world = self._scenario.client(), self._world
        while not self._scenario.is_over:
            world.pause(world.chance.expovariate(2.0))
            try:
                if self._n == 0:
                    client.put_run(SERVED, embedder="none", group_size=GROUP_SIZE, retention={"prompts": KEPT})
                self._act(client)
            except EvenOddsError as error:
                world.say(f"gateway: {error!r:.120}")

    def _act(self, client: Client) -> None:
        chance = self._world.chance
        what = chance.random()
        if what < 0.2 and self._known:
            client.predict(SERVED, [f"{SERVED}-{chance.choice(self._known[-KEPT:])}"])
        elif what < 0.25 and self._known:
            i = self._known.pop(chance.randrange(len(self._known)))
            client.delete_prompt(SERVED, f"{SERVED}-{i}")
            self._world.sometimes["a prompt was erased"] += 1
            self._scenario.history.erased.add(text_of(SERVED, i))
        else:
            self._n += 1
            i = self._n
            row = {"prompt_id": f"{SERVED}-{i}", "text": text_of(SERVED, i), "successes": i % 8, "attempts": GROUP_SIZE}
            client.observe(SERVED, i // 10, [row], request_id=f"served-{i}")
            self._known.append(i)  # what was not acknowledged may still be under way

    def check(self) -> None:
        world, history = self._world, self._scenario.history
        for row in history.rows("SELECT * FROM runs WHERE name = ? AND base_position > 0", SERVED):
            world.sometimes["a run let go of prompts"] += 1
            below = "SELECT 1 FROM log WHERE run_id = ? AND position <= ? AND kind = 'observe' AND body LIKE ?"
            if history.rows(below, row["id"], row["base_position"], f"%canary of {SERVED}%"):
                world.violated(f"a text of {SERVED} stands in the log below its base")


def _mislead(scenario: _Scenario) -> None:
    """Rates known beforehand that are right for a while, and then the contrary: the choice falls back to chance."""
    client, chance = scenario.client(), scenario.world.chance
    for step in range(17):
        known = 0.05 if step % 2 else 0.95
        true = known if step < 12 else 1 - known
        rows = [
            {
                "prompt_id": f"m{64 * step + i}",
                "text": f"Say {64 * step + i}.",
                "prior_rate": known,
                "successes": sum(chance.random() < true for _ in range(GROUP_SIZE)),
                "attempts": GROUP_SIZE,
            }
            for i in range(64)
        ]
        for _ in range(20):
            try:
                if step == 0:
                    client.put_run(MISLED, embedder="none", group_size=GROUP_SIZE)
                client.observe(MISLED, step, rows, request_id=f"m{step}")
                break
            except EvenOddsError:
                scenario.world.pause(1.0)
    with suppress(EvenOddsError):
        client.select_batch(MISLED, 17, 4)
