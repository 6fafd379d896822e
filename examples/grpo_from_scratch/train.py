"""One training run: the service chooses the batch, the model answers, the verifier judges, GRPO moves the model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from examples.grpo_from_scratch import grpo
from examples.grpo_from_scratch.grpo import Rollouts
from examples.grpo_from_scratch.model import Transformer, answers_of, questions_of, success_rates
from examples.grpo_from_scratch.task import Problem

from evenodds import Client, SelectReply
from evenodds.schemas import Predictor

PREDICTORS: dict[str, Predictor] = {
    "uniform": "uniform",
    "dynamic": "uniform",
    "mopps": "mopps",
    "gps-paper": "gps-paper",
    "gps": "gps",
}
_SETTINGS: dict[str, Callable[[str], float | str]] = {
    "acquisition": str,
    "candidates": int,
    "cooldown_steps": int,
    "diversity": float,
    "max_visits": int,
    "optimism": float,
    "target_rate": float,
}
_FITTED = ("gps", "gps-paper")
_OWN_PACE = {"every_observations": 10_000_000, "every_seconds": 10_000_000}


@dataclass(frozen=True, slots=True)
class Method:
    """How batches are chosen: a predictor of the service, or dynamic sampling over uniform batches.

    Attributes:
        name: As given: a key of `PREDICTORS`, then settings, as in `gps+cooldown_steps=20`.
        settings: Of the run.
        candidates: The service chooses among so many random prompts for each one of the batch; 0: among the whole pool.
    """

    name: str
    base: str
    settings: Mapping[str, float | str]
    candidates: int = 0

    @staticmethod
    def parse(name: str) -> Method:
        """The method of that name.

        Raises:
            ValueError: no such method or setting, or a setting whose value is no number.
        """
        base, *parts = name.split("+")
        if base not in PREDICTORS:
            raise ValueError(f"method {base!r} is none of {', '.join(PREDICTORS)}")
        settings: dict[str, float | str] = {}
        for part in parts:
            setting, _, value = part.partition("=")
            if setting not in _SETTINGS:
                raise ValueError(f"setting {setting!r} in method {name!r} is none of {', '.join(_SETTINGS)}")
            try:
                settings[setting] = _SETTINGS[setting](value)
            except ValueError:
                raise ValueError(f"{part!r} in method {name!r}: {value!r} is not a number of that kind") from None
        candidates = int(settings.pop("candidates", 0))
        if candidates < 0:
            raise ValueError(f"candidates {candidates} in method {name!r} must be at least 0")
        return Method(name, base, settings, candidates)


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of a training run.

    Attributes:
        batch_size: B groups a step.
        group_size: G attempts at each prompt.
        evaluate_every: Steps between evaluations.
        refit_every: Steps between refits of the shared model. The run waits for them, because its steps take a fraction
            of a second: a worker beside a real training has minutes.
        dynamic_rounds: Dynamic sampling rolls out at most so many batches a step.
    """

    steps: int
    batch_size: int
    group_size: int
    learning_rate: float
    evaluate_every: int
    refit_every: int
    dynamic_rounds: int


@dataclass(slots=True)
class Record:
    """What a run showed. Lists have an item per step, those of the evaluations one per evaluation.

    Attributes:
        evaluated_at: Steps done before the evaluation.
        rollouts_at: Attempts made before the evaluation.
        accuracies: Mean probability of the right answer on held-out problems, all and by group.
        informative: Share of informative groups among those that were rolled out.
        forecasts: Of that share, by the service.
        rollouts: Attempts made, by step.
        distinct: How many different prompts were rolled out in the whole run.
        service_seconds: Of select and observe. `refit_seconds`: waited for refits, in all.
        own_seconds: Of attempts and update.
    """

    evaluated_at: list[int] = field(default_factory=list)
    rollouts_at: list[int] = field(default_factory=list)
    accuracies: dict[str, list[float]] = field(default_factory=dict)
    informative: list[float] = field(default_factory=list)
    forecasts: list[float] = field(default_factory=list)
    rollouts: list[int] = field(default_factory=list)
    distinct: int = 0
    service_seconds: list[float] = field(default_factory=list)
    own_seconds: list[float] = field(default_factory=list)
    refit_seconds: float = 0.0


