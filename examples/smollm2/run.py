"""GRPO on SmolLM2-135M, its batches chosen through the service: `make demo-llm`.

Starts a service of its own over a database in the results folder, warms the model up once, and trains it by each arm
from the same weights. All is kept in that folder: a demo that was killed at any time goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.trainings_report import write
from examples.grpo_from_scratch.service import ServiceFailed, running_service
from examples.smollm2.model import Policy, save, saved_model, smollm2
from examples.smollm2.report import WINDOW, forecasts
from examples.smollm2.task import SHOTS, Problems, problems
from examples.smollm2.train import ARMS, Arm, Files, Plan, Record, train, warm_up
from tqdm import tqdm

from evenodds import Client, EvenOddsError


@dataclass(frozen=True, slots=True)
class Scale:
    """Problems and warm-up. See README.md for how they were chosen."""

    n_pool: int = 2_000
    n_held_out: int = 200
    n_of_another_kind: int = 40
    warm_up_steps: int = 10


class DifferentPlan(RuntimeError):
    """The folder holds runs of another plan."""


class FolderInUse(RuntimeError):
    """Another demo works in the folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the service would outlive the demo
    try:
        demo = _demo(options)
        if not options.report:
            with _locked(options.out):
                demo.run(
                    [*dict.fromkeys(options.seeds)],
                    [ARMS[name] for name in options.arms],
                    keeps_checkpoints=options.keep,
                )
    except (EvenOddsError, ServiceFailed, ValueError, RuntimeError) as error:
        print(f"demo-llm: {error}", file=sys.stderr)
        return 1
    demo.report(options.arms)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="GRPO on SmolLM2-135M with batches chosen by Even Odds.")
    plan = Plan()
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3], metavar="SEED")
    parser.add_argument("--steps", type=int, default=plan.steps, help=f"of each run; {plan.steps} by default")
    parser.add_argument("--batch-size", type=int, default=plan.batch_size, help="groups of a step")
    parser.add_argument("--group-size", type=int, default=plan.group_size, help="attempts of a group")
    parser.add_argument(
        "--checkpoint-every", type=int, default=plan.checkpoint_every, metavar="STEPS", help="0 for no checkpoints"
    )
    parser.add_argument("--pool", type=int, default=Scale().n_pool, help="problems to choose among")
    parser.add_argument("--held-out", type=int, default=Scale().n_held_out, help="problems to be judged by")
    parser.add_argument("--device", help="torch device; CUDA where there is one")
    parser.add_argument("--out", type=Path, default=Path("demo-llm-results"), help="folder for results")
    parser.add_argument("--keep", action="store_true", help="keep the last checkpoints: more --steps go on from them")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is there")
    return parser


def _demo(options: argparse.Namespace) -> Demo:
    plan = Plan(
        steps=options.steps,
        batch_size=options.batch_size,
        group_size=options.group_size,
        checkpoint_every=options.checkpoint_every,
    )
    if plan.steps < 1 or plan.steps % plan.evaluate_every:
        raise ValueError(
            f"--steps {plan.steps} must be a positive multiple of {plan.evaluate_every}: so often is judged"
        )
    if plan.checkpoint_every < 0:
        raise ValueError(f"--checkpoint-every {plan.checkpoint_every} must be 0 or more: it is a number of steps")
    scale = Scale(n_pool=options.pool, n_held_out=options.held_out)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    siblings = [name for name in options.arms if ARMS[name].has_sibling]
    if siblings and not options.report and len(set(options.seeds)) < 2:
        raise ValueError(f"arm {siblings[0]!r} learns from another seed's uniform run: name two --seeds or more")
    return Demo(options.out, plan, scale, device)


