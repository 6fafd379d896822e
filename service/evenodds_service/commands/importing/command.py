"""`evenodds import`: finds out what the file is, sends it, and says what was left out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from evenodds import Client, Conflict, EvenOddsError
from evenodds_service.commands.formats.outcomes import LogRefused, Tally, Wishes
from evenodds_service.commands.formats.reading import OF_TRAININGS, PROMPTS, Log, open_log
from evenodds_service.commands.importing import prompts
from evenodds_service.commands.importing.known_prompts import KnownPrompts
from evenodds_service.commands.importing.sending import Sent, send_outcomes, send_rates


def run(options: argparse.Namespace) -> int:
    """Import as the arguments say.

    Returns:
        The exit status: 0, 1 after a fault that was explained on standard error, 130 after an interruption.
    """
    try:
        low, high = options.reward_range
        wishes = Wishes(
            reward=options.reward,
            low=low,
            high=high,
            filter=options.filter,
            step=options.step,
            id_column=options.id,
            text_column=options.text,
            rate_columns=tuple(options.rate),
            of=options.of,
            counts_failures=options.failures,
        )
        if options.file == "-" or options.format == PROMPTS:
            return prompts.run(options)
        log = open_log(Path(options.file), None if options.format == "auto" else options.format)
        if log.format == PROMPTS:
            return prompts.run(options)
        as_prior = _is_prior(options.as_, log)
    except LogRefused as error:
        return prompts.fault(str(error))
    sent, tally = Sent(options.source or Path(options.file).resolve().name, options.dry_run), Tally()
    again = "run the same command again to go on from there"
    try:
        prompts.tell_if_away(options.url)
        with Client(options.url, timeout_seconds=prompts.TIMEOUT_SECONDS, retries=prompts.RETRIES) as client:
            known = KnownPrompts(client, options.run)
            with tqdm(total=log.size or None, unit="B", unit_scale=True, file=sys.stderr) as bar:

                def advance() -> None:
                    bar.set_postfix_str(sent.in_short, refresh=False)
                    bar.update(log.position - bar.n)

                send = send_rates if as_prior else send_outcomes
                send(client, options.run, log, wishes, tally=tally, known=known, sent=sent, advance=advance)
    except LogRefused as error:
        return prompts.fault(f"{error}; {sent.so_far}")
    except Conflict as error:
        return prompts.fault(f"{_explained(error, sent)}; {sent.so_far}")
    except (EvenOddsError, KeyboardInterrupt) as error:
        return prompts.ended(error, sent.so_far, again)
    print("\n".join([*sent.lines(log.format), *tally.told()]))
    return 0 if sent.n_groups or sent.n_rates else 1


def _is_prior(as_: str | None, log: Log) -> bool:
    """Raises LogRefused: a training's log has no one rate for each prompt."""
    if as_ == "prior" and log.format in OF_TRAININGS:
        raise LogRefused(
            f"--as prior: a {log.format} log is of a policy that changes, so a prompt has no single rate in it: import "
            "it as outcomes into a run of its own"
        )
    return as_ == "prior" or (as_ is None and log.format == "table")


def _explained(error: Conflict, sent: Sent) -> str:
    if error.code != "request_conflict":
        return str(error)
    return (
        f"{sent.place}: this part of {sent.source!r} was imported before with other content: the file has changed "
        "since, or other options were given. Forget what was imported first, by POST /runs/{run}/retract with "
        f"request_id {sent.request_id!r}; or, if this is another log of the same name, name it by --source"
    )
