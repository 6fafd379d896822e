"""Drives a running service through a recording, as a trainer would: rank (open loop) and select (closed loop).

Every chance is keyed by the seed and the step, never by the predictor, so that predictors meet the same prompts,
candidates and outcomes. Knows the wire contract, not the service.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evenodds import Client, Observation
from evenodds_service.commands.replay.recordings import Recording
from evenodds_service.commands.replay.scoring import (
    RankStep,
    SelectStep,
    informative_share,
    mean_absolute_error,
    rank_figures,
    sampling_error,
    select_figures,
)
from evenodds_service.domain.ranks import spearman

IntArray = NDArray[np.int64]

MAX_PREDICTED = 10_000
"""Prompts of the pool that the rank part predicts at each step: all, or so many at random. One call."""
LEAST_NEVER_SEEN = 30
"""With fewer never-seen prompts left, their rank correlation is not measured."""
_OBSERVED, _CANDIDATES, _PREDICTED = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Contender:
    """A predictor as the service knows it; `acquisition` None is the predictor's own."""

    name: str
    predictor: Literal["gps", "mopps", "uniform"]
    acquisition: Literal["yield"] | None = None


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("gps", "gps"),
        Contender("mopps", "mopps"),
        Contender("mopps-yield", "mopps", "yield"),
        Contender("uniform", "uniform"),
    )
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to replay, the same for every predictor.

    Attributes:
        n_steps: Policy versions, at least 2.
        observe_per_step: Random prompts observed at each step of the rank part.
        batch_size, candidates: Of the select part; 0 candidates are the whole pool.
        repeats: Whether a prompt may be observed or chosen more than once.
    """

    recording: Recording
    n_steps: int
    observe_per_step: int
    batch_size: int
    candidates: int
    group_size: int
    repeats: bool

    @property
    def rank_steps(self) -> int:
        """Steps that are predicted; the step before each is observed."""
        steps = self.n_steps - 1
        return steps if self.repeats else min(steps, self.recording.n_prompts // self.observe_per_step)

    @property
    def select_steps(self) -> int:
        return self.n_steps if self.repeats else min(self.n_steps, self.recording.n_prompts // self.batch_size)

    def outcomes(self, seed: int, step: int) -> IntArray:
        return self.recording.outcomes(seed=seed, step=step, n_steps=self.n_steps, group_size=self.group_size)

    def observed(self, seed: int, step: int) -> IntArray:
        """Indices of the random prompts that the rank part observes at this step."""
        n = self.recording.n_prompts
        if self.repeats:
            return np.random.default_rng([seed, step, _OBSERVED]).choice(n, self.observe_per_step, replace=False)
        first = step * self.observe_per_step
        return np.random.default_rng([seed, _OBSERVED]).permutation(n)[first : first + self.observe_per_step]

    def candidate_order(self, seed: int, step: int) -> IntArray:
        """All prompts in the random order in which they become candidates of the select part at this step."""
        return np.random.default_rng([seed, step, _CANDIDATES]).permutation(self.recording.n_prompts)


@dataclass(slots=True)
class Stopwatch:
    """Wall time of calls as the client sees them, in milliseconds by kind of call."""

    milliseconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def timed(self, call: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.milliseconds[call].append(1_000 * (time.perf_counter() - started))


def rank(
    client: Client, run: str, plan: Plan, *, seed: int, watch: Stopwatch, advance: Callable[[], object]
) -> dict[str, float]:
    """Observe random prompts of each step and predict the next step's outcomes before it comes.

    Returns:
        `rank_figures`, against the observed rates of the predicted step, and the visits per prompt at the end.
    """
    ids = [str(prompt.prompt_id) for prompt in plan.recording.prompts]
    n = len(ids)
    predicted = np.arange(n)
    if n > MAX_PREDICTED:
        predicted = np.sort(np.random.default_rng([seed, _PREDICTED]).choice(n, MAX_PREDICTED, replace=False))
    asked = [ids[i] for i in predicted]
    seen = np.zeros(n, dtype=bool)
    steps: list[RankStep] = []
    for step in range(plan.rank_steps):
        observed = plan.observed(seed, step)
        observations = _observations(plan, ids, observed, plan.outcomes(seed, step))
        with watch.timed("observe"):
            client.observe(run, step, observations)
        seen[observed] = True
        with watch.timed("predict"):
            reply = client.predict(run, asked, step=step + 1)
        rates = np.array([prediction.success_rate for prediction in reply.predictions])
        actual = plan.outcomes(seed, step + 1)[predicted] / plan.group_size
        new = ~seen[predicted]
        steps.append(
            RankStep(
                pool=spearman(rates, actual),
                never_seen=spearman(rates[new], actual[new]) if new.sum() >= LEAST_NEVER_SEEN else math.nan,
                absolute_error=mean_absolute_error(rates, actual),
            )
        )
        advance()
    return {**rank_figures(steps), "rank visits": plan.rank_steps * plan.observe_per_step / n}


def select(
    client: Client, run: str, plan: Plan, *, seed: int, watch: Stopwatch, advance: Callable[[], object]
) -> dict[str, float]:
    """Choose each step's batch and observe its outcomes.

    Returns:
        `select_figures`.
    """
    ids = [str(prompt.prompt_id) for prompt in plan.recording.prompts]
    index = {prompt_id: i for i, prompt_id in enumerate(ids)}
    visits: Counter[int] = Counter()
    steps: list[SelectStep] = []
    for step in range(plan.select_steps):
        candidates = None
        if plan.candidates:
            order = plan.candidate_order(seed, step)
            allowed = order if plan.repeats else [i for i in order if not visits[i]]
            candidates = [ids[i] for i in allowed[: plan.candidates]]
        with watch.timed("select_batch"):
            reply = client.select_batch(run, step, plan.batch_size, seed=seed, candidates=candidates)
        chosen = np.array([index[prompt.prompt_id] for prompt in reply.prompts])
        outcomes = plan.outcomes(seed, step)
        observations = _observations(plan, ids, chosen, outcomes)
        with watch.timed("observe"):
            client.observe(run, step, observations, selection_id=reply.selection_id)
        visits.update(chosen.tolist())
        steps.append(
            SelectStep(
                informative=informative_share(outcomes[chosen], plan.group_size),
                forecast=reply.forecast.informative_share,
                sampling_error=sampling_error([prompt.informative_probability for prompt in reply.prompts]),
            )
        )
        advance()
    return select_figures(steps, n_prompts=len(ids), visits=list(visits.values()), group_size=plan.group_size)


def _observations(plan: Plan, ids: list[str], prompts: IntArray, outcomes_N: IntArray) -> list[Observation]:
    return [Observation(prompt_id=ids[i], successes=int(outcomes_N[i]), attempts=plan.group_size) for i in prompts]