def train(
    model: Transformer,
    pool: Sequence[Problem],
    held_out: Sequence[Problem],
    *,
    method: Method,
    plan: Plan,
    client: Client,
    run: str,
    seed: int,
    each: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Train the model in place.

    Args:
        run: Name of a new run of the service.
        seed: Of the attempts and the choices.
        each: Called after each step.

    Raises:
        EvenOddsError: the service refused the call or did not answer.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    record, seen = Record(), set[str]()
    batches = Batches(client, run, pool, method=method, plan=plan, seed=seed)
    _evaluate(model, held_out, record)
    for step in range(plan.steps):
        times = [time.perf_counter()]
        reply, chosen = batches.choose(step)
        times.append(time.perf_counter())
        rollouts, moving = _attempt(model, chosen, method=method, plan=plan, generator=generator)
        if grpo.step(model, optimizer, moving):
            warm_up.step()
        times.append(time.perf_counter())
        batches.report(step, reply, rollouts)
        times.append(time.perf_counter())
        if method.base in _FITTED and (step + 1) % plan.refit_every == 0:
            batches.refit()
        seen.update(problem.text for problem in rollouts.problems)
        record.rollouts.append(rollouts.rewards.numel())
        record.informative.append(float(rollouts.informative.float().mean()))
        record.forecasts.append(reply.forecast.informative_share)
        record.service_seconds.append(times[1] - times[0] + times[3] - times[2])
        record.own_seconds.append(times[2] - times[1])
        record.refit_seconds += time.perf_counter() - times[3]
        record.distinct = len(seen)
        if (step + 1) % plan.evaluate_every == 0:
            _evaluate(model, held_out, record)
        each(record)
    return record


class Batches:
    """The service's side of a run: its pool, its choices and what came of them.

    Makes the run and loads the pool; a prompt's id is its place in the pool.
    """

    def __init__(
        self, client: Client, run: str, pool: Sequence[Problem], *, method: Method, plan: Plan, seed: int
    ) -> None:
        self._client, self._run, self._pool, self._seed = client, run, pool, seed
        self._size = plan.batch_size * (plan.dynamic_rounds if method.base == "dynamic" else 1)
        self._n_candidates = self._size * method.candidates
        client.put_run(
            run,
            predictor=PREDICTORS[method.base],
            group_size=plan.group_size,
            refit=_OWN_PACE,
            **method.settings,  # type: ignore[arg-type]  # the service checks them
        )
        client.add_prompts(
            run, [{"prompt_id": str(i), "text": p.text, "category": p.group} for i, p in enumerate(pool)]
        )
        self._ids = {problem.text: str(i) for i, problem in enumerate(pool)}

    def choose(self, step: int) -> tuple[SelectReply, list[Problem]]:
        """The batch of this step; for dynamic sampling as many as it may need, in the order to try them."""
        candidates = None
        if self._n_candidates:
            chance = random.Random(f"candidates {self._seed} {step}")
            candidates = chance.sample(list(self._ids.values()), min(self._n_candidates, len(self._ids)))
        reply = self._client.select_batch(self._run, step, self._size, seed=self._seed, candidates=candidates)
        return reply, [self._pool[int(prompt.prompt_id)] for prompt in reply.prompts]

    def report(self, step: int, reply: SelectReply, rollouts: Rollouts) -> None:
        """Tell how the attempts went."""
        self._client.observe(
            self._run,
            step,
            [
                {"prompt_id": self._ids[problem.text], "rewards": rewards}
                for problem, rewards in zip(rollouts.problems, rollouts.rewards.tolist(), strict=True)
            ],
            selection_id=reply.selection_id,
        )

    def refit(self) -> None:
        """Have the shared model fitted, and wait for it."""
        refit = self._client.refit(self._run, wait_seconds=300)
        if refit.status != "done":
            raise RuntimeError(f"refit {refit.refit_id} of run {self._run!r} is {refit.status}: {refit.error}")


def _attempt(
    model: Transformer, chosen: Sequence[Problem], *, method: Method, plan: Plan, generator: torch.Generator
) -> tuple[Rollouts, Rollouts]:
    """All rollouts, and those to learn from: for dynamic sampling the first B informative groups."""
    if method.base != "dynamic":
        rollouts = grpo.roll_out(model, chosen, group_size=plan.group_size, generator=generator)
        return rollouts, rollouts
    rounds: list[Rollouts] = []
    for start in range(0, len(chosen), plan.batch_size):
        batch = chosen[start : start + plan.batch_size]
        rounds.append(grpo.roll_out(model, batch, group_size=plan.group_size, generator=generator))
        if sum(int(r.informative.sum()) for r in rounds) >= plan.batch_size:
            break
    rollouts = Rollouts.joined(rounds)
    return rollouts, rollouts.only(rollouts.informative.nonzero()[: plan.batch_size, 0])


def _evaluate(model: Transformer, held_out: Sequence[Problem], record: Record) -> None:
    device = next(model.parameters()).device
    questions = questions_of(held_out, model.levels, device)
    answers = answers_of([problem.answer for problem in held_out], model.levels, device)
    rates = success_rates(model, questions, answers).tolist()
    record.evaluated_at.append(len(record.rollouts))
    record.rollouts_at.append(sum(record.rollouts))
    for group in ("all", "sort", "translate"):
        of_group = [r for r, p in zip(rates, held_out, strict=True) if group in ("all", p.group)]
        record.accuracies.setdefault(group, []).append(sum(of_group) / max(1, len(of_group)))
