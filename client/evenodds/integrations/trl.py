"""TRL: prompts for an unmodified `GRPOTrainer`, and outcomes from its reward functions.

Unsloth and ms-swift inherit both from TRL.
`GRPOTrainer` and `accelerate` read one generation ahead: the batch of a generation is chosen before the outcomes of the
one before it are known. With several processes each reads the dataset; rank 0 chooses for all, and each reports the
rewards that it has computed.

Each generation has `generation_batch_size` completions and all of them are trained on, so that no batch can be filled.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import RewardRange
from evenodds.integrations.torch import ranks
from evenodds.training.selector import PromptSelector
from evenodds.training.text import described

logger = logging.getLogger(__name__)

STATE = "evenodds"
"""Where the trainer's own state keeps the selector's, in each checkpoint's `trainer_state.json`."""
ANSWERS = ("answer", "solution")
"""Columns that hold reference answers, by TRL's own examples and reward functions."""
RewardFunction = Callable[..., Any]


def prompts_of(
    rows: Iterable[Mapping[str, Any]], *, id_column: str = "prompt_id", answer_column: str | None = None
) -> list[dict[str, Any]]:
    """The rows as prompts for a `PromptSelector`: with their texts, and their answers where there are any.

    Args:
        rows: Mappings with `prompt`, a text or messages, and the id column.
        answer_column: Holds the answers; by default `answer`, else `solution`.
    """
    columns = ANSWERS if answer_column is None else (answer_column,)
    return [
        {"prompt_id": str(row[id_column])}
        | described(row["prompt"], next((row[name] for name in columns if row.get(name) is not None), None))
        for row in rows
    ]


