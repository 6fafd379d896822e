"""NeMo-RL: `train_data_step{N}.jsonl` of a run's log folder, a row for each sample, every value in a list of one.

| here | in the file |
|---|---|
| step | N of the file's name |
| text | the messages of `content` before the last one: the user's turn of them |
| group | consecutive rows with equal messages before the last one |
| reward | `rewards`; with dynamic sampling `filtered_rewards`, which belong to the rows |
| category | `agent_ref.name`, where there is one |

With dynamic sampling (`filtered_rewards` is there) groups of equal rewards were dropped before the file was written.
Samples whose `sample_loss_mask` is 0 are left out: overlong or marked by the environment. Not written where NeMo Gym
logs the responses itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from evenodds_service.commands.formats.chat import plain_text
from evenodds_service.commands.formats.files import LogFile, Row
from evenodds_service.commands.formats.grouping import Grouping
from evenodds_service.commands.formats.outcomes import (
    Group,
    LogRefused,
    RewardMissing,
    Tally,
    Wishes,
    number_of,
    scaled,
)

NAME = "nemo-rl"
KEYS = frozenset({"content", "rewards", "idx"})
_STEP = re.compile(r"train_data_step(\d+)\.jsonl(?:\.gz)?\Z")


def recognises(row: Row) -> bool:
    return row.keys() >= KEYS


def files_of(folder: Path) -> list[Path]:
    found = [(match, path) for path in folder.glob("train_data_step*.jsonl*") if (match := _STEP.match(path.name))]
    return [path for _, path in sorted(found, key=lambda item: int(item[0][1]))]


class Reader:
    def __init__(self, wishes: Wishes, tally: Tally) -> None:
        self._wishes, self._tally = wishes, tally

    def read(self, file: LogFile) -> Iterator[Group]:
        """Raises LogRefused."""
        named = _STEP.match(file.path.name)
        if named is None:
            raise LogRefused(
                f"{file.name}: the name does not tell the step: name the file as NeMo-RL does, "
                "train_data_step7.jsonl for example"
            )
        step, n_groups, before = int(named[1]), 0, None
        grouping = Grouping(self._tally)
        for line, row in file.json_lines(self._tally):
            place = file.at(line)
            messages = _only(row.get("content"))
            turns = [messages] if isinstance(messages, str) else messages if isinstance(messages, list) else []
            prompt = "".join(str(turn) for turn in turns[:-1])
            if not prompt:
                self._tally.leave_out("samples whose content has no prompt before the answer", place)
                continue
            if _only(row.get("sample_loss_mask", 1)) == 0:
                self._tally.leave_out("samples that were masked out", place)
                continue
            if prompt != before:
                n_groups, before = n_groups + 1, prompt
            agent = _only(row.get("agent_ref"))
            category = agent.get("name") if isinstance(agent, dict) else None
            about = Group(step, (), text=plain_text(prompt), templated=prompt, category=category or None, place=place)
            grouping.add(n_groups, self._reward(row, place), about)
        yield from grouping.groups()

    def _reward(self, row: Row, place: str) -> float | None:
        name = self._wishes.reward or ("filtered_rewards" if "filtered_rewards" in row else "rewards")
        if "filtered_rewards" in row:
            self._tally.is_filtered = True
            self._tally.note(
                "dynamic sampling was on: groups of equal rewards were dropped before this log was written, and "
                "it shows none of them"
            )
        if name not in row:
            raise RewardMissing(f"{place}: it has no reward {name!r}; NeMo-RL writes the field rewards")
        number = number_of(_only(row[name]))
        return None if number is None else scaled(number, self._wishes, place)


def _only(value: object) -> object:
    """What a list of one holds."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
