"""What allocation saves at inference: coverage for a budget of attempts.

    python -m benchmarks.test_time FOLDER [--seeds 3] [--quick]       (or EVENODDS_DATA=FOLDER)

FOLDER holds `deepscaler_qwen25math7b_k128` (128 samples a prompt) and `math_qwen_multisample` (50). Coverage is the
share of held-out prompts with at least one success. It is exact, not simulated: the expectation over attempts drawn
without replacement from the recorded samples. Beliefs about a prompt rest on its text and on a history of 8,192 other
prompts with 8 attempts each, folded and refitted as the service does; no text stands on both sides. "same": the
history comes from the same data set. "shifted": from the other one. "adapted": shifted, and 2,048 prompts of the
right one were reported since, which is when the worker refits. Methods, by what they know while they spend:

- no verdict until the end (one shot): uniform; the paper's bins; greedy by marginal gain; oracle (recorded rates)
- one verdict: a probe of one attempt each, then greedy on what has failed
- a verdict after each attempt (sequential): stop at the first success, the next attempt goes where it succeeds
  likeliest; "flat" tells no prompt from another, so that they take turns; oracle: recorded rates

Every prompt gets at least one attempt, the oracles' too. Nothing of allocation was chosen on these data.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from benchmarks.worlds import LARGE, MATH, World, open_world
from matplotlib import pyplot
from scipy import sparse

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.budgets.allocation import (
    attempts_at_price,
    bin_gains,
    expected,
    gains,
    spend,
    uniform_attempts,
)
from evenodds_service.domain.budgets.pricing import Traffic
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.predictors import Gps
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SnapshotEntry
from evenodds_service.domain.prompts import RawBlock, text_key
from evenodds_service.domain.ranks import spearman
from evenodds_service.domain.settings import BudgetMode, BudgetPolicy
from evenodds_service.model.embedder import BUILTIN_NAME
from evenodds_service.model.history import History
from evenodds_service.model.refit import TrainingData, fit_shared_model
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.model.surface import SURFACE_NAMES

RESULTS = Path(__file__).parent / "results"
POLICY = "Qwen2.5-Math-7B@T1k50"
LABELS = 8_192
LABEL_ATTEMPTS = 8
BATCH = 256
REFITS = (2_048, LABELS)  # the first one early, so that fitted priors are weighed on outcomes that come after it
_AT_ONCE = 2_000
BUDGETS = (2.0, 4.0, 8.0, 16.0)
GRID = tuple(
    float(x) for x in (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32)
)
ADAPTED_BY = 2_048
_WARM_UP, _SERVED_TOGETHER = 1_024, 16

Beliefs = tuple[FloatArray, FloatArray]
Curve = Callable[[float], float]
Judged = Callable[[IntArray, np.random.Generator], FloatArray]


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Held-out prompts.

    Attributes:
        silent_T_J: P(the first j attempts all fail), j = 0 .. samples, drawn without replacement.
    """

    silent_T_J: FloatArray
    rates_T: FloatArray

    @staticmethod
    def of(successes: IntArray, samples: IntArray) -> HeldOut:
        n = int(samples.min())
        silent = np.ones((len(successes), n + 1))
        for j in range(n):
            silent[:, j + 1] = silent[:, j] * np.maximum(samples - successes - j, 0) / (samples - j)
        return HeldOut(silent, successes / samples)

    @property
    def n_prompts(self) -> int:
        return len(self.rates_T)

    @property
    def most(self) -> int:
        return int(self.silent_T_J.shape[1]) - 1

    @property
    def true_gains(self) -> FloatArray:
        return np.asarray(-np.diff(self.silent_T_J, axis=1))


