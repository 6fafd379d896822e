"""The results of a replay as plain text and as JSON. Computes nothing but means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenodds_service.commands.replay.driving import Plan, Stopwatch
from evenodds_service.commands.replay.recordings import Recording
from evenodds_service.commands.replay.scoring import THIRDS, Spread


@dataclass(frozen=True, slots=True)
class Result:
    """Of one predictor: the figures by name for each seed, and the wall time of its calls."""

    predictor: str
    figures: list[dict[str, float]]
    watch: Stopwatch

    def spread(self, figure: str) -> Spread:
        return Spread.of([figures[figure] for figures in self.figures])


@dataclass(frozen=True, slots=True)
class _Column:
    group: str
    title: str
    figure: str
    digits: int = 3


def _thirds(group: str) -> list[_Column]:
    return [_Column(group, third, f"{group} {third}") for third in THIRDS]


_RANK = [*_thirds("rank correlation"), *_thirds("never-seen prompts"), *_thirds("absolute error")]
_SELECT = [
    *_thirds("informative share"),
    *_thirds("forecast |error|"),
    _Column("forecast", "|error|", "forecast |error|"),
    _Column("forecast", "bias", "forecast bias"),
    _Column("forecast", "chance", "forecast chance"),
]
_USE = [
    _Column("pool", "coverage", "use coverage"),
    _Column("visits", "per used prompt", "use visits", 2),
    _Column("rollouts", "per informative group", "use rollouts", 2),
]
_CALLS = ("observe", "predict", "select_batch", "load pool")


def text(plan: Plan, results: Sequence[Result]) -> str:
    """All tables: a row for each predictor, mean ± sample standard deviation over seeds."""
    n_seeds = len(results[0].figures)
    visits = results[0].spread("rank visits").mean
    over = f"mean ± standard deviation over {n_seeds} seeds" if n_seeds > 1 else "one seed"
    sections = [
        describe(plan.recording),
        f"Figures: {over}; by thirds of the steps. {plan.group_size} attempts a visit.",
        "",
        f"Rank: {plan.rank_steps} steps predicted one ahead, {plan.observe_per_step} random prompts observed before "
        f"each, {visits:.1f} visits a prompt at the end.",
        "Spearman with the observed rates of the predicted step (0 for a constant prediction), and mean absolute "
        "error, whose floor is the noise of those rates.",
        *_table(results, _RANK),
        "",
        f"Select: {plan.select_steps} steps, {plan.batch_size} of "
        + (f"{plan.candidates} random candidates" if plan.candidates else "the whole pool")
        + ("" if plan.repeats else ", no prompt twice")
        + ".",
        "Error of the forecast of each batch's own informative share; chance: the mean |error| of a true forecast.",
        *_table(results, _SELECT),
        "",
        *_table(results, _USE),
        "",
        "Latency in milliseconds as the client sees it, median / 95th percentile.",
        *_latency(results),
    ]
    return "\n".join(sections)


def describe(recording: Recording) -> str:
    """What is replayed, in a line or two."""
    stages, n = recording.stages, recording.n_prompts
    kinds = {
        "run": f"a recorded training run, {len(stages)} visits of each prompt",
        "models": f"a table of models as a stand-in run through {len(stages)} stages, {stages[0]} to {stages[-1]}",
        "static": "a static table: the policy does not move",
    }
    without = f" ({recording.left_out:,} without outcomes in every stage left out)" if recording.left_out else ""
    return f"{recording.name}: {n:,} prompts{without}, {kinds[recording.kind]}."


def document(plan: Plan, results: Sequence[Result]) -> dict[str, object]:
    """Everything as JSON: figures by seed, null where unknown, and milliseconds by call."""
    return {
        "recording": {
            "name": plan.recording.name,
            "kind": plan.recording.kind,
            "n_prompts": plan.recording.n_prompts,
            "stages": list(plan.recording.stages),
        },
        "plan": {
            "n_steps": plan.n_steps,
            "observe_per_step": plan.observe_per_step,
            "batch_size": plan.batch_size,
            "candidates": plan.candidates,
            "group_size": plan.group_size,
            "repeats": plan.repeats,
        },
        "predictors": [
            {
                "predictor": result.predictor,
                "seeds": [
                    {name: None if math.isnan(value) else value for name, value in figures.items()}
                    for figures in result.figures
                ],
                "milliseconds": {
                    call: {"calls": len(times), "median": float(np.median(times)), "p95": _p95(times)}
                    for call, times in result.watch.milliseconds.items()
                    if times
                },
            }
            for result in results
        ],
    }


def _table(results: Sequence[Result], columns: Sequence[_Column]) -> list[str]:
    groups = [
        column.group if i == 0 or columns[i - 1].group != column.group else "" for i, column in enumerate(columns)
    ]
    rows = [
        ["", *groups],
        ["", *(column.title for column in columns)],
        *([r.predictor, *(_cell(r.spread(c.figure), c.digits) for c in columns)] for r in results),
    ]
    return _aligned(rows, n_headers=2)


def _latency(results: Sequence[Result]) -> list[str]:
    rows = [["", *_CALLS]]
    for result in results:
        times = [result.watch.milliseconds[call] for call in _CALLS]
        rows.append([result.predictor, *(f"{np.median(t):.1f} / {_p95(t):.1f}" if t else "-" for t in times)])
    return _aligned(rows, n_headers=1)


def _cell(spread: Spread, digits: int) -> str:
    if math.isnan(spread.mean):
        return "-"
    if math.isnan(spread.deviation):
        return f"{spread.mean:.{digits}f}"
    return f"{spread.mean:.{digits}f} ± {spread.deviation:.{digits}f}"


def _p95(times: Sequence[float]) -> float:
    return float(np.percentile(times, 95))


def _aligned(rows: Sequence[Sequence[str]], *, n_headers: int) -> list[str]:
    """Columns as wide as their widest figure; a group's title may reach over the empty ones after it."""
    widths = [max(len(row[i]) for row in rows[n_headers - 1 :]) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        line = ""
        position = 0
        for cell, width in zip(row, widths, strict=True):
            line = line.ljust(position) + cell
            position += width + 2
        lines.append(line.rstrip())
    return lines
