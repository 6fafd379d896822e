"""How long the operator's page takes from navigation to drawn charts, for a run with a million observations, and to its
list of 10,000 runs.

    python -m benchmarks.page [--observations 1000000] [--runs 10000]

The run of `benchmarks/report_speed.py` in a fresh SQLite file, `evenodds serve` as a process of its own, and a real
Chromium over loopback, each time a fresh one. The first look comes after the process has started and there is no
checkpoint: the service folds the whole log for it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import get_args

import numpy as np
from benchmarks.browser import browser
from benchmarks.latency import service
from benchmarks.report_speed import BATCH_SIZE, RUN, write
from sqlalchemy import event

from evenodds_service.domain.report.summary import Estimate, SharePoint, Summary, Verdict
from evenodds_service.domain.settings import RunSettings
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store

REPETITIONS = 5
LONGEST_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first useful paint of the page.")
    parser.add_argument("--observations", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=10_000)
    options = parser.parse_args()
    n_steps = -(-options.observations // BATCH_SIZE)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    with tempfile.TemporaryDirectory(prefix="evenodds-page-") as folder:
        url = f"sqlite:///{Path(folder) / 'evenodds.db'}"
        engine = open_engine(url)
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
        upgrade(engine)
        write(Store(engine), n_steps)
        write_runs(Store(engine), options.runs)
        with service(url) as base_url:
            first = drawn_ms(f"{base_url}/#/runs/{RUN}")
            later = [drawn_ms(f"{base_url}/#/runs/{RUN}") for _ in range(REPETITIONS)]
            lists = [drawn_ms(f"{base_url}/#/") for _ in range(REPETITIONS)]
    print(f"{n_steps * BATCH_SIZE:,} observations, navigation to drawn charts:")
    print(f"first, which folds the log: {first:,} ms; then median {np.median(later):.0f} ms, fastest {min(later)} ms")
    print(f"list of {options.runs:,} runs, first page: median {np.median(lists):.0f} ms, fastest {min(lists)} ms")


def drawn_ms(address: str) -> int:
    """Milliseconds from navigation to the frame in which the view stands, as the page measured them."""
    with browser() as tab:
        tab.open(address)
        tab.until("document.getElementById('view')?.dataset.drawnMs", seconds=LONGEST_SECONDS)
        return int(tab.run("document.getElementById('view').dataset.drawnMs"))


def write_runs(store: Store, n: int) -> None:
    """So many runs, each with a state of its own."""
    now = datetime.now(timezone.utc)
    verdicts = get_args(Verdict)
    states = []
    for i in range(n):
        run, _ = store.put_run(f"sweep-{i:05d}", RunSettings(embedder="none"), now=now)
        shares = tuple(SharePoint(2 * step, 2 * step + 1, 0.3 + 0.02 * step) for step in range(16))
        summary = Summary(verdicts[i % 5], lift=Estimate(i / n, 0.0, 1.0), informative_shares=shares)
        states.append((run.id, 0, summary))
    store.save_run_states(states, now=now)


if __name__ == "__main__":
    main()
