"""Other logs, evaluations and tables of pass rates as runs that a replayed run learns from.

Each becomes a run of its own with all its outcomes, as `evenodds import` would make it, before the replay begins.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from evenodds import Client, Observation, PromptIn
from evenodds.training.text import answer_of
from evenodds_service.commands.formats.outcomes import Group, KnownRates, LogRefused, Rate, RewardMissing, Tally, Wishes
from evenodds_service.commands.formats.reading import PROMPTS, Log, open_log
from evenodds_service.commands.replay.logged import LoggedRun
from evenodds_service.commands.replay.runs import delete
from evenodds_service.domain.prompts import RATE_ATTEMPTS, join_key, text_key

LEAST_PROMPTS = 16
"""A run that is learned from needs so many prompts."""
_AT_ONCE = 1_000


@dataclass(frozen=True, slots=True)
class ReadSource:
    """What one file showed.

    Attributes:
        name: Of the file; of one of its columns where a table has several.
        prompts: By id.
        outcomes: Of each step: prompt id, successes and attempts.
        has_guessed_attempts: Whether rates came without a number of attempts.
    """

    name: str
    prompts: Mapping[str, PromptIn]
    outcomes: Mapping[int, Sequence[tuple[str, float, int]]]
    has_guessed_attempts: bool = False

    def has_texts_as(self, logged: LoggedRun) -> bool:
        """Whether prompts are joined by their texts: both have some. Ids of two logs may be mere row numbers."""
        return all(any(one.text is not None for one in some) for some in (self.prompts.values(), logged.prompts))

    def n_in_common(self, logged: LoggedRun) -> int:
        """How many of the log's prompts it has tried: by text, by id where one of them has no texts."""
        if not self.has_texts_as(logged):
            return sum(prompt.prompt_id in self.prompts for prompt in logged.prompts)
        keys = {join_key(prompt.text) for prompt in self.prompts.values() if prompt.text is not None}
        return sum(prompt.text is not None and join_key(prompt.text) in keys for prompt in logged.prompts)

    def cannot_tell(self, logged: LoggedRun) -> str | None:
        """Why nothing of the log's prompts can be told from it; None where something can."""
        if len(self.prompts) < LEAST_PROMPTS:
            return f"{self.name} has outcomes of {len(self.prompts)} prompts; at least {LEAST_PROMPTS} are needed"
        if self.has_texts_as(logged) or self.n_in_common(logged):
            return None
        return f"{self.name} has no prompt id in common with the log, and one of them has no texts"


def read_sources(paths: Sequence[Path], wishes: Wishes, tally: Tally) -> list[ReadSource]:
    """Read them whole: counts of each prompt, and each text once.

    The reward that is named for the log counts where a source has one of this name; else the source's only one does.

    Raises:
        LogRefused: one cannot be read, or holds prompts without outcomes.
    """
    return [source for path in paths for source in _read(path, wishes, tally)]


@contextmanager
def loaded(
    client: Client, sources: Sequence[ReadSource], logged: LoggedRun, *, data_set: str, keep: bool
) -> Iterator[list[str]]:
    """A run for each, with all its outcomes; they are deleted afterwards unless they are kept.

    Raises what the client raises.

    Args:
        logged: Who learns from them, and shares ids with those that it has no texts in common with: `data_set`.
    """
    names: list[str] = []
    try:
        for number, source in enumerate(sources):
            names.append(f"replay-source-{number}-{uuid.uuid4().hex[:8]}")
            client.put_run(names[-1], embedder="none", data_set=None if source.has_texts_as(logged) else data_set)
            client.add_prompts(names[-1], source.prompts.values())
            for step, rows in sorted(source.outcomes.items()):
                for some in _blocks(rows, _AT_ONCE):
                    told = [Observation(prompt_id=i, successes=k, attempts=n) for i, k, n in some]
                    client.observe(names[-1], step, told)
        yield names
    finally:
        for name in () if keep else names:
            delete(client, name)


def _read(path: Path, wishes: Wishes, tally: Tally) -> Iterator[ReadSource]:
    log = open_log(path)
    if log.format == PROMPTS:
        raise LogRefused(f"--learn-from {path}: it has prompts and no outcomes: name a log or a table of pass rates")
    prompts: dict[str, dict[str, PromptIn]] = {}
    outcomes: dict[str, dict[int, list[tuple[str, float, int]]]] = {}
    guessed: set[str] = set()
    wishes = _wishes_for(log, wishes)
    for _, entries in log.entries(wishes, tally):
        for entry in entries:
            prompt = _prompt_of(entry)
            if prompt is None:
                tally.leave_out("entries of a source without an id or a text", entry.place)
                continue
            for column, step, successes, attempts in _counts(entry, wishes):
                prompts.setdefault(column, {}).setdefault(str(prompt.prompt_id), prompt)
                rows = outcomes.setdefault(column, {}).setdefault(step, [])
                rows.append((str(prompt.prompt_id), successes, attempts))
            if isinstance(entry, KnownRates):
                guessed |= {column for column, rate in entry.rates.items() if not isinstance(rate, Mapping)}
    if not outcomes:
        raise LogRefused(f"--learn-from {path}: it has no outcome: name a log, an evaluation or a table of pass rates")
    name = path.resolve().name
    for column, found in prompts.items():
        shown = f"{name} ({column})" if column and len(prompts) > 1 else name
        yield ReadSource(shown, found, outcomes[column], column in guessed)


def _wishes_for(log: Log, wishes: Wishes) -> Wishes:
    """Those that the log is read with, without the name of a reward where this source has none of that name."""
    if wishes.reward is None:
        return wishes
    _, entries = next(log.entries(wishes, Tally()))
    try:
        next(entries, None)
    except RewardMissing:
        return replace(wishes, reward=None)
    return wishes


def _counts(entry: Group | KnownRates, wishes: Wishes) -> Iterator[tuple[str, int, float, int]]:
    """Column, step, successes and attempts. A rate without a number of attempts counts as one of `RATE_ATTEMPTS`."""
    if isinstance(entry, Group):
        yield "", entry.step, sum(entry.rewards), len(entry.rewards)
        return
    for column, rate in entry.rates.items():
        yield (column, wishes.step, *_of_rate(rate))


def _of_rate(rate: Rate) -> tuple[float, int]:
    if isinstance(rate, Mapping):
        return rate["successes"], int(rate["attempts"])
    return rate * RATE_ATTEMPTS, int(RATE_ATTEMPTS)


def _prompt_of(entry: Group | KnownRates) -> PromptIn | None:
    key = entry.prompt_id or (f"text:{text_key(entry.text)}" if entry.text is not None else None)
    if key is None:
        return None
    return PromptIn.model_validate({"prompt_id": key, "text": entry.text, "answer": answer_of(entry.answer)})


def _blocks(rows: Iterable[tuple[str, float, int]], n: int) -> Iterator[list[tuple[str, float, int]]]:
    left = iter(rows)
    while block := list(islice(left, n)):
        yield block
