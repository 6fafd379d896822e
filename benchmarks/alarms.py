"""How soon each planted fault is told, and how often a quiet run raises an alarm.

    python -m benchmarks.alarms [--quiet 1000] [--faulty 20] [--folder FOLDER]      (or EVENODDS_DATA=FOLDER)

Simulated runs: prompts in four categories with rates that are piled up near 0 and 1, as recorded ones are; a policy
that improves slowly and jitters from step to step; forecasts that know a part of the truth, lag two steps behind the
policy, and are a little too high or low, and over- or underconfident, in each run by other amounts; batches of 16 to
128, drawn from those near a rate of one half, a tenth of them by chance. They pass through everything that alarms are
read from: the tallies, the guardrails and the sequential tests of the service. Nothing is fitted, for speed.

With a folder that holds `dsr_sub_rl_trajectory`, the whole fold also chooses and learns from this recorded training
run, its prompts dealt into four categories: the same faults, and quiet runs, with other chances each time.

A fault begins at step 20. The tables count the steps with the fault until its alarm is on; a fault that is not told
within 25 steps is missed. The limits of the tests were chosen on runs of the whole fold over made-up pools, not on
these and not on the recorded run.

Of flipped outcomes a second table says how many steps any test needs on average that takes a quiet run for a faulty one
once in a thousand times: log(1,000) over what one batch tells (Wald, "Sequential tests of statistical hypotheses",
1945), by the law that the run is made of. A batch tells the mutual information of forecasts and outcomes where the test
has to be quiet in runs whose forecasts say nothing of the order of prompts, as ours has. It tells the divergence of
flipped outcomes from right ones where the test knows beforehand how well the forecasts order the prompts.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from benchmarks.worlds import TRAJECTORY, World, open_world

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.distributions import beta_from_moments
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.predictors import PREDICTORS
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import ObserveEntry, PoolEntry, SelectEntry
from evenodds_service.domain.prompts import RawBlock
from evenodds_service.domain.report.alarms import Alarm
from evenodds_service.domain.report.findings import alarms
from evenodds_service.domain.selection.selection import Forecasts, SelectionRequest, select
from evenodds_service.domain.settings import RunSettings

SIZE, CONTROL, N_CATEGORIES = 8, 0.1, 4
SETTINGS = RunSettings(group_size=SIZE, control_share=CONTROL, embedder="none")
BATCHES = (16, 32, 64, 128)
FAULT_STEP, FAULTY_STEPS, QUIET_STEPS = 20, 25, 40
SILENT = 1


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong from `FAULT_STEP` on, and which alarms tell it."""

    name: str
    codes: tuple[str, ...]
    outcome: Callable[[FloatArray, IntArray], FloatArray] = lambda k, categories: k
    attempts: int = SIZE
    is_reported: bool = True


