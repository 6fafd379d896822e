"""How good the forecasts of a run were while it went on. By windows of steps: one batch has too few groups to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from examples.smollm2.train import Record

WINDOW = 10
"""Steps."""


def forecasts(runs: Mapping[str, Mapping[int, Record]], arms: Sequence[str]) -> str:
    """One line for each arm, in Markdown: informative share, its forecast and the mean reward, by windows.

    All are means over groups, of all seeds. The error is the mean over windows of |forecast - share|.
    """
    n_steps = min((len(run.groups) for of in runs.values() for run in of.values()), default=0)
    starts = range(0, n_steps, WINDOW)
    heads = ("arm", "seeds", *(f"{start + 1} to {min(start + WINDOW, n_steps)}" for start in starts), "error")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm in arms:
        of = list(runs.get(arm, {}).values())
        if not of:
            continue
        windows = [_window(of, slice(start, min(start + WINDOW, n_steps))) for start in starts]
        error = sum(abs(share - forecast) for share, forecast, _ in windows) / max(1, len(windows))
        cells = [arm, str(len(of)), *(f"{a:.2f} / {b:.2f} / {c:.2f}" for a, b, c in windows), f"{error:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _window(runs: Sequence[Record], steps: slice) -> tuple[float, float, float]:
    groups = [n for run in runs for n in run.groups[steps]]
    n_informative = sum(n for run in runs for n in run.informative[steps])
    forecast = sum(n * share for run in runs for n, share in zip(run.groups[steps], run.forecasts[steps], strict=True))
    reward = sum(n * mean for run in runs for n, mean in zip(run.groups[steps], run.rewards[steps], strict=True))
    return n_informative / sum(groups), forecast / sum(groups), reward / sum(groups)
