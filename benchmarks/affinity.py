"""What one replica for each run saves: runs in memory and memory of each API process, with and without it.

    python -m benchmarks.affinity [--processes 1,2,4] [--runs 100] [--prompts 300]

So many processes of the service over one PostgreSQL, behind a real nginx with `deploy/nginx.conf`, which hashes the
run's name, and once without that line, so that requests take turns. Every run has a pool and one batch with outcomes.
Then each run is asked for a prediction, in a few rounds, and each process says which runs it holds (`/metrics`). A
process keeps 32 runs by default (EVENODDS_LIVE_RUNS).
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
from benchmarks.latency import generated_text, postgresql, service_process
from benchmarks.nginx import NGINX, free_address, running_nginx
from benchmarks.scale import gigabytes

from evenodds import Client

CONFIG = Path(__file__).resolve().parents[1] / "deploy" / "nginx.conf"
HASH = "    hash $run consistent;\n"
SHOWN = ("    server 127.0.0.1:8001;\n", "    server 127.0.0.1:8002;\n")
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of each API process with and without one replica a run.")
    parser.add_argument("--processes", default="1,2,4", help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=300, help="of each run (default: %(default)s)")
    arguments = parser.parse_args()
    if NGINX is None:
        parser.error("this needs nginx")
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {arguments.runs} runs of {arguments.prompts} prompts"
    )
    print("| processes | one replica a run | runs in memory, each | MB, each | predict, ms: median | p95 |")
    print("|---|---|---|---|---|---|")
    runs = [f"run-{i}" for i in range(arguments.runs)]
    with tempfile.TemporaryDirectory(prefix="evenodds-affinity-") as folder, postgresql(Path(folder)) as url:
        with service_process(url) as (base_url, _), Client(base_url, timeout_seconds=120.0) as client:
            fill(client, runs, arguments.prompts)
        for n in arguments.processes.split(","):
            for has_affinity in (True, False) if int(n) > 1 else (True,):
                print(measured(url, Path(folder), int(n), runs, has_affinity=has_affinity), flush=True)


def fill(client: Client, runs: Sequence[str], n_prompts: int) -> None:
    chance = random.Random(0)
    for run in runs:
        client.put_run(run, group_size=8)
        client.add_prompts(run, [{"prompt_id": f"p{i}", "text": generated_text(chance)} for i in range(n_prompts)])
        chosen = client.select_batch(run, 0, 32)
        client.observe(run, 0, [{"prompt_id": p.prompt_id, "successes": 4, "attempts": 8} for p in chosen.prompts])


def measured(url: str, folder: Path, n: int, runs: Sequence[str], *, has_affinity: bool) -> str:
    with ExitStack() as stack:
        replicas = [stack.enter_context(service_process(url)) for _ in range(n)]
        proxy = stack.enter_context(nginx(folder, [base_url for base_url, _ in replicas], has_affinity=has_affinity))
        client = stack.enter_context(Client(proxy, timeout_seconds=120.0))
        times = []
        for _ in range(ROUNDS):
            for run in runs:
                started = time.perf_counter()
                client.predict(run, ["p0"])
                times.append(1_000 * (time.perf_counter() - started))
        held = [httpx.get(f"{base_url}/metrics").text.count("\nevenodds_run_head_lag{") for base_url, _ in replicas]
        memory = [f"{1_000 * gigabytes(pid)[0]:.0f}" for _, pid in replicas]
    later = times[len(runs) :]  # the first round loads every run anyway
    cells = (n, "yes" if has_affinity else "no", ", ".join(map(str, held)), ", ".join(memory))
    return f"| {' | '.join(map(str, cells))} | {np.median(later):.1f} | {np.percentile(later, 95):.1f} |"


@contextmanager
def nginx(folder: Path, replicas: Sequence[str], *, has_affinity: bool) -> Iterator[str]:
    """The base URL of a real nginx before these."""
    address, config = free_address(), CONFIG.read_text()
    assert all(config.count(shown) == 1 for shown in (HASH, *SHOWN)), "deploy/nginx.conf has changed"
    servers = "".join(f"    server {base_url.removeprefix('http://')};\n" for base_url in replicas)
    config = config.replace(SHOWN[0], servers).replace(SHOWN[1], "").replace("127.0.0.1:8000", address)
    with running_nginx(config if has_affinity else config.replace(HASH, ""), folder, address):
        yield f"http://{address}"


if __name__ == "__main__":
    main()
