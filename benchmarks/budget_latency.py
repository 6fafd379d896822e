"""How long a gateway waits for a budget, and what becomes of its requests when the service is stopped.

    python -m benchmarks.budget_latency [FOLDER] [--requests 4000] [--connections 16]      (or EVENODDS_DATA=FOLDER)

`evenodds serve` as its own process on loopback over SQLite, with a run of 8,192 prompts of
`deepscaler_qwen25math7b_k128` (generated ones without it) with outcomes and, unless --no-refit, a fitted shared model.
Every request asks for the budget of a text that was never seen. Milliseconds from the moment at which a request is due
(or its connection is free) to the whole reply, over kept-alive connections. The client is a process of its own that
writes requests made beforehand to bare sockets, some .1 ms a request on a second core: its reading of the reply is
part of the time, its timer is not. `server ms` is the processor time of the service per request, of all its threads;
it tells more than the clock where the machine is busy:

- *paced*: requests spread evenly over time at so many a second, as many users make them
- *with outcomes*: the same while outcomes are reported all the time, so that the view has to be refreshed
- *closed loop*: connections that never pause; requests a second are the most that one process answers
- *stopped*: through `GatewayBudget` with a deadline of 25 ms, while the service is killed under way and comes back:
  every request must pass, and wait no longer than its deadline
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from benchmarks.latency import STARTUP_RETRIES, generated_text, read_pool

from evenodds import Client, GatewayBudget

RUN = "served"
LABELLED, ATTEMPTS, REPORT = 8_192, 8, 256
RATES = (50, 100, 200)
AIM = "aim: median 3, p99 15"
DEADLINE_MS = 25.0
WARM_UP = 200
TIMER_SECONDS = 0.002
"""The event loop's timer wakes up to a millisecond late, which would count as latency: the rest is waited busily."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of POST /budget for new texts.")
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--requests", type=int, default=4_000, help="of each kind (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--no-refit", action="store_true", help="streaming beliefs only")
    arguments = parser.parse_args()
    n, connections = arguments.requests, arguments.connections
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} before the start; {connections} connections, milliseconds; {AIM}")
    texts = Texts()
    with tempfile.TemporaryDirectory(prefix="evenodds-budget-") as folder:
        url = f"sqlite:///{folder}/evenodds.db"
        with serving(url, with_worker=True) as base_url:
            learn(base_url, arguments.folder, refit=not arguments.no_refit)
        # Without the worker, whose fits would compete for the cores.
        with serving(url) as base_url:
            asyncio.run(asked(base_url, texts, WARM_UP, connections=connections, rate=50))
            heads = f"{'median':>9}{'p95':>9}{'p99':>9}{'most':>9}{'per second':>12}{'refused':>9}{'server ms':>11}"
            print(f"{'':28}{heads}")

            def measure(name: str, rate: float | None) -> None:
                before = processor_seconds(base_url)
                times, per_second, refused = asyncio.run(asked(base_url, texts, n, connections=connections, rate=rate))
                show(name, times, per_second, refused, 1_000 * (processor_seconds(base_url) - before) / n)

            for rate in RATES:
                measure(f"paced, {rate}/s", rate)
            with reporting(base_url):
                measure("with outcomes, 100/s", 100)
            measure("closed loop", None)
        asyncio.run(stopped(url, texts))


class Texts:
    """Texts of 10 to 90 words that were never asked."""

    def __init__(self) -> None:
        self._chance, self._n = random.Random(5), 0

    def __call__(self) -> str:
        self._n += 1
        return f"{generated_text(self._chance)} ({self._n})"


def learn(base_url: str, folder: Path | None, *, refit: bool) -> None:
    """A served run with a history of one version."""
    pool = list(read_pool(None if folder is None else Path(folder)).texts.items())[:LABELLED]
    chance = random.Random(4)
    with Client(base_url, timeout_seconds=300) as client:
        client.put_run(RUN, group_size=ATTEMPTS, refit={"every_observations": 10**7, "every_seconds": 10**7})
        client.put_budget_policy(RUN, mode="sequential", target_attempts=4)
        client.add_prompts(RUN, [{"prompt_id": i, "text": text} for i, text in pool])
        for first in range(0, len(pool), REPORT):
            outcomes = [
                {"prompt_id": i, "successes": chance.randint(0, ATTEMPTS), "attempts": ATTEMPTS}
                for i, _ in pool[first : first + REPORT]
            ]
            client.observe(RUN, 1, outcomes)
        if refit:
            done = client.refit(RUN, wait_seconds=300)
            if done.status != "done":
                raise SystemExit(f"the refit is {done.status}: {done.error}")
        state = client.run(RUN)
    print(f"{state.pool_size:,} prompts with outcomes, model version {state.model_version}", flush=True)


