"""GRPOTrainer as installed: what it gives to reward functions, and a real training over a live service."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integrations.conftest import TrainersService, observed
from tests.integrations.tiny import PROMPTS, ROWS, config, says_the_digit, tiny_model
from tests.waiting import until

from evenodds import ConfigurationError, PromptSelector
from evenodds.integrations.trl import GRPOSelection, prompts_of

pytestmark = pytest.mark.filterwarnings("default")  # what TRL and transformers say of one another

Make = Callable[..., PromptSelector]


def test_the_trainer_still_calls_what_the_adapter_relies_on(tmp_path: Path) -> None:
    import trl
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer)

    assert trl.__version__.split(".")[0] == "1"
    assert {"train_dataset", "reward_funcs", "args", "callbacks"} <= set(inspect.signature(GRPOTrainer).parameters)
    assert 'reward_kwargs["trainer_state"] = self.state' in source
    fields = vars(config(tmp_path))
    assert (fields["generation_batch_size"], fields["steps_per_generation"], fields["num_iterations"]) == (16, 2, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(0, 4), (1, 4), (2, 4)]),
        ({"num_iterations": 2}, [(0, 4), (2, 4), (4, 4)]),
        ({"steps_per_generation": 1}, [(0, 4), (1, 4), (2, 4)]),
        ({"steps_per_generation": 4}, [(0, 8), (2, 8), (4, 8)]),
    ],
)
def test_there_is_one_choice_for_each_policy_version_that_generates(
    tmp_path: Path, options: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    with PromptSelector(None, "r", ["a"]) as selector:
        selection = GRPOSelection(selector, config(tmp_path, **options))

        assert list(itertools.islice(selection.batches(), 3)) == expected


@pytest.mark.parametrize("change", [{"shuffle_dataset": True}, {"ignore_data_skip": False}, {"max_steps": -1}])
def test_a_config_that_would_undo_the_choice_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (name,) = change
    with (
        PromptSelector(None, "r", ["a"]) as selector,
        pytest.raises(ConfigurationError, match=f"GRPOConfig: {name} is"),
    ):
        GRPOSelection(selector, config(tmp_path, **change))


def test_the_asynchronous_trainer_is_refused_with_the_reason() -> None:
    from trl.experimental.async_grpo import AsyncGRPOConfig

    fields = inspect.signature(AsyncGRPOConfig).parameters
    config = object.__new__(AsyncGRPOConfig)  # to make one as it is asks for a GPU

    assert "generation_batch_size" not in fields
    with (
        PromptSelector(None, "r", ["a"]) as selector,
        pytest.raises(ConfigurationError, match="AsyncGRPOConfig: it must be a GRPOConfig"),
    ):
        GRPOSelection(selector, config)


def test_rows_are_needed_for_all_prompts(tmp_path: Path) -> None:
    with PromptSelector(None, "r", ["a", "b"]) as selector, pytest.raises(ConfigurationError, match="have none: 'b'"):
        GRPOSelection(selector, config(tmp_path)).dataset([{"prompt_id": "a", "prompt": "A"}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "A"}], r"rows\[0\] has no column 'prompt_id', which tells prompts apart: add it, or name another"),
        ([{"prompt_id": "a"}, {"prompt_id": "a"}], r"rows\[1\] has the prompt_id 'a' of an earlier row"),
    ],
)
def test_rows_without_ids_of_their_own_are_named(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    with PromptSelector(None, "r", ["a"]) as selector, pytest.raises(ConfigurationError, match=message):
        GRPOSelection(selector, config(tmp_path)).dataset(rows)


def test_the_run_gets_the_trainers_group_size(
    trainers_service: TrainersService, make_selector: Make, tmp_path: Path
) -> None:
    selector = make_selector()

    GRPOSelection(selector, config(tmp_path, num_generations=8))

    until(lambda: trainers_service.client.run(selector.run).group_size == 8, "the group size of the trainer")


def test_rewards_of_another_range_are_mapped_and_those_outside_of_it_raise(tmp_path: Path) -> None:
    class State:
        global_step = 3

    def columns(prompt_ids: list[str]) -> dict[str, Any]:
        return {"prompt_id": prompt_ids, "trainer_state": State}

    with PromptSelector(None, "r", ["a", "b"], outbox=tmp_path) as selector:
        selection = GRPOSelection(selector, config(tmp_path))
        reward = selection.observed(lambda rewards, **_: rewards, reward_range=(-1, 1))
        unmapped = selection.observed(lambda rewards, **_: rewards)

        reward(rewards=[1.0, -1.0, None, float("nan")], **columns(["a", "a", "b", "b"]))

        (delivery,) = selector.state_dict()["undelivered"]
        assert json.loads(delivery["body"]) == [{"prompt_id": "a", "rewards": [1.0, 0.0]}]
        with pytest.raises(
            ConfigurationError, match=r"observed: the reward -1 of prompt 'b' is outside of reward_range"
        ):
            unmapped(rewards=[1.0, -1.0], **columns(["a", "b"]))
        with pytest.raises(ConfigurationError, match=r"observed: reward_range \[1, 0\] must rise"):
            selection.observed(lambda rewards, **_: rewards, reward_range=[1, 0])


@pytest.mark.slow
def test_a_real_training_draws_from_the_service_reports_to_it_and_resumes(
    trainers_service: TrainersService, make_selector: Make, tmp_path: Path
) -> None:
    from trl import GRPOTrainer

    generated: list[tuple[int, tuple[str, ...], float]] = []

    def reward(prompts: list[str], completions: list[str], prompt_id: list[str], **columns: Any) -> list[float]:
        rewards = says_the_digit(prompts, completions, **columns)
        generated.append((columns["trainer_state"].global_step, tuple(prompt_id), sum(rewards)))
        return rewards

    def trainer(selector: PromptSelector, **options: Any) -> Any:
        model, tokenizer = tiny_model()
        arguments = config(tmp_path, save_strategy="steps", save_steps=2, **options)
        selection = GRPOSelection(selector, arguments)
        return GRPOTrainer(
            model,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=selection.dataset(ROWS),
            reward_funcs=[selection.observed(reward)],
            callbacks=[selection.callback()],
        )

    first = make_selector(prompts=PROMPTS)
    before = [p.clone() for p in tiny_model()[0].parameters()]
    training = trainer(first)
    training.train()
    assert first.flush()
    first.close()

    reports = observed(trainers_service, first.run)
    assert [step for step, _, _ in generated] == [0, 1, 2, 3]
    for step, prompt_ids, successes in generated:
        batch = trainers_service.client.select_batch(first.run, step, 4)
        assert sorted(set(prompt_ids)) == sorted(prompt.prompt_id for prompt in batch.prompts)
        assert [attempts for _, s, _, attempts in reports if s == step] == [4] * 4
        assert sum(won for _, s, won, _ in reports if s == step) == successes
    assert sum(successes for _, _, successes in generated) > 0
    assert any((p != q).any() for p, q in zip(before, training.model.parameters(), strict=True))

    second = make_selector(prompts=PROMPTS)
    resumed = trainer(second, max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trained" / "checkpoint-2"))
    assert second.flush()

    assert [step for step, _, _ in generated[4:]] == [2, 3, 4]
    steps = [step for _, step, _, _ in observed(trainers_service, second.run)]
    assert sorted(steps) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4


def test_trl_finds_answers_by_the_usual_names_of_their_columns() -> None:
    rows = [
        {"prompt_id": 1, "prompt": "1?", "answer": "a", "solution": "s"},
        {"prompt_id": 2, "prompt": [{"role": "user", "content": "2?"}], "answer": None, "solution": "s"},
        {"prompt_id": 3, "prompt": "3?", "truth": 3},
    ]

    assert prompts_of(rows) == [
        {"prompt_id": "1", "text": "1?", "answer": "a"},
        {"prompt_id": "2", "text": "2?", "answer": "s"},
        {"prompt_id": "3", "text": "3?"},
    ]
    assert [prompt.get("answer") for prompt in prompts_of(rows, answer_column="truth")] == [None, None, 3]
