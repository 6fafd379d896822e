"""A service of the demo's own: `evenodds serve --with-worker` on a free loopback port over a database file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evenodds import Client, EvenOddsError

START_SECONDS = 120.0


class ServiceFailed(RuntimeError):
    """The service did not come up. The message holds what it said last."""


@contextmanager
def running_service(folder: Path) -> Iterator[str]:
    """Start it, wait until it is ready, yield its URL, and stop it at the end.

    Args:
        folder: For its database and its log; exists.

    Raises:
        ServiceFailed: it ended, or was not ready after `START_SECONDS`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "EVENODDS_HOST": "127.0.0.1",
        "EVENODDS_PORT": str(port),
        "EVENODDS_DATABASE_URL": f"sqlite:///{folder / 'evenodds.db'}",
        "EVENODDS_WORKER_POLL_SECONDS": "0.05",  # a step of the demo takes a fraction of a second
    }
    url = f"http://127.0.0.1:{port}"
    log = folder / "service.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "evenodds_service", "serve", "--with-worker"],
            env={**os.environ, **settings},
            stdout=said,
            stderr=said,
        )
        try:
            _wait_until_ready(url, process, log)
            yield url
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with Client(url, retries=0) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServiceFailed(f"the service ended with status {process.returncode}: {log.read_text()[-2_000:]}")
            try:
                if client.readyz().status == "ok":
                    return
            except EvenOddsError:
                pass
            time.sleep(0.1)
    raise ServiceFailed(f"the service was not ready after {START_SECONDS:g} s: {log.read_text()[-2_000:]}")