async def asked(
    base_url: str, texts: Texts, n: int, *, connections: int, rate: float | None
) -> tuple[Sequence[float], float, int]:
    """Milliseconds of n requests, requests a second, and how many were refused (503: too busy, or too late).

    Without a rate no connection ever pauses.
    """
    host, port = base_url.removeprefix("http://").split(":")
    bodies = [json.dumps({"run": RUN, "prompt": {"text": texts()}}).encode() for _ in range(n)]
    head = f"POST /budget HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    requests = iter([f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies])
    times: list[float] = []
    refused: list[bool] = []
    started = time.perf_counter()

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for request in requests:
            due = next(schedule) if rate is not None else time.perf_counter()
            await until(due)
            writer.write(request)
            headers = await reader.readuntil(b"\r\n\r\n")
            refused.append(not headers.startswith(b"HTTP/1.1 200"))
            length = headers.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            times.append(1_000 * (time.perf_counter() - due))
        writer.close()

    async def until(due: float) -> None:
        await asyncio.sleep(due - time.perf_counter() - TIMER_SECONDS)
        while time.perf_counter() < due:  # noqa: ASYNC110  (no event is finer than the timer)
            await asyncio.sleep(0)

    schedule: Iterator[float] = (started + i / (rate or 1) for i in range(n))
    await asyncio.gather(*(connection() for _ in range(connections)))
    return times, n / (time.perf_counter() - started), sum(refused)


@contextmanager
def reporting(base_url: str) -> Iterator[None]:
    """Another process reports outcomes of new texts, 16 at a time, ten times a second."""
    program = """
import random, sys, time
from evenodds import Client
chance, n = random.Random(6), 0
with Client(sys.argv[1]) as client:
    while True:
        texts = [f"Reported number {n + i}: what is {chance.random()} times seven?" for i in range(16)]
        client.observe(sys.argv[2], 1, [{"text": text, "rewards": [chance.randint(0, 1)]} for text in texts])
        n += 16
        time.sleep(0.1)
"""
    process = subprocess.Popen([sys.executable, "-c", program, base_url, RUN])
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


async def stopped(url: str, texts: Texts, *, n: int = 600, rate: float = 100.0) -> None:
    """Requests of a gateway while the service is killed after a third of them, and started again after two."""
    with serving(url) as base_url:
        port = int(base_url.rpartition(":")[2])
        gateway = GatewayBudget(base_url, run=RUN, deadline_ms=DEADLINE_MS, open_seconds=0.5)
        waits: dict[str, list[float]] = {"serving": [], "killed": [], "back": []}
        answers = dict.fromkeys(waits, 0)
        for _ in range(1_000):  # the service loads the run, and the circuit closes again
            if await gateway.budget(texts()) is not None:
                break
            await asyncio.sleep(0.05)
        for _ in range(WARM_UP):
            await gateway.budget(texts())

        async def request(phase: str) -> None:
            begun = time.perf_counter()
            answers[phase] += await gateway.budget(texts()) is not None
            waits[phase].append(1_000 * (time.perf_counter() - begun))

        async def phase(name: str) -> None:
            started, requests = time.perf_counter(), []
            for i in range(n // 3):
                await asyncio.sleep(started + i / rate - time.perf_counter())
                requests.append(asyncio.create_task(request(name)))
            await asyncio.gather(*requests)

        await phase("serving")
        await asyncio.to_thread(_PROCESSES[base_url].kill)
        await phase("killed")
        with serving(url, port=port):
            await asyncio.sleep(1.0)  # until the circuit lets one try
            await phase("back")
        print(f"\nstopped: GatewayBudget, deadline {DEADLINE_MS:g} ms, {rate:g} requests a second; {gateway.counts}")
        print(f"{'':28}{'median':>9}{'p99':>9}{'most':>9}{'passed':>9}{'with a budget':>15}")
        for name, times in waits.items():
            figures = (np.median(times), np.percentile(times, 99), max(times))
            passed = f"{len(times):>9}{answers[name]:>15}"
            print(f"{name:28}" + "".join(f"{figure:>9.2f}" for figure in figures) + passed)
        await gateway.close()


_PROCESSES: dict[str, subprocess.Popen[bytes]] = {}


@contextmanager
def serving(database_url: str, *, with_worker: bool = False, port: int = 0) -> Iterator[str]:
    """The base URL of `evenodds serve` over this database."""
    if port == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    base_url = f"http://127.0.0.1:{port}"
    settings = {"EVENODDS_HOST": "127.0.0.1", "EVENODDS_PORT": str(port), "EVENODDS_DATABASE_URL": database_url}
    command = [sys.executable, "-m", "evenodds_service", "serve", *(["--with-worker"] if with_worker else [])]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)
        _PROCESSES[base_url] = process
        try:
            with Client(base_url, retries=STARTUP_RETRIES) as client:
                client.readyz()
            yield base_url
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            process.terminate()
            process.wait(60)


def processor_seconds(base_url: str) -> float:
    """Of the service so far, in all its threads; nan where the system does not tell (it has no /proc)."""
    try:
        fields = Path(f"/proc/{_PROCESSES[base_url].pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(name: str, times: Sequence[float], per_second: float, refused: int, server_ms: float) -> None:
    figures = (np.median(times), np.percentile(times, 95), np.percentile(times, 99), max(times))
    shown = "".join(f"{figure:>9.2f}" for figure in figures)
    print(f"{name:28}{shown}{per_second:>12.0f}{refused:>9}{server_ms:>11.2f}", flush=True)


if __name__ == "__main__":
    main()
