"""What other models' outcomes are worth to a run: as `prior_rates` of its prompts, or as runs that it learns from.

    python -m benchmarks.known_rates FOLDER [--models k50] [--history 0 1 2 5] [--mean | --learn-from]
                                            [--adverse random] [--served]  (or EVENODDS_DATA=FOLDER)

FOLDER holds a table of models (`math_qwen_multisample`, `bigcodebench_models`). Three of its models, weak, middle and
strong, are the policy of a new run each: 128 random prompts a step, 8 attempts drawn at the recorded rates. R other
models, drawn by chance, none of the policy's own base model (the name before `@`), showed `--attempts` attempts on each
prompt beforehand. With one recorded sample a model, the policy is the mean of the ten models around the chosen one, and
none of these is among the others. The shared model is refitted before each measurement. With `--served`, all of it goes
over HTTP to `evenodds serve --with-worker` on SQLite: runs, prompts, outcomes, refits, forecasts.

Figures by visits a prompt: Spearman over the pool and over prompts never seen, log loss (nats an attempt) of the pool,
and the mean chance of an informative group among the best 256 that were never seen (256 of the forecast).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from benchmarks.contenders import Gps
from benchmarks.latency import service_process
from benchmarks.loops import log_loss
from benchmarks.rivals import Forecast
from benchmarks.worlds import World, world_of

from evenodds import Client
from evenodds_service.commands.replay.recordings import Recording, read_recording
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.prompts import NamedRates
from evenodds_service.domain.ranks import spearman
from evenodds_service.model.history import History
from evenodds_service.model.sources import Source, joined

VISITS = (0.0, 0.25, 0.5, 1.0, 2.0)
BATCH, GROUP_SIZE, BEST, AROUND = 128, 8, 256, 5
POLICIES = (0.2, 0.5, 0.8)
"""Which of the models from weak to strong are the policies."""


ADVERSE: Mapping[str, Callable[[IntArray, int, np.random.Generator], IntArray]] = {
    "random": lambda shown, attempts, chance: chance.integers(0, attempts + 1, size=shown.shape),
    "permuted": lambda shown, attempts, chance: shown[:, chance.permutation(shown.shape[1])],
    "inverted": lambda shown, attempts, chance: attempts - shown,
    "punished": lambda shown, attempts, chance: chance.binomial(shown, 0.03),
}
"""Rates by chance, of other prompts, of a verifier that takes wrong for right, of one that refuses most formats."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--history", nargs="+", type=int, default=[0, 1, 2, 5, 20], help="others, 0: none")
    parser.add_argument("--attempts", type=int, default=8, help="of each other on each prompt")
    parser.add_argument("--prompts", type=int, default=1_500, help="of the table, drawn by chance")
    parser.add_argument("--models", default="", help="only models whose name contains this, say k50")
    parser.add_argument("--mean", action="store_true", help="send the mean of the others as prior_rate instead")
    parser.add_argument("--adverse", choices=sorted(ADVERSE), help="what the others showed is made useless so")
    parser.add_argument("--learn-from", action="store_true", help="the others are runs that the run learns from")
    parser.add_argument("--served", action="store_true", help="over HTTP, by a service and its worker")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.folder is None:
        parser.error("name the folder of a table of models, or set EVENODDS_DATA")
    recording = read_recording(Path(arguments.folder), models=arguments.models)
    world = world_of(_some(recording, arguments.prompts, arguments.seed))
    if not arguments.served:
        _print(world, arguments, None)
        return
    with (
        tempfile.TemporaryDirectory(prefix="evenodds-known-rates-") as folder,
        service_process(f"sqlite:///{folder}/evenodds.db", "--with-worker") as (base_url, _),
        Client(base_url, timeout_seconds=120.0, total_seconds=400.0) as client,
    ):
        _print(world, arguments, client)


def _print(world: World, arguments: argparse.Namespace, client: Client | None) -> None:
    """The figures, over the client's service, or in this process without one."""
    sys.stdout.write("| R | figure | " + " | ".join(f"{visits:g}" for visits in VISITS) + " |\n")
    for n_others in arguments.history:
        runs = [_run(world, share, n_others, arguments, client) for share in POLICIES]
        for name in runs[0]:
            cells = np.mean([run[name] for run in runs], axis=0)
            sys.stdout.write(f"| {n_others} | {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |\n")
        sys.stdout.flush()


