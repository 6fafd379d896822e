"""Where one database is not enough: a load model of many prompts and runs, from measured constants.

    python -m benchmarks.capacity                             the tables of docs/past-one-database.md
    python -m benchmarks.capacity --prompts 1e8 --runs 500    for a load of your own
    python -m benchmarks.capacity --measure                   bytes of each thing that is stored: some minutes

The model multiplies `MEASURED` constants: it knows no queues, no caches that are too small, and no disk that is too
slow, so that what it allows may still fail. With `--measure` nothing is modelled: the service imports generated prompts
into fresh databases, and the sizes of these are read.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.latency import generated_text, postgresql, service_process
from sqlalchemy import Connection, text

from evenodds import Client
from evenodds_service.storage.engine import open_engine

GB, TB = 1e9, 1e12
RUN = "capacity"
BATCH, GROUP_SIZE = 256, 8
LIVE_RUNS = 32  # EVENODDS_LIVE_RUNS by default
BACKUP_BYTES = 100e6  # a second
DISK_BYTES = 2e12


@dataclass(frozen=True, slots=True)
class Constants:
    """What one of each costs. All were measured on two cores; see `benchmarks/README.md`, "Capacity".

    Attributes:
        prompt_bytes: Of a prompt with its text and vector, with indexes, in PostgreSQL.
        observation_bytes, selection_bytes: Of a row of an observation, and of the choice of a batch of 256.
        packed_bytes, checkpoint_bytes, checkpoints: Packed features and one checkpoint, of a prompt, and how many
            checkpoints a run has.
        snapshot_bytes, snapshot_prompt_bytes, snapshots: Of what one refit fits, what each prompt of the pool adds to
            it (two 16-bit numbers of two priors), and how many snapshots a run keeps at most: EVENODDS_SNAPSHOTS by
            default, and one for each checkpoint.
        memory_bytes: Of an API process, for each prompt of the runs that it holds.
        select_seconds, observe_seconds: Of a process, for a batch of 256 from a pool of about 100,000.
        refit_seconds: Of a worker with two cores, for 100,000 observations.
        import_rate: Prompts a second through one process.
        cold_start_seconds: From the checkpoint of a million prompts to the first answer, libraries loaded.
    """

    prompt_bytes: float
    observation_bytes: float
    selection_bytes: float
    packed_bytes: float
    checkpoint_bytes: float
    checkpoints: int
    snapshot_bytes: float
    snapshot_prompt_bytes: float
    snapshots: int
    memory_bytes: float
    select_seconds: float
    observe_seconds: float
    refit_seconds: float
    import_rate: float
    cold_start_seconds: float


MEASURED = Constants(
    prompt_bytes=1_524.0,
    observation_bytes=11.0,
    selection_bytes=12_698.0,
    packed_bytes=616.0,
    checkpoint_bytes=100.0,
    checkpoints=8,
    snapshot_bytes=4.34e6,
    snapshot_prompt_bytes=8.0,
    snapshots=40,
    memory_bytes=1_580.0,
    select_seconds=0.0369,
    observe_seconds=0.0099,
    refit_seconds=17.0,
    import_rate=3_822.0,
    cold_start_seconds=1.9,
)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for.

    Attributes:
        prompts, runs: In all; a run has as many prompts as another.
        active: Share of the runs that train at a time.
        steps: Of a run, so far.
        step_seconds: Of a training step, in which one batch is chosen and reported.
        busy: How busy a process or a worker may be on average.
    """

    prompts: float = 1e9
    runs: float = 1e4
    active: float = 0.1
    steps: int = 1_000
    step_seconds: float = 60.0
    refit_observations: int = 2_048
    busy: float = 0.5


@dataclass(frozen=True, slots=True)
class Needs:
    """What the load takes, of everything together."""

    prompts_bytes: float
    log_bytes: float
    packed_bytes: float
    checkpoints_bytes: float
    snapshots_bytes: float
    requests_per_second: float
    api_processes: float
    memory_bytes: float
    refits_per_second: float
    workers: float
    import_hours: float
    failover_seconds: float

    @property
    def database_bytes(self) -> float:
        return self.prompts_bytes + self.log_bytes + self.blob_bytes

    @property
    def blob_bytes(self) -> float:
        """What is written once and read whole: what an object storage could hold."""
        return self.packed_bytes + self.checkpoints_bytes + self.snapshots_bytes


def _step_bytes(constants: Constants) -> float:
    """What a training step of a run adds to the log."""
    return BATCH * constants.observation_bytes + constants.selection_bytes


