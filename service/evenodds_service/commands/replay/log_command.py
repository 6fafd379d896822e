"""`evenodds replay LOG`: what choosing would have saved, or why this log cannot tell."""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from evenodds import Client
from evenodds_service.commands.formats.outcomes import Wishes
from evenodds_service.commands.replay import answer
from evenodds_service.commands.replay.answer import LEARNING, Replayed
from evenodds_service.commands.replay.arguments import OF_LOGS
from evenodds_service.commands.replay.driving import CONTENDERS, Contender
from evenodds_service.commands.replay.logged import LoggedRun, read_logged
from evenodds_service.commands.replay.runs import ReplayRefused, contenders_of, fresh_run, write
from evenodds_service.commands.replay.saving import ChosenSteps, choose_within, refitted
from evenodds_service.commands.replay.sources import ReadSource, loaded, read_sources

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
        raise ReplayRefused("--predictors uniform: a random choice needs no replay: name another predictor as well")
    if not 0.0 < options.share < 1.0:
        raise ReplayRefused(f"--share {options.share:g}: must lie between 0 and 1")
    if options.seeds < 1:
        raise ReplayRefused(f"--seeds {options.seeds}: must be at least 1")
    if options.learn_from and all(one.name != "gps" for one in contenders):
        raise ReplayRefused("--learn-from: only gps learns from others: name gps among --predictors")
    for path in options.learn_from:
        if path.resolve() == options.folder.resolve():
            raise ReplayRefused(f"--learn-from {path}: the log would predict itself: name another log")
    wishes = Wishes(reward=options.reward, low=low, high=high)
    format_ = None if options.format == "auto" else options.format
    logged = read_logged(options.folder, wishes, format_=format_, n_steps=options.steps)
    sources = read_sources(options.learn_from, wishes, logged.tally)
    reasons = logged.cannot_tell()
    if reasons:
        replayed = Replayed({}, sources)
        lines = answer.no_figure(reasons)
    else:
        replayed = _replayed(options, contenders, logged, sources)
        lines = answer.text(logged, replayed, share=options.share)
    print("\n".join([*answer.facts(logged), *logged.tally.told(), *lines]))
    if options.json is not None:
        document = answer.document(logged, replayed, share=options.share)
        write("--json", options.json, json.dumps(document, indent=2) + "\n")
    if options.picture is not None and replayed.runs:
        write("--picture", options.picture, answer.picture(logged, replayed.runs, share=options.share))
    return 0


def _replayed(
    options: argparse.Namespace, contenders: Sequence[Contender], logged: LoggedRun, sources: Sequence[ReadSource]
) -> Replayed:
    """What each predictor chose, a replay for each seed; and gps once more, learning from the sources."""
    runs: dict[str, list[ChosenSteps]] = {one.name: [] for one in contenders}
    reasons = [source.cannot_tell(logged) for source in sources]
    cannot_tell = [reason for reason in reasons if reason is not None]
    used = [source for source, reason in zip(sources, reasons, strict=True) if reason is None]
    if used:
        contenders = [*contenders, replace(CONTENDERS["gps"], name=LEARNING)]
        runs[LEARNING] = []
    has_worker, data_set = True, f"replay-{uuid.uuid4().hex[:8]}"
    n_steps = options.seeds * len(contenders) * len(logged.steps)
    with (
        Client(options.url, timeout_seconds=_TIMEOUT_SECONDS) as client,
        loaded(client, used, logged, data_set=data_set, keep=options.keep) as names,
        tqdm(total=n_steps, unit="step", file=sys.stderr, disable=None) as bar,
    ):
        for seed in range(options.seeds):
            for contender in contenders:
                bar.set_description(f"{contender.name}, seed {seed}")
                is_fitted, learns = contender.predictor == "gps", contender.name == LEARNING
                with fresh_run(
                    client,
                    contender,
                    logged.name,
                    logged.group_size,
                    seed,
                    learn_from=names if learns else (),
                    data_set=data_set if learns else None,
                    keep=options.keep,
                ) as name:
                    client.add_prompts(name, logged.prompts)
                    if learns:  # what others showed is there before the first batch, or not at all
                        has_worker = has_worker and refitted(client, name)
                        if not has_worker:
                            continue
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
    if used and len(runs[LEARNING]) < options.seeds:
        del runs[LEARNING]
        cannot_tell.append(
            "no worker was running, and only a worker reads other runs: start evenodds serve --with-worker"
        )
    return Replayed(runs, sources, used, cannot_tell)
