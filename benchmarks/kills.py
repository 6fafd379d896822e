"""Kill -9 a worker in the middle of a fit, again and again, while another stands by and services answer.

What must not happen is counted as a fault: a refit that fails or that nobody takes over, a version published twice or
left out, and an answer that is not the one of its log position. Between two entries of the log every answer must be
the same, to the bit, on every service: a model is used whole or not at all.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from evenodds import Client, RefitState
from evenodds_service.domain.log_entries import SnapshotEntry
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store

ROOT = Path(__file__).parents[1]
RUN = "kills"
POOL_SIZE = 3_000
OBSERVED_PER_CYCLE = 1_500
GROUP_SIZE = 8
LEASE_SECONDS = 2
PATIENCE_SECONDS = 120.0
_LISTENING = "running on "


@dataclass
class Kills:
    """What came of killing workers.

    Attributes:
        refits: How many were asked for; the worker of each was killed once.
        in_fit: How many kills met a refit that was still running.
        taken_over: How many refits another worker finished.
        answers: Replies that the services gave meanwhile.
        faults: What must not happen, in words.
    """

    refits: int = 0
    in_fit: int = 0
    taken_over: int = 0
    answers: int = 0
    faults: list[str] = field(default_factory=list)


def kill_workers(url: str, base_urls: Sequence[str], n: int, *, seed: int = 0) -> Kills:
    """Observe, ask for a refit, kill its worker in the middle, and wait until another has published it; n times.

    Args:
        url: Of a migrated database without runs.
        base_urls: Of services over it, at least one.
        seed: Of the moments at which workers are killed.
    """
    kills, chance = Kills(), random.Random(seed)
    ids = [f"p{i}" for i in range(POOL_SIZE)]
    with ExitStack() as stack:
        client = stack.enter_context(Client(base_urls[0], timeout_seconds=60))
        client.put_run(RUN, group_size=GROUP_SIZE, refit={"every_observations": 10**7, "every_seconds": 10**7})
        client.add_prompts(RUN, [{"prompt_id": i, "text": _text(i, chance)} for i in ids])
        watch = Watch(base_urls, [*ids[:40], {"text": "Prove a thing that nobody has seen."}])
        stack.callback(watch.stop)
        workers = [stack.enter_context(working(url)) for _ in range(2)]
        shortest = 0.3
        for cycle in range(n):
            _observe(client, ids, cycle, chance)
            kills.refits += 1
            begun = _until(client, client.refit(RUN).refit_id, "running", "done", "failed")
            time.sleep(chance.uniform(0.0, shortest))
            # A worker's name ends in its process id.
            victim = next(worker for worker in workers if str(begun.worker).endswith(f"-{worker.pid}"))
            victim.kill()
            victim.wait()
            workers.remove(victim)
            kills.in_fit += _refit(client, begun.refit_id).status == "running"
            workers.append(stack.enter_context(working(url)))
            done = _until(client, begun.refit_id, "done", "failed")
            kills.taken_over += done.attempts > 1 and done.worker != begun.worker
            if done.status == "failed":
                kills.faults.append(f"refit {done.refit_id} failed: {done.error}")
            report = done.report or {}
            shortest = min(shortest, report.get("seconds_loading", 0.0) + report.get("seconds_fitting", shortest))
        watch.stop()
        kills.answers = watch.answers
        kills.faults += watch.faults + _faults_in_the_log(url, client, n, watch.versions)
    if kills.taken_over != kills.in_fit:
        kills.faults.append(f"{kills.in_fit} workers were killed in the middle, {kills.taken_over} taken over")
    return kills


class Watch:
    """Asks every service for the same predictions over and over, from a thread for each, until it is stopped.

    Attributes:
        versions: The model version that was answered at each log position.
        answers: How many replies there were.
        faults: Replies that differ from another one of the same log position, and services that did not reply.
    """

    def __init__(self, base_urls: Sequence[str], prompts: Sequence[str | Mapping[str, object]]) -> None:
        self.versions: dict[int, int] = {}
        self.answers = 0
        self.faults: list[str] = []
        self._prompts = prompts
        self._replies: dict[int, str] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(base_url,)) for base_url in base_urls]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Repeating it is safe."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, base_url: str) -> None:
        with Client(base_url, timeout_seconds=60) as client:
            while not self._stop.wait(0.05):
                try:
                    reply = client.predict(RUN, self._prompts)
                except Exception as error:
                    self.faults.append(f"{base_url}: {error}")
                    return
                text = reply.model_dump_json()
                with self._lock:
                    self.answers += 1
                    self.versions[reply.log_position] = reply.model_version
                    if self._replies.setdefault(reply.log_position, text) != text:
                        self.faults.append(f"two answers at log position {reply.log_position}")


@contextmanager
def working(url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of `evenodds work`, killed at the end."""
    settings = {"EVENODDS_WORKER_LEASE_SECONDS": str(LEASE_SECONDS), "EVENODDS_WORKER_POLL_SECONDS": "0.05"}
    with _process(url, "work", settings, stderr=subprocess.DEVNULL) as process:
        yield process


