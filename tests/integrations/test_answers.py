"""Each adapter sends the answers that its framework has, and nothing that cannot be sent."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.integrations import frameworks
from tests.integrations.conftest import TrainersService
from tests.integrations.test_adapters import adapter, slime_args
from tests.integrations.test_more_adapters import Builder, SkyTrainer
from tests.waiting import PATIENCE_SECONDS

from evenodds.integrations.connection import Connection
from evenodds.schemas.fields import MAX_ANSWER
from evenodds.training.text import answer_of, described

_numbers = itertools.count(1)


def verl(settings: dict[str, Any], _: Path) -> tuple[Connection, dict[str, Any]]:
    with frameworks.installed(frameworks.VERL_071, "evenodds.integrations.verl"):
        data = {"train_batch_size": 4, "evenodds": settings}
        made = adapter("verl").EvenOddsSampler(frameworks.RLHFDataset(8), data)
    return made._connection, {f"sums/{i}": f"{2 * i}" for i in range(8)}


def slime(settings: dict[str, Any], folder: Path) -> tuple[Connection, dict[str, Any]]:
    samples = [
        frameworks.Sample(prompt=f"{i}?", label=f"label {i}" if i else None, metadata={"prompt_id": f"q{i}"})
        for i in range(4)
    ]
    with frameworks.installed(frameworks.SLIME, "evenodds.integrations.slime"):
        made = adapter("slime").EvenOddsDataSource(slime_args(settings, folder, samples=samples))
    return made.connection, {"q0": None} | {f"q{i}": f"label {i}" for i in range(1, 4)}


def prime_rl(settings: dict[str, Any], _: Path) -> tuple[Connection, dict[str, Any]]:
    tasks = [frameworks.task(f"t{i}") for i in range(4)]
    del tasks[0].data.answer  # its data has no such field
    with frameworks.installed(frameworks.prime_rl(), "evenodds.integrations.prime_rl"):
        made = adapter("prime_rl").EvenOddsSampler(tasks, settings, batch_size=2)
    return made._connection, {"t0": None} | {f"t{i}": f"t{i} done" for i in range(1, 4)}


def trinity(settings: dict[str, Any], _: Path) -> tuple[Connection, dict[str, Any]]:
    registry = frameworks.Registry()
    rows = SimpleNamespace(dataset=[{"question": f"{i}?", "truth": np.float64(i)} for i in range(4)])
    config = SimpleNamespace(seed=7, kwargs={**settings, "group_size": 8, "answer_key": "truth"})
    with frameworks.installed(frameworks.trinity(registry), "evenodds.integrations.trinity"):
        adapter("trinity")
        made = registry.modules["evenodds"](rows, config)
    return made._connection, {f"{i}": float(i) for i in range(4)}


def nemo_rl(settings: dict[str, Any], _: Path) -> tuple[Connection, dict[str, Any]]:
    loaders = {"math": frameworks.nemo_loader("math", 4)}
    with frameworks.installed(frameworks.NEMO_RL, "evenodds.integrations.nemo_rl"):
        connection = adapter("nemo_rl").SelectedDataloader(settings, n_prompts=4)._connected(loaders)
    return connection, {f"math/{i}": f"{i}" for i in range(4)}


def skyrl(settings: dict[str, Any], _: Path) -> tuple[Connection, dict[str, Any]]:
    with frameworks.installed(frameworks.TORCHDATA, "evenodds.integrations.skyrl"):
        made = adapter("skyrl").following(SkyTrainer, settings)(4)
    return made._evenodds, {prompt_id: f"{2 * int(uid)}" for uid, prompt_id in made._evenodds_ids.items()}


def openrlhf(settings: dict[str, Any], _: Path) -> tuple[Connection, dict[str, Any]]:
    module, dataset = adapter("openrlhf"), frameworks.OpenRLHFDataset(4)
    made = module.SelectedDataloader(dataset, settings, batch_size=2, group_size=2)
    return made.connection, {module.id_of(dataset[i][1], dataset[i][2]): f"{2 * i}" for i in range(4)}


def tinker(settings: dict[str, Any], _: Path) -> tuple[Connection, dict[str, Any]]:
    builders = {f"t{i}": Builder(f"t{i}") for i in range(4)}
    with frameworks.installed(frameworks.TINKER, "evenodds.integrations.tinker"):
        made = adapter("tinker").SelectedDataset(builders, settings, batch_size=2, n_batches=1, answers={"t1": "one"})
    return made.connection, {"t0": None, "t1": "one", "t2": None, "t3": None}


@pytest.mark.parametrize("of_framework", [verl, slime, prime_rl, trinity, nemo_rl, skyrl, openrlhf, tinker])
def test_an_adapter_sends_the_answers_that_its_framework_has(
    of_framework: Any, trainers_service: TrainersService, tmp_path: Path
) -> None:
    run = f"answered-{next(_numbers)}"
    settings = {
        "base_url": trainers_service.base_url,
        "run": run,
        "run_settings": {"embedder": "none"},
        "deadline_seconds": PATIENCE_SECONDS,
        "outbox": str(tmp_path / "outbox"),
    }

    connection, answers = of_framework(settings, tmp_path)
    assert connection.selector.wait_until_ready()
    connection.selector.close()

    assert {prompt.prompt_id: prompt.answer for prompt in trainers_service.client.prompts(run)} == answers


def test_what_cannot_be_sent_is_left_out_and_the_text_stays() -> None:
    for answer in (None, "", float("nan"), "\ud800", "1" * MAX_ANSWER, object(), {1: 2}, [float("inf")]):
        assert described("What?", answer) == {"text": "What?"}
    for answer, sent in ((np.array(["a", "b"]), ["a", "b"]), (np.int64(3), 3), (("a", 1), ["a", 1]), (0, 0)):
        assert answer_of(answer) == sent
