"""Figures of `trainings`: how much sooner an arm is where uniform choice gets to, by steps, rollouts, tokens and cost.

All figures are read from mean curves over seeds, paired with uniform's of the same seeds; their 95% intervals come from
the jackknife over seeds, with Student's t. Computes nothing but that, and knows no training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot
from scipy import stats

from evenodds_service.domain.arrays import FloatArray

BASELINE, FILLED = "uniform", "dynamic"
COST_RATIOS = (0.25, 0.5, 1.0)
"""What the update of a group costs, in rollouts of a group."""

AFTER_STEP = 20
"""The least difference to uniform is looked for after this step: before it, arms have hardly parted."""


FEW_SEEDS = 2


class Run(Protocol):
    """What is read of a `trainings.Run`."""

    evaluated_at: list[int]
    accuracy: list[float]
    of_another_kind: list[float]
    groups: list[int]
    informative: list[int]
    updated: list[int]
    tokens: list[int]
    forecasts: list[float]

    @property
    def distinct(self) -> int: ...

    @property
    def repeats(self) -> float: ...


Runs = Mapping[str, Mapping[int, Run]]
"""By arm, then by seed."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95% interval; the bounds are NaN for a single seed."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}" if math.isnan(self.low) else f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, slots=True)
class Curves:
    """Of some seeds of one arm, [S, E] each: values at the evaluations, which were made after `steps` [E].

    `spent` holds what was spent until then: groups rolled out, groups updated on, answer tokens.
    """

    steps: FloatArray
    accuracy: FloatArray
    spent: Mapping[str, FloatArray]

    @staticmethod
    def of(runs: Sequence[Run]) -> Curves:
        n = min(len(run.accuracy) for run in runs)
        steps = np.asarray(runs[0].evaluated_at[:n])
        spent = {}
        for name in ("groups", "updated", "tokens"):
            sums = [np.concatenate(([0], np.cumsum(getattr(run, name)))) for run in runs]
            # The last updates of an asynchronous run come after its end.
            spent[name] = np.array([[total[min(step, len(total) - 1)] for step in steps] for total in sums], float)
        return Curves(steps.astype(float), np.array([run.accuracy[:n] for run in runs]), spent)

    def without(self, seed: int) -> Curves:
        """All but one of the seeds, by its place."""
        kept = np.arange(len(self.accuracy)) != seed
        return Curves(self.steps, self.accuracy[kept], {name: values[kept] for name, values in self.spent.items()})

    def reached_at(self, aim: float) -> float | None:
        """The step at which the mean curve first comes up to the aim, on the line between two evaluations."""
        return reached_at(self.steps, self.accuracy.mean(axis=0), aim)

    def spent_at(self, step: float) -> dict[str, float]:
        """Mean over seeds of what was spent until this step."""
        return {name: float(np.interp(step, self.steps, each.mean(axis=0))) for name, each in self.spent.items()}


def reached_at(steps: FloatArray, curve: FloatArray, aim: float) -> float | None:
    """Where the curve first comes up to the aim, on the line between two evaluations; None if it never does."""
    above = np.flatnonzero(curve >= aim)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return float(steps[0])
    part = (aim - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))


def aim_of(curves: Curves, share: float) -> float:
    """The mean accuracy at this share of the gain that the curves end with."""
    mean = curves.accuracy.mean(axis=0)
    return float(mean[0] + share * (mean[-1] - mean[0]))


def meeting(arm: Curves, baseline: Curves, share: float) -> tuple[float, float]:
    """The steps of the arm and of the baseline at which both are equally accurate.

    That is the baseline's accuracy at this share of its gain; where the arm never gets there, the best accuracy of the
    arm, at its end: so a slower arm has a figure, too.
    """
    aim = aim_of(baseline, share)
    at, baseline_at = arm.reached_at(aim), baseline.reached_at(aim)
    if at is None:
        best = min(aim, float(arm.accuracy.mean(axis=0).max()))
        at, baseline_at = float(arm.steps[-1]), baseline.reached_at(best)
    assert baseline_at is not None  # the aim is on its own curve
    return max(at, 1.0), max(baseline_at, 1.0)


def ratio_of(arm: Curves, baseline: Curves, share: float, spent: Callable[[Mapping[str, float]], float]) -> float:
    """What the arm spends until they meet, divided by what the baseline spends."""
    at, baseline_at = meeting(arm, baseline, share)
    return spent(arm.spent_at(at)) / spent(baseline.spent_at(baseline_at))


