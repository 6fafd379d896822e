"""verl: `trainer.rollout_data_dir/{step}.jsonl`, a row for each attempt.

| here | in the file |
|---|---|
| step | `step` |
| group | the first part of `uid` (`{prompt}_{rollout}_{output}`, V1 trainers), else rows of a file with equal `input` |
| text | `input`, decoded without special tokens: the user's turn of it |
| reward | `score`; `--reward NAME` takes what the reward function reported beside it, `acc` say |
| answer | `gts` |
| category | `data_source`, where the reward function reports it |

The V1 trainers write what they trained on: groups that were filtered or evicted are missing. Of several outputs of one
rollout the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from evenodds_service.commands.formats.chat import plain_text
from evenodds_service.commands.formats.files import LogFile, Row
from evenodds_service.commands.formats.grouping import Grouping
from evenodds_service.commands.formats.outcomes import Group, RewardMissing, Tally, Wishes, number_of, scaled

NAME = "verl"
KEYS = frozenset({"input", "output", "score", "step"})
_NO_REWARDS = KEYS | {"gts", "uid", "request_id"}
_UID = re.compile(r"(.+)_(\d+)_(\d+)")


def recognises(row: Row) -> bool:
    return row.keys() >= KEYS


def files_of(folder: Path) -> list[Path]:
    """`1.jsonl`, `2.jsonl`, ... in the order of their steps."""
    found = [path for path in folder.glob("*.jsonl") if path.stem.isdigit()]
    return sorted(found, key=lambda path: int(path.stem))


class Reader:
    def __init__(self, wishes: Wishes, tally: Tally) -> None:
        self._wishes, self._tally = wishes, tally

    def read(self, file: LogFile) -> Iterator[Group]:
        """Raises LogRefused."""
        grouping = Grouping(self._tally)
        outputs: dict[str, int] = {}
        for line, row in file.json_lines(self._tally):
            place = file.at(line)
            step, text = row.get("step"), row.get("input")
            if not isinstance(step, int) or step < 0 or not isinstance(text, str):
                self._tally.leave_out("rows without a step or an input", place)
                continue
            uid = _UID.fullmatch(str(row.get("uid", "")))
            rollout = None
            if uid is not None:
                self._tally.is_filtered = True
                self._tally.note(
                    "verl's V1 trainers write what they trained on: groups that were filtered or evicted are not in "
                    "this log, which therefore shows fewer silent groups than there were"
                )
                rollout = f"{uid[1]}_{uid[2]}"
                outputs[rollout] = outputs.get(rollout, -1) + 1
                if outputs[rollout]:
                    self._tally.leave_out("earlier outputs of a rollout that has several outputs", place)
            key = (step, uid[1] if uid is not None else text)
            about = Group(
                step,
                (),
                text=plain_text(text),
                templated=text,
                category=_category(row),
                place=place,
                answer=row.get("gts"),
            )
            grouping.add(key, self._reward(row, place), about, attempt=rollout)
        yield from grouping.groups()

    def _reward(self, row: Row, place: str) -> float | None:
        name = self._wishes.reward or "score"
        others = sorted(key for key, value in row.items() if key not in _NO_REWARDS and number_of(value) is not None)
        if name not in row:
            raise RewardMissing(f"{place}: it has no reward {name!r}; its rewards are: {', '.join(['score', *others])}")
        number = number_of(row[name])
        return None if number is None else scaled(number, self._wishes, place, others=others)


def _category(row: Row) -> str | None:
    source = row.get("data_source")
    return source if isinstance(source, str) and source else None
