"""GRPOTrainer in two processes, as `torchrun` starts them: both train on what the service chose for all."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from benchmarks.latency import service_process
from tests.client.proxy import proxy_before
from tests.integrations import tiny
from tests.integrations.conftest import TrainersService, observed
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import Client

pytestmark = pytest.mark.slow

_numbers = itertools.count(1)
Rewarded = list[tuple[int, str, float]]
ONE_GROUP_EACH: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
GROUPS_THAT_SPAN_RANKS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
}


class Training:
    """Starts the two ranks of a training, and reads what they have rewarded."""

    def __init__(self, base_url: str, run: str, folder: Path, port: int) -> None:
        self.base_url, self.run, self.folder, self.port = base_url, run, folder, port

    def start(self, name: str, *, resume: Path | None = None, halts: tuple[int, ...] = (), **config: Any) -> Any:
        given = {
            "name": name,
            "resume": None if resume is None else str(resume),
            "halts": halts,
            "outboxes": True,  # as on two machines
            "deadline_seconds": PATIENCE_SECONDS if not halts else 5.0,
            "config": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **config},
        }
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(self.port)]
        return subprocess.Popen(
            [sys.executable, *launch, tiny.__file__, self.base_url, self.run, str(self.folder)],
            env={**os.environ, "PYTHONPATH": os.getcwd(), "TINY_TRAINING": json.dumps(given)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def ended(self, process: Any, name: str) -> list[Rewarded]:
        said = process.communicate(timeout=4 * PATIENCE_SECONDS)[1]
        assert process.returncode == 0, said[-3_000:]
        return [[tuple(a) for a in json.loads((self.folder / f"{name}-{rank}.json").read_text())] for rank in (0, 1)]

    def trained(self, name: str, **options: Any) -> list[Rewarded]:
        return self.ended(self.start(name, **options), name)


@pytest.fixture
def training(trainers_service: TrainersService, tmp_path: Path, unused_port: int) -> Training:
    return Training(trainers_service.base_url, f"ranked-{next(_numbers)}", tmp_path, unused_port)


def summed(*lives: list[Rewarded]) -> list[tuple[str, int, float, int]]:
    """(prompt, step, successes, attempts) of what all ranks rewarded."""
    totals: dict[tuple[str, int], list[float]] = defaultdict(list)
    for ranks in lives:
        for step, prompt_id, reward in itertools.chain(*ranks):
            totals[prompt_id, step].append(reward)
    return sorted((prompt_id, step, sum(rewards), len(rewards)) for (prompt_id, step), rewards in totals.items())


def counted(service: TrainersService, run: str) -> list[tuple[str, int, float, int]]:
    """The same as the service counts it: what several ranks report of one group together."""
    totals: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0])
    for prompt_id, step, successes, attempts in observed(service, run):
        totals[prompt_id, step][0] += successes
        totals[prompt_id, step][1] += attempts
    return sorted((prompt_id, step, won, int(n)) for (prompt_id, step), (won, n) in totals.items())


@pytest.mark.parametrize("config", [ONE_GROUP_EACH, GROUPS_THAT_SPAN_RANKS])
def test_a_fresh_training_counts_what_both_ranks_rewarded(
    trainers_service: TrainersService, training: Training, config: dict[str, Any]
) -> None:
    lived = training.trained("fresh", **config)

    assert {step for step, _, _ in lived[1]} == {0, 1, 2, 3}
    assert counted(trainers_service, training.run) == summed(lived)
    n_prompts = 8 // config.get("num_generations", 4)
    for step in range(4):
        batch = trainers_service.client.select_batch(training.run, step, n_prompts)
        drawn = {prompt_id for at, prompt_id, _ in itertools.chain(*lived) if at == step}
        assert batch.replayed
        assert {prompt.prompt_id for prompt in batch.prompts} == drawn


def test_a_training_resumed_from_a_checkpoint_that_was_moved_counts_each_step_once(
    trainers_service: TrainersService, training: Training, tmp_path: Path
) -> None:
    first = training.trained("first", **ONE_GROUP_EACH)
    checkpoint = Path(shutil.move(tmp_path / "trained" / "checkpoint-2", tmp_path / "elsewhere"))
    shutil.rmtree(tmp_path / "trained")

    second = training.trained("second", resume=checkpoint, **ONE_GROUP_EACH)

    kept = [[attempt for attempt in rank if attempt[0] < 2] for rank in first]
    assert {step for step, _, _ in itertools.chain(*second)} == {2, 3}
    assert counted(trainers_service, training.run) == summed(kept, second)
    assert {visit.selection_id for prompt in tiny.PROMPTS for visit in _history(trainers_service, training, prompt)}


def _history(service: TrainersService, training: Training, prompt: dict[str, str]) -> Any:
    return service.client.prompt(training.run, prompt["prompt_id"]).history


def test_a_service_that_is_killed_meanwhile_costs_uniform_batches_and_no_outcome(
    training: Training, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path}/evenodds.db"
    with (
        service_process(database) as (first_url, first_pid),
        proxy_before(first_url) as proxy,
    ):
        training.base_url = proxy.base_url
        process = training.start("lived", halts=(1, 3), **ONE_GROUP_EACH)
        until(lambda: len(list(tmp_path.glob("reached-1-*"))) == 2, "both ranks at step 1")
        os.kill(first_pid, signal.SIGKILL)
        (tmp_path / "go-on-1").touch()
        until(lambda: len(list(tmp_path.glob("reached-3-*"))) == 2, "both ranks at step 3")
        with service_process(database) as (second_url, _), Client(second_url) as client:
            proxy.target = second_url
            (tmp_path / "go-on-3").touch()
            lived = training.ended(process, "lived")

            assert counted(TrainersService(second_url, client), training.run) == summed(lived)
    assert {step for step, _, _ in lived[0]} == {0, 1, 2, 3}
