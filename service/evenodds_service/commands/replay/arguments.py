"""The arguments of `evenodds replay`. Standard library only: they are needed for every `--help`."""

from __future__ import annotations

import argparse
from pathlib import Path

PREDICTORS = ("gps", "mopps", "mopps-yield", "uniform")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `replay`."""
    parser = commands.add_parser(
        "replay", help="drive a running service through recorded success rates and compare predictors"
    )
    parser.set_defaults(command=_run)
    parser.description = (
        "Drive a running service through recorded success rates, once for each predictor with the same outcomes, "
        "and compare. Two parts. Rank: every predictor observes the same random prompts and predicts the next "
        "step. Select: every predictor chooses its batches and observes their outcomes."
    )
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        nargs="?",
        metavar="FOLDER",
        help="holds prompts.jsonl.gz and rates.csv.gz (default: EVENODDS_DATA)",
    )
    add("--url", default="http://127.0.0.1:8000", help="the running service (default: %(default)s)")
    add(
        "--predictors",
        default=",".join(PREDICTORS),
        help="of %(default)s; mopps chooses as published (Thompson, nearest to one half), mopps-yield by yield",
    )
    add("--seeds", type=int, default=3, help="repetitions with other chance (default: %(default)s)")
    add("--steps", type=int, help="policy versions (default: all recorded visits, else 44)")
    add(
        "--observe-per-step",
        type=int,
        default=32,
        help="rank: random prompts observed at each step (default: %(default)s)",
    )
    add("--batch-size", type=int, default=128, help="select: prompts chosen a step (default: %(default)s)")
    add(
        "--candidates",
        type=int,
        default=512,
        help="select: random prompts to choose from at each step, the same for all predictors; 0: the whole pool "
        "(default: %(default)s)",
    )
    add("--group-size", type=int, default=8, help="attempts per prompt and visit (default: %(default)s)")
    add("--no-repeats", action="store_true", help="no prompt is observed or chosen twice; stops with the pool")
    add("--models", default="", help="of a table of models, use those whose name contains this text")
    add("--json", type=Path, metavar="FILE", help="write the figures of every seed here too")
    add("--keep", action="store_true", help="do not delete the runs afterwards")


def _run(options: argparse.Namespace) -> int:
    from evenodds_service.commands.replay.command import run

    return run(options)
