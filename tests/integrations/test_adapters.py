"""The adapters between stand-ins of their frameworks and a real service: what is drawn, reported and kept."""

from __future__ import annotations

import copy
import importlib
import itertools
import random
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
    """How an adapter is told of the service, with a run of the test's own."""
    run = f"adapted-{next(_numbers)}"
    trainers_service.client.put_run(run, embedder="none", group_size=4)
    return {
        "base_url": trainers_service.base_url,
        "run": run,
        "run_settings": {"group_size": 2},
        "deadline_seconds": PATIENCE_SECONDS,
        "outbox": str(tmp_path / "outbox"),
    }


def connected(connection: Any) -> Any:
    """The selector below an adapter, its pool loaded."""
    assert connection.selector.wait_until_ready()
    return connection.selector


def adapter(name: str) -> Any:
    return importlib.import_module(f"evenodds.integrations.{name}")


# verl 0.7.1


def verl_batch(dataset: frameworks.RLHFDataset, rows: list[int], scores: list[float], **columns: Any) -> Any:
    return SimpleNamespace(
        batch={"token_level_scores": frameworks.rewards_tensor(scores)},
        non_tensor_batch={
            "data_source": [dataset.dataframe[row]["data_source"] for row in rows],
            "extra_info": [dataset.dataframe[row]["extra_info"] for row in rows],
            **columns,
        },
    )


