"""Whether memory, database and latency stay flat over endless new texts with retention on.

    python -m benchmarks.retention [--requests 2000000] [--retain 200000] [--json FILE]

One process does what the service does, without HTTP: rounds of 64 budgets for texts that nobody has sent before, as
requests that wait together share them, then one report of an outcome for each, as a gateway's buffer sends them; behind
it checkpoints and tidying in their threads. A line for every twentieth of the requests: prompts in the pool, memory of
the process, the database with its write-ahead log, milliseconds of a round and of a report. `most` is the longest
one: a round waits for the run's lock while prompts are let go, a report for the database's.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from benchmarks.latency import generated_text

from evenodds.schemas import Observation, PromptRef
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.settings import BudgetPolicy, RunSettings
from evenodds_service.runtime.beliefs import beliefs_about
from evenodds_service.runtime.featurizer import Featurizer, new_prompt
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.runtime.retention import Tidying
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store

ROUND = 64
LINES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Flat memory and latency over endless new texts.")
    parser.add_argument("--requests", type=int, default=2_000_000)
    parser.add_argument("--retain", type=int, default=200_000)
    parser.add_argument("--json", type=Path, help="append each line here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evenodds-retention-") as folder:
        run(Path(folder), arguments.requests, arguments.retain, arguments.json)


def run(folder: Path, requests: int, retain: int, saved: Path | None = None) -> list[dict[str, float]]:
    """Ask and report so many times. Returns a line for every twentieth."""
    engine = open_engine(f"sqlite:///{folder}/evenodds.db")
    upgrade(engine)
    store = Store(engine)
    settings = RunSettings(retain_prompts=retain, budget_policies=(BudgetPolicy(name="default", version=1),))
    served, _ = store.put_run("served", settings, now=_now())
    featurizer, live_runs, tidying = Featurizer(store), LiveRuns(store, capacity=1), Tidying(store)
    rng = np.random.default_rng(0)
    lines: list[dict[str, float]] = []
    rounds: list[float] = []
    reports: list[float] = []
    per_line = max(1, requests // ROUND // LINES)
    for number in range(requests // ROUND):
        texts = [f"{generated_text(random.Random(i))} ({i})" for i in range(number * ROUND, (number + 1) * ROUND)]
        run_now, live, _ = live_runs.at_head("served")
        started = time.perf_counter()
        beliefs_about(featurizer, run_now, live, [PromptRef(text=t) for t in texts], names=["prompt"] * ROUND)
        rounds.append(time.perf_counter() - started)
        observed = [Observation(text=text, rewards=(float(rng.random() < 0.5),)) for text in texts]
        started = time.perf_counter()
        new = featurizer.prepare(run_now, observed, names=["observations"] * ROUND)
        outcomes = [NewObservation.of_rewards(new_prompt(item).prompt_id, item.rewards or ()) for item in observed]
        appended = store.append_observations(served.id, Outcomes(1, outcomes), new=new, now=_now())
        reports.append(time.perf_counter() - started)
        assert appended.written is not None
        live = live_runs.fold(appended.written.run, appended.written.entries)
        live.save_behind(store, appended.written.run, now=_now())
        tidying.behind(live, appended.written.run, now=_now())
        if (number + 1) % per_line == 0:
            lines.append(_line(folder, (number + 1) * ROUND, live.state.n_prompts, rounds, reports))
            _show(lines[-1], is_first=len(lines) == 1)
            if saved is not None:
                saved.write_text(json.dumps(lines, indent=1) + "\n")
            rounds, reports = [], []
    while tidying.is_busy(served.id) or live.is_saving:
        time.sleep(0.05)
    store.close()
    return lines


def _line(folder: Path, requests: int, pool: int, rounds: list[float], reports: list[float]) -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = sum(file.stat().st_size for file in folder.glob("evenodds.db*"))
    p99 = sorted(rounds)[int(0.99 * (len(rounds) - 1))]
    return {
        "requests": requests,
        "pool": pool,
        "memory_mb": pages * resource.getpagesize() / 1e6,
        "database_mb": files / 1e6,
        "round_ms": 1_000 * float(np.median(rounds)),
        "round_p99_ms": 1_000 * p99,
        "round_most_ms": 1_000 * max(rounds),
        "report_ms": 1_000 * float(np.median(reports)),
        "report_most_ms": 1_000 * max(reports),
    }


def _show(line: dict[str, float], *, is_first: bool) -> None:
    if is_first:
        print("".join(f"{name:>16}" for name in line))
    print(
        "".join(f"{value:>16,.1f}" if isinstance(value, float) else f"{value:>16,}" for value in line.values()),
        flush=True,
    )


def _now() -> datetime:
    return datetime.now(timezone.utc)


if __name__ == "__main__":
    main()
