"""A training of tinker-cookbook as installed, with a policy that guesses.

`python tinker_program.py URL RUN OUTBOX FIRST END` trains at the steps from FIRST to before END.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import sys
from collections.abc import Sequence
from typing import Any

import tinker
from tinker_cookbook.completers import TokenCompleter, TokensWithLogprobs
from tinker_cookbook.rl.rollouts import do_group_rollout
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, StepResult

from evenodds.integrations.tinker import SelectedDataset


class Parity(Env):  # type: ignore[misc]  # not installed where this is checked
    """The right answer is the parity of the prompt's number; an answer also gets a bonus for its form."""

    def __init__(self, number: int) -> None:
        self.number = number

    async def initial_observation(self) -> Any:
        return tinker.ModelInput.from_ints([self.number]), []

    async def step(self, action: list[int], *, extra: Any = None) -> Any:
        correct = float(action[0] % 2 == self.number % 2)
        return StepResult(
            reward=correct - 0.1,
            episode_done=True,
            next_observation=tinker.ModelInput.from_ints([]),
            next_stop_condition=[],
            metrics={"correct": correct},
        )


class Group(EnvGroupBuilder):  # type: ignore[misc]
    def __init__(self, number: int) -> None:
        self.number = number

    async def make_envs(self) -> Sequence[Any]:
        return [Parity(self.number) for _ in range(4)]


class Guess(TokenCompleter):  # type: ignore[misc]
    async def __call__(self, model_input: Any, stop: Any, **_: Any) -> Any:
        return TokensWithLogprobs(tokens=[random.randrange(2)], maybe_logprobs=[0.0])


async def train(dataset: SelectedDataset, steps: range) -> None:
    for step in steps:
        for builder in pickle.loads(pickle.dumps(dataset.get_batch(step))):  # as an executor in other processes does
            group = await do_group_rollout(builder, Guess())
            correct = sum(trajectory.transitions[-1].metrics["correct"] for trajectory in group.trajectories_G)
            sys.stdout.write(f"{builder._prompt_id} {step} {correct}\n")
            builder._connection.selector.flush()


if __name__ == "__main__":
    url, run, outbox, first, last = sys.argv[1:]
    settings = {"base_url": url, "run": run, "outbox": outbox, "reward_key": "correct", "deadline_seconds": 60}
    selected = SelectedDataset({f"n{i}": Group(i) for i in range(8)}, settings, batch_size=2, n_batches=9, group_size=4)
    asyncio.run(train(selected, range(int(first), int(last))))
    assert selected.connection.selector.flush()
