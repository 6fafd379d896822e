"""What every replay needs: predictors by name, a fresh run for each, and a place for the result."""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from evenodds import Client, EvenOddsError
from evenodds_service.commands.replay.driving import CONTENDERS, Contender


class ReplayRefused(Exception):
    """The arguments do not fit together, or a result cannot be written."""


def contenders_of(names: str) -> list[Contender]:
    """Raises ReplayRefused."""
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in CONTENDERS:
            raise ReplayRefused(f"--predictors: {name!r} is not a predictor: choose from {', '.join(CONTENDERS)}")
    return [CONTENDERS[name] for name in dict.fromkeys(wanted)]


@contextmanager
def fresh_run(
    client: Client,
    contender: Contender,
    of: str,
    group_size: int,
    seed: int,
    *,
    max_visits: int = 0,
    learn_from: Sequence[str] = (),
    data_set: str | None = None,
    keep: bool,
) -> Iterator[str]:
    """A run without prompts, which is deleted afterwards unless it is kept. Its name begins with what is replayed. As
    many arguments as a run of a replay has settings that differ.
    """
    what = re.sub(r"[^A-Za-z0-9._-]", "-", f"{of[:60]}-{contender.name}")
    name = f"replay-{what}-{seed}-{uuid.uuid4().hex[:8]}"
    client.put_run(
        name,
        predictor=contender.predictor,
        acquisition=contender.acquisition,
        group_size=group_size,
        max_visits=max_visits,
        learn_from=list(learn_from) or None,
        data_set=data_set,
    )
    try:
        yield name
    finally:
        if not keep:
            delete(client, name)


def write(option: str, path: Path, content: str) -> None:
    """Raises ReplayRefused."""
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ReplayRefused(f"{option} {path}: {error.strerror}; name a file that is writable") from error


def delete(client: Client, name: str) -> None:
    """Delete the run. What keeps it from that is a warning: the fault that ended the replay is the one to report."""
    try:
        client.delete_run(name)
    except EvenOddsError as error:
        print(f"evenodds replay: run {name} was not deleted: {error}", file=sys.stderr)
