"""Drives a method through a world, open loop and closed loop, and takes the figures.

Every chance is keyed by the seed and the step, never by the method, so that methods meet the same prompts, candidates
and outcomes. Knows no method in particular.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.answering import AnsweringPolicy
from benchmarks.rivals import Method

from evenodds_service.commands.replay.driving import LEAST_NEVER_SEEN, Plan
from evenodds_service.commands.replay.scoring import mean_absolute_error, mean_of_known, sampling_error
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.ranks import spearman

Figures = dict[str, float]
Stages = Sequence[tuple[str, int, int]]
"""Name, first and last step, both counted in, of each stage."""

EPOCHS: Stages = (("1-5", 1, 5), ("6-20", 6, 20), ("21-43", 21, 43))
N_BINS = 10
_CHOICE = 11
_LIMITS = (1e-3, 1.0 - 1e-3)


@dataclass(slots=True)
class Reliability:
    """Predicted against observed success rates, in bins of equal width: counts and sums, [N_BINS] each."""

    counts: FloatArray
    predicted: FloatArray
    observed: FloatArray

    @staticmethod
    def new() -> Reliability:
        return Reliability(np.zeros(N_BINS), np.zeros(N_BINS), np.zeros(N_BINS))

    def add(self, predicted_n: FloatArray, observed_n: FloatArray) -> None:
        bins = np.minimum((predicted_n * N_BINS).astype(np.int64), N_BINS - 1)
        self.counts += np.bincount(bins, minlength=N_BINS)
        self.predicted += np.bincount(bins, weights=predicted_n, minlength=N_BINS)
        self.observed += np.bincount(bins, weights=observed_n, minlength=N_BINS)

    def error(self) -> float:
        """Mean |predicted - observed| over the bins, weighted by their counts."""
        return float(np.abs(self.predicted - self.observed).sum() / max(self.counts.sum(), 1.0))

    def rows(self) -> list[tuple[int, float, float]]:
        """Count, mean prediction and mean outcome of each bin; NaN in an empty one."""
        return [
            (int(count), p / count if count else math.nan, o / count if count else math.nan)
            for count, p, o in zip(self.counts, self.predicted, self.observed, strict=True)
        ]


def thirds(n_steps: int, *, first: int) -> Stages:
    """The steps first .. n_steps - 1 in three stages, the later ones not shorter."""
    n = n_steps - first
    cuts = [first, first + n // 3, first + 2 * n // 3, n_steps]
    return [(name, cuts[i], cuts[i + 1] - 1) for i, name in enumerate(("first", "middle", "last"))]


def open_loop(
    method: Method, plan: Plan, *, seed: int, stages: Stages, held_out_N: BoolArray | None = None
) -> tuple[Figures, Reliability]:
    """Observe random prompts of each step and predict the next step's outcomes before it comes.

    Args:
        held_out_N: Prompts that are never observed; their rank correlation is a figure of its own, and the other
            figures leave them out.

    Returns:
        By stage: `spearman` over the pool, `never seen` over prompts without an observation, `held out`, `MAE`,
        `log loss` of the mean (nats an attempt), `informative log loss`. Over the run: `batch r`, the Pearson
        correlation of forecast and observed means of the batches, and the calibration error. And the reliability.
    """
    n = plan.recording.n_prompts
    out = np.zeros(n, dtype=bool) if held_out_N is None else held_out_N
    inside = np.flatnonzero(~out)
    seen = np.zeros(n, dtype=bool)
    reliability = Reliability.new()
    steps: list[Figures] = []
    batch_means: list[tuple[float, float]] = []
    for step in range(plan.rank_steps):
        observed = plan.observed(seed, step)
        observed = observed[~out[observed]]
        outcomes = plan.outcomes(seed, step)[observed].astype(np.float64)
        method.observe(step, observed, outcomes, np.full(len(observed), float(plan.group_size)))
        seen[observed] = True
        forecast = method.predict()
        k = plan.outcomes(seed, step + 1)
        actual = k / plan.group_size
        informative = (k > 0) & (k < plan.group_size)
        mean, never = forecast.mean_N, ~seen & ~out
        steps.append(
            {
                "spearman": spearman(mean[inside], actual[inside]),
                "never seen": spearman(mean[never], actual[never]) if never.sum() >= LEAST_NEVER_SEEN else math.nan,
                "held out": spearman(mean[out], actual[out]) if out.any() else math.nan,
                "MAE": mean_absolute_error(mean[inside], actual[inside]),
                "log loss": log_loss(mean[inside], actual[inside]),
                "informative log loss": log_loss(forecast.informative_N[inside], informative[inside]),
            }
        )
        reliability.add(mean[inside], actual[inside])
        if step + 1 < plan.rank_steps:
            batch = plan.observed(seed, step + 1)
            batch_means.append((float(mean[batch].mean()), float(actual[batch].mean())))
    # The figures of index i are of step i + 1, which was predicted.
    figures = {
        f"{name} {stage}": mean_of_known([step[name] for step in steps[first - 1 : last]])
        for name in steps[0]
        for stage, first, last in stages
    }
    figures["batch r"] = _pearson(batch_means)
    figures["calibration error"] = reliability.error()
    return figures, reliability


def closed_loop(
    method: Method,
    plan: Plan,
    *,
    seed: int,
    stages: Stages,
    fills_batch: bool = False,
    policy: AnsweringPolicy | None = None,
) -> tuple[Figures, FloatArray]:
    """Choose each step's batch and observe its outcomes.

    Args:
        fills_batch: Dynamic sampling: further batches are rolled out at the same step until B informative groups are
            found (or the candidates are used up); surplus ones are thrown away. All groups are counted.
        policy: Outcomes come from it, and it learns from the informative groups that are used. Without it they are
            the recorded ones, whatever is chosen.

    Returns:
        By stage: `informative` share of all groups, `groups per informative` one that is used, `forecast error`. Over
        the run: these three, `forecast chance` (the error of a true forecast), `coverage` (share of the pool ever
        used), `visits` per used prompt and `gain`, by how much the policy's mean success rate over the pool rose (NaN
        without one). And the informative share by step.
    """
    n = plan.recording.n_prompts
    visits, learned = np.zeros((2, n), dtype=np.int64)
    groups, kept, found, errors, chances = [], [], [], [], []
    for step in range(plan.select_steps):
        candidates = np.arange(n)
        if plan.candidates or not plan.repeats:
            order = plan.candidate_order(seed, step)
            candidates = order if plan.repeats else order[visits[order] == 0]
            candidates = candidates[: plan.candidates or None]
        forecast = method.predict()
        if policy is None:
            outcomes = plan.outcomes(seed, step)
        else:
            outcomes = policy.outcomes(learned, seed=seed, step=step, group_size=plan.group_size)
        generator = np.random.default_rng([seed, step, _CHOICE])
        batches: list[IntArray] = []
        n_found = 0
        while len(candidates) >= plan.batch_size and (not batches or (fills_batch and n_found < plan.batch_size)):
            chosen = method.select(candidates, plan.batch_size, step=step, generator=generator)
            batches.append(chosen)
            candidates = np.setdiff1d(candidates, chosen, assume_unique=True)
            n_found += int(((outcomes[chosen] > 0) & (outcomes[chosen] < plan.group_size)).sum())
        if not batches:  # without repeats, dynamic sampling may use up the pool before the last step
            break
        chosen = np.concatenate(batches)
        visits[chosen] += 1
        k = outcomes[chosen].astype(np.float64)
        learned[chosen[(k > 0) & (k < plan.group_size)][: plan.batch_size]] += 1
        method.observe(step, chosen, k, np.full(len(chosen), float(plan.group_size)))
        probabilities = forecast.informative_N[chosen]
        groups.append(len(chosen))
        found.append(n_found)
        kept.append(min(n_found, plan.batch_size))
        errors.append(abs(float(probabilities.mean()) - n_found / len(chosen)))
        chances.append(sampling_error(probabilities))
    figures: Figures = {}
    for stage, first, last in [*stages, ("whole", 0, len(groups) - 1)]:
        rows = slice(first, last + 1)
        n_groups, n_kept = sum(groups[rows]), sum(kept[rows])
        figures[f"informative {stage}"] = sum(found[rows]) / n_groups if n_groups else math.nan
        figures[f"groups per informative {stage}"] = n_groups / n_kept if n_kept else math.nan
        figures[f"forecast error {stage}"] = mean_of_known(errors[rows])
    figures["forecast chance"] = mean_of_known(chances)
    figures["coverage"] = float((visits > 0).mean())
    figures["visits"] = float(visits.sum() / max((visits > 0).sum(), 1))
    figures["gain"] = math.nan
    if policy is not None:
        figures["gain"] = float((policy.rates(learned) - policy.rates(np.zeros_like(learned))).mean())
    return figures, np.asarray(found) / np.asarray(groups)


def log_loss(predicted: FloatArray, actual: FloatArray | BoolArray) -> float:
    """Mean cross entropy in nats; predictions are taken as at least .001 away from 0 and 1."""
    p = np.clip(predicted, *_LIMITS)
    happened = np.asarray(actual, dtype=np.float64)
    return float(-np.mean(happened * np.log(p) + (1.0 - happened) * np.log1p(-p)))


def _pearson(pairs: Sequence[tuple[float, float]]) -> float:
    """Correlation of forecast and observed means; 0 where the forecast does not move."""
    values = np.asarray(pairs)
    if len(values) < 3 or np.ptp(values[:, 0]) < 1e-12:
        return 0.0
    return float(np.corrcoef(values.T)[0, 1])
