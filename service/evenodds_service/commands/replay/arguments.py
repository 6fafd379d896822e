"""The arguments of `evenodds replay`. Standard library only: they are needed for every `--help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from evenodds_service.commands.importing.arguments import add_reading

PREDICTORS = ("gps", "mopps", "mopps-yield", "uniform")
OF_LOGS = ("gps", "mopps-yield")
"""By default; a random choice needs no replay."""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `replay`."""
    parser = commands.add_parser(
        "replay", help="what choosing would have saved in your own log; predictors compared on recorded success rates"
    )
    parser.set_defaults(command=_run)
    parser.description = (
        "Of a trainer's log (the formats of `evenodds import`): drive a running service through it and say what "
        "choosing would have saved, as far as the log can tell. Of a folder of recorded success rates: drive the "
        "service through them, once for each predictor with the same outcomes, and compare. Two parts. Rank: every "
        "predictor observes the same random prompts and predicts the next step. Select: every predictor chooses its "
        "batches and observes their outcomes."
    )
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        nargs="?",
        metavar="LOG",
        help="a trainer's log, or a folder that holds prompts.jsonl.gz and rates.csv.gz (default: EVENODDS_DATA)",
    )
    add("--url", default="http://127.0.0.1:8000", help="the running service (default: %(default)s)")
    add(
        "--predictors",
        help=f"of {', '.join(PREDICTORS)} (default: all; of a log {', '.join(OF_LOGS)}); mopps chooses as published "
        "(Thompson, nearest to one half), mopps-yield by yield",
    )
    add("--seeds", type=int, default=3, help="repetitions with other chance (default: %(default)s)")
    add("--steps", type=int, help="policy versions (default: all recorded visits, else 44; of a log all)")
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
    of_logs = parser.add_argument_group("of a log")
    of_logs.add_argument(
        "--share", type=float, default=0.5, help="how much of each step's groups is chosen (default: %(default)s)"
    )
    of_logs.add_argument(
        "--learn-from",
        type=Path,
        action="append",
        default=[],
        metavar="LOG",
        help="another log, evaluation or table of pass rates: replay gps once more, learning from it; may be given "
        "several times",
    )
    of_logs.add_argument("--picture", type=Path, metavar="FILE", help="draw the answer into this SVG")
    add_reading(of_logs)


def _run(options: argparse.Namespace) -> int:
    from evenodds_service.commands.replay.command import run

    return run(options)
