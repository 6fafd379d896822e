"""How long `GET /runs/{run}/report` takes after a million observations, and what keeping its sums adds to observe.

    python -m benchmarks.report_speed [--observations 1000000]

A pool of 29,115 prompts in 12 groups, batches of 256 with a control arm, written into a fresh SQLite file through the
store. The service, a process of its own, is then asked over loopback: the first time it folds the whole log (there is
no checkpoint), afterwards it answers from the sums. The cost of the sums is measured inside the fold, in this process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from benchmarks.latency import POOL_SIZE, read_pool, service

from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.guardrails import Guardrails
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.learning.tallies import Met, Tallies
from evenodds_service.domain.log_entries import NewObservation, ObserveEntry, Outcomes
from evenodds_service.domain.prompts import NewPrompt, text_key
from evenodds_service.domain.report.report import report
from evenodds_service.domain.settings import RunSettings
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import NewSelection, Run, Store

BATCH_SIZE, GROUP_SIZE, N_GROUPS = 256, 8, 12
CONTROL_SHARE = 0.1
REPETITIONS = 20
NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
RUN = "million"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the report after many observations.")
    parser.add_argument("--observations", type=int, default=1_000_000)
    n_steps = -(-parser.parse_args().observations // BATCH_SIZE)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    with tempfile.TemporaryDirectory(prefix="evenodds-report-") as folder:
        url = f"sqlite:///{Path(folder) / 'evenodds.db'}"
        engine = open_engine(url)
        upgrade(engine)
        store = Store(engine)
        run = write(store, n_steps)
        print(f"log: {n_steps * BATCH_SIZE:,} observations and {n_steps:,} selections over {POOL_SIZE:,} prompts")
        inside_the_fold(store, run)
        with service(url) as base_url, httpx.Client(base_url=base_url, timeout=600.0) as http:
            first, *later = (timed(http) for _ in range(1 + REPETITIONS))
        print(f"GET /report: first, which folds the log: {first:,.0f} ms; then ", end="")
        print(f"median {np.median(later):.1f} ms, fastest {min(later):.1f} ms")


def write(store: Store, n_steps: int) -> Run:
    """A run whose policy prefers prompts of middling difficulty, in part."""
    chance = np.random.default_rng(0)
    run, _ = store.put_run(RUN, RunSettings(embedder="none", control_share=CONTROL_SHARE), now=NOW)
    prompts = [
        NewPrompt(f"p{i}", text=text, text_key=text_key(text), group=f"group {i % N_GROUPS}")
        for i, text in enumerate(read_pool(None).texts.values())
    ]
    for first in range(0, POOL_SIZE, 2_000):
        store.add_prompts(run.id, prompts[first : first + 2_000], now=NOW)
    rates = chance.beta(0.4, 0.4, size=POOL_SIZE)
    liked = np.argsort(np.abs(rates + chance.normal(scale=0.3, size=POOL_SIZE) - 0.5))[: POOL_SIZE // 3]
    control = np.arange(BATCH_SIZE) >= round(BATCH_SIZE * (1 - CONTROL_SHARE))
    for step in range(n_steps):
        others = chance.choice(POOL_SIZE, size=int(control.sum()), replace=False)
        policy = chance.choice(np.setdiff1d(liked, others), size=int((~control).sum()), replace=False)
        batch = np.concatenate((policy, others))
        forecast = np.clip(rates[batch] + chance.normal(scale=0.2, size=BATCH_SIZE), 0.05, 0.95)
        store.record_selection(
            run.id,
            NewSelection(
                selection_id=f"s{step}",
                step=step,
                arguments_hash="",
                prompts=batch,
                reply="{}",
                control_share=CONTROL_SHARE,
                control=control,
                a=4.0 * forecast,
                b=4.0 * (1.0 - forecast),
            ),
            now=NOW,
        )
        successes = chance.binomial(GROUP_SIZE, rates[batch]).tolist()
        store.append_observations(
            run.id,
            Outcomes(
                step=step,
                observations=[
                    NewObservation.of_counts(prompt, k, GROUP_SIZE)
                    for prompt, k in zip(batch.tolist(), successes, strict=True)
                ],
                selection_id=f"s{step}",
            ),
            now=NOW,
        )
    return store.run(RUN)


def inside_the_fold(store: Store, run: Run) -> None:
    """Fold the log, and say what the report costs, an observe entry, and what of it the sums."""
    live = LiveRun(run.id)
    started = time.perf_counter()
    live.catch_up(store, run)
    print(f"fold of the whole log: {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    report(live.state, live.pool)
    print(f"report in process: {1_000 * (time.perf_counter() - started):.1f} ms")
    kept, plain = State(), State(tallies=_Silent(), guardrails=_SilentGuardrails())
    whole = live.pool.raw(0, live.pool.n)
    other = Pool(surface_width=whole.surface_N_S.shape[1], embedding_width=0)  # a pool projects for one state at a time
    other.append(whole)
    costs: dict[str, list[float]] = {"with": [], "without": []}
    for entry in store.entries(run.id, after=0, limit=420):
        # In turns: whatever else runs slows both.
        for name, state, pool in (("with", kept, live.pool), ("without", plain, other)):
            started = time.perf_counter()
            fold(state, entry, pool)
            if isinstance(entry, ObserveEntry):
                costs[name].append(1_000 * (time.perf_counter() - started))
    print(f"observe entry of {BATCH_SIZE}, folded: median {np.median(costs['with']):.2f} ms, ", end="")
    print(f"without the sums {np.median(costs['without']):.2f} ms")


class _Silent(Tallies):
    """Keeps nothing."""

    def select(self, *_: Any) -> None: ...

    def observe(self, *arguments: Any) -> Met:
        nothing, never = np.zeros(len(arguments[5])), np.zeros(len(arguments[5]), bool)
        return Met(arguments[5], 0.0, 0.0, nothing, nothing, nothing, never, never)

    def compare(self, *_: Any) -> None: ...

    def look(self, *_: Any) -> None: ...


class _SilentGuardrails(Guardrails):
    """Watches nothing, and so do the sequential tests where nothing is judged."""

    def select(self, *_: Any) -> None: ...

    def observe(self, *_: Any) -> None: ...

    def compare(self, *_: Any) -> None: ...


def timed(http: httpx.Client) -> float:
    """Milliseconds of one whole request."""
    started = time.perf_counter()
    http.get(f"/runs/{RUN}/report").raise_for_status()
    return 1_000 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
