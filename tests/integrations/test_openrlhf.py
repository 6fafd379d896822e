"""The adapter under OpenRLHF's own trainer, prompt data set and samples generator. Slow: packages come first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.integrations.conftest import TrainersService, observed
from tests.integrations.real import groups_made, python_with

PACKAGES = (
    "openrlhf==0.11.2",
    "aiohappyeyeballs",
    "aiohttp",
    "aiosignal",
    "attrs",
    "frozenlist",
    "jsonschema",
    "jsonschema-specifications",
    "msgpack",
    "multidict",
    "peft",
    "propcache",
    "protobuf",
    "pylatexenc",
    "ray==2.60.0",
    "referencing",
    "rpds-py",
    "torchdata==0.11.0",
    "yarl",
)
"""OpenRLHF's trainer imports them. What needs a GPU (vLLM, DeepSpeed, flash-attn) the program leaves empty."""


@pytest.mark.slow
def test_groups_are_reported_before_the_filter_and_a_resumed_training_goes_back(
    trainers_service: TrainersService, tmp_path: Path
) -> None:
    python, program = python_with(tmp_path / "python", *PACKAGES), str(Path(__file__).parent / "openrlhf_program.py")
    folder = tmp_path / "training"
    folder.mkdir()

    def trained(n_steps: int) -> list[tuple[str, int, float, int]]:
        given = {**os.environ, "HF_HOME": str(tmp_path / "huggingface"), "HOME": str(folder)}
        command = [python, program, trainers_service.base_url, "openrlhf", str(folder), str(n_steps)]
        return [(prompt_id, step, won, 4) for prompt_id, step, won in groups_made(command, folder, given)]

    first, second = trained(2), trained(4)

    kept = [group for group in first if group[1] < min(step for _, step, _, _ in second)]
    assert observed(trainers_service, "openrlhf") == sorted(kept + second)
    assert kept
    assert {won for _, _, won, _ in kept + second} & {0.0, 4.0}  # what the filter dropped is known too
    assert trainers_service.client.run("openrlhf").group_size == 4
