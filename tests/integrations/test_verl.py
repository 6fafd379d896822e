"""The sampler under verl's own configuration, dataset, data loader and batches. Slow: the packages come first."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.integrations.conftest import TrainersService, observed
from tests.integrations.real import python_with

PACKAGES = (
    "verl==0.7.1",
    "aiohappyeyeballs",
    "aiohttp",
    "aiosignal",
    "antlr4-python3-runtime==4.9.3",
    "attrs",
    "codetiming",
    "frozenlist",
    "hydra-core==1.3.2",
    "jsonschema",
    "jsonschema-specifications",
    "msgpack",
    "multidict",
    "omegaconf==2.3.0",
    "orjson",
    "peft",
    "propcache",
    "protobuf",
    "pyvers",
    "ray==2.60.0",
    "referencing",
    "rpds-py",
    "tensordict==0.15.3",
    "torchdata==0.11.0",
    "yarl",
)
"""verl's trainer imports them."""


@pytest.mark.slow
def test_real_batches_are_reported_and_a_resumed_training_goes_back(
    trainers_service: TrainersService, tmp_path: Path
) -> None:
    python, run = python_with(tmp_path / "python", *PACKAGES), "verl-real"

    def trained(first: int, end: int) -> list[tuple[str, int, float, int]]:
        program = str(Path(__file__).parent / "verl_program.py")
        arguments = [trainers_service.base_url, run, str(tmp_path), str(first), str(end)]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "huggingface")}
        done = subprocess.run(
            [python, program, *arguments], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr[-3_000:]
        lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("trained ")]
        return [(f"sums/{index}", int(step), float(correct), 4) for index, step, correct in lines]

    first = trained(1, 5)
    second = trained(3, 8)

    kept = [group for group in first if group[1] < 3]
    assert observed(trainers_service, run) == sorted(kept + second)
    assert len({step for _, step, _, _ in second}) == 5
    assert trainers_service.client.run(run).group_size == 4