def test_verl_draws_epochs_of_global_steps_and_reports_each(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    dataset = frameworks.RLHFDataset(10)
    data = {"train_batch_size": 4, "evenodds": {**settings, "reward_range": [-1, 1]}}
    with frameworks.installed(frameworks.VERL_071, "evenodds.integrations.verl"):
        sampler = adapter("verl").EvenOddsSampler(dataset, data)
        selector = connected(sampler._connection)
        drawn: list[list[int]] = []
        for _epoch in range(2):
            rows = iter(sampler)
            for _step in range(len(sampler) // 4):
                drawn.append([next(rows) for _ in range(4)])
                repeated = [row for row in drawn[-1] for _ in range(2)]
                sampler.update(verl_batch(dataset, repeated, [1.0, -1.0] * 4))
            assert next(rows, None) is None
        assert selector.flush()

        state = sampler.state_dict()
        selector.close()

    chosen = selected(trainers_service, settings["run"], 1, 2, 3, 4)
    assert [[f"sums/{row}" for row in rows] for rows in drawn] == chosen
    assert observed(trainers_service, settings["run"]) == sorted(
        (prompt_id, step, 1.0, 2) for step, ids in enumerate(chosen, start=1) for prompt_id in ids
    )
    assert state["next_step"] == 5
    assert trainers_service.client.prompt(settings["run"], "sums/3").text == "What is 3 + 3?"


def test_verl_goes_on_in_the_middle_of_an_epoch(trainers_service: TrainersService, settings: dict[str, Any]) -> None:
    dataset = frameworks.RLHFDataset(12)
    data = {"train_batch_size": 4, "evenodds": settings}
    with frameworks.installed(frameworks.VERL_071, "evenodds.integrations.verl"):
        module = adapter("verl")
        first = module.EvenOddsSampler(dataset, data)
        connected(first._connection)
        first.update(verl_batch(dataset, list(itertools.islice(first, 4)), [1.0] * 4))
        state = first.state_dict()
        first._connection.selector.close()

        second = module.EvenOddsSampler(dataset, data)
        connected(second._connection)
        second.load_state_dict(state)
        rest = list(second)
        second._connection.selector.close()

    assert [f"sums/{row}" for row in rest] == [
        prompt_id for step in selected(trainers_service, settings["run"], 2, 3) for prompt_id in step
    ]


def test_verl_reads_the_verifiers_own_key_where_the_score_holds_a_penalty(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    dataset = frameworks.RLHFDataset(12)
    data = {"train_batch_size": 4, "evenodds": {**settings, "reward_key": "acc"}}
    with frameworks.installed(frameworks.VERL_071, "evenodds.integrations.verl"):
        sampler = adapter("verl").EvenOddsSampler(dataset, data)
        connected(sampler._connection)
        rows = [row for row in itertools.islice(sampler, 4) for _ in range(2)]
        penalised = [0.7, -1.5] * 4
        with pytest.raises(ConfigurationError, match=r"reward_key 'acc' is not among .* \(data_source, extra_info\)"):
            sampler.update(verl_batch(dataset, rows, penalised))
        sampler.update(verl_batch(dataset, rows, penalised, acc=[True, False] * 4))
        assert sampler._connection.selector.flush()
        sampler._connection.selector.close()

    assert [(won, n) for _, _, won, n in observed(trainers_service, settings["run"])] == [(1.0, 2)] * 4


def test_verl_says_that_a_data_set_does_not_fill_a_batch(settings: dict[str, Any]) -> None:
    data = {"train_batch_size": 4, "evenodds": {**settings, "base_url": None}}
    with (
        frameworks.installed(frameworks.VERL_071, "evenodds.integrations.verl"),
        pytest.raises(ConfigurationError, match="3 prompts do not fill a batch of 4"),
    ):
        adapter("verl").EvenOddsSampler(frameworks.RLHFDataset(3), data)


def test_verl_rows_need_an_index() -> None:
    dataset = frameworks.RLHFDataset(2)
    dataset.dataframe[1]["extra_info"] = {}
    with (
        frameworks.installed(frameworks.VERL_071, "evenodds.integrations.verl"),
        pytest.raises(ConfigurationError, match=r"row 1 of the training files has no extra_info\.index"),
    ):
        adapter("verl").EvenOddsSampler(dataset, {"train_batch_size": 2})


# verl 0.9.1


def verl_config(**data: Any) -> Any:
    class Data(dict[str, Any]):
        __getattr__ = dict.__getitem__

    return SimpleNamespace(data=Data({"train_batch_size": 4, **data}))


@pytest.mark.parametrize("gen_batch_size", [None, 1])
def test_verls_v1_trainers_draw_from_the_service_and_report_what_they_train_on(
    trainers_service: TrainersService, settings: dict[str, Any], gen_batch_size: int | None
) -> None:
    queue = frameworks.TransferQueue()
    with frameworks.installed(frameworks.verl_091(queue), "evenodds.integrations.verl_v1"):
        base = adapter("verl_v1").trainer_base
        config = verl_config(evenodds=settings, gen_batch_size=gen_batch_size)
        trainer = base.TRAINER_REGISTRY["sync"](config, frameworks.RLHFDataset(12), queue)
        trainer._init_dataloader()
        selector = connected(trainer._evenodds)
        for _step in range(4):
            fetched = [trainer._fetch_one_gen_batch() for _ in range(4 // (gen_batch_size or 4))]
            uids = [uid for batch in fetched for uid in batch["uid"]]
            keys = [f"{uid}_{n}" for uid in uids for n in range(2)]
            scores = frameworks.rewards_tensor([1.0, 0.0] * 4)
            queue.fields = {k: {"uid": k[:-2], "rm_scores": s} for k, s in zip(keys, scores, strict=True)}
            meta = frameworks.Meta([*keys, "pad"], [{}] * len(keys) + [{"is_padding": True}])
            metrics: dict[str, Any] = {}
            assert trainer._compute_advantage(meta, metrics) is meta
            assert metrics["advantages"] == 9
            assert metrics["evenodds/informative_share"] == 1.0
            assert metrics["evenodds/from_service"] == 1.0
        assert selector.flush()
        assert trainer._evenodds_chosen == {}
        selector.close()

    chosen = selected(trainers_service, settings["run"], 1, 2, 3, 4)
    assert observed(trainers_service, settings["run"]) == sorted(
        (prompt_id, step, 1.0, 2) for step, ids in enumerate(chosen, start=1) for prompt_id in ids
    )


@pytest.mark.parametrize("reward_key", [None, "acc"])
def test_several_outputs_of_one_session_of_verl_are_one_attempt(
    trainers_service: TrainersService, settings: dict[str, Any], reward_key: str | None
) -> None:
    queue = frameworks.TransferQueue()
    with frameworks.installed(frameworks.verl_091(queue), "evenodds.integrations.verl_v1"):
        base = adapter("verl_v1").trainer_base
        config = verl_config(evenodds=settings if reward_key is None else {**settings, "reward_key": reward_key})
        config.actor_rollout_ref = SimpleNamespace(rollout=SimpleNamespace(n=3))
        trainer = base.TRAINER_REGISTRY["sync"](config, frameworks.RLHFDataset(12), queue)
        trainer._init_dataloader()
        selector = connected(trainer._evenodds)
        for uid in trainer._fetch_one_gen_batch()["uid"]:
            for session, (rewards, acc) in enumerate([([1.0], True), ([0.0, 0.0, 0.0], False), ([0.0, 0.0], False)]):
                for index, reward in enumerate(rewards):
                    queue.fields[f"{uid}_{session}_{index}"] = {
                        "uid": uid,
                        "rm_scores": frameworks.rewards_tensor([reward if reward_key is None else -1.7])[0],
                        "extra_fields": {"reward_extra_info": {"acc": acc}},
                    }
        meta = frameworks.Meta(list(queue.fields), [{}] * len(queue.fields))
        trainer._compute_advantage(meta, {})
        assert selector.flush()
        selector.close()

    assert [(won, n) for _, _, won, n in observed(trainers_service, settings["run"])] == [(1.0, 3)] * 4
    assert trainers_service.client.run(settings["run"]).group_size == 3


def test_verls_v1_trainers_are_as_before_where_nothing_is_configured() -> None:
    queue = frameworks.TransferQueue()
    with frameworks.installed(frameworks.verl_091(queue), "evenodds.integrations.verl_v1"):
        module = adapter("verl_v1")
        module.install()
        trainer = module.trainer_base.TRAINER_REGISTRY["sync"](verl_config(), frameworks.RLHFDataset(8), queue)
        trainer._init_dataloader()

        batch = trainer._fetch_one_gen_batch()

    assert [row["index"] for row in batch["extra_info"]] == [0, 1, 2, 3]
    assert type(trainer).__mro__[1:3] == (module.SelectsPrompts, frameworks.PPOTrainerSync)


def test_groups_that_verls_replay_buffer_drops_are_reported(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    queue = frameworks.TransferQueue()
    with frameworks.installed(frameworks.verl_091(queue), "evenodds.integrations.verl_v1"):
        base = adapter("verl_v1").trainer_base
        trainer = base.TRAINER_REGISTRY["sync"](verl_config(evenodds=settings), frameworks.RLHFDataset(12), queue)
        trainer._init_dataloader()
        selector = connected(trainer._evenodds)
        kept, silent, unfinished, failed = trainer._fetch_one_gen_batch()["uid"]
        rewards = {kept: [1.0, 0.0], silent: [0.0, 0.0], unfinished: [1.0]}
        for uid, group in rewards.items():
            for session, reward in enumerate(group):
                score = frameworks.rewards_tensor([reward])[0]
                queue.fields[f"{uid}_{session}_0"] = {"uid": uid, "rm_scores": score}
        buffer = trainer.replay_buffer
        buffer.partitions = {"train": dict.fromkeys(queue.fields), "val": {"uid-9_0_0": None}}

        buffer._clear_groups("val", {"uid-9"})
        buffer._clear_groups("train", {silent, unfinished, failed})
        trainer._compute_advantage(frameworks.Meta(list(buffer.partitions["train"]), [{}] * 2), {})
        assert selector.flush()
        selector.close()

    assert buffer.partitions == {"train": dict.fromkeys([f"{kept}_0_0", f"{kept}_1_0"]), "val": {}}
    assert trainer._evenodds_chosen == {}
    (ids,) = selected(trainers_service, settings["run"], 1)
    outcomes = zip(ids, [(1.0, 2), (0.0, 2), (1.0, 1)], strict=False)
    assert observed(trainers_service, settings["run"]) == sorted((i, 1, *outcome) for i, outcome in outcomes)


def test_a_replay_buffer_that_cannot_be_followed_is_warned_of(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    queue = frameworks.TransferQueue()
    config = verl_config(evenodds={**settings, "base_url": None})
    with frameworks.installed(frameworks.verl_091(queue), "evenodds.integrations.verl_v1"):
        base = adapter("verl_v1").trainer_base
        base.TRAINER_REGISTRY["sync"](config, frameworks.RLHFDataset(8), queue, SimpleNamespace())._init_dataloader()

    (record,) = caplog.records
    assert "SimpleNamespace, of trainer.v1.sampler.custom_sampler, is no ReplayBuffer" in record.getMessage()


# slime and miles


def slime_args(settings: dict[str, Any] | None, folder: Path, **more: Any) -> Any:
    samples = [frameworks.Sample(prompt=f"Question {i}?", metadata={"prompt_id": f"q{i}"}) for i in range(12)]
    samples.append(frameworks.Sample(prompt=[{"role": "user", "content": "A question without an id?"}]))
    defaults = {
        "rollout_global_dataset": True,
        "samples": samples,
        "n_samples_per_prompt": 3,
        "reward_key": None,
        "save": str(folder),
        "load": str(folder),
        "evenodds": settings,
    }
    return SimpleNamespace(**{**defaults, **more})


@pytest.mark.parametrize("package", [frameworks.SLIME, frameworks.MILES])
def test_slime_draws_groups_reports_all_samples_and_goes_back(
    trainers_service: TrainersService, settings: dict[str, Any], tmp_path: Path, package: dict[str, Any]
) -> None:
    with frameworks.installed(package, "evenodds.integrations.slime"):
        slime = adapter("slime")
        args = slime_args(settings, tmp_path)
        source = slime.EvenOddsDataSource(args)
        selector = connected(source.connection)
        source.load(-1)
        groups = source.get_samples(4)
        for group in groups:
            for sample, reward in zip(group, [1.0, 0.0, 1.0], strict=True):
                sample.reward, sample.status = reward, frameworks.Sample.Status.COMPLETED
        groups[0][0].status = frameworks.Sample.Status.ABORTED
        groups[1][0].reward = None
        slime.report(args, groups, source.get_samples)  # what slime itself hands over
        source.save(0)
        later = source.get_samples(4)
        source.add_samples(later[:1])
        mixed = source.get_samples(2)
        for group in later:
            for sample in group:
                sample.reward, sample.status = 1.0, frameworks.Sample.Status.TRUNCATED
        slime.report(args, later, source)
        assert selector.flush()
        before = observed(trainers_service, settings["run"])
        selector.close()

        resumed = slime.EvenOddsDataSource(args)
        connected(resumed.connection)
        resumed.load(0)
        again = resumed.get_samples(4)
        resumed.connection.selector.close()

    (ids, later_ids) = selected(trainers_service, settings["run"], 0, 1)
    by_id = {ids[0]: (1.0, 2), ids[1]: (1.0, 2), ids[2]: (2.0, 3), ids[3]: (2.0, 3)}
    assert [group[0].metadata["evenodds"]["prompt_id"] for group in groups] == ids
    assert [sample.index for group in groups for sample in group] == list(range(12))
    assert mixed[0] is later[0]
    assert len(mixed) == 2
    assert before == sorted(
        [(prompt_id, 0, *outcome) for prompt_id, outcome in by_id.items()]
        + [(group[0].metadata["evenodds"]["prompt_id"], 1, 3.0, 3) for group in later]
    )
    assert [group[0].metadata["evenodds"] for group in again] == [{"prompt_id": i, "step": 1} for i in later_ids]
    assert again[0][0].index == 12
    assert {step for _, step, _, _ in observed(trainers_service, settings["run"])} == {0}


@pytest.mark.parametrize("shape", ["lists", "rollout ids"])
def test_several_samples_of_one_attempt_of_slime_count_once(
    trainers_service: TrainersService, settings: dict[str, Any], tmp_path: Path, shape: str
) -> None:
    with frameworks.installed(frameworks.SLIME, "evenodds.integrations.slime"):
        slime = adapter("slime")
        args = slime_args(settings, tmp_path, n_samples_per_prompt=4)
        source = slime.EvenOddsDataSource(args)
        connected(source.connection)
        groups = []
        for group in source.get_samples(2):
            attempts = []
            for number, (sample, reward) in enumerate(zip(group, [1.0, 1.0, 1.0, 0.0], strict=True)):
                sample.reward, sample.status = reward, frameworks.Sample.Status.COMPLETED
                parts = [copy.deepcopy(sample) for _ in range(5 if number == 3 else 1)]
                for part in parts:
                    part.rollout_id = number if shape == "rollout ids" else None
                attempts.append(parts)
            groups.append(attempts if shape == "lists" else list(itertools.chain(*attempts)))
        slime.report(args, groups, source)
        assert source.connection.selector.flush()
        source.connection.selector.close()

    assert [(won, n) for _, _, won, n in observed(trainers_service, settings["run"])] == [(3.0, 4)] * 2
    assert trainers_service.client.run(settings["run"]).group_size == 4


def test_slime_says_that_nothing_is_reported(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offline = {**settings, "base_url": None, "run_settings": None}
    with frameworks.installed(frameworks.SLIME, "evenodds.integrations.slime"):
        path = "slime.rollout.fully_async_rollout.generate_rollout_fully_async"
        args = slime_args(offline, tmp_path, rollout_function_path=path, rollout_batch_size=2)
        source = adapter("slime").EvenOddsDataSource(args)
        for _ in range(10):
            source.get_samples(1)

    at_start, later = [record.getMessage() for record in caplog.records]
    assert f"{path} never calls --rollout-all-samples-process-path" in at_start
    assert f"8 prompts were chosen for run '{settings['run']}' since outcomes were last reported" in later


def test_slime_tells_rows_with_one_id_from_rows_that_repeat_a_prompt(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offline = {**settings, "base_url": None, "run_settings": None}
    with frameworks.installed(frameworks.SLIME, "evenodds.integrations.slime"):
        slime = adapter("slime")
        twice = [frameworks.Sample(prompt=text, metadata={"prompt_id": "q"}) for text in ("A?", "B?")]
        with pytest.raises(ConfigurationError, match="row 1 of --prompt-data has the metadata prompt_id 'q'"):
            slime.EvenOddsDataSource(slime_args(offline, tmp_path, samples=twice))
        slime.EvenOddsDataSource(slime_args(offline, tmp_path, samples=[frameworks.Sample(prompt="A?")] * 3))

    assert "2 rows of --prompt-data repeat the prompt of an earlier row" in caplog.records[-1].getMessage()


def test_slime_without_a_pool_or_a_configuration_says_so(tmp_path: Path) -> None:
    with frameworks.installed(frameworks.SLIME, "evenodds.integrations.slime"):
        slime = adapter("slime")
        with pytest.raises(ConfigurationError, match="set --prompt-data and --rollout-global-dataset"):
            slime.EvenOddsDataSource(slime_args(None, tmp_path, rollout_global_dataset=False))
        with pytest.raises(ConfigurationError, match="evenodds in the file of --custom-config-path: base_url and run"):
            slime.EvenOddsDataSource(slime_args(None, tmp_path))


# prime-rl


def test_prime_rl_gets_task_after_task_and_reports_groups_as_they_end(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    tasks = [frameworks.task(f"t{i}") for i in range(10)]
    chance = random.Random(0)
    with frameworks.installed(frameworks.prime_rl(), "evenodds.integrations.prime_rl"):
        module = adapter("prime_rl")
        module.install(settings, batch_size=4)
        sampler = module.samplers.StandardSampler(tasks)
        selector = connected(sampler._connection)
        drawn = [next(sampler) for _ in range(12)]
        order = list(drawn)
        chance.shuffle(order)
        for task in order:
            failed = frameworks.episode(task, 0.0, has_error=True)
            sampler.observe([frameworks.episode(task, 1.0), frameworks.episode(task, 0.0), failed])
        sampler.observe([frameworks.episode(tasks[0], 0.0, num_turns=0)])
        assert selector.flush()
        metrics = sampler.metrics()
        state = sampler.state_dict()
        sampler.load_state_dict(state)
        following = [next(sampler).key for _ in range(4)]
        selector.close()

    chosen = selected(trainers_service, settings["run"], 0, 1, 2)
    assert [task.key for task in drawn] == list(itertools.chain(*chosen))
    assert observed(trainers_service, settings["run"]) == sorted(
        (key, step, 1.0, 2) for step, keys in enumerate(chosen) for key in keys
    )
    assert metrics["evenodds/undelivered"] == 0
    assert metrics["evenodds/coverage"] == 1.0
    assert [following] == selected(trainers_service, settings["run"], 3)


def test_a_dropped_group_of_prime_rl_shifts_no_other(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    tasks = [frameworks.task(f"t{i}") for i in range(2)]
    with frameworks.installed(frameworks.prime_rl(), "evenodds.integrations.prime_rl"):
        module = adapter("prime_rl")
        module.install(settings, batch_size=2)
        source = module.train_source.TrainSource(module.samplers.StandardSampler(tasks))
        sampler = source.curricula["env"].sampler
        connected(sampler._connection)
        for step in range(6):
            for task in [source.next_task(step=10 + step).task for _ in range(2)]:
                if step not in (0, 3):  # their groups were stale, and are never shown
                    sampler.observe([frameworks.episode(task, reward, step=10 + step) for reward in (1.0, 0.0, 0.0)])
        assert sampler._connection.selector.flush()
        sampler._connection.selector.close()

    assert observed(trainers_service, settings["run"]) == sorted(
        (task.key, step, 1.0, 3) for step in (1, 2, 4, 5) for task in tasks
    )
    assert trainers_service.client.run(settings["run"]).group_size == 3


def test_prime_rl_gives_each_environment_a_run_and_refuses_endless_tasks(settings: dict[str, Any]) -> None:
    tasks = [frameworks.task("a")]
    with frameworks.installed(frameworks.prime_rl(), "evenodds.integrations.prime_rl"):
        module = adapter("prime_rl")
        module.install({**settings, "base_url": None}, batch_size=4)

        made = [module.samplers.StandardSampler(tasks) for _ in range(2)]

        assert [m._connection.selector.run for m in made] == [settings["run"], f"{settings['run']}-2"]
        with pytest.raises(ConfigurationError, match="a taskset without end has no pool to choose from"):
            module.EvenOddsSampler(iter(tasks), settings, batch_size=4)
        with pytest.raises(ConfigurationError, match="tasks: two have the key 'a': keys must differ within a taskset"):
            module.EvenOddsSampler(tasks * 2, settings, batch_size=4)


# Trinity-RFT


def test_trinity_selects_rows_and_takes_means_as_feedback(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    registry = frameworks.Registry()
    rows = SimpleNamespace(dataset=[{"question": f"{i}?", "name": f"row-{i}"} for i in range(12)])
    kwargs = {**settings, "group_size": 8, "id_key": "name"}
    config = SimpleNamespace(seed=7, kwargs=kwargs)
    with frameworks.installed(frameworks.trinity(registry), "evenodds.integrations.trinity"):
        adapter("trinity")
        selector = registry.modules["evenodds"](rows, config)
        selector.load_state_dict({"current_index": 0})  # what Trinity-RFT hands over at a fresh start
        connected(selector._connection)
        first, second = selector.get_indices(4), selector.get_indices(4)
        selector.feedback([first[0], first[1], second[0]], [0.25, 1.0, 0.5])
        assert selector._connection.selector.flush()
        state = selector.state_dict()
        selector.load_state_dict(state)
        third = selector.get_indices(4)
        selector._connection.selector.close()
        with pytest.raises(ConfigurationError, match=r"row 0 of the taskset has no column 'uid' \(id_key\)"):
            registry.modules["evenodds"](rows, SimpleNamespace(seed=7, kwargs={**kwargs, "id_key": "uid"}))
        with pytest.raises(ConfigurationError, match="group_size 0; set it to the number of attempts"):
            registry.modules["evenodds"](rows, SimpleNamespace(seed=7, kwargs=settings))

    def names(indices: list[int]) -> list[str]:
        return [f"row-{index}" for index in indices]

    reply = [trainers_service.client.select_batch(settings["run"], step, 4, seed=7).prompts for step in (0, 1, 2)]
    assert [names(i) for i in (first, second, third)] == [[p.prompt_id for p in prompts] for prompts in reply]
    newest = {index: step for step, indices in enumerate((first, second)) for index in indices}
    assert observed(trainers_service, settings["run"]) == sorted(
        (f"row-{index}", newest[index], mean * 8, 8)
        for index, mean in {first[0]: 0.25, first[1]: 1.0, second[0]: 0.5}.items()
    )


# NeMo-RL


def test_nemo_rl_draws_rows_of_all_loaders_and_reports_what_it_is_handed(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    loaders = {"math/hard": frameworks.nemo_loader("math", 6), "code": frameworks.nemo_loader("code", 6)}
    iterators: dict[str, Any] = {}
    with frameworks.installed(frameworks.NEMO_RL, "evenodds.integrations.nemo_rl"):
        dataloader = adapter("nemo_rl").SelectedDataloader(settings, n_prompts=4)
        with pytest.raises(ConfigurationError, match="nothing was drawn in this process"):
            dataloader.observe({"evenodds_id": [], "evenodds_step": []}, [])
        assert dataloader.state_dict() == {}
        connected(dataloader._connected(loaders))
        batch, returned = dataloader(iterators, loaders)
        more, _ = dataloader(iterators, loaders, expected_num_prompts=2, target_weight_version=1)
        repeated = {key: [item for item in column for _ in range(2)] for key, column in batch.items()}
        dataloader.observe(repeated, [1.0, 0.0] * 4)
        with pytest.raises(ConfigurationError, match="observe: the batch lacks evenodds_id, evenodds_step, which this"):
            dataloader.observe({"message_log": []}, [])
        selector = dataloader._connection.selector
        assert selector.flush()
        dataloader.load_state_dict(dataloader.state_dict(), loaders)
        selector.close()

    (ids,) = selected(trainers_service, settings["run"], 0)
    assert sorted(batch["evenodds_id"]) == sorted(ids)
    assert {f"{i.split('/')[0]} {i.rsplit('/')[-1]}?" for i in ids} == {m[0]["content"] for m in batch["message_log"]}
    assert returned is iterators
    assert len(more["message_log"]) == 2
    assert observed(trainers_service, settings["run"]) == sorted((prompt_id, 0, 1.0, 2) for prompt_id in ids)
    assert trainers_service.client.prompt(settings["run"], ids[0]).category in ("math/hard", "code")


# All


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": ...}, "settings: run missing"),
        ({"base_url": ...}, "settings: base_url missing: set them; base_url is the address of the service"),
        ({"reward_range": [1, 1]}, r"settings: reward_range \[1, 1\] must rise from failure to success"),
        ({"reward_range": 1}, r"settings: reward_range 1 must be two numbers, as \[-1, 1\]"),
        ({"deadline": 1}, "settings: .*unexpected keyword argument 'deadline'"),
        ({"seed": -1}, "settings: seed -1 must be in"),
        (
            {"fill": {"size": 8}},
            r"settings: fill {'size': 8} must be true, or have no keys but fill_factor, max_prompts",
        ),
        ({"fill": 2}, "settings: fill 2 must be true, or have no keys but"),
    ],
)
def test_a_wrong_setting_is_named_with_its_place(change: dict[str, Any], message: str) -> None:
    from evenodds.integrations.connection import Connection

    given = {"base_url": None, "run": "r", **change}

    with pytest.raises(ConfigurationError, match=message):
        Connection(
            {key: value for key, value in given.items() if value is not ...}, ["a"], where="settings", no_fill=""
        )


@pytest.mark.parametrize(
    ("reward_range", "reward", "message"),
    [
        ([0, 1], -1, r"settings: the reward -1 of prompt 'a' is outside of reward_range \[0, 1\]: set reward_range"),
        ([-1, 1], 1.4, r"the reward 1.4 of prompt 'a' is outside of reward_range \[-1, 1\]"),
        ([0, 1], "yes", "settings: the reward 'yes' is not a number, of prompt 'a'"),
    ],
)
def test_a_reward_outside_of_its_range_is_an_error_at_once(
    reward_range: list[float], reward: Any, message: str
) -> None:
    from evenodds.integrations.connection import Connection

    connection = Connection(
        {"base_url": None, "run": "r", "reward_range": reward_range}, ["a", "b"], where="settings", no_fill=""
    )

    with pytest.raises(ConfigurationError, match=message):
        connection.observe(0, {"b": [1, 0], "a": [1, reward]})
    with pytest.raises(ConfigurationError, match=message):
        connection.observe_means(0, {"b": 1, "a": reward}, attempts=4)

    assert connection.selector.counts().observed == 0
    connection.selector.close()


def test_rewards_of_both_signs_give_a_hopeless_prompt_its_rate(
    trainers_service: TrainersService, settings: dict[str, Any]
) -> None:
    from evenodds.integrations.connection import Connection

    given, pool = {**settings, "reward_range": [-1, 1]}, [{"prompt_id": "a", "text": "A"}]
    connection = Connection(given, pool, where="settings", no_fill="")
    connected(connection)
    for step in range(4):
        connection.observe(step, {"a": [-1.0, -1.0, None, float("nan")]})
    assert connection.selector.flush()
    connection.selector.close()

    belief = trainers_service.client.prompt(settings["run"], "a").belief
    assert belief.success_rate < 0.1
    assert belief.attempts_seen == 8