def interval(figure: Callable[[Curves, Curves], float], arm: Curves, baseline: Curves) -> Interval:
    """A positive figure with its 95% interval, by the jackknife of its logarithm over paired seeds."""
    value, n = figure(arm, baseline), len(arm.accuracy)
    if n < 2:
        return Interval(value, math.nan, math.nan)
    logs = np.log([figure(arm.without(i), baseline.without(i)) for i in range(n)])
    error = math.sqrt((n - 1) / n * float(((logs - logs.mean()) ** 2).sum()))
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return Interval(value, value * math.exp(-reach), value * math.exp(reach))


def paired(differences: FloatArray) -> Interval:
    """Mean of differences by seed, [S], and its 95% interval."""
    n = len(differences)
    mean = float(differences.mean())
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    reach = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - reach, mean + reach)


def figures(runs: Runs, arm: str) -> dict[str, Interval | float | int]:
    """All figures of an arm, over the seeds that the baseline has too; there is at least one."""
    seeds = sorted(set(runs[arm]) & set(runs[BASELINE]))
    mine = [runs[arm][seed] for seed in seeds]
    ours, theirs = Curves.of(mine), Curves.of([runs[BASELINE][seed] for seed in seeds])
    result: dict[str, Interval | float | int] = {"seeds": len(seeds)}
    for name, share in (("half", 0.5), ("end", 1.0)):

        def speed(a: Curves, b: Curves, share: float = share) -> float:
            at, baseline_at = meeting(a, b, share)
            return baseline_at / at

        def rollouts(a: Curves, b: Curves, share: float = share) -> float:
            return ratio_of(a, b, share, lambda spent: spent["groups"])

        result[f"speed, {name}"] = interval(speed, ours, theirs)
        result[f"rollouts, {name}"] = interval(rollouts, ours, theirs)
        result[f"tokens, {name}"] = ratio_of(ours, theirs, share, lambda spent: spent["tokens"])
        for ratio in COST_RATIOS:

            def cost(a: Curves, b: Curves, share: float = share, ratio: float = ratio) -> float:
                return ratio_of(a, b, share, lambda spent: spent["groups"] + ratio * spent["updated"])

            result[f"cost {ratio:g}, {name}"] = interval(cost, ours, theirs)
    if set(seeds) <= set(runs.get(FILLED, {})):
        filled = Curves.of([runs[FILLED][seed] for seed in seeds])
        theirs_end = ratio_of(filled, theirs, 1.0, lambda spent: spent["groups"])
        result["rollouts, of dynamic's"] = ratio_of(ours, theirs, 1.0, lambda spent: spent["groups"]) / theirs_end
    n = min(ours.accuracy.shape[1], theirs.accuracy.shape[1])
    differences = ours.accuracy[:, :n] - theirs.accuracy[:, :n]
    result["accuracy, end"] = float(ours.accuracy[:, -1].mean())
    result["accuracy, difference"] = paired(differences[:, -1])
    result["least difference"] = float(differences[:, ours.steps[:n] > AFTER_STEP].mean(axis=0).min(initial=np.inf))
    result["another kind, difference"] = paired(
        np.array([runs[arm][seed].of_another_kind[-1] - runs[BASELINE][seed].of_another_kind[-1] for seed in seeds])
    )
    result["informative"] = float(np.mean([sum(run.informative) / sum(run.groups) for run in mine]))
    result["forecast error"] = float(np.mean([_forecast_error(run) for run in mine]))
    result["distinct"] = float(np.mean([run.distinct for run in mine]))
    result["repeats"] = float(np.mean([run.repeats for run in mine]))
    return result


def _forecast_error(run: Run) -> float:
    """Mean |forecast - actual| of a batch's informative share."""
    return float(np.mean(np.abs(np.asarray(run.forecasts) - np.asarray(run.informative) / np.asarray(run.groups))))