def _some(recording: Recording, n: int, seed: int) -> Recording:
    """The recording of n random prompts."""
    n = min(n, recording.n_prompts)
    rows = np.sort(np.random.default_rng([seed, 1]).choice(recording.n_prompts, size=n, replace=False))
    return replace(
        recording,
        prompts=tuple(recording.prompts[i] for i in rows.tolist()),
        successes_V_N=recording.successes_V_N[:, rows],
        attempts_V_N=recording.attempts_V_N[:, rows],
    )


@dataclass(frozen=True, slots=True)
class Others:
    """What other models showed.

    Attributes:
        names: R names.
        shown_R_N: How many of their attempts succeeded.
        attempts: Of each on each prompt.
    """

    names: tuple[str, ...]
    shown_R_N: IntArray
    attempts: int


class Method(Protocol):
    """A run of the product."""

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None: ...

    def refit(self, step: int) -> None: ...

    def predict(self) -> Forecast: ...


def _run(
    world: World, share: float, n_others: int, arguments: argparse.Namespace, client: Client | None
) -> dict[str, list[float]]:
    """One policy's run: each figure after so many visits a prompt."""
    recording, n = world.recording, world.n_prompts
    rates_V_N = recording.successes_V_N / recording.attempts_V_N
    chosen = round(share * (len(recording.stages) - 1))
    if recording.attempts_V_N.max() == 1:
        first = min(max(chosen - AROUND, 0), len(recording.stages) - 2 * AROUND)
        own = list(range(first, first + 2 * AROUND))
    else:
        base = _base(recording.stages[chosen])
        own = [v for v, stage in enumerate(recording.stages) if v == chosen or _base(stage) == base]
    rates_N = rates_V_N[own].mean(axis=0) if recording.attempts_V_N.max() == 1 else rates_V_N[chosen]
    chance = np.random.default_rng([arguments.seed, chosen])
    drawn = chance.permutation([v for v in range(len(recording.stages)) if v not in own])[:n_others]
    shown = chance.binomial(arguments.attempts, rates_V_N[drawn]) if n_others else np.zeros((0, n), dtype=np.int64)
    if arguments.adverse:
        shown = ADVERSE[arguments.adverse](shown, arguments.attempts, chance)
    others = Others(tuple(recording.stages[v] for v in drawn.tolist()), shown, arguments.attempts)
    told = "runs" if arguments.learn_from else "mean" if arguments.mean else "rates"
    if client is None:
        method: Method = Gps(_told(world, others, told))
    else:
        method = Served(client, f"policy-{chosen}-of-{n_others}", world, others, told)
    seen = np.zeros(n, dtype=bool)
    informative_N = 1.0 - rates_N**GROUP_SIZE - (1.0 - rates_N) ** GROUP_SIZE
    figures: dict[str, list[float]] = {name: [] for name in ("spearman", "never seen", "log loss", "best never seen")}
    step, queue = 0, chance.permutation(n)
    for visits in VISITS:
        while step * BATCH < visits * n:
            if len(queue) < BATCH:
                queue = np.concatenate((queue, np.setdiff1d(chance.permutation(n), queue)))
            prompts, queue = np.sort(queue[:BATCH]), queue[BATCH:]
            k = chance.binomial(GROUP_SIZE, rates_N[prompts]).astype(np.float64)
            method.observe(step, prompts, k, np.full(BATCH, float(GROUP_SIZE)))
            seen[prompts] = True
            step += 1
        if step:
            method.refit(step)
        measure(figures, method, seen, rates_N, informative_N)
    return figures


def _told(world: World, others: Others, told: str) -> World:
    """The world of a run that is told what others showed: as runs, as the mean of their rates, or as rates by name."""
    rates_N_R = others.shown_R_N.T / others.attempts
    if not others.names:
        return world
    if told == "runs":
        return _learning(world, others.names, others.shown_R_N.astype(np.float64), np.float64(others.attempts))
    if told == "mean":
        return replace(world, prior_rates_N=rates_N_R.mean(axis=1))
    counts = np.full(rates_N_R.shape, others.attempts, dtype=np.float32)
    return replace(world, named_rates=NamedRates(others.names, rates_N_R.astype(np.float32), counts))


