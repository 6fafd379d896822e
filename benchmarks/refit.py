"""How long a refit takes on 100,000 observations of a pool of 29,115 prompts, and what kill -9 does to one.

    python -m benchmarks.refit [FOLDER]          (or EVENODDS_DATA=FOLDER)
    python -m benchmarks.refit --published --devices cuda
    python -m benchmarks.refit --growth 29115:100000,29115:1000000,1000000:100000
    python -m benchmarks.refit --kill 50

FOLDER holds the data sets or is one. The pool is `deepscaler_qwen25math7b_k128`, outcomes of 8 attempts are drawn from
its recorded rates; without it both are generated. The refit is a worker's, in a process of its own over a fresh SQLite
database: first one that reads everything, then one after 2,048 further observations. On the CPU, then on CUDA where
there is one. Building the database is not counted. `gps` is fitted on the CPU alone, wherever it runs; `--published`
fits the published networks instead (`gps-paper`, 20 million parameters).

`--growth` does the same for pools and histories of other sizes, PROMPTS:OBSERVATIONS, generated, one after the other on
the CPU, and tells how time and memory grow with either.

`--kill N` kills the worker in the middle of a fit N times, with another worker standing by and two services answering
all the while. Any fault is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from benchmarks.kills import kill_workers, serving
from benchmarks.scale import slope

from evenodds import PromptIn
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.settings import RunSettings
from evenodds_service.model.refit import TrainingData, fit_shared_model
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.runtime.featurizer import Featurizer
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store
from evenodds_service.worker import Worker

DATA_SET = "deepscaler_qwen25math7b_k128"
POOL_SIZE = 29_115
OBSERVATIONS = 100_000
MORE_OBSERVATIONS = 2_048
BATCH_SIZE = 256
GROUP_SIZE = 8
RUN = "refit"
AIM_SECONDS = {"cpu": 60.0, "cuda": 3.0}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time of a refit, and what kill -9 does to one.")
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="kill the worker N times instead")
    parser.add_argument("--growth", metavar="SIZES", help="prompts:observations, several by commas, instead")
    parser.add_argument("--published", action="store_true", help="fit gps-paper with networks of the published size")
    parser.add_argument("--devices", nargs="+", metavar="DEVICE", help="cpu and cuda where there is one")
    arguments = parser.parse_args()
    settings = RunSettings(group_size=GROUP_SIZE)
    if arguments.published:
        settings = dataclasses.replace(settings, predictor="gps-paper", model_size="published")
    if arguments.growth:
        show_growth([tuple(int(n) for n in size.split(":")) for size in arguments.growth.split(",")], settings)
        return 0
    with tempfile.TemporaryDirectory(prefix="evenodds-refit-") as folder:
        url = f"sqlite:///{folder}/evenodds.db"
        if arguments.kill:
            return show_kills(url, arguments.kill)
        devices = arguments.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        show_times(url, None if arguments.folder is None else Path(arguments.folder), settings, devices)
    return 0


# The time of a refit.


def show_times(url: str, folder: Path | None, settings: RunSettings, devices: Sequence[str]) -> None:
    load, _, _ = os.getloadavg()
    print(f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}; devices {devices}")
    if torch.cuda.is_available():
        print(f"CUDA device: {torch.cuda.get_device_name()}")
    print(f"predictor {settings.predictor}, model size {settings.model_size}")
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, load {load:.1f} before the start")
    started = time.perf_counter()
    origin, texts, rates = read_pool(folder)
    store = open_store(url)
    build(store, texts, rates, settings)
    observe(store, rates, OBSERVATIONS, seed=0)
    print(f"pool: {len(texts):,} prompts, {origin}; {OBSERVATIONS:,} observations of {GROUP_SIZE} attempts")
    print(f"built in {time.perf_counter() - started:.0f} s, which is not counted")
    columns = f"{'loading':>10}{'fitting':>10}{'publishing':>12}{'in all':>10}{'aim':>8}{'peak GiB':>10}"
    print(f"\n{'seconds':24}{columns}{'snapshot MB':>13}")
    for device in devices:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            for what in ("everything", f"after {MORE_OBSERVATIONS:,} more"):
                if what != "everything":
                    observe(store, rates, MORE_OBSERVATIONS, seed=1)
                figures = process.submit(refit_once, url, device).result()
                seconds = "".join(f"{figures[part]:>10.1f}" for part in ("loading", "fitting"))
                seconds += f"{figures['publishing']:>12.1f}{figures['all']:>10.1f}{AIM_SECONDS[device]:>8.0f}"
                memory = f"{figures['peak_gib']:>10.2f}{figures['snapshot_mb']:>13.1f}"
                print(f"{device + ', ' + what:24}{seconds}{memory}", flush=True)
    report = store.refits(store.run(RUN).id, limit=1)[0].report or {}
    print("\n" + ", ".join(f"{name} {value:.4g}" for name, value in report.items() if isinstance(value, (int, float))))
    store.close()


def show_growth(sizes: Sequence[Sequence[int]], settings: RunSettings) -> None:
    """One row for each size, and the exponents of its growth between those that share the other number."""
    parts = ("loading", "fitting", "publishing", "all", "peak_gib", "snapshot_mb")
    names = ("prompts", "observations", *parts, f"after {MORE_OBSERVATIONS:,} more", "peak_gib")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start; seconds, GiB, MB\n")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)
    found: dict[tuple[int, ...], list[float]] = {}
    for n_prompts, n_observations in sizes:
        with tempfile.TemporaryDirectory(prefix="evenodds-refit-") as folder:
            url = f"sqlite:///{folder}/evenodds.db"
            store, (texts, rates) = open_store(url), generated(n_prompts)
            build(store, texts, rates, settings)
            observe(store, rates, n_observations, seed=0, batch_size=min(10_000, n_prompts))
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                first = process.submit(refit_once, url, "cpu").result()
                observe(store, rates, MORE_OBSERVATIONS, seed=1)
                second = process.submit(refit_once, url, "cpu").result()
            store.close()
        row = [*(first[part] for part in parts), second["all"], second["peak_gib"]]
        found[n_prompts, n_observations] = row
        print(f"| {n_prompts:,} | {n_observations:,} | {' | '.join(f'{value:.2f}' for value in row)} |", flush=True)
    for axis, name in enumerate(("prompts", "observations")):
        for other in sorted({size[1 - axis] for size in found}):
            like = {size[axis]: row for size, row in found.items() if size[1 - axis] == other}
            if len(like) > 1:
                exponents = [
                    slope([(n, like[n][i]) for n in sorted(like)])
                    for i in (parts.index("all"), parts.index("peak_gib"))
                ]
                told = f"{('observations', 'prompts')[axis]} {other:,}"
                print("exponent of {} at {}: seconds {:.2f}, memory {:.2f}".format(name, told, *exponents))


_workers: dict[str, Worker] = {}
"""Of a measuring process: the second refit meets what a worker keeps of a run."""


def refit_once(url: str, device: str) -> dict[str, float]:
    """Ask for a refit and let a worker of this process do it. Seconds by part, and memory at its highest."""
    store = open_store(url)
    if url not in _workers:
        _workers[url] = Worker(
            store,
            name=f"measured-{os.getpid()}",
            clock=lambda: datetime.now(timezone.utc),
            fit=lambda data: _fit(data, device),
        )
    run = store.run(RUN)
    asked = store.request_refit(run.id, now=datetime.now(timezone.utc))
    started = time.perf_counter()
    _workers[url].work_once()
    seconds = time.perf_counter() - started
    done = store.refit(asked.id)
    if done.status != "done" or done.report is None or done.model_version is None:
        raise SystemExit(f"the refit ended {done.status}: {done.error}")
    loading, fitting = (float(str(done.report[f"seconds_{part}"])) for part in ("loading", "fitting"))
    return {
        "loading": loading,
        "fitting": fitting,
        "publishing": seconds - loading - fitting,
        "all": seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "snapshot_mb": len(store.snapshot(run.id, done.model_version).weights) / 1e6,
    }


def _fit(data: TrainingData, device: str) -> SharedModel:
    model = fit_shared_model(data, device=torch.device(device))
    if device == "cuda":
        torch.cuda.synchronize()
    return model


def read_pool(folder: Path | None) -> tuple[str, Mapping[str, str], np.ndarray]:
    """Where the pool is from, its texts by id, and their success rates."""
    for candidate in [] if folder is None else [folder, folder / DATA_SET]:
        path = candidate / "prompts.jsonl.gz"
        if path.is_file():
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            texts = {row["prompt_id"]: row["text"] for row in rows}
            rates = dict.fromkeys(texts, 0.5)
            with gzip.open(candidate / "rates.csv.gz", "rt", encoding="utf-8", newline="") as lines:
                for row in csv.DictReader(lines):
                    rates[row["prompt_id"]] = float(row["n_success"]) / float(row["n_samples"])
            return f"from {candidate.name}", texts, np.array([rates[prompt_id] for prompt_id in texts])
    texts, rates_N = generated(POOL_SIZE)
    return f"GENERATED, for want of {DATA_SET} in the folder given", texts, rates_N


def generated(n: int) -> tuple[dict[str, str], np.ndarray]:
    """Questions of 10 to 90 words and numbers, the longer the harder."""
    chance = random.Random(0)
    words = ("find", "the", "number", "of", "triangle", "integer", "such", "that", "sum", "angle", "where", "prime")
    lengths = [chance.randint(10, 90) for _ in range(n)]
    texts = {
        f"p{i:05d}": " ".join(chance.choice((*words, f"${chance.randint(1, 999)}$")) for _ in range(length)) + "?"
        for i, length in enumerate(lengths)
    }
    return texts, 1.0 - np.array(lengths) / 100.0


def show_kills(url: str, n: int) -> int:
    """Returns the exit status."""
    open_store(url).close()
    with ExitStack() as services:
        kills = kill_workers(url, [services.enter_context(serving(url)) for _ in range(2)], n)
    print(
        f"{kills.refits} refits, {kills.in_fit} workers killed in the middle, {kills.taken_over} taken over, "
        f"{kills.answers:,} answers of two services meanwhile, {len(kills.faults)} faults"
    )
    print("\n".join(kills.faults))
    return 1 if kills.faults else 0


def open_store(url: str) -> Store:
    engine = open_engine(url)
    upgrade(engine)
    return Store(engine)


def build(store: Store, texts: Mapping[str, str], rates: np.ndarray, settings: RunSettings) -> None:
    """The run with its pool."""
    run, _ = store.put_run(RUN, settings, now=datetime.now(timezone.utc))
    featurizer = Featurizer(store)
    items = [PromptIn(prompt_id=prompt_id, text=text) for prompt_id, text in texts.items()]
    for first in range(0, len(items), 2_000):
        block = items[first : first + 2_000]
        prepared = featurizer.prepare(run, block, names=[str(i) for i in range(len(block))])
        store.add_prompts(
            run.id,
            prepared.prompts,
            prepared.vectors,
            embedder=prepared.embedder,
            embedding_width=prepared.embedding_width,
            now=datetime.now(timezone.utc),
        )
        run = store.run(RUN)


def observe(store: Store, rates: np.ndarray, n: int, *, seed: int, batch_size: int = BATCH_SIZE) -> None:
    """Outcomes of so many random groups, a batch a step."""
    run, generator = store.run(RUN), np.random.default_rng(seed)
    step = -1 if run.head_step is None else run.head_step
    for first in range(0, n, batch_size):
        step += 1
        prompts = generator.choice(len(rates), size=min(batch_size, n - first), replace=False)
        successes = generator.binomial(GROUP_SIZE, rates[prompts])
        rows = [NewObservation.of_counts(int(i), int(k), GROUP_SIZE) for i, k in zip(prompts, successes, strict=True)]
        store.append_observations(run.id, Outcomes(step=step, observations=rows), now=datetime.now(timezone.utc))


if __name__ == "__main__":
    sys.exit(main())
