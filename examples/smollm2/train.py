"""One training run: the service chooses, the model attempts, the verifier judges, GRPO moves the model; it resumes.

GRPO (arXiv 2402.03300), on policy: one update per batch, so that the ratio of policies is 1 and needs no clipping; no
KL term; an attempt's loss is divided by a constant length (arXiv 2503.20783). Every step draws from a generator of its
own and the service forgets what came after a checkpoint, so that a run that was killed and resumed equals one that was
not.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from examples.grpo_from_scratch.grpo import advantages
from examples.smollm2.model import Policy, Rollouts, replaced
from examples.smollm2.task import ANSWER_TOKENS, Problem, Problems

from evenodds import Client, SelectReply
from evenodds.schemas import Predictor

_OWN_PACE = {"every_observations": 10_000_000, "every_seconds": 10_000_000}
_REFIT_SECONDS = 300.0
_UPDATED_AT_ONCE = 8
"""Groups in one backward pass."""


@dataclass(frozen=True, slots=True)
class Arm:
    """How batches are chosen.

    Attributes:
        in_waves: Dynamic sampling: batch after batch until there are B informative groups, or `most_waves`.
        fills: The service chooses as many prompts as it takes to find B informative groups in one wave.
        has_sibling: The run learns from the outcomes of another seed's uniform run.
    """

    name: str
    predictor: Predictor
    in_waves: bool = False
    fills: bool = False
    has_sibling: bool = False

    @property
    def is_fitted(self) -> bool:
        """Whether refits change what it chooses."""
        return self.predictor == "gps"

    def run_name(self, seed: int) -> str:
        """Of its run in the service."""
        return f"{self.name.replace('+', '-')}-{seed}"


ARMS = {
    arm.name: arm
    for arm in (
        Arm("uniform", "uniform"),
        Arm("dynamic", "uniform", in_waves=True),
        Arm("gps", "gps"),
        Arm("gps+fill", "gps", fills=True),
        Arm("gps+sibling", "gps", has_sibling=True),
    )
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of a training run.

    Attributes:
        batch_size: B groups a step.
        group_size: G attempts at each prompt.
        warm_steps: The learning rate rises over so many steps.
        refit_every: Steps between refits of the shared model. The run waits for them, so that it can be repeated.
        checkpoint_every: Steps between checkpoints, each of three times the model's size; 0 for none.
        most_waves: Dynamic sampling rolls out at most so many batches a step.
    """

    steps: int = 60
    batch_size: int = 8
    group_size: int = 8
    learning_rate: float = 1e-5
    warm_steps: int = 5
    evaluate_every: int = 5
    refit_every: int = 10
    checkpoint_every: int = 10
    most_waves: int = 8


@dataclass(slots=True)
class Record:
    """What a run showed. Lists have an item per step, those of the evaluations one per evaluation.

    Attributes:
        evaluated_at: Steps done before the evaluation.
        accuracy, of_another_kind: Mean probability of the right answer on held-out problems, of the pool's kinds and of
            another.
        by_kind: As `accuracy`, by kind.
        groups, informative, updated, tokens: Groups rolled out, informative ones, those that were learned from, tokens
            drawn.
        forecasts: Of the informative share, by the service.
        rewards: Mean reward.
        prompts: Ids of the prompts rolled out.
        successes: Right attempts at each of them.
        seconds: Of the step, in all; `service_seconds`: of choosing and reporting, with refits.
    """

    evaluated_at: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    of_another_kind: list[float] = field(default_factory=list)
    by_kind: dict[str, list[float]] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)
    informative: list[int] = field(default_factory=list)
    updated: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    forecasts: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    successes: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    service_seconds: list[float] = field(default_factory=list)

    @property
    def distinct(self) -> int:
        """How many different prompts were rolled out."""
        return len({prompt for chosen in self.prompts for prompt in chosen})

    @property
    def repeats(self) -> float:
        """Share of the groups whose prompt had been rolled out before."""
        return 1.0 - self.distinct / max(1, sum(self.groups))


@dataclass(frozen=True, slots=True)
class Files:
    """Where a run is kept: what it showed, written after each step, and its newest checkpoint."""

    record: Path
    checkpoint: Path

    @staticmethod
    def of(out: Path, arm: Arm, seed: int) -> Files:
        folder = out / "runs" / arm.name
        return Files(folder / f"{seed}.json", folder / f"{seed}.pt")

    def load(self) -> Record | None:
        """What the run has shown so far; None if it has not begun."""
        return Record(**json.loads(self.record.read_text())) if self.record.exists() else None

    def save_record(self, record: Record) -> None:
        with replaced(self.record) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(record)))


