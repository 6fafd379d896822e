"""What `PromptSelector` costs a training step: `select` and `observe` as the training loop waits for them.

    python -m benchmarks.overhead [FOLDER] [--step-seconds 1.0] [--steps 40]     (or EVENODDS_DATA=FOLDER)

FOLDER and the pool of 29,115 prompts are those of `benchmarks.latency`; so are the 256 prompts of a batch and the 8
attempts of each. The service runs as its own process on loopback, over SQLite. A step sleeps between `select` and
`observe`, where the rollouts would be, and after `observe`, where the update would be. Four ways:

    live       the service answers
    prefetch   the next batch is asked for while the update runs
    dead       nobody answers at the address
    offline    no service at all
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.latency import BATCH_SIZE, GROUP_SIZE, PoolOf, read_pool, service

from evenodds import PromptSelector

WARM_UP = 3
NOBODY = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Cost:
    """Milliseconds that the loop waited, one figure a step, and what came of it."""

    select_ms: list[float]
    observe_ms: list[float]
    service_batches: int
    steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description="What select and observe cost a training step.")
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--step-seconds", type=float, default=1.0, help="the step's own time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="(default: %(default)s)")
    arguments = parser.parse_args()
    pool = read_pool(None if arguments.folder is None else Path(arguments.folder))
    load, _, _ = os.getloadavg()
    print(f"pool: {len(pool.texts):,} prompts, {pool.origin}; {BATCH_SIZE} prompts a batch, {GROUP_SIZE} attempts each")
    print(
        f"{arguments.steps} steps of {arguments.step_seconds:g} s; {os.cpu_count()} cores, load {load:.1f} before\n"
        f"{'':10}{'select ms':>22}{'observe ms':>22}{'of the step':>13}{'of a 60 s step':>16}{'by the service':>16}\n"
        f"{'':10}{'median':>11}{'p95':>11}{'median':>11}{'p95':>11}{'median':>13}{'median':>16}"
    )
    with tempfile.TemporaryDirectory(prefix="evenodds-overhead-") as folder:
        with service(f"sqlite:///{folder}/evenodds.db") as base_url:
            for name, url, prefetch in (("live", base_url, False), ("prefetch", base_url, True)):
                show(name, measure(name, url, pool, Path(folder), arguments, prefetch=prefetch), arguments.step_seconds)
        for name, nowhere in (("dead", NOBODY), ("offline", None)):
            show(name, measure(name, nowhere, pool, Path(folder), arguments), arguments.step_seconds)


def measure(
    name: str, base_url: str | None, pool: PoolOf, folder: Path, arguments: Any, *, prefetch: bool = False
) -> Cost:
    """Train for so many steps, in which nothing happens but time."""
    prompts = [{"prompt_id": prompt_id, "text": text} for prompt_id, text in pool.texts.items()]
    chance = random.Random(0)
    select_ms, observe_ms = [], []
    with PromptSelector(
        base_url,
        name,
        prompts,
        run_settings={"group_size": GROUP_SIZE},
        outbox=folder / name,
        prefetch=prefetch,
    ) as selector:
        if base_url is not None and base_url != NOBODY:
            selector.wait_until_ready(600)
        before = 0
        for step in range(WARM_UP + arguments.steps):
            if step == WARM_UP:
                before = selector.counts().service_batches
            started = time.perf_counter()
            batch = selector.select(step, BATCH_SIZE)
            selected = time.perf_counter()
            rewards = {i: [float(chance.random() < 0.5) for _ in range(GROUP_SIZE)] for i in batch}
            time.sleep(arguments.step_seconds / 2)
            rolled_out = time.perf_counter()
            selector.observe(step, rewards)
            observed = time.perf_counter()
            time.sleep(arguments.step_seconds / 2)
            if step >= WARM_UP:
                select_ms.append(1_000 * (selected - started))
                observe_ms.append(1_000 * (observed - rolled_out))
        service_batches = selector.counts().service_batches - before
        if base_url == NOBODY or base_url is None:
            selector.close(timeout_seconds=0)
    return Cost(select_ms, observe_ms, service_batches, arguments.steps)


def show(name: str, cost: Cost, step_seconds: float) -> None:
    both = float(np.median(cost.select_ms) + np.median(cost.observe_ms))
    figures = "".join(
        f"{figure:>11.1f}"
        for waits in (cost.select_ms, cost.observe_ms)
        for figure in (np.median(waits), np.percentile(waits, 95))
    )
    shares = f"{both / 1_000 / step_seconds:>13.2%}{both / 1_000 / 60:>16.3%}"
    print(f"{name:10}{figures}{shares}{f'{cost.service_batches}/{cost.steps}':>16}", flush=True)


if __name__ == "__main__":
    main()
