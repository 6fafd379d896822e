"""tinker-cookbook: a dataset of its RL training, whose groups report their rewards.

    settings = {"base_url": "http://127.0.0.1:8000", "run": "math-7b"}
    dataset = SelectedDataset(builders, settings, batch_size=64, n_batches=500)

The index of a batch is the step. tinker-cookbook's checkpoints hold the index alone, and so a training that begins at a
later one goes back to it. With `fill` a batch has as many groups as it takes to find `batch_size` informative ones, and
tinker-cookbook's `remove_constant_reward_groups` leaves those to be trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset

from evenodds.errors import ConfigurationError
from evenodds.integrations.connection import Connection
from evenodds.training.text import described


class SelectedDataset(RLDataset):  # type: ignore[misc]  # tinker-cookbook is not installed where this is checked
    """The groups that the service chooses.

    Args:
        builders: By prompt id. They must be picklable, as tinker-cookbook asks.
        settings: See `Connection`; and `reward_key`, the metric of an attempt's last step that says whether it
            succeeded (`correct` of `ProblemEnv`), where the reward holds more than success. By default the whole
            reward of an attempt counts: that of all steps and of the group.
        batch_size: Groups of a batch; with `fill`, informative ones.
        n_batches: Batches of the training: its length, as tinker-cookbook counts epochs.
        texts: What each prompt is judged by until it was tried.
        answers: And the answers, as `ProblemEnv.get_reference_answer` gives them.
        group_size: Attempts of a group.

    Raises:
        ConfigurationError: The settings are incomplete, or there are fewer builders than a batch has groups.
    """

    def __init__(
        self,
        builders: Mapping[str, EnvGroupBuilder],
        settings: Mapping[str, Any],
        *,
        batch_size: int,
        n_batches: int,
        texts: Mapping[str, str] | None = None,
        answers: Mapping[str, Any] | None = None,
        group_size: int | None = None,
    ) -> None:
        if len(builders) < batch_size:
            raise ConfigurationError(f"builders: {len(builders)} do not fill a batch of {batch_size}")
        texts, answers = texts or {}, answers or {}
        pool = [{"prompt_id": i} | described(texts.get(i), answers.get(i)) for i in builders]
        options = {name: value for name, value in settings.items() if name != "reward_key"}
        self.connection = Connection(options, pool, where="settings", no_fill=None, group_size=group_size)
        self._reward_key = settings.get("reward_key")
        self._builders = dict(builders)
        self._batch_size, self._n_batches = batch_size, n_batches
        self._has_begun = False
        self._faults: list[ConfigurationError] = []

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """The groups of this step.

        Raises:
            ConfigurationError: Outcomes of a step before could not be reported. tinker-cookbook's strategies that
                tolerate errors of rollouts leave such groups out, and would go on without any.
        """
        if self._faults:
            raise self._faults[0]
        if not self._has_begun and index > 0:
            self.connection.selector.rewind_to(index - 1)
        self._has_begun = True
        self.connection.next_step = index
        batch = self.connection.choose(self._batch_size)
        return [
            ReportingBuilder(
                self._builders[prompt_id], self.connection, index, prompt_id, self._reward_key, self._faults
            )
            for prompt_id in batch
        ]

    def __len__(self) -> int:
        return self._n_batches


class ReportingBuilder(EnvGroupBuilder):  # type: ignore[misc]
    """A builder whose rewards are reported as they are computed, before groups of equal rewards are removed.

    Args:
        faults: Gets what kept outcomes from being reported, besides that it is raised.
    """

    def __init__(
        self,
        inner: EnvGroupBuilder,
        connection: Connection,
        step: int,
        prompt_id: str,
        reward_key: str | None,
        faults: list[ConfigurationError],
    ) -> None:
        self._inner = inner
        self._connection = connection
        self._step, self._prompt_id, self._reward_key = step, prompt_id, reward_key
        self._faults = faults

    async def make_envs(self) -> Sequence[Any]:
        envs: Sequence[Any] = await self._inner.make_envs()
        return envs

    async def compute_group_rewards(
        self, trajectory_group: list[Any], env_group: Sequence[Any]
    ) -> list[tuple[float, Any]]:
        """The inner builder's. Attempts that failed for other reasons are not among them."""
        rewards: list[tuple[float, Any]] = await self._inner.compute_group_rewards(trajectory_group, env_group)
        try:
            reported = [
                self._reward(trajectory, reward, metrics)
                for trajectory, (reward, metrics) in zip(trajectory_group, rewards, strict=True)
            ]
            self._connection.observe(self._step, {self._prompt_id: reported})
        except ConfigurationError as error:
            self._faults.append(error)
            raise
        return rewards

    async def cleanup(self) -> None:
        await self._inner.cleanup()

    def logging_tags(self) -> list[str]:
        tags: list[str] = self._inner.logging_tags()
        return tags

    def _reward(self, trajectory: Any, of_group: float, metrics: Mapping[str, Any]) -> float:
        if self._reward_key is None:
            return float(sum(step.reward for step in trajectory.transitions) + of_group)
        last = trajectory.transitions[-1].metrics if trajectory.transitions else {}
        there = {**last, **metrics}
        if self._reward_key not in there:
            names = ", ".join(sorted(there)) or "none"
            raise ConfigurationError(
                f"settings: reward_key {self._reward_key!r} is not a metric of an attempt ({names})"
            )
        return float(there[self._reward_key])
