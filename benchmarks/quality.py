"""How well prompts are predicted and chosen, against the rivals, in process.

    python -m benchmarks.quality [FOLDER] [--seeds 3] [--only PART] [--quick]        (or EVENODDS_DATA=FOLDER)

FOLDER holds the data sets. Each part replays recorded outcomes: in the open loop random prompts are observed and the
next step is predicted, in the closed loop each method chooses its batches. All methods meet the same outcomes. Writes
`benchmarks/results/PART.md`, `.json` and `.png`.

Which data chose what: the settings of `gps` were chosen on `math_qwen_multisample` and `reasoning_gym_models`, whose
figures flatter it; nothing was chosen on `dsr_sub_rl_trajectory` and `deepscaler_qwen25math7b_k128`. The rivals have
their published settings.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.answering import AnsweringPolicy
from benchmarks.contenders import Gps, GpsPaper, LookingAt, Parts
from benchmarks.loops import EPOCHS, Stages, closed_loop, open_loop, thirds
from benchmarks.rivals import DPS, Arcus, Method, MoPPS, Uniform
from benchmarks.worlds import LARGE, MATH, TASKS, TRAJECTORY, World, learning_from, open_world

from benchmarks import report
from evenodds_service.commands.replay.driving import Plan
from evenodds_service.commands.replay.recordings import read_recording
from evenodds_service.domain.learning.mixture import MEMORIES, PRIORS

Make = Callable[[World, int], Method]

RIVALS: Mapping[str, Make] = {
    "uniform": lambda world, seed: Uniform(world.n_prompts),
    "dynamic sampling": lambda world, seed: Uniform(world.n_prompts),
    "MoPPS": lambda world, seed: MoPPS(world.n_prompts, world.group_size),
    "MoPPS, decay .5": lambda world, seed: MoPPS(world.n_prompts, world.group_size, decay=0.5),
    "MoPPS, yield score": lambda world, seed: MoPPS(world.n_prompts, world.group_size, score="yield"),
    "DPS": lambda world, seed: DPS(world.n_prompts),
    "ARCUS-like": lambda world, seed: Arcus(world.n_prompts, world.group_size),
    "ARCUS-like, greedy": lambda world, seed: Arcus(world.n_prompts, world.group_size, temperature=0.0),
    "gps-paper": lambda world, seed: GpsPaper(world, seed=seed),
}
REFIT_EVERY = 4
HISTORY_ATTEMPTS = 8
GREEDY = Parts(diversity=0.0, rest=False)
"""The highest scores, again and again: what recorded rates reward, which do not answer to the choice."""
GPS: Mapping[str, Make] = {
    "gps": lambda world, seed: Gps(world, Parts(refit_every=REFIT_EVERY)),
    "gps, streaming only": lambda world, seed: Gps(world),
    "gps, greedy": lambda world, seed: Gps(world, replace(GREEDY, refit_every=REFIT_EVERY)),
}
FILLS_BATCH = "dynamic sampling"
CHOICE_ONLY = (FILLS_BATCH, "MoPPS, yield score", "ARCUS-like, greedy", "gps, greedy")
"""Methods that predict as another one of the table does: they have no row in the open loop."""
HELD_OUT_TASKS = 0.2
LOOKED_AT = {"all": 1_000_000, "an eighth": 3_640, "a sixteenth": 1_820}
ANSWERING_STEPS = 60
ANSWERED = ("uniform", FILLS_BATCH, "MoPPS", "MoPPS, yield score", "ARCUS-like, greedy", "DPS", "gps", "gps, greedy")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prediction and choice against the rivals, in process.")
    parser.add_argument("folder", nargs="?", type=Path, default=os.environ.get("EVENODDS_DATA"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="a part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="one seed, and without gps-paper, which takes most time")
    arguments = parser.parse_args()
    if arguments.folder is None:
        parser.error("name the folder of the data sets, or set EVENODDS_DATA")
    seeds = 1 if arguments.quick else arguments.seeds
    rivals = {name: make for name, make in RIVALS.items() if not (arguments.quick and name == "gps-paper")}
    for name in arguments.only or PARTS:
        started = time.perf_counter()
        tables = PARTS[name](Path(arguments.folder), {**GPS, **rivals}, seeds)
        report.write(name, tables, seeds=seeds)
        print(f"\n({name}: {time.perf_counter() - started:,.0f} s)\n", flush=True)


def trajectory(folder: Path, methods: Mapping[str, Make], seeds: int) -> list[report.Table]:
    world = open_world(folder / TRAJECTORY)
    few, many = plan_of(world, 44, 32), plan_of(world, 44, 128, candidates=512)
    return [
        open_table("32 random prompts observed a step, 1.2 visits a prompt", world, few, methods, seeds, EPOCHS),
        open_table("128 random prompts observed a step, 4.7 visits a prompt", world, many, methods, seeds, EPOCHS),
        closed_table("32 of the whole pool", world, few, methods, seeds),
        closed_table("128 of 512 random candidates", world, many, methods, seeds),
    ]


def mathematics(folder: Path, methods: Mapping[str, Make], seeds: int) -> list[report.Table]:
    world = open_world(folder / MATH, models="Qwen2.5-Math-1.5B")
    plan = plan_of(world, 44, 256)
    return [
        open_table("256 random prompts observed a step, 0.9 visits a prompt", world, plan, methods, seeds),
        closed_table("256 of the whole pool", world, plan, methods, seeds),
        closed_table("256 of 1,024 random candidates", world, replace(plan, candidates=1_024), methods, seeds),
    ]


def tasks(folder: Path, methods: Mapping[str, Make], seeds: int) -> list[report.Table]:
    world = open_world(folder / TASKS)
    plan = plan_of(world, 44, 128)
    title = f"128 random prompts observed a step, {HELD_OUT_TASKS:.0%} of the tasks held out"
    return [
        open_table(title, world, plan, methods, seeds, held_out_share=HELD_OUT_TASKS),
        closed_table("128 of 512 random candidates", world, replace(plan, candidates=512), methods, seeds),
    ]


def large(folder: Path, methods: Mapping[str, Make], seeds: int) -> list[report.Table]:
    world = open_world(folder / LARGE)
    plan = plan_of(world, 60, 256)
    return [
        open_table("256 random prompts observed a step, 0.5 visits a prompt", world, plan, methods, seeds),
        closed_table("256 of the whole pool, repeats allowed", world, plan, methods, seeds),
        closed_table("256 of the whole pool, no prompt twice", world, replace(plan, repeats=False), methods, seeds),
    ]


def ablations(folder: Path, methods: Mapping[str, Make], seeds: int) -> list[report.Table]:
    """Each part of `gps` taken away."""
    world = open_world(folder / TRAJECTORY)
    few, many = plan_of(world, 44, 32), plan_of(world, 44, 128, candidates=512)
    believing: dict[str, Make] = {name: gps_with(parts) for name, parts in BELIEF_PARTS.items()}
    choosing: dict[str, Make] = {name: gps_with(parts) for name, parts in {**BELIEF_PARTS, **CHOICE_PARTS}.items()}
    return [
        open_table("32 random prompts observed a step, 1.2 visits a prompt", world, few, believing, seeds, EPOCHS),
        closed_table("32 of the whole pool", world, few, choosing, seeds),
        closed_table("128 of 512 random candidates", world, many, choosing, seeds),
    ]


def paper(folder: Path, methods: Mapping[str, Make], seeds: int) -> list[report.Table]:
    """`gps-paper` beside MoPPS, and each of its parts taken away."""
    world = open_world(folder / TRAJECTORY)
    few, many = plan_of(world, 44, 32), plan_of(world, 44, 128, candidates=512)
    own = {name: RIVALS[name] for name in ("MoPPS", "gps-paper")}
    title = "random prompts observed a step"
    return [
        open_table(f"32 {title}, 1.2 visits a prompt", world, few, {**own, **PAPER_PARTS}, seeds, EPOCHS),
        open_table(f"128 {title}, 4.7 visits a prompt", world, many, own, seeds, EPOCHS),
        closed_table("32 of the whole pool", world, few, own, seeds),
        closed_table("128 of 512 random candidates", world, many, own, seeds),
    ]


def learning(folder: Path, methods: Mapping[str, Make], seeds: int) -> list[report.Table]:
    """A run that learns from a larger model of its family, which was evaluated on a pool that holds most of its own."""
    world = open_world(folder / TRAJECTORY)
    few, many = plan_of(world, 44, 32), plan_of(world, 44, 128, candidates=512)
    other = read_recording(folder / LARGE)
    kinds = {"learning from other prompts": False, "learning from its own prompts too": True}
    worlds = {
        name: learning_from(world, other, attempts=HISTORY_ATTEMPTS, in_common=in_common, seed=0)
        for name, in_common in kinds.items()
    }
    own: dict[str, Make] = {"gps": GPS["gps"]}
    own |= {f"gps, {name}": gps_in(learning_world) for name, learning_world in worlds.items()}
    greedy: dict[str, Make] = {"gps, greedy": GPS["gps, greedy"]}
    greedy |= {f"gps, greedy, {name}": gps_in(learning_world, GREEDY) for name, learning_world in worlds.items()}
    return [
        open_table("32 random prompts observed a step, 1.2 visits a prompt", world, few, own, seeds, EPOCHS),
        closed_table("128 of 512 random candidates", world, many, {**own, **greedy}, seeds),
    ]


def answering(folder: Path, methods: Mapping[str, Make], seeds: int) -> list[report.Table]:
    """Closed loops whose policy learns from what is chosen: its own prompts alone, or half of it all prompts."""
    world = open_world(folder / TRAJECTORY)
    plan = plan_of(world, ANSWERING_STEPS, 128)
    policies = {
        "a visit moves its own prompt alone": AnsweringPolicy.of(world.recording, own=1.0),
        "half of a visit moves all prompts": AnsweringPolicy.of(world.recording, own=0.5),
    }
    choosing = {name: methods[name] for name in ANSWERED if name in methods}
    choosing["gps, no rest"] = gps_with(Parts(rest=False))
    return [
        closed_table(f"128 of the whole pool, {title}", world, plan, choosing, seeds, policy=policy)
        for title, policy in policies.items()
    ]


def parts(folder: Path, methods: Mapping[str, Make], seeds: int) -> list[report.Table]:
    """Choices that look at all prompts beside those that look at a part, as the service does of larger pools."""
    world = open_world(folder / LARGE)
    choosing: dict[str, Make] = {"uniform": methods["uniform"]}
    choosing |= {f"gps, looks at {name}": looking_at(n) for name, n in LOOKED_AT.items()}
    return [
        closed_table(f"{size} of the whole pool", world, plan_of(world, 60, size), choosing, seeds)
        for size in (64, 256)
    ]


def looking_at(n: int) -> Make:
    return lambda world, seed: LookingAt(world, n)


def gps_in(world: World, parts: Parts | None = None) -> Make:
    """`gps` in a world of its own, of the same prompts."""
    return lambda _, seed: Gps(world, replace(parts or Parts(), refit_every=REFIT_EVERY))


PAPER_PARTS: Mapping[str, Make] = {
    "newest batch only": lambda world, seed: GpsPaper(world, seed=seed, past_pairs=0),
    "embedding only": lambda world, seed: GpsPaper(world, seed=seed, has_features=False),
    "newest batch and embedding only": lambda world, seed: GpsPaper(world, seed=seed, past_pairs=0, has_features=False),
    "z does not depend on the last batch": lambda world, seed: GpsPaper(world, seed=seed, conditioned=False),
}


def without(*priors: str) -> tuple[str, ...]:
    return tuple(prior for prior in PRIORS if prior not in priors)


BELIEF_PARTS: Mapping[str, Parts] = {
    "gps": Parts(),
    "no surface features": Parts(priors=without("surface")),
    "no embedding": Parts(priors=without("embedding")),
    "no n-grams": Parts(priors=without("ngrams")),
    "no latent model": Parts(priors=without("latent")),
    "fitted priors not stacked": Parts(priors=without("stacked")),
    "no text at all": Parts(priors=("flat", "running mean")),
    "no running mean, no flat prior": Parts(priors=without("flat", "running mean"), guard=False),
    "nothing of a prompt is forgotten": Parts(memories=(0,)),
    "nothing ages between visits": Parts(memories=(0, 1, 2)),
    "weights do not forget": Parts(weights_forget=False),
    "regressions do not forget": Parts(regressions_forget=False),
    "no guard": Parts(guard=False),
    "one expert: embedding, s = 2, l = .8": Parts(
        priors=("embedding",), strengths=(2.0,), memories=(MEMORIES.index(0.8),), guard=False
    ),
}
CHOICE_PARTS: Mapping[str, Parts] = {
    "no optimism": Parts(optimism=0.0),
    "optimism 1": Parts(optimism=1.0),
    "no diversity": Parts(diversity=0.0),
    "diversity .05": Parts(diversity=0.05),
    "diversity .2": Parts(diversity=0.2),
    "no rest": Parts(rest=False),
    "no least-recently-seen quota": Parts(quota=False),
    "score alone": Parts(optimism=0.0, diversity=0.0, rest=False, quota=False),
}
PARTS: Mapping[str, Callable[[Path, Mapping[str, Make], int], list[report.Table]]] = {
    "trajectory": trajectory,
    "math": mathematics,
    "tasks": tasks,
    "large": large,
    "ablations": ablations,
    "paper": paper,
    "learning": learning,
    "answering": answering,
    "parts": parts,
}


def gps_with(parts: Parts) -> Make:
    return lambda world, seed: Gps(world, replace(parts, refit_every=REFIT_EVERY))


def plan_of(world: World, n_steps: int, batch_size: int, *, candidates: int = 0) -> Plan:
    return Plan(
        recording=world.recording,
        n_steps=n_steps,
        observe_per_step=batch_size,
        batch_size=batch_size,
        candidates=candidates,
        group_size=world.group_size,
        repeats=True,
    )


def open_table(
    title: str,
    world: World,
    plan: Plan,
    methods: Mapping[str, Make],
    seeds: int,
    stages: Stages | None = None,
    *,
    held_out_share: float = 0.0,
) -> report.Table:
    stages = stages or thirds(plan.rank_steps + 1, first=1)
    rows: list[report.Row] = []
    for name, make in methods.items():
        if name in CHOICE_ONLY:
            continue
        runs = []
        for seed in range(seeds):
            held_out = world.held_out(seed, held_out_share) if held_out_share else None
            runs.append(open_loop(make(world, seed), plan, seed=seed, stages=stages, held_out_N=held_out))
        rows.append(report.Row(name, [figures for figures, _ in runs], reliability=[r for _, r in runs]))
        print(f"  {title}: {name}", flush=True)
    return report.Table(f"{world.recording.name}, open loop: {title}", "open", [stage for stage, _, _ in stages], rows)


def closed_table(
    title: str,
    world: World,
    plan: Plan,
    methods: Mapping[str, Make],
    seeds: int,
    *,
    policy: AnsweringPolicy | None = None,
) -> report.Table:
    stages = thirds(plan.select_steps, first=0)
    rows: list[report.Row] = []
    for name, make in methods.items():
        runs = [
            closed_loop(
                make(world, seed), plan, seed=seed, stages=stages, fills_batch=name == FILLS_BATCH, policy=policy
            )
            for seed in range(seeds)
        ]
        rows.append(report.Row(name, [figures for figures, _ in runs], curves=[curve for _, curve in runs]))
        print(f"  {title}: {name}", flush=True)
    names: Sequence[str] = [stage for stage, _, _ in stages]
    return report.Table(f"{world.recording.name}, closed loop: {title}", "closed", names, rows)


if __name__ == "__main__":
    main()
