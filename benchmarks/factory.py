"""What a prior that is fitted on published pass rates is worth to a run on other data: leave one data set out.

    python -m benchmarks.factory FOLDER [--left-out NAME ...] [--seeds 3]       (or EVENODDS_DATA=FOLDER)
    python -m benchmarks.factory FOLDER --write weights.safetensors

FOLDER holds the data sets that are named below, all under Apache-2.0 or MIT. For each of them the n-gram model of
`model/ngrams.py` is fitted on the mean rates of the others (at most 6,000 prompts of each, without any text that the
left-out one has), and its log-odds stand as the one source of a new run there: 1,500 prompts, 128 random ones a step, 8
attempts at the rates of a recorded model, another one with each seed. "factory" begins with the whole of these
log-odds, "factory, low" with a third. Figures are those of `benchmarks.known_rates`, after so many visits a prompt.

`--write` fits on all data sets and writes the weights: numbers, no text.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from benchmarks.contenders import Gps
from benchmarks.known_rates import measure
from benchmarks.worlds import LARGE, MATH, TASKS, TRAJECTORY, World, world_of
from safetensors.numpy import save

from evenodds_service.commands.replay.recordings import Recording, read_recording
from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.prompts import SourceColumns, join_key
from evenodds_service.model import ngrams

CODE = "bigcodebench_models"
MODELS = {MATH: "k50", LARGE: "", TRAJECTORY: "", CODE: "", TASKS: ""}
"""The data sets, and of a table of models those whose name contains this text."""
MOST, POOL, BATCH, G = 6_000, 1_500, 128, 8
VISITS = (0.0, 0.25, 0.5)
AROUND = 5  # models on either side, whose mean stands for one with a single recorded sample
PRIORS = {"none": 0.0, "factory": 1.0, "factory, low": 1 / 3}


@dataclass(frozen=True)
class Published:
    """A data set: its texts with their keys, and the mean rate of all models on each."""

    recording: Recording
    texts: tuple[str, ...]
    keys: tuple[str, ...]
    rates_N: FloatArray

    @staticmethod
    def of(recording: Recording) -> Published:
        texts = tuple(prompt.text or "" for prompt in recording.prompts)
        attempts_N = recording.attempts_V_N.sum(axis=0)
        rates_N = recording.successes_V_N.sum(axis=0) / np.maximum(attempts_N, 1)
        return Published(recording, texts, tuple(map(join_key, texts)), np.where(attempts_N > 0, rates_N, np.nan))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--left-out", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", type=Path, metavar="FILE", help="fit on all and write the weights")
    arguments = parser.parse_args()
    if arguments.folder is None:
        parser.error("name the folder of the data sets, or set EVENODDS_DATA")
    folder = Path(arguments.folder)
    published = {name: Published.of(read_recording(folder / name, models=models)) for name, models in MODELS.items()}
    if arguments.write is not None:
        content = save({name: np.ascontiguousarray(part) for name, part in fitted(published.values()).items()})
        arguments.write.write_bytes(content)
        sys.stdout.write(f"{len(content):,} bytes\n")
        return
    sys.stdout.write("| left out | prior | figure | " + " | ".join(f"{visits:g}" for visits in VISITS) + " |\n")
    for name in arguments.left_out:
        weights = fitted([other for known, other in published.items() if known != name], published[name].keys)
        figures: defaultdict[str, list[dict[str, list[float]]]] = defaultdict(list)
        for seed in range(arguments.seeds):
            world, rates_N = policy(published[name].recording, seed)
            for prior, share in PRIORS.items():
                told = replace(world, shown=column(world, weights, share)) if share else world
                figures[prior].append(run(told, rates_N, seed))
        for prior, runs in figures.items():
            for figure in runs[0]:
                cells = np.array([one[figure] for one in runs])
                means, spreads = cells.mean(axis=0), cells.std(axis=0)
                told_cells = " | ".join(f"{m:.3f} ({s:.3f})" for m, s in zip(means, spreads, strict=True))
                sys.stdout.write(f"| {name.partition('_')[0]} | {prior} | {figure} | {told_cells} |\n")
        sys.stdout.flush()


def fitted(published: Iterable[Published], without: Sequence[str] = ()) -> dict[str, FloatArray]:
    """Weights of an n-gram model of these data sets, without texts of these keys."""
    chance, left_out = np.random.default_rng(0), set(without)
    texts: list[str] = []
    rates: list[float] = []
    for data in published:
        rows = [i for i, key in enumerate(data.keys) if key not in left_out and np.isfinite(data.rates_N[i])]
        kept = chance.permutation(rows)[:MOST]
        texts += [data.texts[i] for i in kept]
        rates += [float(data.rates_N[i]) for i in kept]
    n = len(texts)
    fit = ngrams.fit(
        ngrams.ngram_matrix(texts),
        np.zeros((n, 0), dtype=np.float32),
        labelled=np.arange(n),
        successes=G * np.array(rates),
        attempts=np.full(n, float(G)),
        informative_share=np.full(n, np.nan),
        group_size=G,
        seed=0,
    )
    return fit.weights


def policy(recording: Recording, seed: int) -> tuple[World, FloatArray]:
    """Random prompts of the data set, and the success rates of one of its models on them."""
    chance = np.random.default_rng([seed, 7])
    attempts_V_N = recording.attempts_V_N
    if attempts_V_N.max() == 1:  # a mean of neighbours in ability
        first = int(chance.integers(0, len(attempts_V_N) - 2 * AROUND))
        stages = np.arange(first, first + 2 * AROUND)
    elif recording.name == TRAJECTORY:
        stages = np.arange(len(attempts_V_N))  # the policy of the whole training
    else:
        stages = chance.integers(0, len(attempts_V_N), 1)
    n_N = attempts_V_N[stages].sum(axis=0)
    rows = np.flatnonzero(n_N > 0)
    rows = np.sort(chance.permutation(rows)[:POOL])
    some = replace(
        recording,
        prompts=tuple(recording.prompts[i] for i in rows.tolist()),
        successes_V_N=recording.successes_V_N[:, rows],
        attempts_V_N=attempts_V_N[:, rows],
    )
    return world_of(some), recording.successes_V_N[stages].sum(axis=0)[rows] / n_N[rows]


def column(world: World, weights: ngrams.Weights, share: float) -> SourceColumns:
    """What the weights say of the prompts, as a snapshot brings a source."""
    mean_N, _ = ngrams.NgramPrior(weights).predict(world.ngrams, np.zeros((world.n_prompts, 0), dtype=np.float32))
    log_odds_N_1 = (share * exact.log_odds(mean_N.astype(np.float64)))[:, None].astype(np.float16)
    return SourceColumns(("factory",), log_odds_N_1, log_odds_N_1.astype(np.float64).mean(axis=0))


def run(world: World, rates_N: FloatArray, seed: int) -> dict[str, list[float]]:
    """A run's figures after so many visits a prompt."""
    n, chance, method = world.n_prompts, np.random.default_rng([seed, 11]), Gps(world)
    seen = np.zeros(n, dtype=bool)
    informative_N = 1.0 - rates_N**G - (1.0 - rates_N) ** G
    figures: dict[str, list[float]] = {name: [] for name in ("spearman", "never seen", "log loss", "best never seen")}
    step, order = 0, chance.permutation(n)
    for visits in VISITS:
        while (step + 1) * BATCH <= visits * n:
            prompts = np.sort(order[step * BATCH : (step + 1) * BATCH])
            k = chance.binomial(G, rates_N[prompts]).astype(np.float64)
            method.observe(step, prompts, k, np.full(BATCH, float(G)))
            seen[prompts] = True
            step += 1
        if step:
            method.refit(step)
        measure(figures, method, seen, rates_N, informative_N)
    return figures


if __name__ == "__main__":
    main()
