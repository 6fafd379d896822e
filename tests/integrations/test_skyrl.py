"""The adapter under SkyRL's own configuration, dataset, training loop and checkpoints. Slow: packages come first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.integrations.conftest import TrainersService, observed
from tests.integrations.real import groups_made, python_with

PACKAGES = (
    "skyrl==0.3.0",
    "skyrl-gym==0.4.0",
    "aiohappyeyeballs",
    "aiohttp",
    "aiosignal",
    "antlr4-python3-runtime==4.9.3",
    "attrs",
    "frozenlist",
    "hydra-core==1.3.2",
    "jaxtyping",
    "jsonschema",
    "jsonschema-specifications",
    "loguru",
    "msgpack",
    "multidict",
    "omegaconf==2.3.0",
    "peft",
    "propcache",
    "protobuf",
    "ray==2.60.0",
    "referencing",
    "rpds-py",
    "torchdata==0.11.0",
    "wadler-lindig",
    "yarl",
)
"""SkyRL's trainer imports them."""
FILTER = "trainer.algorithm.dynamic_sampling.type=filter"


@pytest.mark.slow
def test_real_batches_are_reported_and_a_resumed_training_goes_back(
    trainers_service: TrainersService, tmp_path: Path
) -> None:
    python, program = python_with(tmp_path / "python", *PACKAGES), str(Path(__file__).parent / "skyrl_program.py")

    def trained(run: str, *settings: str, **environment: str) -> list[tuple[str, int, float, int]]:
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        given = {**os.environ, "HF_HOME": str(tmp_path / "huggingface"), "HOME": str(folder), **environment}
        command = [python, program, trainers_service.base_url, run, str(folder), *settings]
        return [(prompt_id, step, correct, 4) for prompt_id, step, correct in groups_made(command, folder, given)]

    def from_step(run: str, step: int) -> tuple[str, str]:
        return "trainer.resume_mode=from_path", f"trainer.resume_path={tmp_path}/{run}/checkpoints/global_step_{step}"

    first = trained("sky", "trainer.max_training_steps=3")
    turns = "generator.step_wise_trajectories=true"
    second = trained("sky", "trainer.max_training_steps=3", turns, *from_step("sky", 1))
    filled = trained("sky-filled", "trainer.max_training_steps=2", FILTER, FILL="1")
    again = trained("sky-filled", "trainer.max_training_steps=2", FILTER, *from_step("sky-filled", 1), FILL="1")

    kept = [group for group in first if group[1] == 1]
    assert observed(trainers_service, "sky") == sorted(kept + second)
    assert {step for _, step, _, _ in second} == {2, 3}
    assert trainers_service.client.run("sky").group_size == 4
    n_prompts = [sum(step == wanted for _, step, _, _ in filled) for wanted in (1, 2)]
    assert min(n_prompts) > 4  # more than a batch, of which the filter keeps the informative groups
    outcomes = [group[::2] for group in filled if group[1] == 1] + [group[::2] for group in again]
    assert sorted(group[::2] for group in observed(trainers_service, "sky-filled")) == sorted(outcomes)
