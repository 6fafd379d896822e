"""The adapter under tinker-cookbook's own classes and rollouts. Slow: the package is installed first."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.integrations.conftest import TrainersService, observed
from tests.integrations.real import python_with

PACKAGES = ("tinker-cookbook==0.6.1", "tinker==0.38.0", "chz", "distro", "orjson", "sniffio")


@pytest.mark.slow
def test_real_rollouts_are_reported_and_a_resumed_training_goes_back(
    trainers_service: TrainersService, tmp_path: Path
) -> None:
    python = python_with(tmp_path / "python", *PACKAGES)
    client, run = trainers_service.client, "tinker-real"
    client.put_run(run, embedder="none")
    client.add_prompts(run, [{"prompt_id": f"n{i}", "text": f"{i}?"} for i in range(8)])

    def trained(first: int, end: int) -> list[tuple[str, int, float, int]]:
        program = str(Path(__file__).parent / "tinker_program.py")
        done = subprocess.run(
            [python, program, trainers_service.base_url, run, str(tmp_path / "outbox"), str(first), str(end)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3_000:]
        lines = [line.split() for line in done.stdout.splitlines()]
        return [(prompt_id, int(step), float(correct), 4) for prompt_id, step, correct in lines]

    first = trained(0, 3)
    second = trained(2, 4)

    kept = [attempt for attempt in first if attempt[1] < 2]
    assert observed(trainers_service, run) == sorted(kept + second)
    assert client.run(run).group_size == 4
