"""What a training step pays for choosing its batch and for telling what came of it: ours, other methods, and the floor.

    python -m benchmarks.peers                                        all of it; a million prompts are imported: minutes
    python -m benchmarks.peers --pools 29115,1000000 --served 29115   a million in process alone
    python -m benchmarks.peers --pools 10000000 --served ""           ten million: 10 GB and ten minutes
    python -m benchmarks.peers --vizier PYTHON                        also OSS Vizier, which that Python has

Batches of 256 with 8 attempts each; generated outcomes that depend on the category, no data. The other methods are
those of `rivals` and `arms`, arrays in this process. Ours is timed in this process too (fold, beliefs and choice,
without a database, a log that lasts, or HTTP), and as it is served: `evenodds serve` over SQLite on loopback, whole
requests as the client sees them. The floor: no service is faster than a round trip of `GET /healthz`, and no choice
that reads all features than one pass over their memory. Writes `results/peers.md` and `.json`.

OSS Vizier is asked over gRPC for 256 trials at a time, by chance and by its default algorithm. Its one parameter is the
prompt's place, an integer. What it costs is shown, not what it would find.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
from benchmarks.arms import Pools
from benchmarks.latency import service_process
from benchmarks.report import RESULTS
from benchmarks.rivals import Bots, Forecast, Method, MoPPS
from benchmarks.scale import (
    BATCH,
    GROUP_SIZE,
    N_CATEGORIES,
    N_FEATURES,
    Bench,
    fill,
    gigabytes,
    processor_seconds,
    timed_ms,
)

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.prediction import beliefs_of
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry
from evenodds_service.domain.prompts import RawBlock
from evenodds_service.domain.selection.selection import Forecasts, SelectionRequest, choose_batch
from evenodds_service.domain.settings import RunSettings
from evenodds_service.model.surface import SURFACE_NAMES
from evenodds_service.runtime.live_run import RAW_MOST

WARM_UP = 3
STEP_SECONDS = 60.0
TOGETHER = 50_000
VIZIER_SECONDS = 100  # for all steps of one algorithm
EMBEDDING_WIDTH = 256  # of the built-in embedder

VIZIER = """
import json, sys, time
from vizier.service import clients
from vizier.service import pyvizier as vz
n, batch, steps, algorithm = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
problem = vz.ProblemStatement()
problem.search_space.root.add_int_param("prompt", 0, n - 1)
problem.metric_information.append(vz.MetricInformation(name="informative", goal=vz.ObjectiveMetricGoal.MAXIMIZE))
config = vz.StudyConfig.from_problem(problem)
config.algorithm = algorithm
study = clients.Study.from_study_config(config, owner="peers", study_id=f"{algorithm}-{n}")
for _ in range(steps):
    started = time.perf_counter()
    trials = study.suggest(count=batch)
    suggested = time.perf_counter()
    for trial in trials:
        trial.complete(vz.Measurement({"informative": float(trial.parameters["prompt"] % 8 in (2, 3, 4))}))
    print(json.dumps([1000 * (suggested - started), 1000 * (time.perf_counter() - suggested)]), flush=True)
