"""`evenodds replay LOG`: what choosing would have saved, or why this log cannot tell."""

from __future__ import annotations

import argparse
import json
import sys

from tqdm import tqdm

from evenodds import Client
from evenodds_service.commands.formats.outcomes import Wishes
from evenodds_service.commands.replay import answer
from evenodds_service.commands.replay.arguments import OF_LOGS
from evenodds_service.commands.replay.logged import LoggedRun, read_logged
from evenodds_service.commands.replay.runs import ReplayRefused, contenders_of, fresh_run, write
from evenodds_service.commands.replay.saving import ChosenSteps, choose_within, random_share_T, saving_of

_TIMEOUT_SECONDS = 300.0
_RECORDING = ("prompts.jsonl.gz", "rates.csv.gz")


def is_log(options: argparse.Namespace) -> bool:
    """Whether a log is named: a file, or a folder that holds no recorded success rates."""
    path = options.folder
    if path is None or not path.exists():
        return False
    return not path.is_dir() or not any((path / name).exists() for name in _RECORDING)


def replay_log(options: argparse.Namespace) -> int:
    """Replay it as the arguments say. Returns the exit status 0.

    Raises:
        LogRefused, ReplayRefused, and what the client raises.
    """
    low, high = options.reward_range
    contenders = [one for one in contenders_of(options.predictors or ",".join(OF_LOGS)) if one.name != "uniform"]
    if not contenders:
        raise ReplayRefused("--predictors uniform: a random choice needs no replay; name another one beside it")
    if not 0.0 < options.share < 1.0:
        raise ReplayRefused(f"--share {options.share:g}: must lie between 0 and 1")
    if options.seeds < 1:
        raise ReplayRefused(f"--seeds {options.seeds}: must be at least 1")
    logged = read_logged(
        options.folder,
        Wishes(reward=options.reward, low=low, high=high),
        format_=None if options.format == "auto" else options.format,
        n_steps=options.steps,
    )
    reasons = logged.cannot_tell()
    if reasons:
        runs: dict[str, list[ChosenSteps]] = {}
        lines = answer.no_figure(reasons)
    else:
        runs = _runs(options, logged)
    savings = {name: saving_of(seeds, random_share_T(logged)) for name, seeds in runs.items()}
    if runs:
        lines = answer.text(logged, savings, runs, share=options.share)
    print("\n".join([*answer.facts(logged), *logged.tally.told(), *lines]))
    if options.json is not None:
        document = answer.document(logged, savings, runs, share=options.share)
        write("--json", options.json, json.dumps(document, indent=2) + "\n")
    if options.picture is not None and runs:
        write("--picture", options.picture, answer.picture(logged, runs, share=options.share))
    return 0


def _runs(options: argparse.Namespace, logged: LoggedRun) -> dict[str, list[ChosenSteps]]:
    """What each predictor chose, a replay for each seed."""
    contenders = [one for one in contenders_of(options.predictors or ",".join(OF_LOGS)) if one.name != "uniform"]
    runs: dict[str, list[ChosenSteps]] = {one.name: [] for one in contenders}
    has_worker = True
    n_steps = options.seeds * len(contenders) * len(logged.steps)
    with (
        Client(options.url, timeout_seconds=_TIMEOUT_SECONDS) as client,
        tqdm(total=n_steps, unit="step", file=sys.stderr, disable=None) as bar,
    ):
        for seed in range(options.seeds):
            for contender in contenders:
                bar.set_description(f"{contender.name}, seed {seed}")
                is_fitted = contender.predictor == "gps"
                with fresh_run(client, contender, logged.name, logged.group_size, seed, keep=options.keep) as name:
                    client.add_prompts(name, logged.prompts)
                    run = choose_within(
                        client,
                        name,
                        logged,
                        share=options.share,
                        seed=seed,
                        is_refitted=is_fitted and has_worker,
                        advance=bar.update,
                    )
                has_worker &= run.is_refitted or not is_fitted
                runs[contender.name].append(run)
    return runs
