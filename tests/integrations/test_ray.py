"""The service on a real, local Ray: another driver finds it, it comes back when it is killed, and refits in tasks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from tests.integrations.real import python_with
from tests.waiting import until

from evenodds import Client, EvenOddsError

PACKAGES = (
    "ray==2.60.0",
    "msgpack",
    "protobuf",
    "jsonschema",
    "attrs",
    "jsonschema-specifications",
    "referencing",
    "rpds-py",
)
DRIVER = """
import sys, ray
from evenodds.integrations.ray import start, stop

ray.init(address=sys.argv[3], log_to_driver=False)
for line in sys.stdin:
    if line == "stop\\n":
        stop()
        stop()
        break
    url = start(sys.argv[1], port=int(sys.argv[2]), look_seconds=0.5)
    pid = ray.get(ray.get_actor("evenodds", namespace="evenodds").pid.remote())
    print(url, pid, flush=True)
"""


HEAD = """
import sys, ray

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


class Cluster:
    """A Ray of one node that outlives its drivers, and the drivers that connect to it."""

    def __init__(self, folder: Path, service_port: int) -> None:
        self._python = python_with(folder / "python", *PACKAGES)
        self._sockets = tempfile.mkdtemp(prefix="ray-")  # the paths of sockets may not be long
        self._environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HOME": str(folder),
        }
        self._head = self._program(HEAD, self._sockets)
        assert self._head.stdout is not None
        self._arguments = [f"sqlite:///{folder}/evenodds.db", str(service_port), self._head.stdout.readline().strip()]

    def driver(self) -> subprocess.Popen[str]:
        return self._program(DRIVER, *self._arguments)

    def close(self) -> None:
        self._head.communicate()  # it ends with its input
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _program(self, text: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self._python, "-c", text, *arguments],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )


def said_by(driver: subprocess.Popen[str], word: str) -> list[str]:
    """What a driver answers to a line."""
    assert driver.stdin is not None
    assert driver.stdout is not None
    driver.stdin.write(f"{word}\n")
    driver.stdin.flush()
    return driver.stdout.readline().split()


@pytest.mark.slow
def test_a_second_driver_finds_the_service_which_comes_back_when_killed_and_refits(
    tmp_path: Path, unused_port: int
) -> None:
    cluster = Cluster(tmp_path, unused_port)
    drivers = []
    try:
        drivers.append(cluster.driver())
        url, pid = said_by(drivers[0], "start")
        drivers[0].kill()
        drivers[0].wait()
        with Client(url) as client:
            client.put_run("math", embedder="none", refit={"every_observations": 1})
            client.add_prompts("math", [{"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"} for i in range(40)])
            drivers.append(cluster.driver())
            found = said_by(drivers[1], "start")
            client.observe("math", 0, [{"prompt_id": f"p{i}", "successes": i % 5, "attempts": 4} for i in range(40)])
            os.kill(int(pid), signal.SIGKILL)

            def is_refitted() -> bool:
                try:
                    return client.run("math").model_version > 0
                except EvenOddsError:
                    return False

            until(is_refitted, "the service after it was killed, and a refit by a task")
        _, pid_afterwards = said_by(drivers[1], "start")
        assert said_by(drivers[1], "stop") == []
        ended = drivers[1].wait(120)
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate()
        cluster.close()

    assert found == [url, pid]
    assert pid_afterwards != pid
    assert ended == 0
