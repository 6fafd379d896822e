"""Rules of choice judged by trainings, in regimes: whole GRPO runs of the small demo's tasks and model, in process.

    python -m benchmarks.trainings run OUT [--regimes a b c d e f g] [--arms uniform dynamic gps ...] [--seeds 200-211]
    python -m benchmarks.trainings report OUT [--results NAME]

`run` trains one model for each regime, arm and seed, saves every run as a file under OUT when it is done and passes
over those that are there, so that it may be stopped at any time. `report` makes tables and the picture of what is
there. Paired: of one seed all arms meet the same pretrained model, pool and held-out problems. No HTTP: an arm is
driven through the service's own fold and choice (`arms`).

Seeds 101 to 104 and 200 to 211 are for tuning; what is reported is measured on others (0 to 11), and no choice is made
by them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from benchmarks.arms import RIVALS, Arm, arm_named
from benchmarks.worlds import World
from examples.grpo_from_scratch.grpo import Rollouts, pretrain
from examples.grpo_from_scratch.model import Transformer
from examples.grpo_from_scratch.native import policy_of
from examples.grpo_from_scratch.run import SCALES
from examples.grpo_from_scratch.task import PAD, WORD, WORDS, Levels, Operations, Problem
from examples.grpo_from_scratch.task import World as Lessons
from scipy import sparse

from benchmarks import trainings_report
from evenodds import PromptIn
from evenodds_service.commands.replay.recordings import Recording
from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.settings import BUILTIN
from evenodds_service.model.embedder import open_embedder
from evenodds_service.model.ngrams import ngram_matrix
from evenodds_service.model.surface import surface_features

SCALE = SCALES["small"]
GROUP_SIZE = SCALE.plan.group_size
HELD_OUT, OF_ANOTHER_KIND = 320, 128
WITHHELD = 0.2
"""Share of the languages, or of the operations, that no pool holds: the held-out problems of another kind."""

MOST_WAVES = 8
SIBLING_ATTEMPTS = 8
_SIBLING_SEED = 10_000


@dataclass(frozen=True, slots=True)
class Task:
    """A family of worlds and how a model is pretrained for it."""

    name: str
    levels: Levels
    lessons: Callable[[Levels, int], Lessons]
    pretrain_steps: int


SORT = Task("sort", SCALE.levels, Lessons, SCALE.pretrain_steps)
OPS = Task("ops", Levels(digits=10, languages=1, words=1), Operations, 800)


@dataclass(frozen=True, slots=True)
class Regime:
    """Under which conditions a policy is trained.

    Attributes:
        delay: A batch's outcomes are known, and its update made, so many steps after it was rolled out.
        has_sibling: At the start, eight attempts at each prompt by another model of the same corpus are known.
        same_as: The regime whose runs serve for arms that do not read what is known at the start.
    """

    name: str
    title: str
    task: Task
    batch_size: int
    pool_size: int
    steps: int
    evaluate_every: int = 5
    delay: int = 0
    has_sibling: bool = False
    same_as: str = ""


REGIMES: Mapping[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime("a", "sort, B 8, pool 6,000", SORT, 8, 6_000, 60),
        Regime("b", "sort, B 32, pool 50,000", SORT, 32, 50_000, 60),
        Regime("c", "sort, B 8, pool 300", SORT, 8, 300, 200, evaluate_every=10),
        Regime("d", "ops, B 8, pool 6,000", OPS, 8, 6_000, 60),
        Regime("e", "as a, outcomes late by 2 steps", SORT, 8, 6_000, 60, delay=2),
        Regime("f", "as a, with a sibling's outcomes", SORT, 8, 6_000, 60, has_sibling=True, same_as="a"),
        Regime("g", "sort, B 32, pool 320", SORT, 32, 320, 60),
    )
}


@dataclass(slots=True)
class Run:
    """What a run showed.

    Attributes:
        evaluated_at: Steps done before each evaluation.
        accuracy, of_another_kind: Mean probability of the right answer at each evaluation, on held-out problems of the
            pool's kind and of another.
        groups, informative, updated, tokens: By step: groups rolled out, informative ones, those that an update was
            paid for, answer tokens drawn.
        forecasts: Of the informative share, by step.
        distinct: Different prompts rolled out.
        repeats: Share of the groups whose prompt had been rolled out before.
        seconds: Of choosing, observing and predicting; of all.
    """

    evaluated_at: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    of_another_kind: list[float] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    informative: list[int] = field(default_factory=list)
    updated: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    forecasts: list[float] = field(default_factory=list)
    distinct: int = 0
    repeats: float = 0.0
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])


@dataclass
class Class:
    """What all arms of a regime and seed have in common: pool, held-out problems, pretrained model."""

    regime: Regime
    seed: int
    models: Path
    with_ngrams: bool = False

    @cached_property
    def lessons(self) -> Lessons:
        return self.regime.task.lessons(self.regime.task.levels, self.seed)

    @cached_property
    def problems(self) -> tuple[list[Problem], list[Problem], list[Problem]]:
        """The pool, held-out problems of its kind, and such of another kind."""
        n = self.regime.pool_size + HELD_OUT
        drawn, _ = self.lessons.problems(round(1.35 * n) + 4 * OF_ANOTHER_KIND, 0)
        within = [problem for problem in drawn if not is_withheld(problem, self.lessons.levels)]
        without = [problem for problem in drawn if is_withheld(problem, self.lessons.levels)]
        return within[HELD_OUT:n], within[:HELD_OUT], without[:OF_ANOTHER_KIND]

    @cached_property
    def pretrained(self) -> Transformer:
        return pretrained(self.regime.task, self.lessons, self.models, seed=self.seed)

    @cached_property
    def world(self) -> World:
        """The pool with its features, as the service holds it."""
        pool = self.problems[0]
        n, texts = len(pool), tuple(problem.text for problem in pool)
        prompts = tuple(PromptIn(prompt_id=str(i), text=p.text, group=p.group) for i, p in enumerate(pool))
        nothing = np.zeros((1, n), dtype=np.int64)
        return World(
            recording=Recording("training", "static", prompts, 0, nothing, nothing + 1, ("the policy",)),
            texts=texts,
            surface_N_S=surface_features(texts),
            embeddings_N_D=open_embedder(BUILTIN).embed(texts),
            ngrams=ngram_matrix(texts) if self.with_ngrams else sparse.csr_matrix((n, 0)),
            group_size=GROUP_SIZE,
            prior_rates_N=self._sibling_rates() if self.regime.has_sibling else None,
        )

    def _sibling_rates(self) -> FloatArray:
        """Mean of eight attempts of the sibling on each prompt, a success and a failure added."""
        sibling = pretrained(self.regime.task, self.lessons, self.models, seed=self.seed + _SIBLING_SEED)
        rates = np.clip(policy_of(sibling, self.models).success_rates(self.problems[0]), 0.0, 1.0)
        successes = np.random.default_rng([self.seed, _SIBLING_SEED]).binomial(SIBLING_ATTEMPTS, rates)
        return np.asarray((successes + 1.0) / (SIBLING_ATTEMPTS + 2.0))


def is_withheld(problem: Problem, levels: Levels) -> bool:
    """Whether the problem is of a kind that pools do not have: a withheld language or operation."""
    words = [token - WORD for token in problem.question if token >= WORD]
    if not words:
        return False
    if problem.group == "translate":
        return words[0] // WORDS < WITHHELD * levels.languages
    return words[0] < WITHHELD * levels.languages * WORDS


def pretrained(task: Task, lessons: Lessons, folder: Path, *, seed: int) -> Transformer:
    """A model that learned the corpus, from the folder if it is there. `seed` is of its weights and its corpus."""
    file = folder / f"{task.name}-{seed}.pt"
    torch.manual_seed(seed)
    model = Transformer(lessons.levels, width=SCALE.width, layers=SCALE.layers, heads=SCALE.heads)
    if file.exists():
        model.load_state_dict(torch.load(file))
        return model
    batch_size, rate = SCALE.pretrain_batch, SCALE.pretrain_rate
    pretrain(model, lessons, steps=task.pretrain_steps, batch_size=batch_size, learning_rate=rate, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), partial)
    partial.replace(file)
    return model


@dataclass
class Training:
    """One run in its course. It is the `arms.Course` of its arm."""

    lesson: Class
    arm: Arm

    def __post_init__(self) -> None:
        self.world, self.seed, self.batch_size = self.lesson.world, self.lesson.seed, self.lesson.regime.batch_size
        self._policy = policy_of(self.lesson.pretrained, self.lesson.models)
        self._method = self.arm.make(self)
        self._seen = np.zeros(self.world.n_prompts, dtype=np.int64)

    def rates(self, prompts: IntArray) -> FloatArray:
        """Exact success rates of these prompts under the policy as it is now, [n]."""
        return self._policy.success_rates(self._problems(prompts))

    def run(self) -> Run:
        """Train to the end."""
        regime, run = self.lesson.regime, Run()
        started = time.perf_counter()
        late: deque[tuple[int, IntArray, Rollouts]] = deque()
        self._evaluate(run)
        for step in range(regime.steps):
            prompts, rollouts = self._roll_out(step, run)
            late.append((step, prompts, rollouts))
            if len(late) > regime.delay:
                self._learn(*late.popleft(), n_updates=step - regime.delay, run=run)
            if (step + 1) % regime.evaluate_every == 0:
                self._evaluate(run)
        run.distinct = int((self._seen > 0).sum())
        run.repeats = float(1.0 - run.distinct / self._seen.sum())
        run.seconds[1] = time.perf_counter() - started
        return run

    def _roll_out(self, step: int, run: Run) -> tuple[IntArray, Rollouts]:
        """Choose this step's prompts and attempt them, in waves where the arm says so."""
        generator = np.random.default_rng([self.seed, step])
        chosen: list[IntArray] = []
        parts: list[Rollouts] = []
        forecasts: list[FloatArray] = []
        candidates, n_found = np.arange(self.world.n_prompts), 0
        while not parts or (self.arm.in_waves and n_found < self.batch_size and len(parts) < MOST_WAVES):
            if len(candidates) < self.batch_size:
                break
            started = time.perf_counter()
            prompts = self._method.select(candidates, self.batch_size, step=step, generator=generator)
            forecasts.append(self._method.predict().informative_N[prompts])
            run.seconds[0] += time.perf_counter() - started
            chance = MOST_WAVES * (1_000 * self.seed + step) + len(parts)
            parts.append(self._policy.roll_out(self._problems(prompts), group_size=GROUP_SIZE, seed=chance))
            chosen.append(prompts)
            n_found += int(parts[-1].informative.sum())
            if self.arm.in_waves:
                candidates = np.setdiff1d(candidates, prompts, assume_unique=True)
        prompts, rollouts = np.concatenate(chosen), Rollouts.joined(parts)
        np.add.at(self._seen, prompts, 1)
        run.groups.append(len(prompts))
        run.informative.append(n_found)
        run.tokens.append(int((rollouts.answers != PAD).sum()))
        run.forecasts.append(float(np.concatenate(forecasts).mean()))
        return prompts, rollouts

    def _learn(self, step: int, prompts: IntArray, rollouts: Rollouts, *, n_updates: int, run: Run) -> None:
        """Update the policy and tell the arm. The learning rate warms up over ten updates, as in the demo."""
        moving = rollouts
        if self.arm.keeps_informative:
            moving = rollouts.only(rollouts.informative.nonzero()[:, 0])
            if self.arm.in_waves:
                moving = moving.only(torch.arange(min(self.batch_size, len(moving.problems))))
        run.updated.append(len(moving.problems))
        rate = SCALE.plan.learning_rate * min(1.0, 0.1 + 0.09 * n_updates)
        self._policy.step(moving, learning_rate=rate, n_groups=max(self.batch_size, len(moving.problems)))
        started = time.perf_counter()
        successes = rollouts.rewards.sum(1).double().numpy()
        self._method.observe(step, prompts, successes, np.full(len(prompts), float(GROUP_SIZE)))
        run.seconds[0] += time.perf_counter() - started

    def _evaluate(self, run: Run) -> None:
        _, held_out, of_another_kind = self.lesson.problems
        run.evaluated_at.append(len(run.groups))
        run.accuracy.append(float(self._policy.success_rates(held_out).mean()))
        run.of_another_kind.append(float(self._policy.success_rates(of_another_kind).mean()))

    def _problems(self, prompts: IntArray) -> list[Problem]:
        pool = self.lesson.problems[0]
        return [pool[i] for i in prompts.tolist()]