def table(runs: Runs, arms: Sequence[str]) -> str:
    """One line for each arm, in Markdown."""
    heads = (
        "arm",
        "seeds",
        "fewer steps: half",
        "end",
        "rollouts: half",
        "end",
        "of dynamic's",
        "tokens",
        *(f"cost {ratio:g}" for ratio in COST_RATIOS),
        "accuracy",
        "against uniform",
        "least after step 20",
        "another kind",
        "informative",
        "forecast error",
        "distinct",
        "repeats",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm in arms:
        if not set(runs.get(arm, {})) & set(runs.get(BASELINE, {})):
            continue
        f = figures(runs, arm)
        cells = (
            arm,
            f["seeds"],
            f["speed, half"],
            f["speed, end"],
            f["rollouts, half"],
            f["rollouts, end"],
            _percent(f.get("rollouts, of dynamic's", math.nan)),
            f"{f['tokens, end']:.2f}",
            *(f[f"cost {ratio:g}, end"] for ratio in COST_RATIOS),
            f"{f['accuracy, end']:.3f}",
            _signed(f["accuracy, difference"]),
            f"{f['least difference']:+.3f}",
            _signed(f["another kind, difference"]),
            f"{f['informative']:.2f}",
            f"{f['forecast error']:.2f}",
            f"{f['distinct']:,.0f}",
            f"{f['repeats']:.2f}",
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _percent(value: object) -> str:
    assert isinstance(value, float)
    return "-" if math.isnan(value) else f"{value:.0%}"


def _signed(value: object) -> str:
    assert isinstance(value, Interval)
    return f"{value.value:+.3f}" if math.isnan(value.low) else f"{value.value:+.3f} ± {value.high - value.value:.3f}"


def picture(by_regime: Mapping[str, Runs], titles: Mapping[str, str], arms: Sequence[str], path: Path) -> None:
    """Gain in accuracy against steps and groups rolled out, a column for each regime.

    The band of an arm is the 95% interval of its paired difference to uniform; of two seeds it would hide all others.
    """
    mpl.use("Agg")
    figure, axes = pyplot.subplots(
        2, len(by_regime), figsize=(1.0 + 4.6 * len(by_regime), 8.0), constrained_layout=True, squeeze=False
    )
    for column, (regime, runs) in enumerate(by_regime.items()):
        for number, arm in enumerate(arms):
            seeds = sorted(set(runs.get(arm, {})) & set(runs.get(BASELINE, {})))
            if not seeds:
                continue
            ours, theirs = (Curves.of([runs[name][seed] for seed in seeds]) for name in (arm, BASELINE))
            gain = (ours.accuracy - ours.accuracy[:, :1]).mean(axis=0)
            n = min(len(gain), theirs.accuracy.shape[1])
            bounds = [paired(column_) for column_ in (ours.accuracy[:, :n] - theirs.accuracy[:, :n]).T]
            reach = np.array([0.0 if math.isnan(each.high) else each.high - each.value for each in bounds])
            colour = mpl.colormaps["tab20"]((2 * number + number // 10) % 20)  # strong ones first, then the light
            for axis, x in ((axes[0, column], ours.steps), (axes[1, column], ours.spent["groups"].mean(axis=0))):
                axis.plot(x, gain, color=colour, label=arm, linewidth=2 if arm == BASELINE else 1.2)
                if arm != BASELINE and len(seeds) > FEW_SEEDS:
                    axis.fill_between(x[:n], gain[:n] - reach, gain[:n] + reach, color=colour, alpha=0.12, linewidth=0)
        axes[0, column].set(title=f"{regime}: {titles[regime]}", xlabel="steps", ylabel="gain in held-out accuracy")
        axes[1, column].set(xlabel="groups rolled out", ylabel="gain in held-out accuracy")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    named = {str(line.get_label()): line for axis in axes[0] for line in axis.lines}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def write(by_regime: Mapping[str, Runs], titles: Mapping[str, str], arms: Sequence[str], results: Path | None) -> None:
    """Print the tables; with a name also write NAME.md, NAME.json and NAME.png."""
    parts = [f"## {regime}: {titles[regime]}\n\n{table(runs, arms)}" for regime, runs in by_regime.items()]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if results is None:
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    document = {
        regime: {arm: _plain(figures(runs, arm)) for arm in arms if set(runs.get(arm, {})) & set(runs[BASELINE])}
        for regime, runs in by_regime.items()
    }
    results.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    picture(by_regime, titles, arms, results.with_suffix(".png"))


def _plain(values: Mapping[str, Interval | float | int]) -> dict[str, object]:
    return {
        name: [value.value, value.low, value.high] if isinstance(value, Interval) else value
        for name, value in values.items()
    }
