"""The service on a real Ray cluster of one node: it outlives its driver, comes back when it is killed, and refits."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integrations.real import python_with
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import Client, EvenOddsError

pytestmark = pytest.mark.slow

DRIVER = """
import sys, ray
from evenodds.integrations.ray import start, stop

ray.init(address=sys.argv[1], log_to_driver=False)
if sys.argv[2] == "stop":
    stop()
    stop()
else:
    print(start(sys.argv[2], port=int(sys.argv[3]), look_seconds=0.5))
    print(ray.get(ray.get_actor("evenodds", namespace="evenodds").pid.remote()))
"""
IS_UP = "import ray, sys; ray.init(address=sys.argv[1])"
Drive = Callable[..., list[str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    """Runs a driver on a cluster of its own, and returns the lines it printed."""
    python = python_with(tmp_path / "python", "ray==2.60.0", "msgpack", "jsonschema", "protobuf")
    sockets = tempfile.mkdtemp(prefix="ray-")  # the paths of sockets may not be long
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)}
    port = free_port()
    address = f"127.0.0.1:{port}"
    ray = [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    head = subprocess.Popen(
        [*ray, "--include-dashboard=false", f"--temp-dir={sockets}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def run(*arguments: str) -> list[str]:
        done = subprocess.run(
            [python, "-c", DRIVER, address, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3_000:]
        return done.stdout.split()

    def is_up() -> bool:
        asked = subprocess.run([python, "-c", IS_UP, address], env=environment, capture_output=True, check=False)
        return asked.returncode == 0

    try:
        until(is_up, "the cluster's head")
        yield run
        run("stop")
    finally:
        head.terminate()
        head.wait(PATIENCE_SECONDS)
        shutil.rmtree(sockets, ignore_errors=True)


def test_the_service_outlives_its_driver_comes_back_when_killed_and_refits(drive: Drive, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/evenodds.db"
    port = str(free_port())

    url, pid = drive(database, port)
    with Client(url, retries=20) as client:
        client.put_run("math", embedder="none", refit={"every_observations": 1})
        client.add_prompts("math", [{"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"} for i in range(40)])
        client.observe("math", 0, [{"prompt_id": f"p{i}", "successes": i % 5, "attempts": 4} for i in range(40)])
        again = drive(database, port)
        os.kill(int(pid), signal.SIGKILL)

        def is_refitted() -> bool:
            try:
                return client.run("math").model_version > 0
            except EvenOddsError:
                return False

        until(is_refitted, "a refit by a task, and the service after it was killed")
        found = drive(database, port)

    assert again == [url, pid]
    assert found[0] == url
    assert found[1] != pid
