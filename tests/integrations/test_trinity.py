"""The selector under Trinity-RFT's own taskset scheduler, reader and operator. Slow: the packages come first."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.integrations.conftest import TrainersService, observed
from tests.integrations.real import python_with

PACKAGES = (
    "trinity-rft==0.6.0",
    "antlr4-python3-runtime==4.9.3",
    "attrs",
    "greenlet",
    "jsonschema",
    "jsonschema-specifications",
    "msgpack",
    "omegaconf==2.3.0",
    "protobuf",
    "ray==2.60.0",
    "referencing",
    "rpds-py",
)
"""Trinity's buffer imports them."""


@pytest.mark.slow
def test_real_feedback_is_reported_and_a_resumed_exploration_goes_back(
    trainers_service: TrainersService, tmp_path: Path
) -> None:
    python, run = python_with(tmp_path / "python", *PACKAGES), "trinity-real"

    def explored(first: int, end: int) -> list[tuple[str, int, float, int]]:
        program = str(Path(__file__).parent / "trinity_program.py")
        command = [python, program, trainers_service.base_url, run, str(tmp_path), str(first), str(end)]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "huggingface")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3_000:]
        lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("explored ")]
        return [(row, int(step), float(correct), 4) for row, step, correct in lines]

    first = explored(0, 3)
    second = explored(2, 4)

    kept = [group for group in first if group[1] < 2]
    assert observed(trainers_service, run) == sorted(kept + second)
    assert {step for _, step, _, _ in second} == {2, 3}
    assert trainers_service.client.run(run).group_size == 4