class GRPOSelection:
    """What one GRPO training needs: `dataset(rows)`, `observed(reward_function)` and `callback()`.

    The step is the trainer's `global_step`, which is the policy version. Where `torch.distributed` runs (a `GRPOConfig`
    starts it in a launched process), the selector becomes one of its ranks.

    Args:
        config: The trainer's `GRPOConfig`, with `max_steps` (the dataset never ends), `shuffle_dataset=False` (the
            service orders it), `ignore_data_skip=True` (a resumed training goes on choosing, and does not draw what
            it has had) and `dataloader_num_workers=0`.
        id_column: Column of the rows that holds the prompt id.

    Raises:
        ConfigurationError: The config is not like that.
    """

    def __init__(self, selector: PromptSelector, config: Any, *, id_column: str = "prompt_id") -> None:
        if not hasattr(config, "generation_batch_size"):
            raise ConfigurationError(
                f"{type(config).__name__}: it must be a GRPOConfig. TRL's asynchronous trainer draws prompts and "
                "rewards them in a process of its own, which is not told the step"
            )
        for name, wanted in (("shuffle_dataset", False), ("ignore_data_skip", True), ("dataloader_num_workers", 0)):
            if getattr(config, name) != wanted:
                raise ConfigurationError(f"GRPOConfig: {name} is {getattr(config, name)!r}, set it to {wanted!r}")
        if config.max_steps <= 0:
            raise ConfigurationError(
                f"GRPOConfig: max_steps is {config.max_steps}, set it to the steps after which the training ends"
            )
        if not selector.has_broadcast and (of_this_process := ranks()):
            selector.use_ranks(of_this_process["rank"], of_this_process["broadcast"])
        self._selector = selector
        self._id_column = id_column
        self._n_prompts = config.generation_batch_size // config.num_generations
        selector.set_group_size(config.num_generations)
        # Both count batches of the data loader: those that one generation serves, and those of one optimizer step.
        self._per_generation = config.num_iterations * config.steps_per_generation
        self._per_step = config.gradient_accumulation_steps
        self._first_step = 0

    def dataset(self, rows: Iterable[Mapping[str, Any]]) -> IterableDataset:
        """The rows that the service chooses, for `train_dataset`.

        Args:
            rows: Mappings with `prompt`, the id column, and whatever the reward functions need.

        Raises:
            ConfigurationError: A row has no id, two have the same, or a prompt of the selector has no row.
        """
        by_id: dict[str, dict[str, Any]] = {}
        for number, row in enumerate(rows):
            if row.get(self._id_column) is None:
                raise ConfigurationError(
                    f"rows[{number}] has no column {self._id_column!r}, which tells prompts apart: add it, or name "
                    "another with id_column"
                )
            prompt_id = str(row[self._id_column])
            if prompt_id in by_id:
                raise ConfigurationError(f"rows[{number}] has the {self._id_column} {prompt_id!r} of an earlier row")
            by_id[prompt_id] = dict(row)
        missing = [prompt_id for prompt_id in self._selector.prompt_ids if prompt_id not in by_id]
        if missing:
            raise ConfigurationError(f"rows: {len(missing)} prompts of the selector have none: {missing[0]!r} ...")

        def generate() -> Iterator[dict[str, Any]]:
            for step, n_prompts in self.batches():
                for prompt_id in self._selector.select(step, n_prompts):
                    yield by_id[prompt_id]

        dataset: IterableDataset = IterableDataset.from_generator(generate)
        return dataset

    def batches(self) -> Iterator[tuple[int, int]]:
        """Each step at which there are generations, and how many prompts they take: one choice a step."""
        generation = 0
        while True:
            step = generation * self._per_generation // self._per_step
            n = 1
            while (generation + n) * self._per_generation // self._per_step == step:
                n += 1
            yield self._first_step + step, n * self._n_prompts
            generation += n

    def observed(
        self,
        reward_function: RewardFunction,
        *,
        reward_range: Sequence[float] = (0.0, 1.0),
        success: Callable[[float], float | None] = float,
    ) -> RewardFunction:
        """The reward function, whose rewards are reported too.

        Wrap the one that says whether an attempt succeeded. Rows without the id column, or of prompts outside the
        pool, are not reported; leave the column out of an evaluation set.

        Args:
            reward_function: As `GRPOTrainer` calls it, asynchronous or not. A reward of None or NaN is no attempt.
            reward_range: The rewards that stand for failure and success: (-1, 1), say.
            success: Maps a reward to one in `reward_range`, or to None: no attempt.

        Raises:
            ConfigurationError: `reward_range` does not rise. While training: a reward is outside of it.
        """
        known = frozenset(self._selector.prompt_ids)
        scale = RewardRange.of(reward_range, where="observed")

        def report(rewards: Iterable[float | None], columns: Mapping[str, Any]) -> None:
            outcomes: dict[str, list[float | None]] = defaultdict(list)
            for prompt_id, reward in zip(columns.get(self._id_column, ()), rewards, strict=False):
                if str(prompt_id) in known:
                    succeeded = None if reward is None else success(reward)
                    outcomes[str(prompt_id)].append(scale.scaled(succeeded, str(prompt_id)))
            self._selector.observe(columns["trainer_state"].global_step, outcomes)
            log_metric = columns.get("log_metric")
            if log_metric is not None:
                for name, value in self._selector.metrics().items():
                    log_metric(name, value)

        if inspect.iscoroutinefunction(reward_function):

            @functools.wraps(reward_function)
            async def reward_and_report_later(*args: Any, **columns: Any) -> Any:
                rewards = await reward_function(*args, **columns)
                report(rewards, columns)
                return rewards

            return reward_and_report_later

        @functools.wraps(reward_function)
        def reward_and_report(*args: Any, **columns: Any) -> Any:
            rewards = reward_function(*args, **columns)
            report(rewards, columns)
            return rewards

        return reward_and_report

    def callback(self) -> TrainerCallback:
        """Keeps the selector's state in the trainer's checkpoints, and goes back to it when training resumes."""
        return _Checkpoints(self)


class _Checkpoints(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """In `TrainerState`, which every checkpoint has, wherever it lies; the process that writes it is rank 0."""

    def __init__(self, selection: GRPOSelection) -> None:
        self._selection = selection

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A callback behind this one may still ask for a checkpoint.
        state.stateful_callbacks[STATE] = self._selection._selector.state_dict()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        selector = self._selection._selector
        self._selection._first_step = state.global_step
        if state.global_step == 0:
            return
        kept = state.stateful_callbacks.get(STATE)
        if kept is not None:
            selector.load_state_dict(kept)
            return
        logger.warning(
            "run %r: the checkpoint of step %d holds no state of the selector; what was observed from step %d on is "
            "forgotten, as after a checkpoint that holds one",
            selector.run,
            state.global_step,
            state.global_step,
        )
        selector.rewind_to(state.global_step - 1)