def needs(load: Load, constants: Constants = MEASURED) -> Needs:
    """Multiply. Workers are of two cores each; memory is that of all runs that train, each held once."""
    c = constants
    training = load.runs * load.active
    pool = load.prompts / load.runs
    snapshots = min(load.steps * BATCH / load.refit_observations, c.snapshots)
    steps_per_second = training / load.step_seconds
    refits_per_second = steps_per_second * min(1.0, BATCH / load.refit_observations)
    return Needs(
        prompts_bytes=load.prompts * c.prompt_bytes,
        log_bytes=load.runs * load.steps * _step_bytes(c),
        packed_bytes=load.prompts * c.packed_bytes,
        checkpoints_bytes=load.prompts * c.checkpoint_bytes * c.checkpoints,
        snapshots_bytes=load.runs * snapshots * (c.snapshot_bytes + pool * c.snapshot_prompt_bytes),
        requests_per_second=2.0 * steps_per_second,
        api_processes=steps_per_second * (c.select_seconds + c.observe_seconds) / load.busy,
        memory_bytes=training * pool * c.memory_bytes,
        refits_per_second=refits_per_second,
        workers=refits_per_second * c.refit_seconds / load.busy,
        import_hours=load.prompts / c.import_rate / 3_600.0,
        failover_seconds=training * pool / 1e6 * c.cold_start_seconds,
    )


def table(load: Load, shards: tuple[int, ...] = (1, 4, 16, 64), constants: Constants = MEASURED) -> str:
    """What each of so many databases would hold and do, as Markdown."""
    whole = needs(load, constants)
    rows: list[tuple[str, float, str]] = [
        ("database, TB", whole.database_bytes / TB, ".2f"),
        ("of it prompts with their indexes, TB", whole.prompts_bytes / TB, ".2f"),
        ("of it the log, TB", whole.log_bytes / TB, ".2f"),
        ("of it packed features, TB", whole.packed_bytes / TB, ".2f"),
        ("of it checkpoints, TB", whole.checkpoints_bytes / TB, ".2f"),
        ("of it snapshots, TB", whole.snapshots_bytes / TB, ".2f"),
        ("requests/s of trainers", whole.requests_per_second, ".1f"),
        ("API processes", whole.api_processes, ".1f"),
        ("memory of the training runs, each held once, GB", whole.memory_bytes / GB, ".0f"),
        ("refits/s", whole.refits_per_second, ".2f"),
        ("workers of two cores", whole.workers, ".1f"),
        ("import by one process, hours", whole.import_hours, ".1f"),
        ("loading all training runs again, one after the other, s", whole.failover_seconds, ".0f"),
    ]
    head = "| of each | " + " | ".join(f"{n} database{'s' if n > 1 else ''}" for n in shards) + " |"
    lines = [head, "|---" * (1 + len(shards)) + "|"]
    lines += [f"| {name} | " + " | ".join(format(value / n, form) for n in shards) + " |" for name, value, form in rows]
    return "\n".join(lines)


