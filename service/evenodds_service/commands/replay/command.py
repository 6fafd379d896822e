"""`evenodds replay` of recorded rates: checks the arguments, replays every predictor and seed, prints the tables.

Runs are made under names of their own and deleted at the end. Faults are one line on standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError
from tqdm import tqdm

from evenodds import Client, EvenOddsError
from evenodds_service.commands.formats.outcomes import LogRefused
from evenodds_service.commands.opening import explained
from evenodds_service.commands.replay import tables
from evenodds_service.commands.replay.arguments import PREDICTORS
from evenodds_service.commands.replay.driving import Contender, Plan, Stopwatch, rank, select
from evenodds_service.commands.replay.log_command import is_log, replay_log
from evenodds_service.commands.replay.recordings import RecordingError, read_recording
from evenodds_service.commands.replay.runs import ReplayRefused, contenders_of, fresh_run, write
from evenodds_service.settings import settings_from_environment

_TIMEOUT_SECONDS = 300.0


class _Part(Protocol):
    """`rank` or `select`."""

    __name__: str

    def __call__(
        self,
        client: Client,
        run: str,
        plan: Plan,
        *,
        seed: int,
        watch: Stopwatch,
        advance: Callable[[], object],
    ) -> dict[str, float]: ...


def run(options: argparse.Namespace) -> int:
    """Replay as the arguments say.

    Returns:
        The exit status: 0, or 1 after a fault that was explained on standard error.
    """
    try:
        if is_log(options):
            return replay_log(options)
        contenders = contenders_of(options.predictors or ",".join(PREDICTORS))
        plan = _plan(options)
        with Client(options.url, timeout_seconds=_TIMEOUT_SECONDS) as client:
            client.healthz()
            results = _replay(client, plan, contenders, n_seeds=options.seeds, keep=options.keep)
        print(tables.text(plan, results))
        if options.json is not None:
            write("--json", options.json, json.dumps(tables.document(plan, results), indent=2) + "\n")
    except (ReplayRefused, RecordingError, LogRefused, EvenOddsError) as error:
        print(f"evenodds replay: {error}", file=sys.stderr)
        return 1
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    for name, least in (
        ("seeds", 1), ("steps", 2), ("observe_per_step", 1), ("batch_size", 1), ("candidates", 0), ("group_size", 1)
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < least:
            raise ReplayRefused(f"{_flag(name)} {value}: must be at least {least}")
    if options.candidates and options.candidates < options.batch_size:
        raise ReplayRefused(
            f"--candidates {options.candidates}: fewer than --batch-size {options.batch_size}; "
            "ask for more candidates, or 0 for the whole pool"
        )
    recording = read_recording(options.folder or _default_folder(), models=options.models)
    for name in ("observe_per_step", "batch_size"):
        if getattr(options, name) > recording.n_prompts:
            raise ReplayRefused(
                f"{_flag(name)} {getattr(options, name)}: {recording.name} has {recording.n_prompts} prompts; "
                "ask for no more than those"
            )
    n_steps = recording.default_steps if options.steps is None else options.steps
    recording.check(n_steps=n_steps, group_size=options.group_size)
    return Plan(
        recording=recording,
        n_steps=n_steps,
        observe_per_step=options.observe_per_step,
        batch_size=options.batch_size,
        candidates=options.candidates,
        group_size=options.group_size,
        repeats=not options.no_repeats,
    )


def _default_folder() -> Path:
    """That of the settings."""
    try:
        folder = settings_from_environment().data
    except ValidationError as error:
        raise ReplayRefused(explained(error)) from error
    if not folder:
        raise ReplayRefused(
            "name a trainer's log or a folder of recorded success rates as LOG, or set EVENODDS_DATA to a folder"
        )
    return Path(folder)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _replay(
    client: Client, plan: Plan, contenders: list[Contender], *, n_seeds: int, keep: bool
) -> list[tables.Result]:
    results = [tables.Result(contender.name, [], Stopwatch()) for contender in contenders]
    # Acquisition has no part in ranking: contenders of one predictor share the rank part.
    n_rankings = len({contender.predictor for contender in contenders})
    n_steps = n_seeds * (n_rankings * plan.rank_steps + len(contenders) * plan.select_steps)
    with tqdm(total=n_steps, unit="step", file=sys.stderr, disable=None) as bar:

        def play(part: _Part, contender: Contender, seed: int, watch: Stopwatch) -> dict[str, float]:
            bar.set_description(f"{contender.name} {part.__name__}, seed {seed}")
            recording, max_visits = plan.recording, 0 if plan.repeats else 1
            with fresh_run(
                client, contender, recording.name, plan.group_size, seed, max_visits=max_visits, keep=keep
            ) as name:
                with watch.timed("load pool"):
                    client.add_prompts(name, recording.prompts)
                return part(client, name, plan, seed=seed, watch=watch, advance=bar.update)

        for seed in range(n_seeds):
            rankings: dict[str, dict[str, float]] = {}
            for contender, result in zip(contenders, results, strict=True):
                if contender.predictor not in rankings:
                    rankings[contender.predictor] = play(rank, contender, seed, result.watch)
                selection = play(select, contender, seed, result.watch)
                result.figures.append({**rankings[contender.predictor], **selection})
    return results