class Batches:
    """The service's side of a run: its pool, its choices and what came of them.

    Makes the run and loads the pool, which a repeat does not change; a prompt's id is its place in the pool.

    Args:
        learn_from: Name of the run whose outcomes this one uses.
        done: Steps whose outcomes count; the service forgets all others.
    """

    def __init__(
        self,
        client: Client,
        arm: Arm,
        pool: Sequence[Problem],
        *,
        plan: Plan,
        seed: int,
        done: int,
        learn_from: str | None = None,
    ) -> None:
        self._client, self._arm, self._pool, self._plan, self._seed = client, arm, pool, plan, seed
        self._run = arm.run_name(seed)
        self._has_sibling = learn_from is not None
        client.put_run(
            self._run,
            predictor=arm.predictor,
            group_size=plan.group_size,
            refit=_OWN_PACE,
            learn_from=None if learn_from is None else [learn_from],
        )
        client.add_prompts(
            self._run, [{"prompt_id": str(i), "text": p.text, "category": p.kind} for i, p in enumerate(pool)]
        )
        client.rewind(self._run, done - 1)

    def choose(self, step: int) -> tuple[SelectReply, list[Problem]]:
        """The batch of this step; for dynamic sampling as many as it may need, in the order to try them."""
        if self._arm.is_fitted and step % self._plan.refit_every == 0 and (step > 0 or self._has_sibling):
            self._refit()
        size = self._plan.batch_size
        if self._arm.fills:
            reply = self._client.select_batch(self._run, step, informative_groups=size, seed=self._seed)
        else:
            waves = self._plan.most_waves if self._arm.in_waves else 1
            reply = self._client.select_batch(self._run, step, size * waves, seed=self._seed)
        return reply, [self._pool[int(prompt.prompt_id)] for prompt in reply.prompts]

    def report(self, step: int, reply: SelectReply, rollouts: Rollouts) -> None:
        """Tell how the attempts went."""
        chosen = reply.prompts[: len(rollouts.problems)]
        self._client.observe(
            self._run,
            step,
            [
                {"prompt_id": prompt.prompt_id, "rewards": rewards}
                for prompt, rewards in zip(chosen, rollouts.rewards.tolist(), strict=True)
            ],
            selection_id=reply.selection_id,
        )

    def _refit(self) -> None:
        """Have the shared model fitted, and wait for it."""
        refit = self._client.refit(self._run, wait_seconds=_REFIT_SECONDS)
        if refit.status != "done":
            raise RuntimeError(f"refit {refit.refit_id} of run {self._run!r} is {refit.status}: {refit.error}")


