"""What a large pool and a long history cost: time of each call and where it goes, memory, cold start.

    python -m benchmarks.scale                                    all of it, on SQLite; a million prompts take a while
    python -m benchmarks.scale --database postgresql
    python -m benchmarks.scale --pools 29115 --parts select,numpy

Prompts and outcomes are generated: no data is needed. The service runs as its own process on loopback, over a fresh
database in a temporary folder, and is filled by `evenodds import`. Server-side times are those of its `Server-Timing`
header: from the request's head to the reply's. The `database` phase of a call overlaps with `catch-up`, which reads the
log. `numpy` is the same selection written plainly, whole arrays in one process, timed in this one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import httpx
import numpy as np
from benchmarks.latency import generated_text, postgresql, service_process
from numpy.typing import NDArray

from evenodds import Client
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.mixture import MEMORIES, PRIORS, STRENGTHS
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.selection.eligibility import rest_steps
from evenodds_service.domain.selection.pickers import DRAWN, greedy_diverse
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store

RUN = "scale"
BATCH, GROUP_SIZE = 256, 8
BATCHES = (16, 64, 256, 1_024)
N_CATEGORIES, N_FEATURES = 8, 84
CONNECTIONS, SECONDS = 32, 10.0
LONG_HISTORY, PER_CALL = 1_000_000, 10_000
WARM_UP_STEPS = 20
AIMS_MS = {29_115: 15.0, 100_000: 30.0, 1_000_000: 120.0}
PARTS = ("start", "select", "numpy", "predict", "cold")
STARTS = 5

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time, memory and cold start as pools and histories grow.")
    parser.add_argument("--pools", default="29115,100000,1000000", help="pool sizes (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--repetitions", type=int, default=15, help="of each call (default: %(default)s)")
    parser.add_argument("--observations", type=int, default=LONG_HISTORY, help="before the cold start (%(default)s)")
    arguments = parser.parse_args()
    load, _, _ = os.getloadavg()
    print(f"{os.cpu_count()} cores, load {load:.1f} before the start, {arguments.database}", flush=True)
    if "start" in arguments.parts.split(","):
        time_starts()
    growth = Growth()
    for size in arguments.pools.split(","):
        growth.size = int(size)
        with tempfile.TemporaryDirectory(prefix="evenodds-scale-") as name, database(arguments, Path(name)) as url:
            measure(url, Path(name), arguments, growth)
    print(growth.table())


class Growth:
    """Figures by the size of the pool, and how fast they grow with it."""

    def __init__(self) -> None:
        self.size = 0
        self._figures: dict[str, dict[int, float]] = {}

    def note(self, name: str, value: float) -> None:
        """Of the pool that is measured."""
        self._figures.setdefault(name, {})[self.size] = value

    def table(self) -> str:
        """A row for each figure; e of size^e by least squares in logarithms, where there are two sizes or more."""
        sizes = sorted({size for values in self._figures.values() for size in values})
        lines = [
            "",
            "| | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent |",
            "|---" * (len(sizes) + 2) + "|",
        ]
        for name, values in self._figures.items():
            known = [(size, value) for size, value in sorted(values.items()) if value > 0.0]
            exponent = f"{slope(known):.2f}" if len(known) > 1 else ""
            cells = [f"{values[size]:,.2f}" if size in values else "" for size in sizes]
            lines.append(f"| {name} | {' | '.join(cells)} | {exponent} |")
        return "\n".join(lines)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of a straight line through these points in logarithms, by least squares."""
    x, y = np.log(np.array(points)).T
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