@dataclass(frozen=True, slots=True)
class Demo:
    """All runs of a folder."""

    out: Path
    plan: Plan
    scale: Scale
    device: torch.device

    def run(self, seeds: Sequence[int], arms: Sequence[Arm], *, keeps_checkpoints: bool) -> None:
        """Train what is missing: seed by seed, so that arms can be compared; what needs a sibling comes last.

        The sibling of a seed is the next one of those given.
        """
        waiting = [(seed, arm) for seed in seeds for arm in arms if not arm.has_sibling]
        waiting += [(seed, ARMS["uniform"]) for seed in seeds if any(arm.has_sibling for arm in arms)]
        waiting += [(seed, arm) for seed in seeds for arm in arms if arm.has_sibling]
        missing = [each for each in dict.fromkeys(waiting) if not self._is_done(*each)]
        if not missing:
            return
        self._remember_plan()
        scale, size = self.scale, self.plan.batch_size
        every = problems(
            n_pool=scale.n_pool,
            n_held_out=scale.n_held_out,
            n_of_another_kind=scale.n_of_another_kind,
            n_warm_up=scale.warm_up_steps * size,
        )
        self._warmed_up(every)
        folder = self.out / "service"
        folder.mkdir(exist_ok=True)
        with running_service(folder) as url, Client(url, timeout_seconds=300) as client:
            for seed, arm in missing:
                sibling = seeds[(seeds.index(seed) + 1) % len(seeds)]
                self._train(
                    seed,
                    arm,
                    every,
                    client=client,
                    sibling=sibling if arm.has_sibling else None,
                    keeps_last=keeps_checkpoints,
                )
                if not keeps_checkpoints:
                    Files.of(self.out, arm, seed).checkpoint.unlink(missing_ok=True)

    def report(self, arms: Sequence[str]) -> None:
        """Table and picture of the finished runs, and how far the others are."""
        runs: dict[str, dict[int, Record]] = {}
        for arm in arms:
            for file in sorted((self.out / "runs" / arm).glob("*.json")):
                record = Files.of(self.out, ARMS[arm], int(file.stem)).load()
                if record is None or len(record.groups) < self.plan.steps:
                    print(f"{arm} seed {file.stem}: {len(record.groups) if record else 0} of {self.plan.steps} steps")
                    continue
                runs.setdefault(arm, {})[int(file.stem)] = _cut(record, self.plan.steps)
        if not runs.get("uniform"):
            print("no uniform run is finished, with which others could be compared")
            return
        plan, scale = self.plan, self.scale
        title = f"SmolLM2-135M, B {plan.batch_size}, G {plan.group_size}, pool {scale.n_pool:,}"
        write({"llm": runs}, {"llm": title}, arms, self.out / "report")
        text = f"Informative share / its forecast / mean reward, by {WINDOW} steps:\n\n{forecasts(runs, arms)}\n"
        print(text)
        with (self.out / "report.md").open("a") as table:
            table.write(f"\n{text}")
        print(f"picture: {self.out / 'report.png'}, table: {self.out / 'report.md'}")

    def _is_done(self, seed: int, arm: Arm) -> bool:
        record = Files.of(self.out, arm, seed).load()
        return record is not None and len(record.groups) >= self.plan.steps

    def _train(
        self, seed: int, arm: Arm, every: Problems, *, client: Client, sibling: int | None, keeps_last: bool
    ) -> None:
        policy = self._policy(saved_model(self.out / "warmed-up"))
        with tqdm(total=self.plan.steps, desc=f"{arm.name} seed {seed}", unit="step", dynamic_ncols=True) as bar:
            train(
                policy,
                every,
                arm=arm,
                plan=self.plan,
                client=client,
                seed=seed,
                files=Files.of(self.out, arm, seed),
                learn_from=None if sibling is None else ARMS["uniform"].run_name(sibling),
                keeps_last=keeps_last,
                each=lambda record: _show(bar, record),
            )

    def _warmed_up(self, every: Problems) -> None:
        """Have the weights that all runs start with, in their folder."""
        folder = self.out / "warmed-up"
        if folder.exists():
            return
        model, tokenizer = smollm2(self.out / "model")
        steps = self.scale.warm_up_steps
        with tqdm(total=steps, desc="warm-up", unit="step", dynamic_ncols=True) as bar:
            policy = self._policy((model, tokenizer))
            warm_up(policy, every, plan=self.plan, steps=steps, each=bar.update)
        save(model, tokenizer, folder)

    def _policy(self, opened: tuple[Any, Any]) -> Policy:
        model, tokenizer = opened
        return Policy(model.to(self.device), tokenizer, SHOTS)

    def _remember_plan(self) -> None:
        """Runs of different plans cannot be compared: one folder, one plan. More steps are the same plan."""
        alike = {"steps", "checkpoint_every"}  # what may differ: a run shows the same
        plan = {name: value for name, value in dataclasses.asdict(self.plan).items() if name not in alike}
        now = {**plan, **dataclasses.asdict(self.scale)}
        file = self.out / "plan.json"
        if not file.exists():
            file.write_text(json.dumps(now))
        before = json.loads(file.read_text())
        other = [
            f"{name} {before.get(name)} and not {value}" for name, value in now.items() if before.get(name) != value
        ]
        if other:
            raise DifferentPlan(f"{self.out} holds runs with {', '.join(other)}: name another folder by --out")


def _cut(record: Record, steps: int) -> Record:
    """The first steps of a run that was longer."""
    n = sum(at <= steps for at in record.evaluated_at)
    by_evaluation = {"evaluated_at", "accuracy", "of_another_kind"}
    cut = {
        name: value[: n if name in by_evaluation else steps]
        for name, value in dataclasses.asdict(record).items()
        if name != "by_kind"
    }
    return Record(**cut, by_kind={kind: rates[:n] for kind, rates in record.by_kind.items()})


def _show(bar: tqdm[None], record: Record) -> None:
    """Live figures beside the progress bar."""
    bar.update(len(record.groups) - bar.n)
    recent = slice(-10, None)
    bar.set_postfix(
        accuracy=f"{record.accuracy[-1]:.3f}",
        informative=f"{sum(record.informative[recent]) / sum(record.groups[recent]):.2f}",
        forecast=f"{sum(record.forecasts[recent]) / len(record.forecasts[recent]):.2f}",
        rollouts=f"{sum(record.groups):,} groups",
        refresh=False,
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(
                f"{out} is in use by another demo: wait for it, or name another folder by --out"
            ) from None
        yield


if __name__ == "__main__":
    sys.exit(main())