def train(
    policy: Policy,
    problems: Problems,
    *,
    arm: Arm,
    plan: Plan,
    client: Client,
    seed: int,
    files: Files,
    learn_from: str | None = None,
    keeps_last: bool = True,
    each: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Train the policy in place, from the newest checkpoint if there is one.

    Args:
        policy: With the weights that a run starts with.
        seed: Of the attempts and the choices.
        keeps_last: Make a checkpoint after the last step, so that a later call with more steps can go on from it.
        each: Called after each step.

    Raises:
        EvenOddsError: the service refused the call or did not answer.
        RuntimeError: a refit failed, or took longer than five minutes.
    """
    files.record.parent.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer_of(policy, plan)
    record = _resumed(policy, optimizer, files)
    batches = Batches(client, arm, problems.pool, plan=plan, seed=seed, done=len(record.groups), learn_from=learn_from)
    if not record.evaluated_at:
        evaluate(policy, problems, record)
    for step in range(len(record.groups), plan.steps):
        started = time.perf_counter()
        reply, chosen = batches.choose(step)
        service_seconds = time.perf_counter() - started
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        rollouts, moving = attempt(policy, chosen, arm=arm, plan=plan, generator=generator)
        update(policy, optimizer, moving, step=step, plan=plan)
        reporting = time.perf_counter()
        batches.report(step, reply, rollouts)
        record.groups.append(len(rollouts.problems))
        record.informative.append(int(rollouts.informative.sum()))
        record.updated.append(int(moving.informative.sum()))
        record.tokens.append(int(rollouts.lengths.sum()))
        record.forecasts.append(reply.forecast.informative_share)
        record.rewards.append(float(rollouts.rewards.mean()))
        record.prompts.append([int(prompt.prompt_id) for prompt in reply.prompts[: len(rollouts.problems)]])
        record.successes.append(rollouts.rewards.sum(1).int().tolist())
        record.service_seconds.append(service_seconds + time.perf_counter() - reporting)
        record.seconds.append(time.perf_counter() - started)
        if (step + 1) % plan.evaluate_every == 0:
            evaluate(policy, problems, record)
        files.save_record(record)
        if step + 1 == plan.steps:
            is_due = keeps_last
        else:
            is_due = plan.checkpoint_every > 0 and (step + 1) % plan.checkpoint_every == 0
        if is_due:
            _save_checkpoint(policy, optimizer, record, files)
        each(record)
    return record


def optimizer_of(policy: Policy, plan: Plan) -> torch.optim.Optimizer:
    """AdamW without decay. Fused, it takes a tenth of the time: on a CPU it was a tenth of a step."""
    return torch.optim.AdamW(
        policy.model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


def attempt(
    policy: Policy, chosen: Sequence[Problem], *, arm: Arm, plan: Plan, generator: torch.Generator
) -> tuple[Rollouts, Rollouts]:
    """All rollouts, and those to learn from: for dynamic sampling the first B informative groups."""
    if not arm.in_waves:
        rollouts = policy.roll_out(chosen, group_size=plan.group_size, generator=generator)
        return rollouts, rollouts
    waves: list[Rollouts] = []
    for start in range(0, len(chosen), plan.batch_size):
        wave = chosen[start : start + plan.batch_size]
        waves.append(policy.roll_out(wave, group_size=plan.group_size, generator=generator))
        if sum(int(each.informative.sum()) for each in waves) >= plan.batch_size:
            break
    rollouts = Rollouts.joined(waves)
    return rollouts, rollouts.only(rollouts.informative.nonzero()[: plan.batch_size, 0])


def update(policy: Policy, optimizer: torch.optim.Optimizer, rollouts: Rollouts, *, step: int, plan: Plan) -> None:
    """Ascend the mean of advantage x log probability over the attempts of B groups, or of all if more are informative.

    Silent groups have advantage 0: they count in the mean, and cost no pass.
    """
    informative = rollouts.informative.nonzero()[:, 0]
    if len(informative) == 0:
        return
    n_attempts = max(plan.batch_size, len(informative)) * plan.group_size
    optimizer.zero_grad()
    for start in range(0, len(informative), _UPDATED_AT_ONCE):
        moving = rollouts.only(informative[start : start + _UPDATED_AT_ONCE])
        log_p = policy.log_probabilities(moving.problems, moving.tokens, moving.lengths)
        loss = -(advantages(moving.rewards) * log_p).sum() / (n_attempts * ANSWER_TOKENS)
        loss.backward()  # type: ignore[no-untyped-call]  # torch declares no types for it
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate * min(1.0, (step + 1) / plan.warm_steps)
    optimizer.step()


def warm_up(policy: Policy, problems: Problems, *, plan: Plan, steps: int, each: Callable[[], None]) -> None:
    """Steps of GRPO in which the model learns the form of an answer, alike for all arms: on problems of no pool."""
    optimizer = optimizer_of(policy, plan)
    size = plan.batch_size
    for step in range(steps):
        chosen = problems.warm_up[step * size : (step + 1) * size]
        generator = torch.Generator().manual_seed(step)
        update(
            policy,
            optimizer,
            policy.roll_out(chosen, group_size=plan.group_size, generator=generator),
            step=step,
            plan=plan,
        )
        each()


def evaluate(policy: Policy, problems: Problems, record: Record) -> None:
    """Judge the policy as it is, and add it to the record."""
    record.evaluated_at.append(len(record.groups))
    rates = policy.success_rates(problems.held_out)
    record.accuracy.append(sum(rates) / len(rates))
    others = policy.success_rates(problems.of_another_kind)
    record.of_another_kind.append(sum(others) / len(others))
    for kind in sorted({problem.kind for problem in problems.held_out}):
        of_kind = [rate for rate, problem in zip(rates, problems.held_out, strict=True) if problem.kind == kind]
        record.by_kind.setdefault(kind, []).append(sum(of_kind) / len(of_kind))


def _resumed(policy: Policy, optimizer: torch.optim.Optimizer, files: Files) -> Record:
    """The record at the newest checkpoint, whose weights are loaded; an empty one if there is none."""
    if not files.checkpoint.exists():
        return Record()
    content: dict[str, Any] = torch.load(files.checkpoint, map_location=policy.device, weights_only=True)
    policy.model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return Record(**content["record"])


def _save_checkpoint(policy: Policy, optimizer: torch.optim.Optimizer, record: Record, files: Files) -> None:
    with replaced(files.checkpoint) as partial:
        torch.save(
            {
                "model": policy.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "record": dataclasses.asdict(record),
            },
            partial,
        )