@contextmanager
def database(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The URL of an empty database of the kind asked for."""
    if arguments.database == "sqlite":
        yield f"sqlite:///{folder}/evenodds.db"
        return
    with postgresql(folder) as url:
        yield url


def measure(url: str, folder: Path, arguments: argparse.Namespace, growth: Growth) -> None:
    parts = arguments.parts.split(",")
    print(f"\n== {growth.size:,} prompts", flush=True)
    with service_process(url) as (base_url, pid):
        bench = Bench(base_url, growth.size)
        fill(bench, folder, pid)
        bench.steps(WARM_UP_STEPS)
        if "select" in parts:
            time_steps(bench, arguments.repetitions, growth)
            time_batches(bench, arguments.repetitions)
            print(f"memory of the service: {memory(pid)}")
            growth.note("memory, GB", gigabytes(pid)[0])
            growth.note("memory at most, GB", gigabytes(pid)[1])
            time_floor(bench, growth)
        if "numpy" in parts:
            compare_with_numpy(bench, url, arguments.repetitions)
        if "predict" in parts:
            time_predictions(bench, growth)
        if "cold" in parts:
            lengthen(bench, arguments.observations)
            print(f"memory of the service: {memory(pid)}")
    if "cold" in parts:
        time_cold_start(url, growth)


def time_starts() -> None:
    """What it costs to import the client, and to start the service over a database that is there: medians."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for code in ("pass", "import evenodds", "from evenodds import Client"):
        taken = []
        for _ in range(STARTS + 1):  # the first one compiles
            command = [sys.executable, "-c", f"import time\n{code}\nprint(time.process_time())"]
            started = time.perf_counter()
            said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            taken.append((time.perf_counter() - started, float(said)))
        seconds, processor = 1_000 * np.median(taken[1:], axis=0)
        print(f"python -c {code!r}: {seconds:.0f} ms, {processor:.0f} ms of a processor", flush=True)
    with tempfile.TemporaryDirectory(prefix="evenodds-scale-") as folder:
        taken = []
        for _ in range(STARTS + 1):  # the first one makes the database
            started = time.perf_counter()
            with service_process(f"sqlite:///{folder}/evenodds.db") as (_, pid):
                taken.append((time.perf_counter() - started, processor_seconds(pid)))
    seconds, processor = np.median(taken[1:], axis=0)
    print(f"serve, from its start until it is ready: {seconds:.2f} s, {processor:.2f} s of a processor", flush=True)


def processor_seconds(pid: int) -> float:
    """What a process has used so far; Linux only, else nothing."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return float("nan")
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Bench:
    """A trainer that speaks raw HTTP to the service and keeps what the service says of its time."""

    def __init__(self, base_url: str, n_prompts: int) -> None:
        self.base_url = base_url
        self.n_prompts = n_prompts
        self.step = 0
        self.chance = random.Random(1)
        self._http = httpx.Client(base_url=base_url, timeout=600.0)

    def call(self, path: str, body: Mapping[str, object]) -> tuple[dict[str, float], dict[str, object]]:
        """Milliseconds by phase, with the client's own `whole`, and the reply."""
        content = json.dumps(body).encode()
        started = time.perf_counter()
        reply = self._http.post(path, content=content, headers={"Content-Type": "application/json"})
        whole = 1_000 * (time.perf_counter() - started)
        if reply.status_code != 200:
            raise SystemExit(f"{path} answered {reply.status_code}: {reply.text}")
        return {**phases_of(reply.headers["server-timing"]), "whole": whole}, reply.json()

    def select(self, batch_size: int = BATCH) -> tuple[dict[str, float], list[str]]:
        self.step += 1
        timed, reply = self.call("/select_batch", {"run": RUN, "step": self.step, "batch_size": batch_size})
        prompts = reply["prompts"]
        assert isinstance(prompts, list)
        return timed, [prompt["prompt_id"] for prompt in prompts]

    def observe(self, ids: Sequence[str]) -> dict[str, float]:
        outcomes = [{"prompt_id": i, "successes": self.successes(i), "attempts": GROUP_SIZE} for i in ids]
        return self.call("/observe", {"run": RUN, "step": self.step, "observations": outcomes})[0]

    def predict(self) -> dict[str, float]:
        return self.call("/predict", {"run": RUN, "prompts": [{"prompt_id": self.any_id()}]})[0]

    def successes(self, prompt_id: str) -> int:
        """More in later categories: features tell something, so that a choice computes what it does of real runs."""
        rate = 0.1 + 0.1 * (int(prompt_id[1:]) % N_CATEGORIES)
        return sum(self.chance.random() < rate for _ in range(GROUP_SIZE))

    def any_id(self) -> str:
        return prompt_id(self.chance.randrange(self.n_prompts))

    def steps(self, n: int) -> None:
        """Half of what is observed is random, so that the history does not live on a few prompts."""
        for _ in range(n):
            _, chosen = self.select()
            self.observe([*chosen[: BATCH // 2], *(self.any_id() for _ in range(BATCH // 2))])


def prompt_id(index: int) -> str:
    return f"p{index:07d}"


def phases_of(header: str) -> dict[str, float]:
    """Milliseconds by name of a Server-Timing header."""
    pairs = (part.strip().split(";dur=") for part in header.split(","))
    return {name: float(milliseconds) for name, milliseconds in pairs}


def fill(bench: Bench, folder: Path, pid: int) -> None:
    """Import a generated pool as a user would."""
    file, chance = folder / "pool.jsonl", random.Random(0)
    with file.open("w") as lines:
        for index in range(bench.n_prompts):
            text = f"{generated_text(chance)} ({index})"
            lines.write(
                json.dumps({"prompt_id": prompt_id(index), "text": text, "category": f"g{index % N_CATEGORIES}"}) + "\n"
            )
    with Client(bench.base_url) as client:
        client.put_run(RUN, group_size=GROUP_SIZE)
    command = [sys.executable, "-m", "evenodds_service", "import", RUN, str(file), "--url", bench.base_url]
    for what in ("imported", "imported again"):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        print(
            f"{what} in {seconds:.1f} s, {bench.n_prompts / seconds:,.0f} prompts/s; memory {memory(pid)}", flush=True
        )
    file.unlink()
    first, _ = bench.select()
    print(f"first selection, which loads the pool: {first['total'] / 1_000:.1f} s", flush=True)


def time_steps(bench: Bench, repetitions: int, growth: Growth) -> None:
    """A trainer's step with a gateway's call after it: medians in milliseconds, by phase."""
    timed: dict[str, list[dict[str, float]]] = {"select": [], "observe": [], "predict, first": [], "predict": []}
    for _ in range(repetitions):
        times, chosen = bench.select()
        timed["select"].append(times)
        timed["observe"].append(bench.observe(chosen))
        timed["predict, first"].append(bench.predict())
        timed["predict"].append(bench.predict())
    for call, times_of in timed.items():
        names = [name for name in times_of[-1] if name not in ("total", "whole")]
        medians = {name: median(times_of, name) for name in ("total", "whole", *names)}
        aim = f"  aim {AIMS_MS[bench.n_prompts]:g}" if call == "select" and bench.n_prompts in AIMS_MS else ""
        where = ", ".join(f"{name} {medians[name]:.1f}" for name in names)
        growth.note(f"{call}, ms", medians["total"])
        for name in names if call == "select" else ():
            growth.note(f"select: {name}", medians[name])
        print(f"{call:16} server {medians['total']:7.1f} ms{aim}; client {medians['whole']:7.1f}; {where}", flush=True)


def time_floor(bench: Bench, growth: Growth) -> None:
    """What no selection gets below: a round trip over HTTP, and one pass over as many features, on one core."""
    with httpx.Client(base_url=bench.base_url) as http:
        trips = [timed_ms(lambda: http.get("/healthz")) for _ in range(50)]
    features = np.ones((bench.n_prompts, N_FEATURES), dtype=np.float32)
    passes = [timed_ms(features.max) for _ in range(10)]
    print(f"floor: HTTP {np.median(trips):.1f} ms, one pass over the features {np.median(passes):.1f} ms", flush=True)
    growth.note("floor: HTTP, ms", float(np.median(trips)))
    growth.note("floor: one pass over the features, ms", float(np.median(passes)))


def timed_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1_000 * (time.perf_counter() - started)


def time_batches(bench: Bench, repetitions: int) -> None:
    """How selection grows with the batch."""
    figures = []
    for batch_size in BATCHES:
        timed = []
        for _ in range(repetitions):
            times, chosen = bench.select(batch_size)
            timed.append(times)
            bench.observe(chosen[:BATCH])
        figures.append(f"B {batch_size}: {median(timed, 'total'):.1f}")
    print(f"select by batch, server ms: {', '.join(figures)}", flush=True)


def median(timed: Sequence[Mapping[str, float]], name: str) -> float:
    return float(np.median([times.get(name, 0.0) for times in timed]))


def time_predictions(bench: Bench, growth: Growth) -> None:
    """One known id a request: alone, and at 32 connections."""
    alone = [bench.predict() for _ in range(300)]
    print(f"predict known id, alone: server {median(alone, 'total'):.2f} ms, client {median(alone, 'whole'):.2f} ms")
    growth.note("predict known id, ms", median(alone, "total"))
    bodies = [json.dumps({"run": RUN, "prompts": [{"prompt_id": bench.any_id()}]}).encode() for _ in range(2_000)]
    host, port = bench.base_url.removeprefix("http://").split(":")
    seconds = asyncio.run(hammer(host, int(port), bodies))
    growth.note(f"predictions/s at {CONNECTIONS} connections", len(seconds) / SECONDS)
    print(
        f"predict known id, {CONNECTIONS} connections: {len(seconds) / SECONDS:,.0f} requests/s, median "
        f"{1_000 * np.median(seconds):.1f} ms, p99 {1_000 * np.percentile(seconds, 99):.1f} ms",
        flush=True,
    )


async def hammer(host: str, port: int, bodies: Sequence[bytes]) -> list[float]:
    """Seconds of each request; every connection sends its next one when it has its reply.

    Speaks HTTP by hand: a client library would take more time than the service.
    """
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS

    async def caller(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        turn = number
        while (started := time.perf_counter()) < end:
            body = bodies[turn % len(bodies)]
            turn += CONNECTIONS
            head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            reply = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not reply.startswith(b"http/1.1 200"):
                raise SystemExit(f"/predict answered {reply!r}")
            await reader.readexactly(int(reply.split(b"content-length: ")[1].split(b"\r\n")[0]))
            seconds.append(time.perf_counter() - started)
        writer.close()

    await asyncio.gather(*(caller(number) for number in range(CONNECTIONS)))
    return seconds


def lengthen(bench: Bench, n_observations: int) -> None:
    """Observe on until the history has so many."""
    started = time.perf_counter()
    for _ in range(n_observations // PER_CALL):
        bench.step += 1
        bench.observe([bench.any_id() for _ in range(PER_CALL)])
    seconds = time.perf_counter() - started
    print(f"{n_observations:,} observations in {seconds:.1f} s, {n_observations / seconds:,.0f}/s", flush=True)


def time_cold_start(url: str, growth: Growth) -> None:
    """From the start of a process to its first answer: from the log alone, then from a checkpoint."""
    store = Store(open_engine(url))
    for what in ("the log alone", "a checkpoint"):
        if what == "a checkpoint":
            run = store.run(RUN)
            live = LiveRun(run.id)
            live.catch_up(store, run)
            live.save(store, run, now=datetime.now(timezone.utc))
            print(f"checkpoint: {len(to_bytes(live.state)) / 1e6:.0f} MB, and the pool's features")
            del live
        started = time.perf_counter()
        with service_process(url) as (base_url, pid):
            up = time.perf_counter() - started
            timed = Bench(base_url, growth.size).predict()
            seconds = time.perf_counter() - started
            growth.note(f"first answer from {what}, s", seconds)
            print(
                f"cold start from {what}: {seconds:.1f} s to the first answer (process up {up:.1f} s, loading "
                f"{timed['catch-up'] / 1_000 if 'catch-up' in timed else timed['total'] / 1_000:.1f} s); "
                f"memory {memory(pid)}",
                flush=True,
            )
    store.close()


def memory(pid: int) -> str:
    now, peak = gigabytes(pid)
    return f"{now:.2f} GB, at most {peak:.2f} GB"


def gigabytes(pid: int) -> tuple[float, float]:
    """Resident memory of a process and its peak; Linux only, else nothing."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return float("nan"), float("nan")
    kilobytes = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
    return int(kilobytes["VmRSS"].split()[0]) / 1e6, int(kilobytes["VmHWM"].split()[0]) / 1e6


def compare_with_numpy(bench: Bench, url: str, repetitions: int) -> None:
    """The service's server-side time against the same selection written plainly, in the same states, turn by turn."""
    store = Store(open_engine(url))
    live = LiveRun(store.run(RUN).id)
    served, plain, forecasts = [], [], []
    for _ in range(repetitions):
        live.catch_up(store, store.run(RUN))
        started = time.perf_counter()
        prompts = plain_selection(live.state, live.pool, step=bench.step + 1)
        plain.append(1_000 * (time.perf_counter() - started))
        times, chosen = bench.select()
        served.append(times["total"])
        informative, _ = informative_moments(*live.beliefs("gps"), GROUP_SIZE)
        forecasts.append((informative[[live.pool.index[i] for i in chosen]].mean(), informative[prompts].mean()))
        bench.observe(chosen)
    store.close()
    ours, theirs = np.median(served), np.median(plain)
    print(
        f"select in the service {ours:.1f} ms, in plain numpy {theirs:.1f} ms: {ours / theirs:.2f} times (aim 1.5); "
        "informative share foreseen {:.3f} and {:.3f}".format(*np.mean(forecasts, axis=0)),
        flush=True,
    )


def plain_selection(state: State, pool: Pool, *, step: int) -> IntArray:
    """The default selection as one would write it with numpy, without blocks, threads and closed forms. int64 [B]."""
    generator = np.random.default_rng([0, step])
    n = state.n_prompts
    assert state.basis is not None
    x = pool.matrix(state.basis, n)
    means = {
        "flat": np.full(n, 0.5),
        "running mean": np.full(n, (state.running_successes + 1) / (state.running_counts + 2)),
    }
    for name, regression, features in (
        ("surface", state.surface, x[:, : state.basis.n_surface]),
        ("quick", state.quick, x[:, : state.basis.n_surface]),
        ("embedding", state.embedding, x),
    ):
        if regression is not None:
            covariance = np.linalg.inv(regression.precision).astype(np.float32)
            variance = ((features @ covariance) * features).sum(axis=1)
            logit = features @ regression.weights.astype(np.float32)
            means[name] = 1 / (1 + np.exp(-logit / np.sqrt(1 + np.pi / 8 * variance)))
    mean, square = np.zeros(n), np.zeros(n)
    kept = state.mixture.kept()
    for c, i, j in zip(*np.nonzero(kept), strict=True):
        weight, strength = kept[c, i, j], STRENGTHS[i]
        prior = np.clip(means[PRIORS[c]], 1e-3, 1 - 1e-3)
        a = prior * strength + state.successes_L_N[j, :n]
        total = strength + state.successes_L_N[j, :n] + state.failures_L_N[j, :n]
        mean += weight * a / total
        square += weight * a * (a + 1) / (total * (total + 1))
    assert len(MEMORIES) == kept.shape[2]
    concentration = np.clip(mean * (1 - mean) / np.maximum(square - mean**2, 1e-300) - 1, 1e-2, 1e6)
    a, b = mean * concentration, (1 - mean) * concentration
    right, wrong = moment(a, concentration, GROUP_SIZE), moment(b, concentration, GROUP_SIZE)
    second = moment(a, concentration, 2 * GROUP_SIZE) + moment(b, concentration, 2 * GROUP_SIZE)
    second += 2 * right * moment(b, concentration + GROUP_SIZE, GROUP_SIZE)
    informative = 1 - right - wrong
    scores = informative + 0.5 * np.sqrt(np.maximum(second - (right + wrong) ** 2, 0))

    ties = generator.random(n)
    last_seen = np.maximum(state.last_selected_N, state.last_step_N)
    quota = int(0.05 * BATCH + generator.random())
    oldest = np.argpartition(last_seen - 1e-9 * ties, quota)[:quota]
    may = np.abs(step - last_seen) > rest_steps(n, BATCH)
    may |= last_seen < 0
    may[oldest] = False
    worth = np.where(may, scores, -np.inf)
    good = np.flatnonzero(worth >= worth.max() - 0.1)
    if len(good) < BATCH:
        good = np.argpartition(-worth, BATCH)[:BATCH]
    shortlist = generator.permutation(good)[: DRAWN * (BATCH - quota)]

    def directions(rows: IntArray) -> FloatArray:
        unit = x[rows, 1:]
        return np.asarray(unit / np.linalg.norm(unit, axis=1, keepdims=True))

    anchor = directions(np.concatenate(state.recent_batches)).mean(axis=0) if state.recent_batches else None
    order = greedy_diverse(np.zeros(len(shortlist)), directions(shortlist), BATCH - quota, anchor_D=anchor, weight=1.0)
    chosen = np.concatenate((oldest, shortlist[order]))
    rest = np.argsort(-scores)  # the forecast of how many to take for B informative groups
    np.searchsorted(np.cumsum(informative[rest]), BATCH)
    return np.asarray(chosen, dtype=np.int64)


def moment(x: FloatArray, total: FloatArray, m: int) -> FloatArray:
    """E[p^m] of the Beta with parameters x and total - x."""
    ratio = np.ones(len(x))
    for j in range(m):
        ratio *= (x + j) / (total + j)
    return ratio


if __name__ == "__main__":
    main()
