"""Pretraining on the corpus, and one step of GRPO with verified rewards. Knows nothing of how a batch is chosen.

GRPO (arXiv 2402.03300), on policy: one update per batch, so that the ratio of policies is 1 and needs no clipping; no
KL term.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from examples.grpo_from_scratch.model import Transformer, answers_of, log_probabilities, questions_of, sample
from examples.grpo_from_scratch.task import PAD, Problem, World, is_right
from torch import Tensor


def pretrain(
    model: Transformer,
    world: World,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    each: Callable[[float], None] = lambda loss: None,
) -> None:
    """Learn to answer as the corpus does. Linear warm-up over a twentieth, then linear decay.

    Args:
        each: Called after each step with its loss.
    """
    device = next(model.parameters()).device
    chance = random.Random(f"corpus {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm))
    )
    for _ in range(steps):
        problems = [world.draw(chance) for _ in range(batch_size)]
        written = [world.written(problem, chance) for problem in problems]
        questions = questions_of(problems, world.levels, device)
        answers = answers_of(written, world.levels, device)
        loss = -log_probabilities(model, questions, answers).sum() / (answers != PAD).sum()
        _update(model, optimizer, loss)
        schedule.step()
        each(loss.item())


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Attempts at n problems.

    Attributes:
        answers: int64 [n, G, A].
        rewards: float32 [n, G], 0 or 1.
    """

    problems: tuple[Problem, ...]
    answers: Tensor
    rewards: Tensor

    @property
    def informative(self) -> Tensor:
        """Which groups' rewards are not all equal, bool [n]."""
        return self.rewards.amin(1) != self.rewards.amax(1)

    @staticmethod
    def joined(parts: Sequence[Rollouts]) -> Rollouts:
        """One after the other."""
        problems = tuple(problem for part in parts for problem in part.problems)
        return Rollouts(problems, torch.cat([p.answers for p in parts]), torch.cat([p.rewards for p in parts]))

    def only(self, keep: Tensor) -> Rollouts:
        """The groups at these indices, int64 [m]."""
        chosen = tuple(self.problems[i] for i in keep.tolist())
        return Rollouts(chosen, self.answers[keep], self.rewards[keep])


def roll_out(
    model: Transformer, problems: Sequence[Problem], *, group_size: int, generator: torch.Generator
) -> Rollouts:
    """Answer each problem `group_size` times and have the answers verified."""
    device = next(model.parameters()).device
    questions = questions_of(problems, model.levels, device)
    answers = sample(model, questions, attempts=group_size, generator=generator)
    rewards = [
        [float(is_right(problem, tokens)) for tokens in group]
        for problem, group in zip(problems, answers.tolist(), strict=True)
    ]
    return Rollouts(tuple(problems), answers, torch.tensor(rewards, device=device))


def advantages(rewards: Tensor) -> Tensor:
    """(reward - mean) / standard deviation within each group, [n, G]; 0 where all are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, correction=0, keepdim=True) + 1e-6)


def step(
    model: Transformer, optimizer: torch.optim.Optimizer, rollouts: Rollouts, *, n_groups: int | None = None
) -> bool:
    """One update: ascend the mean over all attempts of advantage x log probability of the answer.

    Groups whose rewards are all equal have advantage 0. They count in the mean, and cost no pass.

    Args:
        n_groups: Over how many groups' attempts the mean is taken; all of these by default.

    Returns:
        Whether there was anything to learn from.
    """
    informative = rollouts.informative.nonzero()[:, 0]
    if len(informative) == 0:
        return False
    moving = rollouts.only(informative)
    group_size = moving.rewards.shape[1]
    questions = questions_of(moving.problems, model.levels, moving.rewards.device).repeat_interleave(group_size, 0)
    log_p = log_probabilities(model, questions, moving.answers.flatten(0, 1)).sum(1)  # [m G]
    n_attempts = group_size * (len(rollouts.problems) if n_groups is None else n_groups)
    _update(model, optimizer, -(advantages(moving.rewards).flatten() * log_p).sum() / n_attempts)
    return True


def _update(model: Transformer, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch declares no types for it
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
