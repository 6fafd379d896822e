"""From records of runs to figures: the table in text, and the picture of accuracy against steps and rollouts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from examples.grpo_from_scratch.train import Record

matplotlib.use("Agg")

from matplotlib import pyplot as plt

SMOOTHED = 3
"""Evaluations in a running mean: a single one may cross the aim by chance."""

_HEADS: tuple[str, ...] = (
    "method",
    "steps to aim",
    "fewer steps",
    "rollouts to aim",
    "of dynamic's",
    "accuracy at the end",
    "sort",
    "translate",
    "informative",
    "forecast error",
    "distinct",
    "select + observe",
    "own step",
)

Records = Mapping[str, Mapping[int, Record]]
"""By method, then by seed."""


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean of each value and the two before it, of fewer at the start."""
    return [statistics.fmean(values[max(0, i + 1 - SMOOTHED) : i + 1]) for i in range(len(values))]


def reached_at(record: Record, aim: float, *, axis: Sequence[int]) -> float | None:
    """Where on the axis (`evaluated_at` or `rollouts_at`) the smoothed accuracy first comes up to the aim.

    Between two evaluations, on the line that joins them. None if it never does.
    """
    curve = smoothed(record.accuracies["all"])
    for i, accuracy in enumerate(curve):
        if accuracy >= aim:
            if i == 0:
                return float(axis[0])
            part = (aim - curve[i - 1]) / (accuracy - curve[i - 1])
            return axis[i - 1] + part * (axis[i] - axis[i - 1])
    return None


def table(records: Records, *, baseline: str = "uniform") -> str:
    """Mean ± standard deviation over seeds, one line per method.

    The aim of a seed is the smoothed accuracy at the end of the baseline's run of that seed. A run that ends before it
    gets there counts with its length, and its mean is marked with `>`; the number in brackets is how many got there.
    """
    rows = [_HEADS]
    for method, by_seed in records.items():
        seeds = [seed for seed in by_seed if seed in records.get(baseline, {})]
        if not seeds:
            continue
        steps, steps_censored = _reached(records, method, seeds, baseline=baseline, axis="evaluated_at")
        own, _ = _reached(records, baseline, seeds, baseline=baseline, axis="evaluated_at")
        rollouts, _ = _reached(records, method, seeds, baseline=baseline, axis="rollouts_at")
        more, less = (">", "<") if steps_censored else ("", "")
        dynamic = records.get("dynamic", {})
        share = "-"
        if all(seed in dynamic for seed in seeds):
            theirs, theirs_censored = _reached(records, "dynamic", seeds, baseline=baseline, axis="rollouts_at")
            mark = "?" if steps_censored and theirs_censored else more or ("<" if theirs_censored else "")
            share = mark + _spread([a / b for a, b in zip(rollouts, theirs, strict=True)], ".0%")
        runs = [by_seed[seed] for seed in seeds]
        rows.append(
            (
                method,
                f"{more}{_spread(steps, '.0f')} ({len(seeds) - steps_censored}/{len(seeds)})",
                less + _spread([a / b for a, b in zip(own, steps, strict=True)], ".2f") + " x",
                more + _spread(rollouts, ",.0f"),
                share,
                *(_spread([smoothed(run.accuracies[g])[-1] for run in runs], ".3f") for g in run_groups(runs[0])),
                _spread([statistics.fmean(run.informative) for run in runs], ".2f"),
                _spread([_forecast_error(run) for run in runs], ".2f"),
                _spread([run.distinct for run in runs], ",.0f"),
                _spread([1e3 * statistics.median(run.service_seconds) for run in runs], ".0f") + " ms",
                _spread([1e3 * statistics.median(run.own_seconds) for run in runs], ".0f") + " ms",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def run_groups(record: Record) -> list[str]:
    """`all` first, then the families."""
    return list(record.accuracies)


def picture(records: Records, path: Path, *, title: str) -> None:
    """Held-out accuracy against steps and rollouts, and informative share; means over seeds, seeds as thin lines."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), constrained_layout=True)
    for number, (method, by_seed) in enumerate(records.items()):
        colour = f"C{number}"
        runs = list(by_seed.values())
        for run in runs:
            curve = smoothed(run.accuracies["all"])
            axes[0].plot(run.evaluated_at, curve, color=colour, alpha=0.2, linewidth=0.7)
            axes[1].plot(run.rollouts_at, curve, color=colour, alpha=0.2, linewidth=0.7)
        n = min(len(run.evaluated_at) for run in runs)
        mean = np.mean([smoothed(run.accuracies["all"])[:n] for run in runs], axis=0)
        axes[0].plot(runs[0].evaluated_at[:n], mean, color=colour, label=f"{method} ({len(runs)} seeds)")
        axes[1].plot(np.mean([run.rollouts_at[:n] for run in runs], axis=0), mean, color=colour)
        n_steps = min(len(run.informative) for run in runs)
        share = np.mean([run.informative[:n_steps] for run in runs], axis=0)
        window = min(10, n_steps)
        if window:
            axes[2].plot(np.convolve(share, np.ones(window) / window, "valid"), color=colour)
    for axis, x, y in (
        (axes[0], "steps", "held-out accuracy"),
        (axes[1], "rollouts", "held-out accuracy"),
        (axes[2], "steps", "share of informative groups"),
    ):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _reached(
    records: Records, method: str, seeds: Sequence[int], *, baseline: str, axis: str
) -> tuple[list[float], int]:
    """Where each seed reached its aim, or how far it went; and how many did not reach it."""
    values, censored = [], 0
    for seed in seeds:
        record = records[method][seed]
        aim = smoothed(records[baseline][seed].accuracies["all"])[-1]
        places: list[int] = getattr(record, axis)
        at = reached_at(record, aim, axis=places)
        censored += at is None
        values.append(max(1.0, float(places[-1]) if at is None else at))
    return values, censored


def _forecast_error(run: Record) -> float:
    """Mean |forecast - actual| of a batch's informative share."""
    return statistics.fmean(abs(a - b) for a, b in zip(run.forecasts, run.informative, strict=True))


def _spread(values: Sequence[float], form: str) -> str:
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"
