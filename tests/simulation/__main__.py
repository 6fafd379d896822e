"""Run seeds of the simulation, and say what came of them.

    python -m tests.simulation SEEDS [--processes 2] [--steps N] [--results FILE] [--nightly]

SEEDS are numbers and ranges: `123` replays one seed and shows its last events, `0:10000` are ten thousand. With a file
of results a run may be interrupted: seeds that it has are left out. The exit status is 1 after a violation; with
`--nightly` also where a rail was never exercised, or forecasts are not calibrated.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.simulation.scenario import RAILS, run_seed

CALIBRATED_WITHIN = 0.05
"""Mean true success rate less mean forecast, of each fifth of forecasts, about prompts with 16 attempts and more."""


def seeds_of(said: Sequence[str]) -> list[int]:
    """`3`, `0:100`, or several of them."""
    seeds: list[int] = []
    for part in said:
        first, colon, last = part.partition(":")
        seeds += range(int(first), int(last)) if colon else [int(first)]
    return seeds


def quiet() -> None:
    """In each process: warnings of the product are no news here."""
    logging.disable(logging.CRITICAL)


def outcomes_of(seeds: Sequence[int], processes: int, steps: int | None) -> Iterator[dict[str, Any]]:
    """Each seed's outcome as it comes. Seeds of many processes come in any order."""
    quiet()
    work = partial(run_seed, steps=steps)
    if processes == 1:
        yield from map(asdict, map(work, seeds))
        return
    with ProcessPoolExecutor(processes, initializer=quiet) as pool:
        yield from map(asdict, pool.map(work, seeds))


def calibration(forecasts: Sequence[tuple[float, float]]) -> list[tuple[int, float, float]]:
    """Of each fifth of forecasts: how many, their mean, and the mean of the true rates."""
    ordered = sorted(forecasts)
    size = max(1, -(-len(ordered) // 5))
    fifths = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    return [(len(f), sum(x for x, _ in f) / len(f), sum(y for _, y in f) / len(f)) for f in fifths]


def report(outcomes: Sequence[dict[str, Any]], *, nightly: bool) -> bool:
    """Print what came of them. Whether all is well."""
    sometimes: Counter[str] = Counter()
    for outcome in outcomes:
        sometimes.update(outcome["sometimes"])
    bad = [outcome for outcome in outcomes if outcome["violations"]]
    print(f"{len(outcomes)} seeds, {sum(outcome['steps'] for outcome in outcomes)} steps, {len(bad)} with violations")
    for outcome in bad[:20]:
        print(f"  seed {outcome['seed']}: {outcome['violations'][0]:.1000}")
    never = [rail for rail in RAILS if not sometimes[rail]]
    for rail in (*RAILS, *sorted(sometimes.keys() - set(RAILS))):
        print(f"  {sometimes[rail]:>8} {rail}")
    print(f"rails that were never exercised: {', '.join(never) or 'none'}")
    fifths = calibration([(rate, true) for outcome in outcomes for rate, true in outcome["forecasts"]])
    for n, forecast, true in fifths:
        print(f"  {n:>8} forecasts of {forecast:.3f} on average, true are {true:.3f}")
    is_calibrated = all(abs(forecast - true) <= CALIBRATED_WITHIN for _, forecast, true in fifths)
    return not bad and not (nightly and (never or not is_calibrated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="of a seed; by default chance decides")
    parser.add_argument("--results", type=Path, help="a line of JSON for each seed is added to it")
    parser.add_argument("--nightly", action="store_true")
    options = parser.parse_args()
    seeds = seeds_of(options.seeds)
    outcomes: list[dict[str, Any]] = []
    if options.results is not None and options.results.exists():
        outcomes = [json.loads(line) for line in options.results.read_text().splitlines()]
    wanted, done = set(seeds), {outcome["seed"] for outcome in outcomes}
    outcomes = [outcome for outcome in outcomes if outcome["seed"] in wanted]
    began, n_steps = time.monotonic(), 0
    for outcome in outcomes_of([seed for seed in seeds if seed not in done], options.processes, options.steps):
        n_steps += outcome["steps"]
        events = outcome.pop("events")
        if len(seeds) == 1:
            print(*events, sep="\n")
        outcomes.append(outcome)
        if options.results is not None:
            with options.results.open("a") as results:
                results.write(json.dumps(outcome) + "\n")
    print(f"{n_steps / max(1e-9, time.monotonic() - began):.0f} steps a second in this run")
    sys.exit(not report(outcomes, nightly=options.nightly))


if __name__ == "__main__":
    main()
