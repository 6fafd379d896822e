"""The examples run where they can, and name what exists where they cannot."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.integrations import frameworks
from tests.integrations.conftest import TrainersService, observed

from evenodds.integrations.connection import Connection

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FRAMEWORKS = (
    "torch",
    "trl",
    "verl",
    "verl_v1",
    "slime",
    "prime_rl",
    "trinity",
    "nemo_rl",
    "tinker",
    "skyrl",
    "openrlhf",
)


def run_example(path: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / path), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


@pytest.mark.slow
def test_the_pytorch_example_trains_and_resumes(trainers_service: TrainersService, tmp_path: Path) -> None:
    first = run_example("torch/train.py", trainers_service.base_url, cwd=tmp_path)
    again = run_example("torch/train.py", trainers_service.base_url, cwd=tmp_path)

    assert [int(step) for step in re.findall(r"step (\d+):", first)] == list(range(20))
    assert again == ""
    assert len(observed(trainers_service, "torch-sums")) == 20 * 32


@pytest.mark.slow
def test_the_trl_example_trains(trainers_service: TrainersService, tmp_path: Path) -> None:
    from tests.integrations.tiny import tiny_model

    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    said = run_example(
        "trl/train.py", trainers_service.base_url, "--model", str(tmp_path / "model"), "--steps", "2", cwd=tmp_path
    )

    assert "delivered=8" in said
    assert [attempts for *_, attempts in observed(trainers_service, "trl-sums")] == [8] * 8


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_readme_pins_a_version_and_names_limits_and_files_that_exist(framework: str) -> None:
    text = (EXAMPLES / framework / "README.md").read_text()

    assert re.search(r"==\d|commit [0-9a-f]{12}", text)
    assert framework == "torch" or "What the interface cannot do:" in text
    for name in re.findall(r"examples/[\w/]+\.\w+", text):
        assert (EXAMPLES.parent / name).is_file() or name in ("examples/run_grpo.py", "examples/grpo_gsm8k")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_an_example_names_of_ours_exists(framework: str) -> None:
    files = [
        path for path in (EXAMPLES / framework).rglob("*") if path.suffix in (".md", ".sh", ".txt", ".py", ".yaml")
    ]
    text = "\n".join(path.read_text() for path in files)
    standins: dict[str, Any] = {
        **frameworks.VERL_071,
        **frameworks.verl_091(frameworks.TransferQueue()),
        **frameworks.SLIME,
        **frameworks.prime_rl(),
        **frameworks.trinity(frameworks.Registry()),
        **frameworks.TINKER,
        **frameworks.TORCHDATA,
    }
    named = set(re.findall(r"evenodds\.integrations\.(\w+)(?:\.(\w+))?", text))
    assert named
    with frameworks.installed(standins, *(f"evenodds.integrations.{module}" for module, _ in named)):
        for module, member in named:
            assert hasattr(importlib.import_module(f"evenodds.integrations.{module}"), member or "__doc__")


def test_the_configurations_are_understood() -> None:
    slime = yaml.safe_load((EXAMPLES / "slime" / "evenodds.yaml").read_text())["evenodds"]
    (taskset,) = yaml.safe_load((EXAMPLES / "trinity" / "taskset.yaml").read_text())["buffer"]["explorer_input"][
        "tasksets"
    ]
    trinity = dict(taskset["data_selector"]["kwargs"])

    assert trinity.pop("group_size") == 8
    for settings in (slime, trinity):
        connection = Connection({**settings, "base_url": None}, ["a"], where="example", no_fill=None)
        assert connection.selector.run == settings["run"]
        connection.selector.close()


def test_the_openrlhf_example_refuses_the_trainer_that_it_does_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--train.async_enable"])
    standins: dict[str, dict[str, Any]] = {"ray": {}, "openrlhf.trainer": {"ppo_trainer": None}}
    with (
        frameworks.installed(standins, "evenodds.integrations.openrlhf"),
        pytest.raises(SystemExit, match=r"^--train\.async_enable: PPOTrainerAsync samples where"),
    ):
        runpy.run_path(str(EXAMPLES / "openrlhf" / "train.py"), run_name="__main__")


@pytest.mark.slow
def test_the_trl_example_trains_in_two_processes(
    trainers_service: TrainersService, tmp_path: Path, unused_port: int
) -> None:
    from tests.integrations.tiny import tiny_model

    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(unused_port)]
    arguments = ["--model", str(tmp_path / "model"), "--steps", "2", "--evenodds-run", "trl-two"]

    done = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / "trl" / "train.py"), trainers_service.base_url, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3_000:]
    reports = observed(trainers_service, "trl-two")
    for step in (0, 1):
        batch = trainers_service.client.select_batch("trl-two", step, 8)
        drawn = {prompt.prompt_id for prompt in batch.prompts}
        assert batch.replayed
        assert {prompt_id for prompt_id, at, _, _ in reports if at == step} == drawn
        assert sum(attempts for _, at, _, attempts in reports if at == step) == 8 * 8