@contextmanager
def serving(url: str) -> Iterator[str]:
    """The base URL of a process of `evenodds serve`, killed at the end."""
    with tempfile.TemporaryFile() as log, _process(url, "serve", {"EVENODDS_PORT": "0"}, stderr=log) as process:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            log.seek(0)
            said = log.read().decode(errors="replace")
            if _LISTENING in said and "\n" in said.partition(_LISTENING)[2]:
                yield said.partition(_LISTENING)[2].split()[0]
                return
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the service did not start: {said}")
            time.sleep(0.05)


@contextmanager
def _process(
    url: str, command: str, settings: Mapping[str, str], *, stderr: object
) -> Iterator[subprocess.Popen[bytes]]:
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("client", "service"))
    environment = {**os.environ, "PYTHONPATH": paths, "EVENODDS_DATABASE_URL": url, **settings}
    arguments = [sys.executable, "-m", "evenodds_service", command]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)  # type: ignore[call-overload]  # a file or a constant
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _text(prompt_id: str, chance: random.Random) -> str:
    words = ("find", "number", "triangle", "integer", "sum", "angle", "prime", "digits", "circle", "area")
    kind = "Prove" if int(prompt_id[1:]) % 2 else "Compute"
    return f"{kind}: {' '.join(chance.choice(words) for _ in range(30))} {prompt_id}."


def _observe(client: Client, ids: Sequence[str], step: int, chance: random.Random) -> None:
    """Compute is mostly solved, Prove mostly not."""
    rows = [
        {"prompt_id": i, "successes": chance.randint(0, 3) + 5 * (int(i[1:]) % 2 == 0), "attempts": GROUP_SIZE}
        for i in chance.sample(ids, OBSERVED_PER_CYCLE)
    ]
    client.observe(RUN, step, rows)


def _until(client: Client, refit_id: int, *statuses: str) -> RefitState:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (refit := _refit(client, refit_id)).status not in statuses:
        if time.monotonic() > deadline:
            raise SystemExit(
                f"refit {refit_id} is {refit.status} after {PATIENCE_SECONDS:.0f} s, worker {refit.worker}"
            )
        time.sleep(0.01)
    return refit


def _refit(client: Client, refit_id: int) -> RefitState:
    return next(refit for refit in client.refits(RUN).refits if refit.refit_id == refit_id)


def _faults_in_the_log(url: str, client: Client, n: int, answered: Mapping[int, int]) -> list[str]:
    """Whether versions 1 to n were published once each, in order, and answered from their positions on."""
    store = Store(open_engine(url))
    run = store.run(RUN)
    version, versions_at, published = 0, {0: 0}, []
    position = 0
    while entries := store.entries(run.id, after=position):
        for entry in entries:
            if isinstance(entry, SnapshotEntry):
                version = entry.version
                published.append(version)
            versions_at[entry.position] = version
            position = entry.position
    store.close()
    faults = []
    if published != list(range(1, n + 1)):
        faults.append(f"{n} refits published versions {published}")
    claimed = Counter(refit.model_version for refit in client.refits(RUN).refits)
    if n <= 100 and claimed != Counter(range(1, n + 1)):
        faults.append(f"{n} refits name versions {dict(claimed)}")
    faults += [
        f"position {at} was answered with version {version}, the log has {versions_at[at]} there"
        for at, version in answered.items()
        if versions_at[at] != version
    ]
    return faults