class Served:
    """The same as a run of a service with its worker, over HTTP."""

    def __init__(self, client: Client, run: str, world: World, others: Others, told: str) -> None:
        self._client, self._run = client, run
        self._ids = [str(prompt.prompt_id) for prompt in world.recording.prompts]
        prompts: list[dict[str, object]] = [
            {"prompt_id": prompt_id, "text": text} for prompt_id, text in zip(self._ids, world.texts, strict=True)
        ]
        rates_R_N = others.shown_R_N / others.attempts
        everyone = np.arange(len(prompts))
        sources = [f"{run}.{i}" for i in range(len(others.names))] if told == "runs" else []
        for source, shown_N in zip(sources, others.shown_R_N, strict=False):
            client.put_run(source, group_size=GROUP_SIZE)
            client.add_prompts(source, prompts)
            self._report(source, 0, everyone, shown_N, np.full(len(everyone), others.attempts))
        for i, prompt in enumerate(prompts):
            if others.names and told == "mean":
                prompt["prior_rate"] = float(rates_R_N[:, i].mean())
            elif others.names and told == "rates":
                shown = zip(others.names, others.shown_R_N[:, i].tolist(), strict=True)
                prompt["prior_rates"] = {name: {"successes": k, "attempts": others.attempts} for name, k in shown}
            category = world.recording.prompts[i].category
            if category is not None:
                prompt["category"] = category
        client.put_run(run, group_size=GROUP_SIZE, learn_from=sources)
        client.add_prompts(run, prompts)
        if sources:
            self.refit(0)

    def observe(self, step: int, prompts: IntArray, successes: FloatArray, attempts: FloatArray) -> None:
        self._report(self._run, step, prompts, successes, attempts)

    def _report(self, run: str, step: int, prompts: IntArray, k: FloatArray | IntArray, n: FloatArray) -> None:
        rows = zip(prompts.tolist(), k.tolist(), n.tolist(), strict=True)
        told = [{"prompt_id": self._ids[i], "successes": k, "attempts": int(n)} for i, k, n in rows]
        self._client.observe(run, step, told)

    def refit(self, step: int) -> None:
        """Have the worker fit on all that was reported."""
        while (refit := self._client.refit(self._run, wait_seconds=300.0)).status in ("pending", "running"):
            pass  # the sources' refits may come first
        if refit.status != "done":
            raise SystemExit(f"the refit of {self._run} at step {step} is {refit.status}: {refit.error}")

    def predict(self) -> Forecast:
        said = self._client.predict(self._run, self._ids).predictions
        return Forecast(
            np.array([each.success_rate for each in said]), np.array([each.informative_probability for each in said])
        )


def _learning(world: World, names: Sequence[str], shown_R_N: FloatArray, attempts: np.float64) -> World:
    """The world of a run that learns from others, each of which was evaluated on all prompts."""
    n = world.n_prompts
    keys, counts = np.arange(1, n + 1), np.full(n, attempts)
    sources = []
    for name, k in zip(names, shown_R_N, strict=True):
        history = History(np.arange(n), np.zeros(n, dtype=np.int64), k, counts, (k > 0) & (k < counts))
        sources.append(Source(name, keys, history))
    return replace(world, sources=joined(keys, [], sources))


def measure(
    figures: dict[str, list[float]], method: Method, seen: BoolArray, rates_N: FloatArray, informative_N: FloatArray
) -> None:
    """Append each figure as it stands now."""
    forecast, never = method.predict(), np.flatnonzero(~seen)
    best: IntArray = never[np.argsort(-forecast.informative_N[never], kind="stable")[:BEST]]
    figures["spearman"].append(spearman(forecast.mean_N, rates_N))
    figures["never seen"].append(spearman(forecast.mean_N[never], rates_N[never]) if len(never) > BEST else np.nan)
    figures["log loss"].append(log_loss(forecast.mean_N, rates_N))
    figures["best never seen"].append(float(informative_N[best].mean()) if len(never) > BEST else np.nan)


def _base(stage: str) -> str:
    return stage.partition("@")[0]


if __name__ == "__main__":
    main()
