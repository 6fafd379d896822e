"""The service on a real, local Ray: it is found under its name, comes back when it is killed, and refits in tasks."""

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

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[3])
for _ in sys.stdin:
    url = start(sys.argv[1], port=int(sys.argv[2]), look_seconds=0.5)
    pid = ray.get(ray.get_actor("evenodds", namespace="evenodds").pid.remote())
    print(url, pid, flush=True)
stop()
stop()
"""


@pytest.mark.slow
def test_the_service_is_found_again_comes_back_when_killed_and_refits(tmp_path: Path, unused_port: int) -> None:
    python = python_with(tmp_path / "python", *PACKAGES)
    sockets = tempfile.mkdtemp(prefix="ray-")  # the paths of sockets may not be long
    driver = subprocess.Popen(
        [python, "-c", DRIVER, f"sqlite:///{tmp_path}/evenodds.db", str(unused_port), sockets],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None

    def started() -> list[str]:
        assert driver.stdin is not None
        assert driver.stdout is not None
        driver.stdin.write("start\n")
        driver.stdin.flush()
        return driver.stdout.readline().split()

    try:
        url, pid = started()
        again = started()
        with Client(url) as client:
            client.put_run("math", embedder="none", refit={"every_observations": 1})
            client.add_prompts("math", [{"prompt_id": f"p{i}", "text": f"What is {i} + {i}?"} for i in range(40)])
            client.observe("math", 0, [{"prompt_id": f"p{i}", "successes": i % 5, "attempts": 4} for i in range(40)])
            os.kill(int(pid), signal.SIGKILL)

            def is_refitted() -> bool:
                try:
                    return client.run("math").model_version > 0
                except EvenOddsError:
                    return False

            until(is_refitted, "the service after it was killed, and a refit by a task")
        _, pid_afterwards = started()
    finally:
        driver.stdin.close()
        driver.wait(120)
        driver.stdout.close()
        shutil.rmtree(sockets, ignore_errors=True)

    assert again == [url, pid]
    assert pid_afterwards != pid
    assert driver.returncode == 0
