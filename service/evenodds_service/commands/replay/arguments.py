"""The arguments of `evenodds replay`. Standard library only: they are needed for every `--help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from evenodds_service.commands.importing.arguments import add_reading

PREDICTORS = ("gps", "mopps", "mopps-yield", "uniform")
OF_LOGS = ("gps", "mopps-yield")
"""By default; a random choice needs no replay."""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `replay`. Longer than other functions: it is a table of options."""
    parser = commands.add_parser(
        "replay",
        help="say what choosing would have saved in your own log, or compare predictors on recorded success rates",
    )
    parser.set_defaults(command=_run)
    parser.description = (
        "Drive a running service through recorded outcomes. LOG is one of two things. (1) A trainer's log, in the "
        "formats of `evenodds import`: the command says how many rollouts choosing would have saved, or why the log "
        "cannot tell. (2) A folder of recorded success rates: the command compares predictors on the same outcomes, in "
        "two parts. Rank: every predictor observes the same random prompts and predicts the next step. Select: every "
        "predictor chooses its batches and observes their outcomes."
    )
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        nargs="?",
        metavar="LOG",
        help="a trainer's log, or a folder with prompts.jsonl.gz and rates.csv.gz (default: EVENODDS_DATA)",
    )
    add("--url", default="http://127.0.0.1:8000", help="address of the running service (default: %(default)s)")
    add(
        "--predictors",
        help=f"predictors to compare, separated by commas: {', '.join(PREDICTORS)} (default: all; for a log "
        f"{', '.join(OF_LOGS)}). mopps chooses as published (Thompson, nearest to one half), mopps-yield by yield",
    )
    add(
        "--seeds",
        type=int,
        default=3,
        help="number of repetitions, each with another random seed (default: %(default)s)",
    )
    add(
        "--steps",
        type=int,
        help="number of policy versions (default: all recorded visits, or 44 where there are none; for a log, all)",
    )
    add(
        "--observe-per-step",
        type=int,
        default=32,
        help="rank: number of random prompts observed at each step (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        default=128,
        help="select: number of prompts chosen at each step (default: %(default)s)",
    )
    add(
        "--candidates",
        type=int,
        default=512,
        help="select: number of random prompts to choose from at each step, the same for all predictors; 0 means the "
        "whole pool (default: %(default)s)",
    )
    add("--group-size", type=int, default=8, help="attempts at a prompt in one visit (default: %(default)s)")
    add(
        "--no-repeats",
        action="store_true",
        help="never observe or choose a prompt twice, and end when the pool is used up",
    )
    add("--models", default="", help="of a table of models, use only those whose name contains this text")
    add("--json", type=Path, metavar="FILE", help="also write the figures of every seed into this file, as JSON")
    add("--keep", action="store_true", help="keep the runs in the service afterwards")
    _add_options_for_logs(parser)


def _add_options_for_logs(parser: argparse.ArgumentParser) -> None:
    of_logs = parser.add_argument_group("options for a trainer's log")
    of_logs.add_argument(
        "--share", type=float, default=0.5, help="share of each step's groups that is chosen (default: %(default)s)"
    )
    of_logs.add_argument(
        "--learn-from",
        type=Path,
        action="append",
        default=[],
        metavar="LOG",
        help="another log, an evaluation or a table of pass rates: gps is replayed once more and learns from it; "
        "--reward counts where it has a reward of that name, else its only one; may be given several times",
    )
    of_logs.add_argument("--picture", type=Path, metavar="FILE", help="draw the answer into this file, as SVG")
    add_reading(of_logs)


def _run(options: argparse.Namespace) -> int:
    from evenodds_service.commands.replay.command import run

    return run(options)