def file_of(out: Path, regime: Regime, arm: Arm, seed: int) -> Path:
    """Where the run is kept. An arm that does not read what is known shares its runs with the regime without it."""
    name = regime.name if arm.reads_prior or not regime.same_as else regime.same_as
    return out / name / arm.name / f"{seed}.json"


def load(file: Path) -> Run | None:
    """The run, if it was finished."""
    return Run(**json.loads(file.read_text())) if file.exists() else None


def run_seed(out: Path, regime: Regime, arms: Sequence[str], seed: int) -> Iterator[str]:
    """Train what is missing of these arms in this regime, and say of each run how it went."""
    every = [arm_named(name) for name in arms]
    missing = [arm for arm in every if not file_of(out, regime, arm, seed).exists()]
    if not missing:
        return
    with_ngrams = any("refit=1" in arm.name for arm in missing)
    lesson = Class(regime, seed, out / "models", with_ngrams=with_ngrams)
    for arm in missing:
        file = file_of(out, regime, arm, seed)
        result = Training(lesson, arm).run()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(dataclasses.asdict(result)))
        partial.replace(file)
        yield (
            f"{regime.name} {arm.name} seed {seed}: accuracy {result.accuracy[0]:.3f} -> {result.accuracy[-1]:.3f}, "
            f"{sum(result.groups):,} groups, informative {sum(result.informative) / sum(result.groups):.2f}, "
            f"{result.seconds[1]:.1f} s ({result.seconds[0]:.1f} s of choice)"
        )


