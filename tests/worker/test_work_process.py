"""The worker as a process: how it starts, how it ends, and what is left when it is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from benchmarks.kills import kill_workers
from tests.waiting import PATIENCE_SECONDS

from evenodds import Client

if TYPE_CHECKING:
    from tests.conftest import Service

ROOT = Path(__file__).parents[2]
LISTENING = re.compile(r"running on (http://127\.0\.0\.1:\d+)")
FITS = re.compile(r"worker \S+-(\d+) fits on cpu")


@contextmanager
def started(cwd: Path, *arguments: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `evenodds` with these settings only; its standard error is a pipe that its children share."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVENODDS_")}
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("client", "service"))
    with subprocess.Popen(
        [sys.executable, "-m", "evenodds_service", *arguments],
        cwd=cwd,
        env={**kept, "PYTHONPATH": paths, "EVENODDS_PORT": "0", "EVENODDS_DEVICE": "cpu", **settings},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def says(process: subprocess.Popen[str], *patterns: re.Pattern[str]) -> list[str]:
    """Read on until each pattern was found; what their groups matched."""
    assert process.stderr is not None
    found: dict[re.Pattern[str], str] = {}
    said = []
    for line in process.stderr:
        said.append(line)
        found |= {pattern: match.group(1) for pattern in patterns if (match := pattern.search(line))}
        if len(found) == len(patterns):
            return [found[pattern] for pattern in patterns]
    raise AssertionError("".join(said))


def rest(process: subprocess.Popen[str]) -> str:
    """What it and its children still say. Ends when the last of them has ended."""
    return process.communicate(timeout=PATIENCE_SECONDS)[1]


def test_work_ends_cleanly_at_sigterm(tmp_path: Path) -> None:
    with started(tmp_path, "work") as process:
        says(process, FITS)

        process.send_signal(signal.SIGTERM)

        assert "Traceback" not in rest(process)
        assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_serve_brings_a_worker_that_refits_and_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, "serve", "--with-worker") as process:
        base_url, pid = says(process, LISTENING, FITS)
        with Client(base_url) as client:
            client.put_run("math", embedder="none")
            client.add_prompts("math", [{"prompt_id": "a"}])
            refit = client.refit("math", wait_seconds=PATIENCE_SECONDS)
            version = client.predict("math", ["a"]).model_version

        process.send_signal(number)

        assert "Traceback" not in rest(process)
        assert (refit.status, refit.model_version, version) == ("done", 1, 1)
        assert refit.worker is not None
        assert refit.worker.endswith(f"-{pid}")


@pytest.mark.slow
def test_a_worker_whose_parent_died_before_it_was_up_ends_too(tmp_path: Path) -> None:
    with started(tmp_path, "serve", "--with-worker") as process:
        says(process, LISTENING)  # the worker still loads its libraries

        process.kill()

        rest(process)


@pytest.mark.slow
def test_work_says_that_the_device_does_not_exist(tmp_path: Path) -> None:
    with started(tmp_path, "work", EVENODDS_DEVICE="teapot") as process:
        said = rest(process)

        assert process.returncode == 1
        assert said.startswith("evenodds: EVENODDS_DEVICE: ")
        assert "'teapot'" in said


@pytest.mark.slow
@pytest.mark.parametrize("n_kills", [4])
def test_killed_workers_are_taken_over_and_no_version_is_lost_or_doubled(
    database_url: str, start_service: Callable[[str], Service], n_kills: int
) -> None:
    base_urls = [start_service(database_url).base_url for _ in range(2)]

    kills = kill_workers(database_url, base_urls, n_kills)

    assert kills.faults == []
    assert kills.refits == n_kills
    assert kills.in_fit >= 1
    assert kills.taken_over == kills.in_fit
    assert kills.answers > 2 * n_kills