def limits(load: Load, constants: Constants = MEASURED) -> str:
    """What one of each carries, and what the load takes in all, as Markdown; what breaks first stands first."""
    whole = needs(load, constants)
    training = load.runs * load.active
    held_gb = LIVE_RUNS * load.prompts / load.runs * constants.memory_bytes / GB
    log_a_day = 86_400.0 * training / load.step_seconds * _step_bytes(constants) / TB
    run_bytes = whole.database_bytes / load.runs
    rows = [
        ("refits", "a worker of two cores", f"{training / whole.workers:.0f} training runs", f"{whole.workers:.0f}"),
        (
            "memory",
            f"an API process with {LIVE_RUNS} runs in memory, {held_gb:.1f} GB",
            f"{LIVE_RUNS} training runs",
            f"{training / LIVE_RUNS:.0f}",
        ),
        (
            "disk",
            f"{DISK_BYTES / TB:.0f} TB, which is assumed",
            f"{DISK_BYTES / run_bytes:,.0f} runs",
            f"{whole.database_bytes / TB:.1f} TB, and {log_a_day:.2f} TB more a day",
        ),
        (
            "backup",
            f"an hour at {BACKUP_BYTES / 1e6:.0f} MB/s, which is assumed",
            f"{3_600 * BACKUP_BYTES / TB:.2f} TB",
            f"{whole.database_bytes / BACKUP_BYTES / 3_600:.0f} hours",
        ),
        (
            "import",
            "an API process",
            f"{constants.import_rate:,.0f} prompts/s",
            f"{whole.import_hours:.0f} hours",
        ),
        (
            "processor",
            "an API process",
            f"{training / whole.api_processes:.0f} training runs",
            f"{whole.api_processes:.1f}",
        ),
    ]
    return "\n".join(
        ["| what | one of it | carries | all of the load takes |", "|---|---|---|---|"]
        + [f"| {' | '.join(row)} |" for row in rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Load model of many prompts and runs, from measured constants.")
    for field in fields(Load):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--measure", action="store_true", help="measure the bytes instead, on both databases")
    parser.add_argument("--measured-prompts", type=int, default=20_000, help="for --measure (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measured_prompts)
        return
    load = Load(**{field.name: getattr(arguments, field.name) for field in fields(Load)})
    print(f"{table(load)}\n\n{limits(load)}")


def measure(n_prompts: int, steps: int = 40) -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {n_prompts:,} prompts, {steps} steps of {BATCH}")
    for name in ("SQLite", "PostgreSQL"):
        with tempfile.TemporaryDirectory(prefix="evenodds-capacity-") as folder, database(name, Path(folder)) as url:
            grow(name, url, n_prompts, steps)


@contextmanager
def database(name: str, folder: Path) -> Iterator[str]:
    if name == "SQLite":
        yield f"sqlite:///{folder}/evenodds.db"
        return
    with postgresql(folder) as url:
        yield url


def grow(name: str, url: str, n_prompts: int, steps: int) -> None:
    """Print by how many bytes the database grows with each thing that is stored."""
    chance = random.Random(0)
    texts = [f"{generated_text(chance)} ({i})" for i in range(n_prompts)]
    print(f"{name}: texts of {sum(map(len, texts)) / n_prompts:.0f} characters")
    with service_process(url) as (base_url, _), Client(base_url, timeout_seconds=600.0, total_seconds=900.0) as client:
        client.put_run(RUN, group_size=GROUP_SIZE)
        size = stored(url)
        client.add_prompts(RUN, ({"prompt_id": f"p{i:07d}", "text": each} for i, each in enumerate(texts)))
        size = told(name, "prompt", url, size, n_prompts)
        for step in range(steps):
            rows = chance.sample(range(n_prompts), BATCH)
            outcomes = [
                {"prompt_id": f"p{i:07d}", "successes": chance.randint(0, GROUP_SIZE), "attempts": GROUP_SIZE}
                for i in rows
            ]
            client.observe(RUN, step, outcomes)
        size = told(name, "observation", url, size, steps * BATCH)
        for step in range(steps):
            client.select_batch(RUN, steps + step, BATCH)
        size = told(name, "selection of 256", url, size, steps)
        environment = {**os.environ, "EVENODDS_DATABASE_URL": url}
        command = [sys.executable, "-m", "evenodds_service", "work"]
        worker = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while client.refit(RUN, wait_seconds=30.0).status not in ("done", "failed"):
                pass
            until_saved(url)
        finally:
            worker.terminate()
            worker.wait(120)
    print(f"{name}: {sizes(url, n_prompts)}", flush=True)


def told(name: str, what: str, url: str, before: int, n: int) -> int:
    now = stored(url)
    print(f"{name}: {(now - before) / n:,.0f} bytes a {what}", flush=True)
    return now


def stored(url: str) -> int:
    """Bytes of all tables and indexes."""
    with connected(url) as connection:
        if url.startswith("sqlite"):
            pages, size = (
                connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in ("page_count", "page_size")
            )
            return int(pages * size)
        query = "SELECT sum(pg_total_relation_size(relid)) FROM pg_stat_user_tables"
        return int(connection.execute(text(query)).scalar_one())


def until_saved(url: str) -> None:
    """The worker saves a checkpoint behind its refit."""
    with connected(url) as connection:
        while not connection.execute(text("SELECT count(*) FROM checkpoints")).scalar_one():
            connection.rollback()
            time.sleep(0.2)


def sizes(url: str, n_prompts: int) -> str:
    """Of what is written once and read whole."""
    with connected(url) as connection:

        def mean(table: str, column: str) -> float:
            found = connection.execute(text(f"SELECT avg(length({column})) FROM {table}")).scalar_one()
            return float(found or "nan")

        (packed,) = connection.execute(
            text('SELECT sum(length(content)) / sum("last" - "first") FROM pool_blocks')
        ).one()
        return (
            f"{float(packed):,.0f} bytes of packed features a prompt, {mean('checkpoints', 'state') / n_prompts:,.0f} "
            f"of a checkpoint; a snapshot of {mean('snapshots', 'weights') / 1e6:.2f} MB"
        )


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


if __name__ == "__main__":
    main()