"""
"""Runs in a Python of its own: `google-vizier[jax]` needs packages that this project does not."""


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of one step.

    Attributes:
        select_ms, update_ms: As a trainer waits for them, medians; None where the floor has no such part.
        processor_ms: Of both, mean of the processor's time, which other work on the machine changes little; of the
            service's process where it is served. None where it was not measured.
    """

    method: str
    n_prompts: int
    select_ms: float | None
    update_ms: float | None
    steps: int
    processor_ms: float | None = None

    @property
    def together_ms(self) -> float:
        return (self.select_ms or 0.0) + (self.update_ms or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Selection and update per training step, beside other methods.")
    parser.add_argument("--pools", default="29115,1000000", help="pool sizes in process (default: %(default)s)")
    parser.add_argument("--served", default="29115,1000000", help="pool sizes over HTTP (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--vizier", metavar="PYTHON", help="a Python that has google-vizier[jax]")
    parser.add_argument("--vizier-steps", type=int, default=3, help="of each algorithm (default: %(default)s)")
    parser.add_argument("--note", default="", help="for the head of the results: the day, the machine")
    arguments = parser.parse_args()
    load, _, _ = os.getloadavg()
    head = f"{os.cpu_count()} cores, load {load:.1f} before the start. {arguments.note}".strip()
    print(head, flush=True)
    rows = []
    for row in measured(arguments):
        print(line_of(row), flush=True)
        rows.append(row)
    write(head, rows)


def measured(arguments: argparse.Namespace) -> Iterator[Row]:
    for size in sizes_of(arguments.pools):
        yield floor_of_memory(size)
        for contender in contenders(size):
            yield in_process(contender, size, arguments.steps)
    for size in sizes_of(arguments.served):
        yield from served(size, arguments.steps)
    if arguments.vizier:
        for algorithm in ("RANDOM_SEARCH", "DEFAULT"):
            yield from vizier(arguments.vizier, algorithm, sizes_of(arguments.pools)[0], arguments.vizier_steps)


def sizes_of(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


@dataclass(frozen=True, slots=True)
class Contender:
    """A method by its name in the table; `n_candidates` prompts by chance are what it chooses among, None for all."""

    name: str
    make: Callable[[], Method]
    n_candidates: int | None = None


def contenders(n_prompts: int) -> tuple[Contender, ...]:
    chance = np.random.default_rng(0)

    def bots() -> Bots:
        return Bots(0.5 * chance.random(n_prompts), 0.5 + 0.5 * chance.random(n_prompts), GROUP_SIZE)

    def mopps() -> MoPPS:
        return MoPPS(n_prompts, GROUP_SIZE)

    return (
        Contender("prime-rl's difficulty pools", lambda: Pools(n_prompts)),
        Contender("MoPPS, 16 B candidates (published)", mopps, n_candidates=16 * BATCH),
        Contender("MoPPS, whole pool", mopps),
        Contender("BOTS", bots),
        Contender("ours, in process", lambda: Ours(n_prompts)),
    )


class Ours:
    """The fold, beliefs and choice of the service on generated features, one thread, no database and no HTTP."""

    def __init__(self, n_prompts: int) -> None:
        self._pool = Pool(surface_width=len(SURFACE_NAMES), embedding_width=EMBEDDING_WIDTH, lets_go=True)
        self._pool.reserve(n_prompts)
        self._settings = RunSettings(group_size=GROUP_SIZE)
        self._state = State()
        for block in generated_blocks(n_prompts):
            self._pool.append(block)
            fold(self._state, PoolEntry(self._state.position + 1, self._pool.n), self._pool)
            self._pool.let_go(self._state.basis, above=RAW_MOST)

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        informative = (successes > 0) & (successes < attempts)
        entry = ObserveEntry(self._state.position + 1, step, prompts, successes, attempts, informative)
        fold(self._state, entry, self._pool)

    def predict(self) -> Forecast:
        a, b = beliefs_of(self._state, self._pool)
        return Forecast(a / (a + b), informative_moments(a, b, GROUP_SIZE)[0])

    def select(self, candidates: IntArray, batch_size: int, *, step: int, generator: np.random.Generator) -> IntArray:
        """Of the whole pool: the service asks for no candidates by default."""
        request = SelectionRequest(step, batch_size)

        def forecasts_of(rows: IntArray | None) -> Forecasts:
            return Forecasts.of(*beliefs_of(self._state, self._pool, rows), GROUP_SIZE)

        chosen = choose_batch(self._state, self._pool, self._settings, request, forecasts_of)
        fold(self._state, SelectEntry(self._state.position + 1, step, chosen.prompts), self._pool)
        return chosen.prompts


def generated_blocks(n_prompts: int) -> Iterator[RawBlock]:
    """As wide as texts under the built-in embedder; the numbers are noise but for the category."""
    chance = np.random.default_rng(0)
    for first in range(0, n_prompts, TOGETHER):
        rows = range(first, min(first + TOGETHER, n_prompts))
        yield RawBlock(
            first=first,
            prompt_ids=tuple(f"p{i:07d}" for i in rows),
            groups=tuple(f"g{i % N_CATEGORIES}" for i in rows),
            numeric=(None,) * len(rows),
            prior_rates_N=np.full(len(rows), np.nan, dtype=np.float32),
            surface_N_S=chance.standard_normal((len(rows), len(SURFACE_NAMES)), dtype=np.float32),
            embedding_N_D=chance.standard_normal((len(rows), EMBEDDING_WIDTH), dtype=np.float32) / 16.0,
        )


def in_process(contender: Contender, n_prompts: int, steps: int) -> Row:
    """A course of so many steps; drawing the candidates is part of the choice."""
    method = contender.make()
    generator = np.random.default_rng(1)
    everyone: IntArray = np.arange(n_prompts)
    rates_N = 0.1 + 0.1 * (everyone % N_CATEGORIES)
    times = []
    used = 0.0
    for step in range(WARM_UP + steps):
        started, before = time.perf_counter(), time.process_time()
        candidates = everyone
        if contender.n_candidates is not None:  # drawn without touching the pool
            candidates = np.unique(generator.integers(n_prompts, size=contender.n_candidates))
        prompts = method.select(candidates, BATCH, step=step, generator=generator)
        selected = time.perf_counter()
        attempts = np.full(len(prompts), float(GROUP_SIZE))
        successes = generator.binomial(GROUP_SIZE, rates_N[prompts]).astype(np.float64)
        told = time.perf_counter()
        method.observe(step, prompts, successes, attempts)
        times.append((1_000 * (selected - started), 1_000 * (time.perf_counter() - told)))
        used += time.process_time() - before if step >= WARM_UP else 0.0
    print(f"memory of this process with {contender.name}: {gigabytes(os.getpid())[0]:.2f} GB", flush=True)
    return row_of(contender.name, n_prompts, times[WARM_UP:], used)


def row_of(name: str, n_prompts: int, times: Sequence[Sequence[float]], used_seconds: float | None = None) -> Row:
    select_ms, update_ms = np.median(np.asarray(times), axis=0)
    processor_ms = None if used_seconds is None else 1_000 * used_seconds / len(times)
    return Row(name, n_prompts, float(select_ms), float(update_ms), len(times), processor_ms)


def floor_of_memory(n_prompts: int) -> Row:
    features = np.ones((n_prompts, N_FEATURES), dtype=np.float32)
    passes = [timed_ms(features.max) for _ in range(10)]
    return Row("floor: one pass over the features", n_prompts, float(np.median(passes)), None, len(passes))


def served(n_prompts: int, steps: int) -> Iterator[Row]:
    """The service as its own process; each figure is of whole requests at the client."""
    with (
        tempfile.TemporaryDirectory(prefix="evenodds-peers-") as folder,
        service_process(f"sqlite:///{folder}/evenodds.db") as (base_url, pid),
        httpx.Client(base_url=base_url) as http,
    ):
        bench = Bench(base_url, n_prompts)
        fill(bench, Path(folder), pid)
        bench.steps(WARM_UP)
        times = []
        before = processor_seconds(pid)
        for _ in range(steps):
            selected, chosen = bench.select()
            times.append((selected["whole"], bench.observe(chosen)["whole"]))
        used = processor_seconds(pid) - before
        trips = [timed_ms(lambda: http.get("/healthz")) for _ in range(50)]
        print(f"memory of the service: {gigabytes(pid)[0]:.2f} GB", flush=True)
    yield Row("floor: HTTP round trip (/healthz)", n_prompts, float(np.median(trips)), float(np.median(trips)), 50)
    yield row_of("ours, over HTTP", n_prompts, times, used)


def vizier(python: str, algorithm: str, n_prompts: int, steps: int) -> Iterator[Row]:
    """Every step counts but the first, in which Vizier starts its server and compiles; no row where it fails."""
    command = [python, "-c", VIZIER, str(n_prompts), str(BATCH), str(1 + steps), algorithm]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=VIZIER_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"OSS Vizier, {algorithm}: {1 + steps} steps take more than {VIZIER_SECONDS} s", flush=True)
        return
    times = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or len(times) < 2:
        print(f"OSS Vizier, {algorithm}: failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return
    yield row_of(f"OSS Vizier over gRPC, {algorithm}", n_prompts, times[1:])


def line_of(row: Row) -> str:
    figures = (row.select_ms, row.update_ms, row.together_ms, row.processor_ms)
    cells = ["" if value is None else f"{value:,.1f}" for value in figures]
    share = row.together_ms / 1_000 / STEP_SECONDS
    return f"| {row.method} | {row.n_prompts:,} | {' | '.join(cells)} | {share:.3%} |"


def write(head: str, rows: Sequence[Row]) -> None:
    """`results/peers.md` and `.json`."""
    share = f"of a step of {STEP_SECONDS:g} s"
    names = f"| method | prompts | select, ms | update, ms | together, ms | of a processor, ms | {share} |"
    table = "\n".join([names, "|---" * 7 + "|", *(line_of(row) for row in rows)])
    text = f"# peers: medians, batches of {BATCH}, {GROUP_SIZE} attempts each\n\n{head}\n\n{table}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "peers.md").write_text(text, encoding="utf-8")
    document = {"head": head, "rows": [asdict(row) for row in rows]}
    (RESULTS / "peers.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
