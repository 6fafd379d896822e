"""GRPO from scratch, its batches chosen through the service: `make demo`.

Starts a service of its own on a free loopback port, pretrains one model per seed, trains it by each method, and writes
a table and a picture. Every finished run is kept as a file, so that a demo that was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from examples.grpo_from_scratch.grpo import pretrain
from examples.grpo_from_scratch.model import Transformer
from examples.grpo_from_scratch.report import picture, table
from examples.grpo_from_scratch.service import ServiceFailed, running_service
from examples.grpo_from_scratch.task import Levels, Problem, World
from examples.grpo_from_scratch.train import PREDICTORS, Method, Plan, Record, train
from tqdm import tqdm

from evenodds import Client, EvenOddsError


@dataclass(frozen=True, slots=True)
class Scale:
    """Model, task and training that belong together. See README.md for how they were chosen."""

    levels: Levels
    pool_size: int
    held_out: int
    width: int
    layers: int
    heads: int
    pretrain_steps: int
    pretrain_batch: int
    pretrain_rate: float
    plan: Plan


SCALES = {
    "small": Scale(
        levels=Levels(digits=10, languages=30, words=10),
        pool_size=6_000,
        held_out=512,
        width=96,
        layers=2,
        heads=4,
        pretrain_steps=400,
        pretrain_batch=64,
        pretrain_rate=2e-3,
        plan=Plan(
            steps=100,
            batch_size=8,
            group_size=8,
            learning_rate=1e-4,
            evaluate_every=5,
            refit_every=20,
            dynamic_rounds=8,
        ),
    ),
    "large": Scale(
        levels=Levels(digits=24, languages=90, words=16),
        pool_size=20_000,
        held_out=2_048,
        width=384,
        layers=6,
        heads=6,
        pretrain_steps=2_000,
        pretrain_batch=512,
        pretrain_rate=6e-4,
        plan=Plan(
            steps=300,
            batch_size=128,
            group_size=16,
            learning_rate=5e-5,
            evaluate_every=5,
            refit_every=10,
            dynamic_rounds=8,
        ),
    ),
}
"""`small` for a CPU, `large` for CUDA."""


GREEDY = "gps+cooldown_steps=0+diversity=0"
"""The highest scores, again and again: more informative groups, and less is learned."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        methods = [Method.parse(name) for name in options.methods]
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (ValueError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    scale = SCALES[options.scale or ("large" if device.type == "cuda" else "small")]
    changes = {name: value for name in ("steps", "refit_every") if (value := getattr(options, name)) is not None}
    scale = replace(scale, plan=replace(scale.plan, **changes))
    if options.pretrain_steps is not None:
        scale = replace(scale, pretrain_steps=options.pretrain_steps)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the service would outlive the demo
    options.out.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[int, Record]] = {method.name: {} for method in methods}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="evenodds-demo-") as folder,
            running_service(Path(folder)) as url,
            Client(url, timeout_seconds=60) as client,
        ):
            for seed in options.seeds:
                _run_seed(seed, methods, records, scale=scale, device=device, client=client, out=options.out)
    except (EvenOddsError, ServiceFailed, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    text = table(records)
    (options.out / "table.md").write_text(text + "\n")
    print(text)
    print(f"picture: {options.out / 'accuracy.png'}, table: {options.out / 'table.md'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="GRPO from scratch with batches chosen by Even Odds.")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*PREDICTORS, GREEDY],
        metavar="METHOD",
        help=f"any of {', '.join(PREDICTORS)}; with settings of the run as in gps+acquisition=thompson",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--device", help="torch device; CUDA where there is one")
    parser.add_argument("--scale", choices=SCALES, help="model and task; large on CUDA, else small")
    parser.add_argument("--steps", type=int, help="GRPO steps of each run")
    parser.add_argument("--pretrain-steps", type=int)
    parser.add_argument("--refit-every", type=int, metavar="STEPS", help="steps between refits of the shared model")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for results")
    return parser


def _run_seed(
    seed: int,
    methods: Sequence[Method],
    records: dict[str, dict[int, Record]],
    *,
    scale: Scale,
    device: torch.device,
    client: Client,
    out: Path,
) -> None:
    """All methods from the same pretrained model, on the same pool."""
    files = {method.name: out / f"seed-{seed}-{method.name}.json" for method in methods}
    for method in methods:
        record = _kept(files[method.name], scale)
        if record is not None:
            records[method.name][seed] = record
    missing = [method for method in methods if seed not in records[method.name]]
    if not missing:
        return
    world = World(scale.levels, seed)
    pool, held_out = world.problems(scale.pool_size, scale.held_out)
    pretrained = _pretrained(world, scale, device, out / f"seed-{seed}-pretrained.pt")
    for method in missing:
        model = copy.deepcopy(pretrained)
        with tqdm(total=scale.plan.steps, desc=f"seed {seed} {method.name}", unit="step", dynamic_ncols=True) as bar:
            records[method.name][seed] = train(
                model,
                pool,
                held_out,
                method=method,
                plan=scale.plan,
                client=client,
                run=f"seed-{seed}-{methods.index(method)}",
                seed=seed,
                each=lambda record, bar=bar: _show(bar, record),  # type: ignore[misc]  # the default binds this bar
            )
        content = {"scale": asdict(scale), "record": asdict(records[method.name][seed])}
        files[method.name].write_text(json.dumps(content))
        drawn = {name: by_seed for name, by_seed in records.items() if by_seed}
        picture(drawn, out / "accuracy.png", title=_title(scale, pretrained, pool))


def _pretrained(world: World, scale: Scale, device: torch.device, file: Path) -> Transformer:
    """The model of this world's seed, from the file if it was pretrained before."""
    torch.manual_seed(world.seed)
    model = Transformer(world.levels, width=scale.width, layers=scale.layers, heads=scale.heads).to(device)
    key = repr(
        (
            scale.levels,
            scale.width,
            scale.layers,
            scale.heads,
            scale.pretrain_steps,
            scale.pretrain_batch,
            scale.pretrain_rate,
        )
    )
    if file.exists():
        content = torch.load(file, map_location=device)
        if content["key"] == key:
            model.load_state_dict(content["state"])
            return model
    with tqdm(
        total=scale.pretrain_steps, desc=f"seed {world.seed} pretraining", unit="step", dynamic_ncols=True
    ) as bar:

        def each(loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        pretrain(
            model,
            world,
            steps=scale.pretrain_steps,
            batch_size=scale.pretrain_batch,
            learning_rate=scale.pretrain_rate,
            seed=world.seed,
            each=each,
        )
    torch.save({"key": key, "state": model.state_dict()}, file)
    return model


def _show(bar: tqdm[None], record: Record) -> None:
    """Live figures beside the progress bar."""
    recent = record.informative[-10:]
    bar.update()
    bar.set_postfix(
        accuracy=f"{record.accuracies['all'][-1]:.3f}",
        informative=f"{sum(recent) / len(recent):.2f}",
        forecast=f"{record.forecasts[-1]:.2f}",
        rollouts=f"{sum(record.rollouts):,}",
        refresh=False,
    )


def _kept(file: Path, scale: Scale) -> Record | None:
    """The record of a run of the same scale that was finished before."""
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    same = content["scale"] == json.loads(json.dumps(asdict(scale)))
    return Record(**content["record"]) if same else None


def _title(scale: Scale, model: Transformer, pool: Sequence[Problem]) -> str:
    n = sum(parameter.numel() for parameter in model.parameters())
    plan = scale.plan
    return f"{n / 1e6:.2f}M parameters, pool of {len(pool):,}, {plan.batch_size} groups of {plan.group_size} a step"


if __name__ == "__main__":
    sys.exit(main())
