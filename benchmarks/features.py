"""How well the features of a text rank prompts by success rate: Spearman on held-out texts.

    python benchmarks/features.py FOLDER        (or EVENODDS_DATA=FOLDER)

FOLDER holds the data sets named below. A ridge regression from standardised features to the logit of the
success rate (mean over the models or visits of the data set; identical texts count once) is fitted on some
labels and scored on texts that it did not see. The weight of the ridge is chosen by leave-one-out error on
the labels alone.

Which data chose what: the surface features were chosen, and the list cut, on `math_qwen_multisample`,
`reasoning_gym_models` and `bigcodebench_models`: there the figures flatter the surface features. Nothing
was chosen on `deepscaler_qwen25math7b_k128` and `dsr_sub_rl_trajectory`; some of their texts are in MATH
too, so both are also measured without those. The built-in embedder was chosen on none.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain.prompts import text_key
from evenodds_service.domain.ranks import spearman
from evenodds_service.domain.settings import BUILTIN
from evenodds_service.model.embedder import open_embedder
from evenodds_service.model.surface import surface_features

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

CHOOSING = ("math_qwen_multisample", "reasoning_gym_models", "bigcodebench_models")
REPORTING = ("deepscaler_qwen25math7b_k128", "dsr_sub_rl_trajectory")
LABEL_COUNTS = (256, 512, 2_048, 8_000, 20_000)
RIDGE_WEIGHTS = 10.0 ** np.arange(-1, 6.5, 0.5)
N_FOLDS = 5


@dataclass(frozen=True)
class Pool:
    name: str
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    tasks: tuple[str, ...]  # empty where the data set knows none
    rates: Floats

    def without(self, keys: frozenset[str], name: str) -> Pool:
        kept = [i for i, key in enumerate(self.keys) if key not in keys]
        tasks = tuple(self.tasks[i] for i in kept) if self.tasks else ()
        return Pool(
            name,
            tuple(self.keys[i] for i in kept),
            tuple(self.texts[i] for i in kept),
            tasks,
            self.rates[kept],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Spearman of text features with success rates, on held-out texts.")
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.folder is None:
        parser.error("name the folder of the data sets, or set EVENODDS_DATA")

    embedder = open_embedder(BUILTIN)
    columns = "".join(f"{n:>9,}" for n in LABEL_COUNTS)
    print(f"{'data set':36}{'features':11}{columns}{'5-fold':>9}{'by task':>9}")
    for pool in pools(Path(arguments.folder)):
        surface = surface_features(pool.texts).astype(np.float64)
        embedding = embedder.embed(pool.texts).astype(np.float64)
        kinds = {"surface": surface, "embedding": embedding, "both": np.hstack([surface, embedding])}
        for kind, features in kinds.items():
            figures = [score_at(features, pool.rates, n_labels, arguments.seeds) for n_labels in LABEL_COUNTS]
            figures.append(score_folds(features, pool.rates, range(len(pool.texts)), arguments.seeds))
            figures.append(score_folds(features, pool.rates, pool.tasks, arguments.seeds) if pool.tasks else None)
            cells = "".join(f"{'-' if figure is None else f'{figure:.3f}':>9}" for figure in figures)
            print(f"{f'{pool.name} ({len(pool.texts):,})':36}{kind:11}{cells}", flush=True)


def pools(folder: Path) -> Iterator[Pool]:
    in_math: frozenset[str] = frozenset()
    for name in (*CHOOSING, *REPORTING):
        pool = read_pool(folder / name)
        short = name.split("_")[0]
        if name.startswith("math"):
            in_math = frozenset(pool.keys)
        yield pool.without(frozenset(), short)
        if name in REPORTING:
            yield pool.without(in_math, f"{short} without MATH")


def read_pool(folder: Path) -> Pool:
    """The distinct texts of a data set with their mean rates."""
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    with gzip.open(folder / "rates.csv.gz", "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            sums[row["prompt_id"]] += int(row["n_success"]) / int(row["n_samples"])
            counts[row["prompt_id"]] += 1
    texts: dict[str, str] = {}
    tasks: dict[str, str] = {}
    rates: defaultdict[str, list[float]] = defaultdict(list)
    with gzip.open(folder / "prompts.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            prompt = json.loads(line)
            prompt_id, key = prompt["prompt_id"], text_key(prompt["text"])
            if counts[prompt_id]:
                texts.setdefault(key, prompt["text"])
                tasks.setdefault(key, prompt["meta"].get("task", ""))
                rates[key].append(sums[prompt_id] / counts[prompt_id])
    return Pool(
        folder.name,
        tuple(texts),
        tuple(texts.values()),
        tuple(tasks.values()) if all(tasks.values()) else (),
        np.array([np.mean(rates[key]) for key in texts]),
    )


def score_at(features: Floats, rates: Floats, n_labels: int, n_seeds: int) -> float | None:
    """Mean Spearman on all other texts after `n_labels` random labels; None where under a tenth is left."""
    if n_labels > 0.9 * len(rates):
        return None
    scores = []
    for seed in range(n_seeds):
        order = np.random.default_rng(seed).permutation(len(rates))
        known, unseen = order[:n_labels], order[n_labels:]
        scores.append(spearman(fit_predict(features, rates, known, unseen), rates[unseen]))
    return float(np.mean(scores))


def score_folds(features: Floats, rates: Floats, units: Sequence[object], n_seeds: int) -> float:
    """Mean Spearman over the whole pool, each text predicted from the folds that its unit is not in."""
    distinct = sorted(set(units), key=str)
    scores = []
    for seed in range(n_seeds):
        fold_of = dict(zip(distinct, np.random.default_rng(seed).permutation(len(distinct)) % N_FOLDS, strict=True))
        folds = np.array([fold_of[unit] for unit in units])
        predicted = np.empty(len(rates))
        for fold in range(N_FOLDS):
            unseen = np.flatnonzero(folds == fold)
            predicted[unseen] = fit_predict(features, rates, np.flatnonzero(folds != fold), unseen)
        scores.append(spearman(predicted, rates))
    return float(np.mean(scores))


def fit_predict(features: Floats, rates: Floats, known: Indices, unseen: Indices) -> Floats:
    """Ridge in closed form; its weight has the smallest leave-one-out error on the known texts."""
    clipped = np.clip(rates[known], 0.01, 0.99)
    logits = np.log(clipped / (1 - clipped))
    mean, std = features[known].mean(axis=0), features[known].std(axis=0)
    varying = std > 1e-6
    x, x_unseen = (
        np.clip((features[rows][:, varying] - mean[varying]) / std[varying], -6, 6) for rows in (known, unseen)
    )
    residual = logits - logits.mean()
    eigenvalues, eigenvectors = np.linalg.eigh(x.T @ x)
    z = x @ eigenvectors
    projected = z.T @ residual
    best_error, best = np.inf, projected
    for weight in RIDGE_WEIGHTS:
        shrunk = projected / (eigenvalues + weight)
        leverage = (z * z) @ (1 / (eigenvalues + weight)) + 1 / len(known)
        error = float(np.mean(((residual - z @ shrunk) / (1 - leverage)) ** 2))
        if error < best_error:
            best_error, best = error, shrunk
    predicted: Floats = x_unseen @ (eigenvectors @ best)
    return predicted


if __name__ == "__main__":
    main()
