"""tinker-cookbook, SkyRL and OpenRLHF: what they draw and report, between stand-ins and a real service."""

from __future__ import annotations

import asyncio
import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.integrations import frameworks
from tests.integrations.conftest import TrainersService, observed, selected
from tests.waiting import PATIENCE_SECONDS

from evenodds import ConfigurationError

_numbers = itertools.count(1)


@pytest.fixture
def settings(trainers_service: TrainersService, tmp_path: Path) -> dict[str, Any]:
    run = f"adapted-too-{next(_numbers)}"
    trainers_service.client.put_run(run, embedder="none")
    return {
        "base_url": trainers_service.base_url,
        "run": run,
        "deadline_seconds": PATIENCE_SECONDS,
        "outbox": str(tmp_path / "outbox"),
    }


def adapter(name: str) -> Any:
    return importlib.import_module(f"evenodds.integrations.{name}")


# tinker-cookbook


class Builder(frameworks.EnvGroupBuilder):
    """Two attempts, whose steps give part of the reward."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cleaned = 0

    async def make_envs(self) -> list[str]:
        return [self.name] * 2

    async def compute_group_rewards(self, trajectory_group: list[Any], env_group: Any) -> list[tuple[float, Any]]:
        return [(0.5, {}), (0.0, {})]

    async def cleanup(self) -> None:
        self.cleaned += 1

    def logging_tags(self) -> list[str]:
        return [self.name]


def trajectory(*rewards: float, **metrics: Any) -> Any:
    return SimpleNamespace(transitions=[SimpleNamespace(reward=reward, metrics=metrics) for reward in rewards])


def tinker_groups(builders: Any, *trajectories: Any) -> None:
    async def roll_out() -> None:
        for builder in builders:
            envs = await builder.make_envs()
            assert await builder.compute_group_rewards(list(trajectories), envs) == [(0.5, {}), (0.0, {})]
            await builder.cleanup()

    asyncio.run(roll_out())


def test_tinker_draws_batches_by_their_index_reports_and_goes_back(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    builders = {f"t{i}": Builder(f"t{i}") for i in range(10)}
    texts = {name: f"Do {name}." for name in builders}
    with frameworks.installed(frameworks.TINKER, "evenodds.integrations.tinker"):
        module = adapter("tinker")

        def dataset() -> Any:
            made = module.SelectedDataset(builders, settings, batch_size=3, n_batches=9, texts=texts, group_size=2)
            assert made.connection.selector.wait_until_ready()
            return made

        first = dataset()
        for index in range(3):
            tinker_groups(first.get_batch(index), trajectory(0.25, 0.25), trajectory(0.0))
        assert first.connection.selector.flush()
        names = [builder.logging_tags()[0] for builder in first.get_batch(3)]
        first.connection.selector.close()

        second = dataset()  # from the checkpoint at batch 2
        tinker_groups(second.get_batch(2), trajectory(0.25, 0.25), trajectory(0.0))
        assert second.connection.selector.flush()
        second.connection.selector.close()

    chosen = selected(trainers_service, settings["run"], 0, 1, 2, batch_size=3)
    assert len(second) == 9
    assert len(set(names)) == 3
    assert observed(trainers_service, settings["run"]) == sorted(
        (name, step, 1.0, 2) for step, ids in enumerate(chosen) for name in ids
    )
    assert all(builder.cleaned for builder in builders.values() if builder.name in itertools.chain(*chosen))


def test_tinker_reads_the_verifiers_own_metric(trainers_service: TrainersService, settings: dict[str, Any]) -> None:
    builders = {f"t{i}": Builder(f"t{i}") for i in range(4)}
    with frameworks.installed(frameworks.TINKER, "evenodds.integrations.tinker"):
        dataset = adapter("tinker").SelectedDataset(
            builders, {**settings, "reward_key": "correct"}, batch_size=2, n_batches=1
        )
        assert dataset.connection.selector.wait_until_ready()
        batch = dataset.get_batch(0)
        tinker_groups(batch, trajectory(-0.1, correct=0.0), trajectory(0.9, correct=1.0))
        assert dataset.connection.selector.flush()
        with pytest.raises(ConfigurationError, match=r"reward_key 'correct' is not a metric of an attempt \(format\)"):
            tinker_groups(batch, trajectory(1.0, format=1.0), trajectory(1.0, format=1.0))
        with pytest.raises(ConfigurationError, match="reward_key 'correct'"):
            dataset.get_batch(1)  # where a strategy that tolerates errors has left the group out
        dataset.connection.selector.close()
        with pytest.raises(ConfigurationError, match="builders: 4 do not fill a batch of 5"):
            adapter("tinker").SelectedDataset(builders, settings, batch_size=5, n_batches=1)

    assert [(won, n) for _, _, won, n in observed(trainers_service, settings["run"])] == [(1.0, 2)] * 2


# SkyRL


class SkyTrainer:
    """As much of `RayPPOTrainer` as the adapter touches."""

    def __init__(self, n_rows: int, dynamic_sampling: str | None = None) -> None:
        algorithm = SimpleNamespace(dynamic_sampling=SimpleNamespace(type=dynamic_sampling))
        self.cfg = SimpleNamespace(
            trainer=SimpleNamespace(train_batch_size=4, algorithm=algorithm),
            generator=SimpleNamespace(n_samples_per_prompt=2),
        )
        self.train_dataset = frameworks.SkyDataset(n_rows)
        self.all_metrics: dict[str, float] = {}
        self._build_train_dataloader_and_compute_training_steps()

    def _build_train_dataloader_and_compute_training_steps(self) -> None:
        self.train_dataloader: Any = None

    def handle_dynamic_sampling(self, generator_output: Any, uids: list[str]) -> Any:
        """Its filter: groups whose rewards differ."""
        groups = [slice(i, i + 2) for i in range(0, len(uids), 2)]
        kept = [group for group in groups if len(set(generator_output["rewards"][group])) > 1]
        rewards = [reward for group in kept for reward in generator_output["rewards"][group]]
        return {"rewards": rewards}, [uid for group in kept for uid in uids[group]], False

    def postprocess_generator_output(self, generator_output: Any, uids: list[str]) -> Any:
        return generator_output, uids


class FullyAsyncRayPPOTrainer(SkyTrainer):
    pass


def test_skyrl_draws_reports_steps_and_token_rewards_and_goes_on(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    with frameworks.installed(frameworks.TORCHDATA, "evenodds.integrations.skyrl"):
        following = adapter("skyrl").following
    trainer = following(SkyTrainer, settings)(12)
    assert trainer._evenodds.selector.wait_until_ready()
    for step, batch in enumerate(itertools.islice(trainer.train_dataloader, 2), start=1):
        uids = [row["uid"] for row in batch for _ in range(2)]
        output: dict[str, Any] = {"rewards": [1.0, 0.0] * 4}
        if step == 2:  # turns of an attempt, with rewards by token: the last turn counts
            uids = [uid for uid in uids for _ in range(3)]
            output = {
                "rewards": [[0.0, reward] for reward in [0.0, 0.0, 1.0] * 8],
                "is_last_step": [False, False, True] * 8,
            }
        assert trainer.postprocess_generator_output(output, uids) == (output, uids)
    assert trainer._evenodds.selector.flush()
    state = trainer.train_dataloader.state_dict()
    figures = trainer.all_metrics
    trainer._evenodds.selector.close()

    resumed = following(SkyTrainer, settings)(12)
    assert resumed._evenodds.selector.wait_until_ready()
    resumed.train_dataloader.load_state_dict(state)
    (third,) = itertools.islice(resumed.train_dataloader, 1)
    ids = [resumed._evenodds_ids[row["uid"]] for row in third]
    resumed._evenodds.selector.close()

    chosen = selected(trainers_service, settings["run"], 1, 2, 3)
    assert ids == chosen[2]
    assert figures["evenodds/from_service"] == 1.0
    assert observed(trainers_service, settings["run"]) == sorted(
        (prompt_id, step, won, 2) for step, won in ((1, 1.0), (2, 2.0)) for prompt_id in chosen[step - 1]
    )
    assert trainers_service.client.run(settings["run"]).group_size == 2


def test_skyrls_asynchronous_trainer_and_rows_without_an_id_are_refused(settings: dict[str, Any]) -> None:
    with frameworks.installed(frameworks.TORCHDATA, "evenodds.integrations.skyrl"):
        following = adapter("skyrl").following
    with pytest.raises(ConfigurationError, match="fully asynchronous trainer resets and skips its data loader"):
        following(FullyAsyncRayPPOTrainer, settings)
    with pytest.raises(ConfigurationError, match=r"has no column 'key' \(id_key\)"):
        following(SkyTrainer, {**settings, "base_url": None, "id_key": "key"})(4)


# OpenRLHF


def test_openrlhf_draws_prompt_after_prompt_and_reports_groups_before_the_filter(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    openrlhf = adapter("openrlhf")
    trainer_class = openrlhf.following(frameworks.OpenRLHFTrainer, settings)
    trainer = trainer_class(frameworks.openrlhf_strategy(batch_size=4, n_samples=2))
    loader = trainer.prompts_dataloader
    assert loader.connection.selector.wait_until_ready()
    kept = trainer.samples_generator.generate_samples(rewards={"scores": 1.0, "reward": -3.0})
    trainer.samples_generator.generate_eval_samples()
    assert loader.connection.selector.flush()
    state = loader.state_dict()
    loader.connection.selector.close()

    resumed = trainer_class(frameworks.openrlhf_strategy(batch_size=4, n_samples=2)).prompts_dataloader
    assert resumed.connection.selector.wait_until_ready()
    resumed.load_state_dict({})
    resumed.load_state_dict(state)
    following = [openrlhf.id_of(prompts[0], labels[0]) for _, prompts, labels, _ in itertools.islice(resumed, 4)]
    resumed.connection.selector.close()

    chosen = selected(trainers_service, settings["run"], 0, 1)
    assert kept == []  # all groups are equal, and OpenRLHF's filter drops them
    assert following == chosen[1]
    assert observed(trainers_service, settings["run"]) == sorted((prompt_id, 0, 2.0, 2) for prompt_id in chosen[0])
    assert trainers_service.client.run(settings["run"]).group_size == 2


def test_openrlhf_says_that_a_data_set_does_not_fill_a_batch(settings: dict[str, Any]) -> None:
    dataset = frameworks.OpenRLHFDataset(3)
    with pytest.raises(ConfigurationError, match="3 prompts do not fill a batch of 4"):
        adapter("openrlhf").SelectedDataloader(dataset, settings, batch_size=4, group_size=2)
