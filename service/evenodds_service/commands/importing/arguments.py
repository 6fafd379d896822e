"""The arguments of `evenodds import`. Standard library only: they are needed for every `--help`."""

from __future__ import annotations

import argparse

FORMATS = ("prompts", "verl", "trl", "prime-rl", "nemo-rl", "lm-eval", "inspect-ai", "table")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `import`."""
    parser = commands.add_parser("import", help="load prompts, pass rates or logs of outcomes, of any size, into a run")
    parser.set_defaults(command=_run)
    parser.description = (
        "Load prompts into the pool of a run, what a table knows of them, or what a trainer's or evaluator's log says "
        "came of them. The command may be repeated: what is stored already is skipped, so that an interrupted import "
        "goes on where it stopped. docs/import.md describes each format."
    )
    add = parser.add_argument
    add("run", help="name of the run; it must exist (PUT /runs/NAME)")
    add("file", metavar="FILE", help="a file or a folder of a log; - reads prompts from standard input")
    add("--url", default="http://127.0.0.1:8000", help="the running service (default: %(default)s)")
    add("--dry-run", action="store_true", help="read all, send nothing, and say what would come of it")
    add(
        "--as",
        dest="as_",
        choices=("outcomes", "prior"),
        help="outcomes of the run's own model, or rates known beforehand (default: logs are outcomes, tables are not)",
    )
    add("--source", metavar="NAME", help="what the run calls this log (default: the name of FILE)")
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What every command that reads logs asks."""
    add = parser.add_argument
    add("--format", choices=("auto", *FORMATS), default="auto", help="of FILE (default: found out)")
    add("--reward", metavar="NAME", help="which reward or metric counts, where the log has several")
    add(
        "--reward-range",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="rewards that mean failure and success (default: 0 1)",
    )
    add("--filter", metavar="NAME", help="lm-eval: whose filter's rows count (default: the first)")
    add("--step", type=int, default=0, help="where outcomes of an evaluation stand (default: %(default)s)")
    table = parser.add_argument_group("tables of pass rates")
    add = table.add_argument
    add("--id", metavar="COLUMN", help="which column has the prompts' ids")
    add("--text", metavar="COLUMN", help="which column has their texts")
    add("--rate", action="append", default=[], metavar="COLUMN", help="which has rates; may be given several times")
    add("--of", type=int, metavar="N", help="numbers are counts out of N")
    add("--failures", action="store_true", help="rates and counts are of failures")


def _run(options: argparse.Namespace) -> int:
    from evenodds_service.commands.importing.command import run

    return run(options)
