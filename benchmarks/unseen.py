"""What the sparse n-gram prior knows of prompts that it has never seen, and which shape its beliefs should have.

    python -m benchmarks.unseen FOLDER [--seeds 3] [--quick]       (or EVENODDS_DATA=FOLDER)
    python -m benchmarks.unseen FOLDER --answers [--seeds 3]

FOLDER holds the data sets named below; identical texts count once. Three tables:

1. Spearman of the predicted with the recorded success rates, on held-out texts, after so many labelled prompts and in
   five folds. Labels are recorded rates ("rates") or the successes of 8 samples drawn from them ("8 samples").
2. Shapes: log-loss of the outcomes of 8 samples on held-out texts (nats per prompt, without the binomial
   coefficient), then of 8 more ("again") once the belief has been updated by the first, and for the chance of an
   informative group the Brier score, the mean absolute gap between forecast and outcome in ten equal bins, and the
   total bias. Labels are 8 samples. "one" is a single concentration for all prompts, the best one in hindsight; "beta"
   is matched prompt by prompt; "inflated" is the zero-one-inflated Beta with a slab of that concentration.
3. First visits only: no prompt twice, the prior fitted on 8 samples of what was chosen so far (at random before the
   first fit), half the pool visited in 60 steps. Share of informative groups of 8 in expectation over their outcomes.

`--answers` shows instead what the prompts' reference answers add, where a data set has them: Spearman as in table 1,
with labels of 8 samples, and the first visits of table 3 with refits at ten steps.

The settings of `model/ngrams.py` and `domain/matched_prior.py` were chosen on `math_qwen_multisample` (the policies
Qwen2.5-Math-7B, Qwen2.5-7B and Qwen2.5-Math-1.5B-Instruct at temperature 1): its figures flatter them. The features of
answers were looked at there too. Nothing was chosen on the others; about 6,000 texts of `deepscaler_qwen25math7b_k128`
are in MATH too.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchmarks.inflated_beta import (
    InflatedBeta,
    inflated_informative_moments,
    log_likelihood,
    matched_inflated,
    updated,
)
from numpy.typing import NDArray
from scipy import sparse

from evenodds_service.domain.learning.features import Basis
from evenodds_service.domain.matched_prior import matched_concentration
from evenodds_service.domain.prompts import NO_ANSWERS, RawBlock, answer_text, text_key, text_to_read
from evenodds_service.domain.ranks import spearman
from evenodds_service.domain.settings import BUILTIN
from evenodds_service.model.answers import answer_features
from evenodds_service.model.embedder import open_embedder
from evenodds_service.model.ngrams import FittedNgrams, fit, ngram_matrix
from evenodds_service.model.surface import surface_features

Floats = NDArray[np.floating]
Indices = NDArray[np.int64]

G = 8
LABEL_COUNTS = (2_048, 8_000, 20_000)
N_FOLDS = 5
STEPS = 60
REFITS = (1, 2, 3, 5, 8, 12, 16, *range(20, STEPS, 5))
FEW_REFITS = (1, 2, 4, 7, 11, 16, 23, 31, 40, 50)
CONCENTRATIONS = tuple(2.0 ** np.arange(-3, 4.1, 0.5))


@dataclass(frozen=True)
class Data:
    """Distinct texts with successes of samples, [N] each, and the inputs of the prior."""

    name: str
    successes: Floats
    samples: Floats
    matrix: sparse.csr_matrix
    dense: NDArray[np.float32]

    @property
    def rates(self) -> Floats:
        return self.successes / self.samples

    def draw(self, seed: int) -> Floats:
        """Successes of 8 attempts: of the recorded samples without replacement, where there are so many."""
        generator = np.random.default_rng(seed)
        drawn = generator.hypergeometric(
            self.successes.astype(np.int64),
            (self.samples - self.successes).astype(np.int64),
            np.minimum(G, self.samples).astype(np.int64),
        )
        return np.where(self.samples >= G, drawn, generator.binomial(G, self.rates)).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the n-gram prior knows of prompts never seen.")
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--answers", action="store_true", help="what the reference answers add")
    parser.add_argument("--quick", action="store_true", help="one seed, and no first visits on the largest pool")
    arguments = parser.parse_args()
    if arguments.folder is None:
        parser.error("name the folder of the data sets, or set EVENODDS_DATA")
    seeds = 1 if arguments.quick else arguments.seeds

    folder = Path(arguments.folder)
    if arguments.answers:
        show_answers(folder, seeds)
        return
    math = read(folder / "math_qwen_multisample", policy="Qwen2.5-Math-7B@T1k50")
    deepscaler = read(folder / "deepscaler_qwen25math7b_k128")
    trajectory = read(folder / "dsr_sub_rl_trajectory")
    code = read(folder / "bigcodebench_models")
    reasoning = read(folder / "reasoning_gym_models")

    print("Spearman on held-out texts, mean (standard deviation over seeds)")
    print(f"{'data set':34}{'labels':11}" + "".join(f"{n:>15,}" for n in LABEL_COUNTS) + f"{'5-fold':>15}")
    for data in (math, deepscaler, trajectory, code, reasoning):
        for kind in ("rates", "8 samples"):
            cells = [held_out(data, kind, n_labels, seeds) for n_labels in LABEL_COUNTS]
            cells.append(None if data is deepscaler else five_folds(data, kind, seeds))
            print(f"{_title(data):34}{kind:11}" + "".join(map(_cell, cells)), flush=True)

    print("\nShapes on held-out texts")
    print(f"{'data set':34}{'labels':>7}  {'shape':16}{'log-loss':>10}{'again':>9}{'Brier':>9}{'gap':>9}{'bias':>9}")
    for data, n_labels in ((math, 8_000), (deepscaler, 2_048), (deepscaler, 20_000), (trajectory, 900), (code, 900)):
        for shape, figures in shapes(data, n_labels, seeds).items():
            print(
                f"{_title(data):34}{n_labels:7,}  {shape:16}{figures[0]:10.4f}"
                + "".join(f"{figure:9.4f}" for figure in figures[1:]),
                flush=True,
            )

    print("\nFirst visits only: share of informative groups")
    print(f"{'data set':34}{'score':14}{'whole run':>14}   by thirds")
    for data in (math, trajectory) if arguments.quick else (math, trajectory, deepscaler):
        for score in ("uniform", "nearest to .5", "informative"):
            shares = np.array([first_visits(data, score, seed) for seed in range(seeds)])  # [seeds, STEPS]
            thirds = shares.reshape(seeds, 3, -1).mean(axis=(0, 2))
            print(
                f"{_title(data):34}{score:14}{_cell(shares.mean(axis=1)):>14}   "
                + " ".join(f"{third:.3f}" for third in thirds),
                flush=True,
            )


def show_answers(folder: Path, seeds: int) -> None:
    """The two tables of `--answers`."""
    told = {False: "text", True: "text, answer"}
    sets: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "math_qwen_multisample": ("Qwen2.5-Math-7B@T1k50", (8_000,)),
        "dsr_sub_rl_trajectory": (None, (900,)),
        "deepscaler_qwen25math7b_k128": (None, (8_000, 20_000)),
    }
    print("Spearman on held-out texts, labels of 8 samples, mean (standard deviation over seeds)")
    kept: dict[bool, Data] = {}
    for name, (policy, label_counts) in sets.items():
        for with_answers, title in told.items():
            data = kept[with_answers] = read(folder / name, policy=policy, with_answers=with_answers)
            for n_labels in label_counts:
                cell = _cell(held_out(data, "8 samples", n_labels, seeds))
                print(f"{_title(data):34}{title:14}{n_labels:7,}{cell}", flush=True)
    print("\nFirst visits only: share of informative groups, by forecast informativeness, one seed")
    for with_answers, title in told.items():
        shares = first_visits(kept[with_answers], "informative", 0, refits=FEW_REFITS)
        thirds = " ".join(f"{third:.3f}" for third in shares.reshape(3, -1).mean(axis=1))
        print(f"{_title(kept[with_answers]):34}{title:14}{shares.mean():9.3f}   {thirds}", flush=True)


def read(folder: Path, *, policy: str | None = None, with_answers: bool = False) -> Data:
    """The distinct texts of a data set, with their samples by one policy or by all."""
    successes: defaultdict[str, int] = defaultdict(int)
    samples: defaultdict[str, int] = defaultdict(int)
    with gzip.open(folder / "rates.csv.gz", "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if policy is None or row["model"] == policy:
                successes[row["prompt_id"]] += int(row["n_success"])
                samples[row["prompt_id"]] += int(row["n_samples"])
    texts: dict[str, tuple[str, str, str]] = {}
    with gzip.open(folder / "prompts.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            prompt = json.loads(line)
            if samples[prompt["prompt_id"]]:
                answer = prompt["meta"]["answer"] if with_answers else ""
                texts.setdefault(text_key(prompt["text"]), (prompt["prompt_id"], prompt["text"], answer))
    ids, kept, answers = zip(*texts.values(), strict=True)
    block = RawBlock(
        first=0,
        prompt_ids=ids,
        groups=(None,) * len(ids),
        numeric=(None,) * len(ids),
        prior_rates_N=np.full(len(ids), np.nan, dtype=np.float32),
        surface_N_S=surface_features(kept),
        embedding_N_D=open_embedder(BUILTIN).embed(kept),
        answers_N_A=answer_features([answer_text(answer) for answer in answers]) if with_answers else NO_ANSWERS,
    )
    return Data(
        folder.name,
        np.array([successes[i] for i in ids], dtype=np.float64),
        np.array([samples[i] for i in ids], dtype=np.float64),
        ngram_matrix([text_to_read(*both) for both in zip(kept, answers, strict=True)] if with_answers else kept),
        np.asarray(Basis.of(block).project(block), dtype=np.float32),
    )


def fitted(data: Data, labelled: Indices, kind: str, seed: int) -> FittedNgrams:
    """The prior, fitted on the labels of these prompts."""
    if kind == "rates":
        successes, attempts = data.successes, data.samples
        share = np.full(len(attempts), np.nan)
    else:
        successes = data.draw(seed)
        attempts = np.full(len(successes), float(G))
        share = ((successes > 0) & (successes < G)).astype(np.float64)
    return fit(
        data.matrix,
        data.dense,
        labelled=labelled,
        successes=successes[labelled],
        attempts=attempts[labelled],
        informative_share=share[labelled],
        group_size=G,
        seed=seed,
    )


def held_out(data: Data, kind: str, n_labels: int, n_seeds: int) -> Floats | None:
    """Spearman on all other texts, by seed; None where under a tenth is left."""
    n = len(data.rates)
    if n_labels > 0.9 * n:
        return None
    scores = []
    for seed in range(n_seeds):
        order = np.random.default_rng(seed).permutation(n)
        means = fitted(data, order[:n_labels], kind, seed).mean_N
        scores.append(spearman(means[order[n_labels:]], data.rates[order[n_labels:]]))
    return np.array(scores)


def five_folds(data: Data, kind: str, n_seeds: int) -> Floats:
    """Spearman over all texts, each predicted from the folds that it is not in, by seed."""
    scores = []
    for seed in range(n_seeds):
        fold = np.random.default_rng(seed).permutation(len(data.rates)) % N_FOLDS
        means = np.empty(len(fold))
        for held in range(N_FOLDS):
            means[fold == held] = fitted(data, np.flatnonzero(fold != held), kind, seed).mean_N[fold == held]
        scores.append(spearman(means, data.rates))
    return np.array(scores)


def shapes(data: Data, n_labels: int, n_seeds: int) -> dict[str, Floats]:
    """Log-loss, log-loss of the next visit, Brier score, calibration gap and bias of each shape, means over seeds."""
    sums: defaultdict[str, Floats] = defaultdict(lambda: np.zeros(5))
    for seed in range(n_seeds):
        order = np.random.default_rng(seed).permutation(len(data.rates))
        result = fitted(data, order[:n_labels], "8 samples", seed)
        unseen = order[n_labels:]
        mean, informative = result.mean_N[unseen].astype(float), result.informative_N[unseen].astype(float)
        k, again = data.draw(1_000 + seed)[unseen], data.draw(2_000 + seed)[unseen]
        single = min(
            (_plain(mean, np.full(len(mean), s)) for s in CONCENTRATIONS),
            key=lambda belief: -float(log_likelihood(belief, k, np.full(len(k), float(G))).sum()),
        )
        beliefs = {"one": single, "beta": _plain(mean, matched_concentration(mean, informative, G))}
        for s in (0.5, 1.0, 2.0):
            beliefs[f"inflated {s:g}"] = matched_inflated(mean, informative, G, slab_concentration=s)
        for shape, belief in beliefs.items():
            sums[shape] = sums[shape] + _figures(belief, k, again)
    return {shape: figures / n_seeds for shape, figures in sums.items()}


def _plain(mean: Floats, s: Floats) -> InflatedBeta:
    none = np.zeros(len(mean))
    return InflatedBeta(zero=none, one=none, a=mean * s, b=(1 - mean) * s)


def _figures(belief: InflatedBeta, k: Floats, again: Floats) -> Floats:
    n = np.full(len(k), float(G))
    log_loss = -float(np.mean(log_likelihood(belief, k, n)))
    next_loss = -float(np.mean(log_likelihood(updated(belief, k, n - k), again, n)))
    forecast, _ = inflated_informative_moments(belief, G)
    outcome = ((k > 0) & (k < G)).astype(np.float64)
    bins = np.array_split(np.argsort(forecast), 10)
    gap = np.mean([abs(float((forecast - outcome)[rows].mean())) for rows in bins])
    return np.array([log_loss, next_loss, np.mean((forecast - outcome) ** 2), gap, np.mean(forecast - outcome)])


def first_visits(data: Data, score: str, seed: int, *, refits: Container[int] = REFITS) -> Floats:
    """Expected share of informative groups in each step's batch, [STEPS]."""
    rates = data.rates
    n = len(rates)
    chance = 1 - rates**G - (1 - rates) ** G
    generator = np.random.default_rng(seed)
    batch_size = int(0.528 * n / STEPS)
    seen = np.zeros(n, dtype=bool)
    scores: Floats = generator.random(n)
    shares = []
    for step in range(STEPS):
        if step in refits and score != "uniform" and seen.sum() >= 32:
            result = fitted(data, np.flatnonzero(seen), "8 samples", seed)
            scores = np.asarray(result.informative_N if score == "informative" else -np.abs(result.mean_N - 0.5))
        batch = np.argsort(np.where(seen, -np.inf, scores))[::-1][:batch_size]
        seen[batch] = True
        shares.append(float(chance[batch].mean()))
    return np.array(shares)


def _title(data: Data) -> str:
    return f"{data.name.split('_')[0]} ({len(data.rates):,})"


def _cell(values: Floats | None) -> str:
    return f"{'-' if values is None else f'{values.mean():.3f} ({values.std():.3f})':>15}"


if __name__ == "__main__":
    main()