FAULTS = (
    Fault("dead verifier", ("forecast_off", "rewards_constant"), lambda k, categories: 0.0 * k),
    Fault("flipped outcomes", ("forecast_off",), lambda k, categories: SIZE - k),
    Fault("stopped outcomes", ("outcomes_stopped",), is_reported=False),
    Fault(
        "silent category",
        ("category_silent", "forecast_off"),
        lambda k, categories: np.where(categories == SILENT, 0.0, k),
    ),
    Fault("wrong group size", ("group_size_mismatch",), attempts=SIZE // 2),
)
NOTHING = Fault("nothing", ())
FALSE_ALARMS = 0.001
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(41)  # of integrals over a standard normal distribution


class Simulated:
    """One run whose forecasts are made up, and everything that alarms are read from."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng([seed, 17])
        self.batch, n = int(rng.choice(BATCHES)), 2_000
        self.categories = rng.integers(0, N_CATEGORIES, n)
        self.level, spread = rng.normal(-0.3, 1.0), rng.uniform(1.2, 2.6)
        knowledge = rng.uniform(0.4, 0.9)  # the forecasts' correlation with the truth
        known = rng.normal(size=n)
        own = rng.normal(0.0, 0.4, N_CATEGORIES)[self.categories]
        self.truth_N = own + spread * (knowledge * known + math.sqrt(1 - knowledge**2) * rng.normal(size=n))
        self.known_N, self.unknown = own + spread * knowledge * known, spread * math.sqrt(1 - knowledge**2)
        self.speed, self.jitter = rng.uniform(0.0, 0.04), rng.uniform(0.0, 0.15)
        self.bias, self.confidence = rng.normal(0.0, 0.15), rng.uniform(0.6, 1.8)
        self.pool = Pool(surface_width=0, embedding_width=0)
        self.pool.append(_block(n, self.categories))
        self.state = fold(State(), PoolEntry(1, n), self.pool)

    def forecast(self, step: int, prompts: IntArray) -> tuple[FloatArray, FloatArray]:
        """Parameters of the beliefs about these prompts: nothing is known before the first outcomes came."""
        if step < 2:
            return np.ones(len(prompts)), np.ones(len(prompts))
        centre = self.level + self.known_N[prompts] + self.speed * (step - 2) + self.bias
        mean = 1.0 / (1.0 + np.exp(-centre / math.sqrt(1.0 + self.unknown**2 * math.pi / 8.0)))
        spread = mean * (1.0 - mean)
        variance = spread * self.unknown**2 * spread / (1.0 + self.unknown**2 * spread)
        return beta_from_moments(mean, np.minimum(variance / self.confidence, 0.9 * spread))

    def chosen(self, step: int) -> tuple[IntArray, BoolArray]:
        """The batch, and which of it are the control arm."""
        n_control = max(1, round(CONTROL * self.batch))
        some = self.rng.choice(len(self.truth_N), 8 * self.batch, replace=False)
        a, b = self.forecast(step, some)
        good = some[np.argsort(np.abs(a / (a + b) - 0.5), kind="stable")[: 3 * self.batch]]
        n_policy = self.batch - n_control
        prompts = np.concatenate((self.rng.permutation(good)[:n_policy], some[:n_control]))
        prompts, first = np.unique(prompts, return_index=True)
        return prompts, first >= n_policy

    def chances(self, step: int, prompts: IntArray) -> FloatArray:
        """Of 0 to `SIZE` successes, to whoever knows how the run was made but not the prompts' own part, [n, 9]."""
        unknown = math.hypot(self.unknown, self.jitter) * _NODES
        centre_n = self.known_N[prompts] + self.level + self.speed * step
        rates_n_1_q = 1.0 / (1.0 + np.exp(-(centre_n[:, None, None] + unknown)))
        k = np.arange(SIZE + 1)
        ways = np.array([math.comb(SIZE, i) for i in k.tolist()])
        chances_n_k_q = ways[:, None] * rates_n_1_q ** k[:, None] * (1.0 - rates_n_1_q) ** (SIZE - k)[:, None]
        return np.asarray(chances_n_k_q @ (_WEIGHTS / _WEIGHTS.sum()))

    def step(self, step: int, fault: Fault) -> None:
        prompts, control = self.chosen(step)
        state, groups = self.state, self.categories[prompts]
        codes = self.pool.group_codes(prompts)
        entry = SelectEntry(1, step, prompts, f"s{step}", CONTROL, control, *self.forecast(step, prompts))
        fresh = state.selected_N[prompts] == 0
        state.selected_N[prompts] += 1
        state.tallies.select(entry, fresh, codes)
        state.guardrails.select(step, fresh, codes)
        if not fault.is_reported:
            return
        moved = self.level + self.speed * step + self.rng.normal(0.0, self.jitter)
        rates = 1.0 / (1.0 + np.exp(-(self.truth_N[prompts] + moved)))
        k = fault.outcome(self.rng.binomial(fault.attempts, rates).astype(np.float64), groups)
        counts = np.full(len(prompts), float(fault.attempts))
        informative = (k > 0) & (k < fault.attempts)

        def never(rows: IntArray) -> tuple[FloatArray, FloatArray]:
            raise AssertionError("all forecasts are recorded")

        met = state.tallies.observe(step, f"s{step}", prompts, k, counts, informative, codes, never)
        state.guardrails.observe(step, met, codes)
        state.watch.observe(step, met, codes)
        state.constant.observe(step, counts, met)
        state.head_step = step
        state.n_observations += len(prompts)


class Recorded:
    """One run of the whole fold over a recorded training: it chooses, and learns from what comes of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        if folder not in _WORLDS:
            _WORLDS[folder] = _in_categories(open_world(folder / TRAJECTORY))
        self.world = _WORLDS[folder]
        self.rng, self.seed = np.random.default_rng([seed, 18]), seed
        self.batch, self.pool = 64, self.world.pool()
        self.state = fold(State(), PoolEntry(1, self.world.n_prompts), self.pool)
        self.categories = np.arange(self.world.n_prompts) % N_CATEGORIES

    def step(self, step: int, fault: Fault) -> None:
        a_N, b_N = PREDICTORS["gps"].beliefs(self.state, self.pool)
        request = SelectionRequest(step=step, batch_size=self.batch, seed=self.seed)
        chosen = select(self.state, self.pool, SETTINGS, request, Forecasts.of(a_N, b_N, SIZE))
        prompts, position = chosen.choice.prompts, self.state.position
        entry = SelectEntry(position + 1, step, prompts, f"s{step}", CONTROL, chosen.choice.control, chosen.a, chosen.b)
        fold(self.state, entry, self.pool)
        if not fault.is_reported:
            return
        told = self.world.recording.outcomes(
            seed=self.seed, step=step, n_steps=FAULT_STEP + FAULTY_STEPS, group_size=fault.attempts
        )
        k = fault.outcome(told[prompts].astype(np.float64), self.categories[prompts])
        counts = np.full(len(prompts), float(fault.attempts))
        informative = (k > 0) & (k < fault.attempts)
        observed = ObserveEntry(position + 2, step, prompts, k, counts, informative, f"s{step}", step)
        fold(self.state, observed, self.pool)


_WORLDS: dict[Path, World] = {}


def _in_categories(world: World) -> World:
    """The world with its prompts dealt into categories, since the recording has none."""
    prompts = [
        prompt.model_copy(update={"category": "abcd"[i % N_CATEGORIES]})
        for i, prompt in enumerate(world.recording.prompts)
    ]
    return replace(world, recording=replace(world.recording, prompts=tuple(prompts)))


def _block(n: int, categories: IntArray) -> RawBlock:
    return RawBlock(
        first=0,
        prompt_ids=tuple(f"p{i}" for i in range(n)),
        groups=tuple("abcd"[i] for i in categories.tolist()),
        numeric=(None,) * n,
        prior_rates_N=np.full(n, np.nan, np.float32),
        surface_N_S=np.zeros((n, 0), np.float32),
        embedding_N_D=np.zeros((n, 0), np.float32),
    )


def raised(run: Simulated | Recorded, fault: Fault, n_steps: int) -> Iterator[tuple[int, tuple[Alarm, ...]]]:
    """The alarms that are on after each step."""
    for step in range(n_steps):
        run.step(step, fault if step >= FAULT_STEP else NOTHING)
        yield step, alarms(run.state, run.pool, SETTINGS)


def told_after(run: Simulated | Recorded, fault: Fault) -> float:
    """Steps with the fault until its alarm is on; infinite where it never is. A false alarm before it is none."""
    for step, found in raised(run, fault, FAULT_STEP + FAULTY_STEPS):
        if step >= FAULT_STEP and any(alarm.code in fault.codes for alarm in found):
            return step - FAULT_STEP + 1
    return math.inf


def fewest_steps(run: Simulated) -> tuple[float, float]:
    """Least mean number of steps until flipped outcomes are told: of a test that is quiet where forecasts say nothing
    of the order, and of one that knows how much they say.
    """
    told = np.zeros(2)
    for step in range(FAULT_STEP, FAULT_STEP + FAULTY_STEPS):
        right = run.chances(step, run.chosen(step)[0])
        flipped = right[:, ::-1]
        for i, quiet in enumerate((flipped.mean(axis=0), right)):
            told[i] += (flipped * np.log(flipped / quiet)).sum() / FAULTY_STEPS
    unordered, ordered = (-math.log(FALSE_ALARMS) / told).tolist()
    return unordered, ordered


def report_fewest(n: int) -> None:
    flipped = next(fault for fault in FAULTS if fault.name == "flipped outcomes")
    print(f"\nsimulated, flipped outcomes: steps until they are told and the least possible, median of {n} runs")
    print(f"{'batch':>6} {'told':>5} {'least, if quiet without order':>30} {'least, if the order is known':>29}")
    by_batch: dict[int, list[tuple[float, float, float]]] = {}
    for seed in range(n):
        run = Simulated(seed)
        by_batch.setdefault(run.batch, []).append((told_after(Simulated(seed), flipped), *fewest_steps(run)))
    for batch, steps in sorted(by_batch.items()):
        told, unordered, ordered = np.median(steps, axis=0).tolist()
        print(f"{batch:>6} {told:>5.1f} {unordered:>30.1f} {ordered:>29.1f}")


def report_quiet(runs: Iterator[Simulated | Recorded], what: str) -> None:
    started, n, loud = time.perf_counter(), 0, Counter[str]()
    n_loud = 0
    for run in runs:
        codes = {alarm.code for _, found in raised(run, NOTHING, QUIET_STEPS) for alarm in found}
        n, n_loud = n + 1, n_loud + bool(codes)
        loud.update(codes)
    seconds = time.perf_counter() - started
    print(f"\n{what}: {n_loud} of {n} quiet runs of {QUIET_STEPS} steps raised an alarm ({seconds:.0f} s)")
    for code, times in loud.most_common():
        print(f"  {code}: {times}")


def report_faults(make: Callable[[int], Simulated | Recorded], n: int, what: str) -> None:
    print(f"\n{what}: steps until the fault is told, of {n} runs each")
    print(f"{'fault':<18} {'batch':>6} {'runs':>5} {'median':>7} {'90%':>5} {'within 3':>9} {'missed':>7}")
    for fault in FAULTS:
        by_batch: dict[int, list[float]] = {}
        for seed in range(n):
            run = make(seed)
            by_batch.setdefault(run.batch, []).append(told_after(run, fault))
        for batch, delays in sorted(by_batch.items()):
            values = np.sort(delays)
            shares = f"{np.mean(values <= 3):.0%}", f"{np.mean(np.isinf(values)):.0%}"
            median, most = (values[min(int(q * len(values)), len(values) - 1)] for q in (0.5, 0.9))
            ends = f"{median:>7.0f} {most:>5.0f} {shares[0]:>9} {shares[1]:>7}"
            print(f"{fault.name:<18} {batch:>6} {len(values):>5} {ends}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quiet", type=int, default=1_000, help="simulated quiet runs")
    parser.add_argument("--faulty", type=int, default=20, help="simulated runs for each fault")
    parser.add_argument("--recorded", type=int, default=4, help="recorded runs, quiet and for each fault")
    folder = os.environ.get("EVENODDS_DATA")
    parser.add_argument("--folder", type=Path, default=Path(folder) if folder else None)
    options = parser.parse_args()
    report_faults(Simulated, options.faulty, "simulated")
    report_fewest(options.faulty)
    report_quiet((Simulated(10_000 + seed) for seed in range(options.quiet)), "simulated")
    if options.folder is not None:
        given: Path = options.folder
        report_faults(lambda seed: Recorded(given, seed), options.recorded, "recorded")
        report_quiet((Recorded(given, 10_000 + seed) for seed in range(options.recorded)), "recorded")


if __name__ == "__main__":
    main()
