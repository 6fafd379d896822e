"""A real nginx on loopback, with a configuration of the test's own or one that the documentation shows."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.waiting import PATIENCE_SECONDS, until

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
behind_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx on this machine")


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
    log = folder / "nginx.log"
    with log.open("wb") as output:
        command = [NGINX, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    host, port = address.split(":")

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as client:
            return client.connect_ex((host, int(port))) == 0

    try:
        until(listens, "nginx to listen")
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)