def seeds_of(text: str) -> list[int]:
    """`200-203,207` -> 200, 201, 202, 203, 207.

    Raises:
        ValueError: not of that form.
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"seeds {text!r} are not of the form 200-203,207")
    bounds = [part.split("-") for part in text.split(",")]
    return [seed for first, *last in bounds for seed in range(int(first), int(last[0] if last else first) + 1)]


def _work(out: Path, regime: str, arms: Sequence[str], seed: int) -> None:
    torch.set_num_threads(1)
    for line in run_seed(out, REGIMES[regime], arms, seed):
        print(line, flush=True)
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # the command was killed: nobody else ends this process


def run(options: argparse.Namespace) -> None:
    """Train all that was asked for, seed by seed, so that all arms and regimes grow together."""
    for name in options.arms:
        arm_named(name)  # all errors before the first hour
    # One thread in each matrix product; the processes are started with it.
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [
            pool.submit(_work, options.out, regime, options.arms, seed)
            for seed in options.seeds
            for regime in options.regimes
        ]
        for each in waiting:
            each.result()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rules of choice judged by trainings, in regimes.")
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="train what is missing")
    running.add_argument("--arms", nargs="+", default=[*RIVALS, "gps"], metavar="ARM")
    running.add_argument("--seeds", type=seeds_of, default=seeds_of("200-211"), help="as in 200-203,207")
    running.add_argument("--jobs", type=int, default=1, help="processes")
    running.set_defaults(do=run)
    reporting = commands.add_parser("report", help="tables and picture of what is there")
    reporting.add_argument("--arms", nargs="+", metavar="ARM", help="in this order; all that are there by default")
    reporting.add_argument("--seeds", type=seeds_of, help="all by default")
    reporting.add_argument("--results", type=Path, help="write NAME.md and NAME.png, or else print")
    reporting.set_defaults(do=report)
    for command in (running, reporting):
        command.add_argument("out", type=Path, help="folder of the runs")
        command.add_argument("--regimes", nargs="+", default=[*REGIMES], choices=REGIMES)
    options = parser.parse_args(arguments)
    options.do(options)


def report(options: argparse.Namespace) -> None:
    """Tables, and the picture where a name for it is given."""
    by_regime = {}
    for regime in (REGIMES[name] for name in options.regimes):
        arms = [arm_named(name) for name in options.arms or _arms_in(options.out, regime)]
        runs = {
            arm.name: {seed: run for seed, file in _files(options.out, regime, arm) if (run := load(file)) is not None}
            for arm in arms
        }
        if options.seeds is not None:
            runs = {arm: {seed: run for seed, run in of.items() if seed in options.seeds} for arm, of in runs.items()}
        if runs.get(trainings_report.BASELINE):
            by_regime[regime.name] = runs
    names = options.arms or list(dict.fromkeys(arm for runs in by_regime.values() for arm in runs))
    titles = {name: regime.title for name, regime in REGIMES.items()}
    trainings_report.write(by_regime, titles, names, options.results)


def _arms_in(out: Path, regime: Regime) -> list[str]:
    """The arms that have runs there, the baseline first."""
    names = {folder.name for each in (regime.name, regime.same_as) if each for folder in (out / each).glob("*")}
    here = [name for name in names if any(True for _ in _files(out, regime, arm_named(name)))]
    return sorted(here, key=lambda name: (name not in RIVALS, list(RIVALS).index(name) if name in RIVALS else 0, name))


def _files(out: Path, regime: Regime, arm: Arm) -> Iterator[tuple[int, Path]]:
    for file in sorted(file_of(out, regime, arm, 0).parent.glob("*.json")):
        yield int(file.stem), file


if __name__ == "__main__":
    main()
