"""The tables and plots of `quality`: Markdown, JSON and PNG. Computes nothing but means over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from benchmarks.loops import Figures, Reliability
from matplotlib import pyplot
from matplotlib.axes import Axes

from evenodds_service.commands.replay.scoring import Spread
from evenodds_service.domain.arrays import FloatArray

RESULTS = Path(__file__).parent / "results"
_SMOOTHED_STEPS = 5

_OPEN = ("spearman", "never seen", "held out", "MAE", "log loss", "informative log loss")
_CLOSED = ("informative", "groups per informative", "forecast error")
_OPEN_WHOLE = ("batch r", "calibration error")
_CLOSED_WHOLE = ("forecast chance", "coverage", "visits", "gain")


@dataclass(frozen=True, slots=True)
class Row:
    """One method: figures by seed, and what its plot needs."""

    name: str
    figures: list[Figures]
    reliability: list[Reliability] = field(default_factory=list)
    curves: list[FloatArray] = field(default_factory=list)

    def spread(self, figure: str) -> Spread:
        return Spread.of([figures[figure] for figures in self.figures])


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    loop: Literal["open", "closed"]
    stages: Sequence[str]
    rows: Sequence[Row]


def write(part: str, tables: Sequence[Table], *, seeds: int) -> None:
    """Write `results/PART.md`, `.json` and `.png`, and print the Markdown."""
    RESULTS.mkdir(exist_ok=True)
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    text = "\n\n".join([f"# {part}: {over}", *(markdown(table) for table in tables)]) + "\n"
    (RESULTS / f"{part}.md").write_text(text, encoding="utf-8")
    document = [_document(table) for table in tables]
    (RESULTS / f"{part}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _plot(RESULTS / f"{part}.png", tables)
    print(text)


def markdown(table: Table) -> str:
    """The figures of a table, and for the open loop its reliability."""
    by_stage, whole = (_OPEN, _OPEN_WHOLE) if table.loop == "open" else (_CLOSED, _CLOSED_WHOLE)
    stages = [*table.stages, *(["whole"] if table.loop == "closed" else [])]
    parts = [f"## {table.title}"]
    blocks = [[(stage, f"{name} {stage}") for stage in stages] for name in by_stage]
    for name, columns in zip(by_stage, blocks, strict=True):
        if not any(_is_known(table, figure) for _, figure in columns):
            continue
        parts.append(_markdown_table(f"**{name}**", columns, table.rows))
    known = [(name, name) for name in whole if _is_known(table, name)]
    parts.append(_markdown_table("**whole run**", known, table.rows))
    if table.loop == "open":
        parts.append(_reliability(table.rows))
    return "\n\n".join(parts)


def _is_known(table: Table, figure: str) -> bool:
    """Whether any method has this figure."""
    return not all(math.isnan(row.spread(figure).mean) for row in table.rows)


def _markdown_table(corner: str, columns: Sequence[tuple[str, str]], rows: Sequence[Row]) -> str:
    lines = [f"| {corner} | " + " | ".join(title for title, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row.name} | " + " | ".join(_cell(row.spread(f)) for _, f in columns) + " |" for row in rows]
    return "\n".join(lines)


def _reliability(rows: Sequence[Row]) -> str:
    """Bins of the predicted success rate: mean prediction, mean outcome and count over all seeds."""
    bins = [f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(len(rows[0].reliability[0].counts))]
    lines = ["| **predicted > observed (count)** | " + " | ".join(bins) + " |", "|---" * (len(bins) + 1) + "|"]
    for row in rows:
        cells = [
            f"{predicted:.2f} > {observed:.2f} ({count:,})" if count else "-"
            for count, predicted, observed in _pooled(row).rows()
        ]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(spread: Spread) -> str:
    if math.isnan(spread.mean):
        return "-"
    return f"{spread.mean:.3f}" + ("" if math.isnan(spread.deviation) else f" ± {spread.deviation:.3f}")


def _pooled(row: Row) -> Reliability:
    total = Reliability.new()
    for one in row.reliability:
        total.counts += one.counts
        total.predicted += one.predicted
        total.observed += one.observed
    return total


def _document(table: Table) -> dict[str, object]:
    return {
        "title": table.title,
        "methods": [
            {
                "method": row.name,
                "seeds": [{k: None if math.isnan(v) else round(v, 5) for k, v in f.items()} for f in row.figures],
                "reliability": [
                    {"count": count, "predicted": round(p, 4), "observed": round(o, 4)}
                    for count, p, o in (_pooled(row).rows() if row.reliability else [])
                    if count
                ],
            }
            for row in table.rows
        ],
    }


def _plot(path: Path, tables: Sequence[Table]) -> None:
    """Two panels a table: rank correlation and reliability, or informative share by step and against coverage."""
    mpl.use("Agg")
    figure, axes = pyplot.subplots(len(tables), 2, figsize=(13, 4.2 * len(tables)), squeeze=False)
    palette = pyplot.get_cmap("tab20")
    names = dict.fromkeys(row.name for table in tables for row in table.rows)
    colours = {name: palette(i % 20) for i, name in enumerate(names)}
    for table, (left, right) in zip(tables, axes, strict=True):
        for row in table.rows:
            draw = _draw_open if table.loop == "open" else _draw_closed
            draw(left, right, row, table.stages, colours[row.name])
        left.set_title(table.title, fontsize=9, loc="left")
        if table.loop == "open":
            left.set_ylabel("Spearman over the pool")
            right.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
            right.set(xlabel="predicted success rate", ylabel="observed")
        else:
            left.set(xlabel="step", ylabel="informative share")
            right.set(xlabel="coverage of the pool", ylabel="groups per informative group")
        right.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw_open(left: Axes, right: Axes, row: Row, stages: Sequence[str], colour: object) -> None:
    spreads = [row.spread(f"spearman {stage}") for stage in stages]
    errors = [0.0 if math.isnan(s.deviation) else s.deviation for s in spreads]
    left.errorbar(list(stages), [s.mean for s in spreads], errors, color=colour, marker="o", capsize=2)
    known = [(p, o) for count, p, o in _pooled(row).rows() if count]
    right.plot([p for p, _ in known], [o for _, o in known], color=colour, marker=".", label=row.name)


def _draw_closed(left: Axes, right: Axes, row: Row, stages: Sequence[str], colour: object) -> None:
    curve = np.mean(row.curves, axis=0)
    window = np.ones(_SMOOTHED_STEPS)
    smooth = np.convolve(curve, window, mode="same") / np.convolve(np.ones(len(curve)), window, mode="same")
    left.plot(smooth, color=colour)
    coverage, groups = row.spread("coverage").mean, row.spread("groups per informative whole").mean
    right.plot([coverage], [groups], color=colour, marker="o", linestyle="", label=row.name)
