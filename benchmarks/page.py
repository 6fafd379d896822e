"""How long the operator's page takes from navigation to drawn charts, for a run with a million observations.

    python -m benchmarks.page [--observations 1000000]

The run of `benchmarks/report_speed.py` in a fresh SQLite file, `evenodds serve` as a process of its own, and a real
Chromium (by `chromedriver`) over loopback, each time a fresh one. The first look comes after the process has started
and there is no checkpoint: the service folds the whole log for it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from benchmarks.latency import service
from benchmarks.report_speed import BATCH_SIZE, RUN, write

from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store

REPETITIONS = 5
LONGEST_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first useful paint of the page.")
    parser.add_argument("--observations", type=int, default=1_000_000)
    n_steps = -(-parser.parse_args().observations // BATCH_SIZE)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    with tempfile.TemporaryDirectory(prefix="evenodds-page-") as folder:
        url = f"sqlite:///{Path(folder) / 'evenodds.db'}"
        engine = open_engine(url)
        upgrade(engine)
        write(Store(engine), n_steps)
        with service(url) as base_url:
            first = drawn_ms(base_url)
            later = [drawn_ms(base_url) for _ in range(REPETITIONS)]
    print(f"{n_steps * BATCH_SIZE:,} observations, navigation to drawn charts:")
    print(f"first, which folds the log: {first:,} ms; then median {np.median(later):.0f} ms, fastest {min(later)} ms")


@contextmanager
def browser() -> Iterator[httpx.Client]:
    """A session of a fresh headless Chromium, spoken to in WebDriver's protocol."""
    driver = shutil.which("chromedriver")
    if driver is None:
        raise SystemExit("no chromedriver on this machine: install chromium and chromium-driver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        transport = httpx.HTTPTransport(retries=8)  # it takes a moment to listen
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0, transport=transport) as http:
            options = {"args": ["--headless", "--no-sandbox", "--disable-gpu"]}
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            session = http.post("/session", json=wanted).raise_for_status().json()["value"]["sessionId"]
            try:
                http.base_url = f"http://127.0.0.1:{port}/session/{session}"
                yield http
            finally:
                http.delete(f"http://127.0.0.1:{port}/session/{session}").raise_for_status()
    finally:
        process.terminate()
        process.wait(30)


def drawn_ms(base_url: str) -> int:
    """Milliseconds from navigation to the frame in which the charts stand, as the page measured them."""
    script = {"script": "return document.getElementById('view').dataset.drawnMs ?? null", "args": []}
    with browser() as http:
        http.post("/url", json={"url": f"{base_url}/#/runs/{RUN}"}).raise_for_status()
        deadline = time.monotonic() + LONGEST_SECONDS
        while time.monotonic() < deadline:
            drawn = http.post("/execute/sync", json=script).raise_for_status().json()["value"]
            if drawn is not None:
                return int(drawn)
            time.sleep(0.1)
    raise SystemExit(f"the charts were not drawn within {LONGEST_SECONDS} s")


if __name__ == "__main__":
    main()
