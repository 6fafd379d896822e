"""The answer to what choosing would have saved: in words, as JSON and as a picture. Computes nothing but sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise

import numpy as np

from evenodds_service.commands.replay.logged import FEW_VISITS, LoggedRun
from evenodds_service.commands.replay.saving import ChosenSteps, Saving, gain_over, random_share_T, saving_of
from evenodds_service.commands.replay.scoring import FloatArray
from evenodds_service.commands.replay.sources import ReadSource
from evenodds_service.domain.prompts import RATE_ATTEMPTS

LEARNING = "gps with learn_from"
"""Name of the replay that learned from the sources."""
_PARTS = 20
"""Points of a curve."""
_WIDTH, _HEIGHT, _LEFT, _TOP = 640, 280, 56, 28
_COLOURS = ("#8a8f98", "#2f6fde", "#d9822b", "#3d9970", "#b04ac9")


@dataclass(frozen=True)
class Replayed:
    """What was replayed.

    Attributes:
        runs: By predictor, what was chosen with each seed; nothing where the log cannot tell.
        sources: What was named to learn from.
        used: Those of them that were learned from.
        cannot_tell: Why nothing, or less, can be told of learning from them.
    """

    runs: Mapping[str, Sequence[ChosenSteps]]
    sources: Sequence[ReadSource] = ()
    used: Sequence[ReadSource] = ()
    cannot_tell: Sequence[str] = ()

    @cached_property
    def gain(self) -> tuple[float, tuple[float, float]] | None:
        """What learning from them saves against gps without, with its interval; None where it was not replayed."""
        return gain_over(self.runs[LEARNING], self.runs["gps"]) if LEARNING in self.runs else None


def facts(logged: LoggedRun) -> list[str]:
    """What the log says by itself, in lines."""
    if not logged.steps:
        return [f"{logged.name} ({logged.format}): it has no step that can be replayed."]
    n_prompts = len({i for step in logged.steps for i in step.prompts})
    return [
        f"{logged.name} ({logged.format}): {logged.n_attempts:,} rollouts in {logged.n_groups:,} groups of "
        f"{n_prompts:,} prompts, {len(logged.steps):,} steps ({logged.steps[0].step} to {logged.steps[-1].step}), "
        f"{logged.visits:.1f} groups a prompt."
    ]


def silent(logged: LoggedRun) -> str:
    return (
        f"{logged.silent_share:.1%} of the {logged.n_attempts:,} rollouts were in silent groups, whose rewards are all "
        "equal."
    )


def no_figure(reasons: Sequence[str]) -> list[str]:
    """Why there is none, in lines."""
    return ["What choosing would have saved, this log cannot tell:", *(f"- {reason}." for reason in reasons)]


def _savings(logged: LoggedRun, replayed: Replayed) -> dict[str, Saving]:
    return {name: saving_of(seeds, random_share_T(logged)) for name, seeds in replayed.runs.items()}


def text(logged: LoggedRun, replayed: Replayed, *, share: float) -> list[str]:
    """The answer, in lines: what was, what choosing would have made of it, and what that assumes."""
    runs, savings = replayed.runs, _savings(logged, replayed)
    at_random = float(np.average(random_share_T(logged), weights=[len(step.prompts) for step in logged.steps]))
    n_seeds = len(next(iter(runs.values())))
    rows = [["", "informative groups", "", "rollouts saved", "", "prompts tried"]]
    rows.append(["at random", f"{at_random:.1%}", "", "", "", ""])
    for name, saving in savings.items():
        coverage = float(np.mean([run.coverage for run in runs[name]]))
        rows.append(
            [
                name,
                f"{saving.informative:.1%}",
                _between(saving.informative_interval),
                f"{saving.saved:.1%}",
                _between(saving.saved_interval),
                f"{coverage:.0%}",
            ]
        )
    return [
        silent(logged),
        "",
        f"If {share:.0%} of each step's groups had been chosen in advance, and the others had not been rolled out:",
        *_aligned(rows),
        "",
        *(_sentence(logged, name, saving) for name, saving in savings.items()),
        *_learning(logged, replayed),
        "",
        "This assumes and leaves open:",
        *(f"- {line}" for line in (*_assumptions(logged, runs, share, n_seeds), *_of_sources(replayed))),
    ]


def document(logged: LoggedRun, replayed: Replayed, *, share: float) -> dict[str, object]:
    """Everything as JSON; no predictors where the log cannot tell."""
    runs, savings, gain = replayed.runs, _savings(logged, replayed), replayed.gain
    return {
        "log": {
            "name": logged.name,
            "format": logged.format,
            "steps": len(logged.steps),
            "groups": logged.n_groups,
            "rollouts": logged.n_attempts,
            "silent_share": logged.silent_share if logged.steps else None,
            "visits": logged.visits if logged.steps else None,
            "left_out": {reason: n for reason, (n, _) in logged.tally.left_out.items()},
            "notes": logged.tally.notes,
        },
        "cannot_tell": logged.cannot_tell(),
        "share": share,
        "predictors": [
            {
                "predictor": name,
                "informative": saving.informative,
                "informative_interval": saving.informative_interval,
                "saved": saving.saved,
                "saved_interval": saving.saved_interval,
                "coverage": [run.coverage for run in runs[name]],
            }
            for name, saving in savings.items()
        ],
        "learn_from": {
            "sources": [
                {
                    "name": source.name,
                    "prompts": len(source.prompts),
                    "in_common": source.n_in_common(logged),
                    "cannot_tell": source.cannot_tell(logged),
                }
                for source in replayed.sources
            ],
            "cannot_tell": list(replayed.cannot_tell),
            "saved_against_gps": None if gain is None else gain[0],
            "saved_against_gps_interval": None if gain is None else gain[1],
        },
    }


def picture(logged: LoggedRun, runs: Mapping[str, Sequence[ChosenSteps]], *, share: float) -> str:
    """An SVG: the share of informative groups over the steps, at random and by each predictor. Loads nothing."""
    curves = {"at random": random_share_T(logged)}
    for name, seeds in runs.items():
        informative_T = np.sum([run.informative_T for run in seeds], axis=0)
        curves[name] = informative_T / np.sum([run.chosen_T for run in seeds], axis=0)
    steps = [step.step for step in logged.steps]
    title = f"Informative groups of {logged.name}, {share:.0%} of each step's groups chosen"
    ends = ", ".join(f"{name} {curve.mean():.0%} on average" for name, curve in curves.items())
    x0, x1, y0, y1 = _LEFT, _WIDTH - 110, _HEIGHT - 34, _TOP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><desc>{escape(ends)}</desc>",
        "<style>text{font:12px sans-serif;fill:#333}.grid{stroke:#ccc}"
        "@media (prefers-color-scheme: dark){svg{background:#111}text{fill:#ddd}.grid{stroke:#444}}</style>",
        f'<text x="{x0}" y="16">{escape(title)}</text>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = y0 + (y1 - y0) * tick
        parts.append(f'<line class="grid" x1="{x0}" x2="{x1}" y1="{y:.0f}" y2="{y:.0f}"/>')
        parts.append(f'<text x="{x0 - 8}" y="{y + 4:.0f}" text-anchor="end">{tick:.0%}</text>')
    parts.append(f'<text x="{x0}" y="{_HEIGHT - 12}">step {steps[0]}</text>')
    parts.append(f'<text x="{x1}" y="{_HEIGHT - 12}" text-anchor="end">step {steps[-1]}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        values = _smoothed(curve)
        points = " ".join(
            f"{x0 + (x1 - x0) * i / max(len(values) - 1, 1):.1f},{y0 + (y1 - y0) * value:.1f}"
            for i, value in enumerate(values)
        )
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        y = y1 + 16 * (number + 1)
        parts.append(f'<text x="{x1 + 10}" y="{y}" style="fill:{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _sentence(logged: LoggedRun, name: str, saving: Saving) -> str:
    low, high = saving.saved_interval
    if low <= 0.0:
        return (
            f"{name}: no saving can be told from none (between {low:.0%} and {high:.0%} of the rollouts for the same "
            "number of informative groups)."
        )
    return (
        f"{name}: the same number of informative groups for {saving.saved:.0%} fewer rollouts (between {low:.0%} and "
        f"{high:.0%}); of {logged.n_attempts:,}, some {round(saving.saved * logged.n_attempts / 100) * 100:,} fewer."
    )


def _learning(logged: LoggedRun, replayed: Replayed) -> list[str]:
    """What learning from others adds, and what cannot be told of it."""
    lines = [f"With learn_from, this log cannot tell: {reason}." for reason in replayed.cannot_tell]
    if replayed.gain is None:
        return lines
    saved, (low, high) = replayed.gain
    shares = ", ".join(
        f"{source.name} ({source.n_in_common(logged) / max(len(logged.prompts), 1):.0%} of the prompts in common)"
        for source in replayed.used
    )
    if low <= 0.0 <= high:
        told = f"no difference to gps without it can be told (between {low:.0%} and {high:.0%} of the rollouts saved)"
    elif high < 0.0:
        told = f"{-saved:.0%} more rollouts than gps without it (between {-high:.0%} and {-low:.0%})"
    else:
        told = f"{saved:.0%} fewer rollouts than gps without it (between {low:.0%} and {high:.0%})"
    return [*lines, f"With learn_from {shares}: {told}, for the same number of informative groups."]


def _of_sources(replayed: Replayed) -> list[str]:
    """What a replay that learns from others assumes."""
    if replayed.gain is None:
        return []
    lines = [
        "With learn_from: all that the others showed was known before the first step, and nothing that this training "
        "did has changed it.",
        "Prompts are the same where letters and digits of their texts are; by their ids where one of the logs has no "
        "texts.",
    ]
    guessed = [source.name for source in replayed.used if source.has_guessed_attempts]
    if guessed:
        lines.append(
            f"Rates of {', '.join(guessed)} came without a number of attempts: each counts as one of "
            f"{RATE_ATTEMPTS:g} attempts."
        )
    return lines


def _assumptions(logged: LoggedRun, runs: Mapping[str, Sequence[ChosenSteps]], share: float, n_seeds: int) -> list[str]:
    lines = [
        "Outcomes are the log's own at each step: the policy is taken as it was. One that had trained on other groups "
        "would have moved otherwise; whether it would have learned faster, a log cannot tell.",
        f"A step's own groups are all that can be chosen from, {1 / share:.2g} for each one chosen. A trainer chooses "
        "from its whole pool; what that would bring, this log cannot tell either.",
        "Only what was chosen is learned from; the other outcomes stay unseen.",
        "A silent group teaches nothing. Methods that learn from groups of equal rewards lose less by them.",
        "Rollouts are counted, not seconds: a step waits for its longest answer.",
        f"Between: 95% of {n_seeds} {'seeds' if n_seeds > 1 else 'seed'} and of blocks of steps, resampled.",
    ]
    if logged.visits < FEW_VISITS:
        lines.append(
            f"Prompts were tried {logged.visits:.1f} times: what was foreseen comes from texts almost alone, and later "
            "epochs are not shown."
        )
    if not all(run.is_refitted for run in runs.get("gps", ())):
        lines.append("No worker was running: gps had no fitted priors, only what it learns as it goes.")
    return lines


def _between(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.1%}, {interval[1]:.1%}]"


def _smoothed(curve: FloatArray) -> list[float]:
    """Means over at most `_PARTS` equal parts."""
    cuts = np.linspace(0, len(curve), min(_PARTS, len(curve)) + 1).round().astype(int)
    return [float(curve[first:last].mean()) for first, last in pairwise(cuts)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
