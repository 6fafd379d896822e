"""A real nginx on loopback, or another proxy, for tests and benchmarks."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
PATIENCE_SECONDS = 120.0


def free_address() -> str:
    """Of loopback, host:port, on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def running_nginx(config: str, folder: Path, address: str) -> Iterator[None]:
    """nginx in the foreground from `folder`, once it listens on `address`; ended afterwards."""
    assert NGINX is not None, "this needs nginx"
    (folder / "nginx.conf").write_text(config)
    with listening([NGINX, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"], folder, address):
        yield


@contextmanager
def listening(command: Sequence[str], folder: Path, address: str) -> Iterator[None]:
    """A program in `folder`, once it listens on `address`; ended afterwards. What it says goes to `proxy.log` there.

    Raises:
        AssertionError: It ended before it listened, or did not listen in two minutes.
    """
    log = folder / "proxy.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _listens(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{command[0]} does not listen: {log.read_text()}"
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def _listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0
