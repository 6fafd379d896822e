"""Filled batches: adapters whose frameworks take a varying number of prompts draw them, the others refuse them."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.integrations import frameworks
from tests.integrations.conftest import PROMPTS, TrainersService, observed
from tests.integrations.test_adapters import slime_args, verl_config
from tests.integrations.test_more_adapters import Builder, SkyTrainer, tinker_groups, trajectory
from tests.waiting import PATIENCE_SECONDS
from torch.utils.data import DataLoader

from evenodds import ConfigurationError, PromptSelector
from evenodds.integrations.connection import Fill
from evenodds.integrations.torch import FilledBatchSampler

_numbers = itertools.count(1)
POOL = 48


@pytest.fixture
def settings(trainers_service: TrainersService, tmp_path: Path) -> dict[str, Any]:
    run = f"filled-{next(_numbers)}"
    trainers_service.client.put_run(run, embedder="none", group_size=2)
    return {
        "base_url": trainers_service.base_url,
        "run": run,
        "deadline_seconds": PATIENCE_SECONDS,
        "outbox": str(tmp_path / "outbox"),
        "fill": True,
    }


def filled(service: TrainersService, run: str, step: int, n: int, **options: Any) -> list[str]:
    """What the service has chosen for this step, of which so many groups were to be informative."""
    reply = service.client.select_batch(run, step, informative_groups=n, **options)
    assert reply.replayed
    assert reply.fill is not None
    return [prompt.prompt_id for prompt in reply.prompts]


def adapter(name: str) -> Any:
    return importlib.import_module(f"evenodds.integrations.{name}")


def test_a_loader_draws_filled_batches_and_goes_on_after_the_newest_observed(
    trainers_service: TrainersService, make_selector: Callable[..., PromptSelector]
) -> None:
    selector = make_selector()
    ids = [prompt["prompt_id"] for prompt in PROMPTS]
    sampler = FilledBatchSampler(selector, 4, fill=Fill(max_prompts=7), n_steps=3)
    batches = iter(DataLoader(ids, batch_sampler=sampler))  # type: ignore[arg-type]
    first = next(batches)
    assert sampler.batch is not None
    outcomes = {i: [1, 0] if n < 2 else [1, 1] for n, i in enumerate(first)}
    assert selector.informative(sampler.batch, outcomes) == tuple(first[:2])
    assert selector.flush()
    assert len(next(batches)) > 4

    with pytest.raises(ConfigurationError, match="go on with the setting of fill that it was saved with"):
        sampler.load_state_dict(None)  # type: ignore[arg-type]  # as torchdata's loader does, of a plain sampler's
    sampler.load_state_dict(sampler.state_dict())
    left = list(DataLoader(ids, batch_sampler=sampler))  # type: ignore[arg-type]

    assert [first, *left] == [filled(trainers_service, selector.run, step, 4, max_prompts=7) for step in range(3)]
    assert len(observed(trainers_service, selector.run)) == len(first) > 4


def test_tinker_gives_as_many_groups_as_fill_a_batch(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    builders = {f"t{i}": Builder(f"t{i}") for i in range(POOL)}
    with frameworks.installed(frameworks.TINKER, "evenodds.integrations.tinker"):
        dataset = adapter("tinker").SelectedDataset(builders, settings, batch_size=3, n_batches=9)
        assert dataset.connection.selector.wait_until_ready()
        batch = dataset.get_batch(0)
        tinker_groups(batch, trajectory(0.25, 0.25), trajectory(0.0))
        assert dataset.connection.selector.flush()
        dataset.connection.selector.close()

    ids = filled(trainers_service, settings["run"], 0, 3)
    assert len(ids) > 3
    assert [builder.logging_tags()[0] for builder in batch] == ids
    assert observed(trainers_service, settings["run"]) == sorted((i, 0, 1.0, 2) for i in ids)


def test_slime_begins_a_rollout_with_a_filled_choice_and_refills_it_plainly(
    trainers_service: TrainersService, settings: dict[str, Any], tmp_path: Path
) -> None:
    samples = [frameworks.Sample(prompt=f"{i}?", metadata={"prompt_id": f"q{i}"}) for i in range(POOL)]
    options = {"samples": samples, "n_samples_per_prompt": 2, "rollout_batch_size": 4, "over_sampling_batch_size": 4}
    with frameworks.installed(frameworks.SLIME, "evenodds.integrations.slime"):
        slime = adapter("slime")
        with pytest.raises(
            ConfigurationError, match="fill is not possible here: slime trains on the first groups that are"
        ):
            slime.EvenOddsDataSource(slime_args(settings, tmp_path, **options))
        args = slime_args(
            settings, tmp_path, **options, dynamic_sampling_filter_path="filters.check_reward_nonzero_std"
        )
        source = slime.EvenOddsDataSource(args)
        assert source.connection.selector.wait_until_ready()
        wave, refill = source.get_samples(4), source.get_samples(4)
        for group in (*wave, *refill):
            for sample, reward in zip(group, (1.0, 0.0), strict=True):
                sample.reward, sample.status = reward, frameworks.Sample.Status.COMPLETED
        slime.report(args, [*wave, *refill], source.get_samples)
        source.add_samples(refill[:1])  # a partial group waits for the next rollout
        following = source.get_samples(4)
        assert source.connection.selector.flush()
        source.connection.selector.close()

    def ids(groups: list[Any]) -> list[str]:
        return [group[0].metadata["evenodds"]["prompt_id"] for group in groups]

    assert len(wave) > len(refill) == 4
    assert ids(wave) == filled(trainers_service, settings["run"], 0, 4)
    assert following[0] is refill[0]
    assert ids(following[1:]) == filled(trainers_service, settings["run"], 2, 3)
    assert len(observed(trainers_service, settings["run"])) == len(wave) + len(refill)


def test_skyrl_fills_a_batch_and_reports_what_its_filter_drops(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    with frameworks.installed(frameworks.TORCHDATA, "evenodds.integrations.skyrl"):
        following = adapter("skyrl").following
    with pytest.raises(ConfigurationError, match=r"set trainer\.algorithm\.dynamic_sampling\.type=filter"):
        following(SkyTrainer, settings)(POOL)
    trainer = following(SkyTrainer, settings)(POOL, "filter")
    assert trainer._evenodds.selector.wait_until_ready()
    batch = next(iter(trainer.train_dataloader))
    uids = [row["uid"] for row in batch for _ in range(2)]
    rewards = [1.0, 0.0] * 4 + [1.0, 1.0] * (len(batch) - 4)
    output, kept, _ = trainer.handle_dynamic_sampling({"rewards": rewards}, uids)
    trainer.postprocess_generator_output(output, kept)
    assert trainer._evenodds.selector.flush()
    state = trainer.train_dataloader.state_dict()
    trainer._evenodds.selector.close()

    ids = filled(trainers_service, settings["run"], 1, 4)
    assert [trainer._evenodds_ids[row["uid"]] for row in batch] == ids
    assert len(ids) > 4
    assert kept == uids[:8]
    assert observed(trainers_service, settings["run"]) == sorted(
        (prompt_id, 1, 1.0 if n < 4 else 2.0, 2) for n, prompt_id in enumerate(ids)
    )
    assert state["next_step"] == 2


def of_verl(settings: dict[str, Any]) -> None:
    with frameworks.installed(frameworks.VERL_071, "evenodds.integrations.verl"):
        data = {"train_batch_size": 4, "evenodds": settings}
        adapter("verl").EvenOddsSampler(frameworks.RLHFDataset(8), data)


def of_verl_v1(settings: dict[str, Any]) -> None:
    queue = frameworks.TransferQueue()
    with frameworks.installed(frameworks.verl_091(queue), "evenodds.integrations.verl_v1"):
        made = adapter("verl_v1").trainer_base.TRAINER_REGISTRY["sync"]
        made(verl_config(evenodds=settings), frameworks.RLHFDataset(8), queue)._init_dataloader()


def of_prime_rl(settings: dict[str, Any]) -> None:
    with frameworks.installed(frameworks.prime_rl(), "evenodds.integrations.prime_rl"):
        adapter("prime_rl").EvenOddsSampler([frameworks.task("a")], settings, batch_size=1)


def of_trinity(settings: dict[str, Any]) -> None:
    registry = frameworks.Registry()
    with frameworks.installed(frameworks.trinity(registry), "evenodds.integrations.trinity"):
        adapter("trinity")
        config = SimpleNamespace(seed=7, kwargs={**settings, "group_size": 8})
        registry.modules["evenodds"](SimpleNamespace(dataset=[{"question": "Why?"}]), config)


def of_nemo_rl(settings: dict[str, Any]) -> None:
    with frameworks.installed(frameworks.NEMO_RL, "evenodds.integrations.nemo_rl"):
        loader = adapter("nemo_rl").SelectedDataloader(settings, n_prompts=4)
        loader({}, {"math": frameworks.nemo_loader("math", 6)})


def of_openrlhf(settings: dict[str, Any]) -> None:
    dataset = frameworks.OpenRLHFDataset(8)
    adapter("openrlhf").SelectedDataloader(dataset, settings, batch_size=4, group_size=2)


@pytest.mark.parametrize("made", [of_verl, of_verl_v1, of_prime_rl, of_trinity, of_nemo_rl, of_openrlhf])
def test_where_a_framework_decides_how_many_prompts_fill_is_refused_with_the_reason(
    made: Callable[[dict[str, Any]], None],
) -> None:
    with pytest.raises(ConfigurationError, match=r"(settings|data|kwargs).*: fill is not possible here: \w.{40}"):
        made({"base_url": None, "run": "filled", "fill": {"update_cost": 2.0}})
