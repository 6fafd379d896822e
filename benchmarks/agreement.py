"""What agreement of several attempts is worth as a reward, beside verified outcomes.

    python -m benchmarks.agreement FOLDER [--seeds 3] [--quick]       (or EVENODDS_DATA=FOLDER)

The set-up is that of `benchmarks.test_time`: a history of 8,192 prompts with 8 attempts each, and allocation over other
prompts, whose coverage is exact. The history's rewards are verified ones, or `evenodds.agreement` of the 8 answers. The
recordings say how many attempts were right and not what the wrong ones said, so that this is assumed, in three ways:
every wrong answer is another ("scattered"), each is one and the same for a prompt with probability one half ("half"),
or always ("common"). Where allocation itself has no verifier either, an attempt's verdict is not known: `vote` picks
the most frequent answer of n attempts, `vote, stop` makes attempts until one answer leads by two, at most 16.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from benchmarks.test_time import (
    BUDGETS,
    LABEL_ATTEMPTS,
    LABELS,
    REFITS,
    RESULTS,
    HeldOut,
    Served,
    _cell,
    _mean,
    asked_for,
    one_shot,
    probed,
    saved,
)
from benchmarks.worlds import World

from evenodds import agreement
from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.budgets.allocation import gains
from evenodds_service.domain.prompts import text_key
from evenodds_service.domain.ranks import spearman

COMMON = {"scattered": 0.0, "half": 0.5, "common": 1.0}
"""How likely a wrong answer is the prompt's common one."""

MOST_VOTES, LEAD = 16, 2
VOTES = (1, 2, 4, 8, 16)


def main() -> None:
    worlds, seeds = asked_for("Agreement as a reward, beside verified outcomes.")
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in range(seeds):
        for name, world in worlds.items():
            for kind, measured in measure(world, seed).items():
                figures.setdefault(name, {}).setdefault(kind, []).append(measured)
            write(figures)


def measure(world: World, seed: int) -> dict[str, dict[str, float]]:
    """Rank correlation and attempts saved by each kind of reward, and what voting reaches."""
    order = np.random.default_rng([seed, 6]).permutation(world.n_prompts)
    labelled, held_out = order[:LABELS], order[LABELS:]
    taken = {text_key(world.texts[i]) for i in labelled}
    held_out = np.array([i for i in held_out if text_key(world.texts[i]) not in taken])
    successes, samples = world.recording.successes_V_N[0], world.recording.attempts_V_N[0]
    test = HeldOut.of(successes[held_out], samples[held_out])
    uniform = one_shot(test, None)
    kinds: dict[str, Callable[[IntArray, np.random.Generator], FloatArray] | None] = {"verified": None}
    kinds |= {name: _agreeing(common) for name, common in COMMON.items()}
    measured: dict[str, dict[str, float]] = {}
    for kind, judged in kinds.items():
        run = Served()
        run.report(world, labelled, refits=REFITS, seed=seed, judged=judged)
        beliefs = run.beliefs(world, held_out)
        curves = {"greedy": one_shot(test, gains("solve", *beliefs, test.most)), "probe": probed(test, beliefs, seed)}
        measured[kind] = {"spearman": spearman(_mean(beliefs), test.rates_T)}
        for method, curve in curves.items():
            measured[kind] |= {f"{method} saved at {b:g}": saved(curve, uniform, b) for b in BUDGETS}
    for kind, common in COMMON.items():
        measured[kind] |= voted(test.rates_T, common, seed)
    return measured


def _agreeing(common: float) -> Callable[[IntArray, np.random.Generator], FloatArray]:
    """Sums of agreement's rewards of 8 attempts each, of which these many are right."""

    def judged(right_n: IntArray, generator: np.random.Generator) -> FloatArray:
        wrong_n = LABEL_ATTEMPTS - right_n
        shared_n = generator.binomial(wrong_n, common)
        return np.array(
            [
                sum(agreement([*["right"] * k, *["wrong"] * s, *range(LABEL_ATTEMPTS - k - s)]))
                for k, s in zip(right_n.tolist(), shared_n.tolist(), strict=True)
            ]
        )

    return judged


def voted(rates_T: FloatArray, common: float, seed: int) -> dict[str, float]:
    """Accuracy of the most frequent answer, by attempts, and of stopping once one leads by two; attempts are drawn."""
    generator = np.random.default_rng([seed, 11])
    n = len(rates_T)
    right = generator.random((n, MOST_VOTES)) < rates_T[:, None]
    shared = ~right & (generator.random((n, MOST_VOTES)) < common)
    rights, commons = right.cumsum(axis=1), shared.cumsum(axis=1)
    ties = generator.random(n)  # of equally frequent answers one is picked by chance

    def accuracy(made_n: IntArray) -> float:
        rows = np.arange(n)
        k, s = rights[rows, made_n - 1], commons[rows, made_n - 1]
        alone = made_n - k - s  # answers that nobody else gave
        most = np.maximum(k, np.maximum(s, (alone > 0).astype(int)))
        tied = (k == most).astype(int) + (s == most) + np.where(most == 1, alone, 0)
        return float(((k == most) & (ties < 1.0 / np.maximum(tied, 1))).mean())

    single = (np.arange(1, MOST_VOTES + 1) - rights - commons > 0).astype(int)
    ahead = np.maximum(rights, commons) - np.maximum(np.minimum(rights, commons), single) >= LEAD
    made_n = np.where(ahead.any(axis=1), ahead.argmax(axis=1) + 1, MOST_VOTES)
    found = {f"vote of {v}": accuracy(np.full(n, v)) for v in VOTES}
    return found | {"vote, stop: attempts": float(made_n.mean()), "vote, stop": accuracy(made_n)}


def write(figures: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """`results/agreement.md` and `.json`; printed too."""
    parts = ["# Agreement as a reward"]
    for name, kinds in figures.items():
        rows = list(dict.fromkeys(row for measured in kinds.values() for row in measured[0]))
        lines = [f"## {name}\n", "| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
        for row in rows:
            cells = [_cell([each[row] for each in found], 3) if row in found[0] else "" for found in kinds.values()]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    text = "\n\n".join(parts) + "\n"
    (RESULTS / "agreement.md").write_text(text, encoding="utf-8")
    (RESULTS / "agreement.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
