"""The adapters under verl's own configuration, dataset, data loader, queue and batches. Slow: packages come first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from tests.integrations.conftest import TrainersService, observed, selected
from tests.integrations.real import python_with

PACKAGES = (
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
"""verl's trainers import them."""
QUEUE = ("TransferQueue==0.1.11", "cachetools", "msgspec", "pyzmq")
"""So do those of V1."""


@pytest.mark.slow
def test_real_batches_are_reported_and_a_resumed_training_goes_back(
    trainers_service: TrainersService, tmp_path: Path
) -> None:
    python, run = python_with(tmp_path / "python", "verl==0.7.1", *PACKAGES), "verl-real"

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


Group = tuple[str, int, float, int]


class Training:
    """verl's V1 trainer in processes of their own, each with a Ray of its own."""

    def __init__(self, python: str, url: str, run: str, folder: Path) -> None:
        self._python, self._url, self._run, self._folder = python, url, run, folder
        folder.mkdir()
        self._n_lines = 0

    def trained(self, *settings: str, **environment: str) -> list[Group]:
        """Every group that this process rolled out: prompt, verl's step, successes, attempts that did not fail."""
        program, sockets = Path(__file__).parent / "verl_v1_program.py", tempfile.mkdtemp(prefix="ray-")
        given = {
            **os.environ,
            "HF_HOME": str(self._folder / "huggingface"),
            "HOME": str(self._folder),
            "RAY_AUTH_MODE": "disabled",
            "RAY_SOCKETS": sockets,  # whose paths may not be long
            "RAY_USAGE_STATS_ENABLED": "0",
            "VERL_USE_EXTERNAL_MODULES": "evenodds.integrations.verl_v1",
            **environment,
        }
        command = [self._python, str(program), self._url, self._run, str(self._folder), *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
        shutil.rmtree(sockets, ignore_errors=True)
        assert done.returncode == 0, done.stderr[-3_000:]
        lines = (self._folder / "sessions.jsonl").read_text().splitlines()
        groups: dict[tuple[str, str, int], list[bool | None]] = defaultdict(list)
        for line in map(json.loads, lines[self._n_lines :]):
            groups[line["uid"], f"sums/{line['prompt']}", line["step"]].append(line["correct"])
        self._n_lines = len(lines)
        return [
            (prompt_id, step, float(sum(bool(c) for c in group)), sum(c is not None for c in group))
            for (_, prompt_id, step), group in groups.items()
        ]


@pytest.mark.slow
def test_v1_trainers_report_every_group_on_a_real_ray_and_a_resumed_training_goes_back(
    trainers_service: TrainersService, tmp_path: Path
) -> None:
    python = python_with(tmp_path / "python", "verl==0.9.1", *PACKAGES, *QUEUE)
    base_url = trainers_service.base_url
    sync, resuming = Training(python, base_url, "verl-sync", tmp_path / "sync"), "trainer.resume_mode=resume_path"
    filtering = ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc")
    ahead = Training(python, base_url, "verl-ahead", tmp_path / "ahead")

    first = sync.trained("trainer.total_training_steps=3", FAILING="1")
    afterwards = observed(trainers_service, "verl-sync")
    checkpoint = f"trainer.resume_from_path={tmp_path}/sync/checkpoints/global_step_1"
    second = sync.trained("trainer.total_training_steps=3", resuming, checkpoint, *filtering)
    early = ahead.trained("trainer.total_training_steps=3", "trainer.v1.trainer_mode=colocate_async")

    assert afterwards == sorted(first)
    assert {attempts for *_, attempts in first} == {3, 4}  # some attempts failed
    kept = [group for group in first if group[1] == 1]  # `second` has those too that verl filtered
    now = observed(trainers_service, "verl-sync")
    assert [group for group in now if group[1] == 1] == sorted(kept)
    assert sorted((i, won, n) for i, step, won, n in now if step > 1) == sorted((i, won, n) for i, _, won, n in second)
    chosen = [(i, step) for step, ids in enumerate(selected(trainers_service, "verl-ahead", 1, 2, 3), 1) for i in ids]
    seen = observed(trainers_service, "verl-ahead")
    assert [(i, step) for i, step, _, _ in seen] == sorted(chosen)
    assert {(i, won, n) for i, _, won, n in seen} <= {(i, won, n) for i, _, won, n in early}
    assert trainers_service.client.run("verl-sync").group_size == 4
    assert '"evenodds/informative_share"' in (tmp_path / "sync" / "figures.jsonl").read_text()