def asked_for(description: str) -> tuple[dict[str, World], int]:
    """The two data sets and how many seeds, as the command line says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed")
    arguments = parser.parse_args()
    if arguments.folder is None:
        parser.error("name the folder of the data sets, or set EVENODDS_DATA")
    folder, seeds = Path(arguments.folder), 1 if arguments.quick else arguments.seeds
    return {LARGE: open_world(folder / LARGE), MATH: open_world(folder / MATH, models=POLICY)}, seeds


def main() -> None:
    worlds, seeds = asked_for("Coverage for a budget of attempts at inference.")
    results: dict[str, list[dict[str, Curve]]] = {}
    correlations: dict[str, list[dict[str, float]]] = {}
    served: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for name, other in ((LARGE, MATH), (MATH, LARGE)):
        for seed in range(seeds):
            curves, rank, priced = measure(worlds[name], worlds[other], seed)
            results.setdefault(name, []).append(curves)
            correlations.setdefault(name, []).append(rank)
            served.setdefault(name, []).append(priced)
            print(f"{name}, seed {seed}: {rank}", flush=True)
    write(results, correlations, served, seeds)


def measure(
    world: World, other: World, seed: int
) -> tuple[dict[str, Curve], dict[str, float], dict[str, tuple[float, float]]]:
    """Coverage by budget of each method, rank correlation of the predicted rates, and spending at fitted prices."""
    generator = np.random.default_rng([seed, 6])
    order = generator.permutation(world.n_prompts)
    labelled, held_out = order[:LABELS], order[LABELS:]
    elsewhere = np.random.default_rng([seed, 7]).permutation(other.n_prompts)[:LABELS]
    taken = {text_key(world.texts[i]) for i in labelled} | {text_key(other.texts[i]) for i in elsewhere}
    held_out = np.array([i for i in held_out if text_key(world.texts[i]) not in taken])
    recording = world.recording
    test = HeldOut.of(recording.successes_V_N[0][held_out], recording.attempts_V_N[0][held_out])
    runs = {"same": Served(), "shifted": Served()}
    runs["same"].report(world, labelled, refits=REFITS, seed=seed)
    runs["shifted"].report(other, elsewhere, refits=REFITS, seed=seed)
    same, shifted = (run.beliefs(world, held_out) for run in runs.values())
    runs["shifted"].report(world, labelled[:ADAPTED_BY], refits=(ADAPTED_BY,), seed=seed)
    adapted = runs["shifted"].beliefs(world, held_out)
    flat = (np.ones(test.n_prompts), np.ones(test.n_prompts))
    curves = {
        "uniform": one_shot(test, None),
        "bins, same": one_shot(test, bin_gains(_mean(same), test.most)),
        "bins, shifted": one_shot(test, bin_gains(_mean(shifted), test.most)),
        "bins, adapted": one_shot(test, bin_gains(_mean(adapted), test.most)),
        "greedy, same": one_shot(test, gains("solve", *same, test.most)),
        "greedy, shifted": one_shot(test, gains("solve", *shifted, test.most)),
        "greedy, adapted": one_shot(test, gains("solve", *adapted, test.most)),
        "one-shot oracle": one_shot(test, test.true_gains),
        "probe, flat": probed(test, flat, seed),
        "probe, same": probed(test, same, seed),
        "probe, shifted": probed(test, shifted, seed),
        "probe, adapted": probed(test, adapted, seed),
        "sequential, flat": sequential(test, flat),
        "sequential, same": sequential(test, same),
        "sequential, shifted": sequential(test, shifted),
        "sequential, adapted": sequential(test, adapted),
        "sequential oracle": sequential(test, (test.rates_T * 1e6 + 1e-6, (1 - test.rates_T) * 1e6 + 1e-6)),
    }
    histories = {"same": same, "shifted": shifted, "adapted": adapted}
    rank = {name: spearman(_mean(beliefs), test.rates_T) for name, beliefs in histories.items()}
    priced = {}
    modes: tuple[BudgetMode, ...] = ("parallel", "sequential")
    for mode in modes:
        for label, beliefs in (("flat", flat), ("same", same), ("shifted", shifted), ("adapted", adapted)):
            for budget in BUDGETS:
                priced[f"{mode}, {label} | {budget:g}"] = as_served(test, beliefs, budget, seed, mode)
    return curves, rank, priced


class Served:
    """A run that learns from reported prompts as the service does, and is asked about new texts."""

    def __init__(self) -> None:
        self._pool = Pool(surface_width=len(SURFACE_NAMES), embedding_width=0)
        self._state = State()
        self._reports: list[tuple[World, IntArray]] = []
        self._history: list[History] = []
        self._model: SharedModel | None = None

    def report(
        self, world: World, rows: IntArray, *, refits: Sequence[int], seed: int, judged: Judged | None = None
    ) -> None:
        """Add these prompts of a world with the outcomes of 8 attempts each; refit after so many of them.

        Args:
            judged: Sums of rewards by how many of the attempts were right; without it the right ones are rewarded.
        """
        state, first = self._state, self._pool.n
        self._pool.append(_block(world, rows, first=first))
        self._reports.append((world, rows))
        fold(state, PoolEntry(state.position + 1, self._pool.n), self._pool)
        successes, samples = world.recording.successes_V_N[0][rows], world.recording.attempts_V_N[0][rows]
        drawn = np.random.default_rng([seed, first, 8]).hypergeometric(successes, samples - successes, LABEL_ATTEMPTS)
        if judged is not None:
            drawn = judged(drawn, np.random.default_rng([seed, first, 12]))
        for start in range(0, len(rows), BATCH):
            k = drawn[start : start + BATCH].astype(np.float64)
            prompts, n = first + start + np.arange(len(k)), np.full(len(k), float(LABEL_ATTEMPTS))
            informative = (k > 0) & (k < LABEL_ATTEMPTS)
            fold(state, ObserveEntry(state.position + 1, 0, prompts, k, n, informative), self._pool)
            self._history.append(History(prompts, np.zeros(len(k), dtype=np.int64), k, n, informative))
            if start + len(k) in refits:
                self._refit()

    def beliefs(self, world: World, rows: IntArray) -> Beliefs:
        """About texts that are not in the pool."""
        assert self._model is not None  # it was refitted
        parts = []
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            texts, block = [world.texts[i] for i in some], _block(world, some)
            parts.append(Gps().new_beliefs(self._state, block, partial(self._model.predict, texts, block))[:2])
        return np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts])

    def _refit(self) -> None:
        """What the worker does: fit on the outcomes so far and let the snapshot enter the log."""
        state = self._state
        assert state.basis is not None  # the pool is not empty
        data = TrainingData(
            embedder=BUILTIN_NAME,
            predictor="gps",
            group_size=LABEL_ATTEMPTS,
            basis=state.basis,
            x_N_d=self._pool.matrix(state.basis, self._pool.n),
            embeddings_N_D=np.concatenate([world.embeddings_N_D[rows] for world, rows in self._reports]),
            ngrams=sparse.vstack([world.ngrams[rows] for world, rows in self._reports], format="csr"),
            history=History.gathered(self._history),
        )
        self._model = fit_shared_model(data, device=torch.device("cpu"))
        version = state.model_version + 1
        self._pool.attach(version, self._model.priors)
        fold(state, SnapshotEntry(state.position + 1, version), self._pool)


def one_shot(test: HeldOut, worth_T_K: FloatArray | None) -> Curve:
    """Attempts fixed beforehand by these gains; uniformly without them."""
    n = test.n_prompts
    costs, least, most = np.ones(n), np.ones(n, dtype=np.int64), np.full(n, test.most)

    def coverage(budget: float) -> float:
        if worth_T_K is None:
            attempts = uniform_attempts(costs, least, most, budget * n)
        else:
            spending = spend(worth_T_K, costs_N=costs, minimum_N=least, maximum_N=most, budget=budget * n)
            attempts = spending.attempts_N.astype(np.float64)
        return float(expected(test.true_gains, attempts).mean())

    return _on_grid(coverage)


def probed(test: HeldOut, beliefs: Beliefs, seed: int) -> Curve:
    """One attempt each; then greedily on those that failed. The probes are drawn, all else is in expectation."""
    n = test.n_prompts
    failed = np.random.default_rng([seed, 9]).random(n) >= test.rates_T
    a, b = beliefs[0][failed], beliefs[1][failed] + 1.0
    worth = gains("solve", a, b, test.most - 1)
    silent = test.silent_T_J[failed, 1:] / test.silent_T_J[failed, 1:2]
    true_gains = -np.diff(silent, axis=1)
    costs, none, most = np.ones(len(a)), np.zeros(len(a), dtype=np.int64), np.full(len(a), test.most - 1)

    def coverage(budget: float) -> float:
        spending = spend(worth, costs_N=costs, minimum_N=none, maximum_N=most, budget=(budget - 1.0) * n)
        return float(1.0 - failed.mean() + expected(true_gains, spending.attempts_N.astype(np.float64)).sum() / n)

    return _on_grid(coverage)


def sequential(test: HeldOut, beliefs: Beliefs) -> Curve:
    """Stop at the first success; the next attempt goes where a/(a+b+j) is greatest. Spending and coverage are exact."""
    a, b = (parameter[:, None] for parameter in beliefs)
    worth = a / (a + b + np.arange(test.most))
    worth[:, 0] += 1.0  # everybody's first attempt comes first
    order = np.argsort(-worth, axis=None, kind="stable")
    spent = np.cumsum(test.silent_T_J[:, :-1].ravel()[order]) / test.n_prompts
    covered = np.cumsum(test.true_gains.ravel()[order]) / test.n_prompts
    return lambda budget: float(np.interp(budget, spent, covered))


def as_served(test: HeldOut, beliefs: Beliefs, target: float, seed: int, mode: BudgetMode) -> tuple[float, float]:
    """Attempts per request and coverage where requests come one by one and `POST /budget` prices them.

    The held-out prompts in random order; outcomes are drawn. The first 1,024 requests only warm the price up.
    """
    generator = np.random.default_rng([seed, 10])
    policy = BudgetPolicy(mode=mode, target_attempts=target, max_attempts=test.most)
    traffic = Traffic(policy, np.zeros(0), np.zeros(0))
    order = generator.permutation(test.n_prompts)
    # Attempts up to the first success; beyond the recorded samples there is none.
    first = 1 + (test.silent_T_J[:, 1:] > generator.random((test.n_prompts, 1))).sum(axis=1)
    spent = solved = n = 0
    for start in range(0, len(order), _SERVED_TOGETHER):
        rows = order[start : start + _SERVED_TOGETHER]
        a, b = beliefs[0][rows], beliefs[1][rows]
        attempts = attempts_at_price(mode, a, b, traffic.price(a, b), minimum=1, maximum=test.most)
        made = np.minimum(attempts, first[rows]) if mode == "sequential" else attempts
        traffic.grant(int(made.sum()))
        if start >= _WARM_UP:
            spent, solved, n = spent + int(made.sum()), solved + int((first[rows] <= attempts).sum()), n + len(rows)
    return spent / n, solved / n


def saved(curve: Curve, uniform: Curve, budget: float) -> float:
    """Share of the attempts that this method does without at the coverage that uniform spending has at `budget`."""
    wanted = uniform(budget)
    low, high = 1.0, GRID[-1]
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if curve(middle) < wanted - 1e-8 else (low, middle)
    return 1.0 - high / budget


def write(
    results: dict[str, list[dict[str, Curve]]],
    correlations: dict[str, list[dict[str, float]]],
    served: dict[str, list[dict[str, tuple[float, float]]]],
    seeds: int,
) -> None:
    """`results/test_time.md`, `.json` and `.png`."""
    RESULTS.mkdir(exist_ok=True)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    parts = [f"# Test-time budgets: {spread}"]
    document: dict[str, object] = {}
    for name, by_seed in results.items():
        ranks = ", ".join(f"{k} {_cell([c[k] for c in correlations[name]])}" for k in ("same", "shifted", "adapted"))
        parts.append(f"## {name}\n\nSpearman of the predicted with the recorded rates: {ranks}")
        coverage = {m: {f"{b:g}": [c[m](b) for c in by_seed] for b in BUDGETS} for m in by_seed[0]}
        saving = {
            m: {f"{b:g}": [saved(c[m], c["uniform"], b) for c in by_seed] for b in BUDGETS}
            for m in by_seed[0]
            if m != "uniform"
        }
        parts.append(_table("coverage at attempts per prompt", coverage))
        parts.append(_table("attempts saved at uniform's coverage", saving, percent=True))
        rows = [
            f"| {key} | {_cell([s[key][0] for s in served[name]], 2)} | {_cell([s[key][1] for s in served[name]])} |"
            for key in served[name][0]
        ]
        header = "| **priced one by one: mode, history** | target | attempts spent | coverage |\n|---|---|---|---|"
        parts.append("\n".join([header, *rows]))
        document[name] = {
            "spearman": correlations[name],
            "coverage": coverage,
            "saved": saving,
            "fitted_price": served[name],
        }
    text = "\n\n".join(parts) + "\n"
    (RESULTS / "test_time.md").write_text(text, encoding="utf-8")
    (RESULTS / "test_time.json").write_text(json.dumps(_rounded(document), indent=1) + "\n", encoding="utf-8")
    _plot(results)
    print(text)


def _block(world: World, rows: IntArray, *, first: int = 0) -> RawBlock:
    n = len(rows)
    return RawBlock(
        first=first,
        prompt_ids=tuple(str(row) for row in rows),
        groups=(None,) * n,
        numeric=(None,) * n,
        prior_rates_N=np.full(n, np.nan, dtype=np.float32),
        surface_N_S=world.surface_N_S[rows],
        embedding_N_D=world.embeddings_N_D[rows],
    )


def _on_grid(coverage: Curve) -> Curve:
    values = [coverage(budget) for budget in GRID]
    return lambda budget: float(np.interp(budget, GRID, values))


def _mean(beliefs: Beliefs) -> FloatArray:
    return np.asarray(beliefs[0] / (beliefs[0] + beliefs[1]))


def _table(corner: str, cells: dict[str, dict[str, list[float]]], *, percent: bool = False) -> str:
    lines = [f"| **{corner}** | " + " | ".join(f"{b:g}" for b in BUDGETS) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
    for method, row in cells.items():
        shown = [_cell([100 * v for v in row[f"{b:g}"]], 1) + "%" if percent else _cell(row[f"{b:g}"]) for b in BUDGETS]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell(values: list[float], digits: int = 4) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def _plot(results: dict[str, list[dict[str, Curve]]]) -> None:
    """Coverage by budget; the shifted history dashed, the oracles dotted."""
    mpl.use("Agg")
    figure, axes = pyplot.subplots(1, len(results), figsize=(7 * len(results), 5), squeeze=False)
    colours = {"uniform": "black", "bins": "tab:brown", "greedy": "tab:blue", "one-shot": "tab:blue"}
    colours |= {"probe": "tab:green", "sequential": "tab:red"}
    for axis, (name, by_seed) in zip(axes[0], results.items(), strict=True):
        for method in by_seed[0]:
            family, _, history = method.replace(" oracle", ", oracle").partition(", ")
            style = {"shifted": "--", "adapted": (0, (4, 1)), "oracle": ":", "flat": "-."}.get(history, "-")
            values = [np.mean([curves[method](budget) for curves in by_seed]) for budget in GRID]
            axis.plot(GRID, values, linestyle=style, color=colours[family], label=method, linewidth=1.2)
        axis.set(xscale="log", xlabel="attempts per prompt", ylabel="coverage", title=name)
        axis.set_xticks(BUDGETS, [f"{b:g}" for b in BUDGETS])
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "test_time.png", dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
