"""The arguments of `evenodds import`. Standard library only: they are needed for every `--help`."""

from __future__ import annotations

import argparse

FORMATS = ("prompts", "verl", "trl", "prime-rl", "nemo-rl", "lm-eval", "inspect-ai", "table")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `import`."""
    parser = commands.add_parser("import", help="load prompts, pass rates or logs of outcomes into a run")
    parser.set_defaults(command=_run)
    parser.description = (
        "Load a file of any size into a run: prompts for its pool, a table of pass rates, or the outcomes in a log "
        "of a "
        "trainer or an evaluation. The command may be repeated: it skips what is stored already, so an interrupted "
        "import continues where it stopped. docs/import.md describes each format."
    )
    add = parser.add_argument
    add("run", help="name of the run, which must exist (PUT /runs/NAME creates it)")
    add("file", metavar="FILE", help="a file, or the folder of a log; - reads prompts from standard input")
    add("--url", default="http://127.0.0.1:8000", help="address of the running service (default: %(default)s)")
    add("--dry-run", action="store_true", help="read everything, send nothing, and say what would be imported")
    add(
        "--as",
        dest="as_",
        choices=("outcomes", "prior"),
        help="what the file is: outcomes of the run's own model, or rates of other models that are known beforehand "
        "(default: outcomes for logs, prior for tables)",
    )
    add(
        "--source",
        metavar="NAME",
        help="name of this log in the run, which tells logs apart (default: the name of FILE)",
    )
    add_reading(parser)
    add("--filter", metavar="NAME", help="lm-eval: the filter whose rows count (default: the first in the file)")
    add(
        "--step",
        type=int,
        default=0,
        help="the step at which the outcomes of an evaluation count (default: %(default)s)",
    )
    table = parser.add_argument_group("options for tables of pass rates")
    add = table.add_argument
    add("--id", metavar="COLUMN", help="the column with the prompts' ids")
    add("--text", metavar="COLUMN", help="the column with the prompts' texts")
    add("--rate", action="append", default=[], metavar="COLUMN", help="a column with rates; may be given several times")
    add("--of", type=int, metavar="N", help="numbers are counts of successes out of N attempts")
    add("--failures", action="store_true", help="rates and counts are of failures, not of successes")


def add_reading(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """What every command that reads logs asks."""
    add = parser.add_argument
    add(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="format of the file (default: recognised from its name and content)",
    )
    add("--reward", metavar="NAME", help="the reward or metric that counts, if the log has several")
    add(
        "--reward-range",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="the rewards that mean failure and success (default: 0 1)",
    )


def _run(options: argparse.Namespace) -> int:
    from evenodds_service.commands.importing.command import run

    return run(options)
