"""TRL: `completions/completions_{step:05d}.parquet` (`log_completions=True`), a row for each completion.

| here | in the file |
|---|---|
| step | `step`, trainer steps |
| group | rows of a file with equal `prompt` |
| text | `prompt`, decoded without special tokens: the user's turn of it |
| answer | `answer` or `solution`, where a reward function logs such a column of texts (`log_extra`) |
| reward | the one numeric column besides `step` and `advantage`; `--reward NAME` where there are several |

A reward of NaN is absent (the reward function returned None). With `num_iterations` above 1, or `steps_per_generation`
above the accumulated steps, TRL writes the same completions again in the next files: they count once. Files hold the
newest generation before each log: with `logging_steps` above 1 the others are missing, but whatever came of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from evenodds_service.commands.formats.chat import plain_text
from evenodds_service.commands.formats.files import LogFile, Row
from evenodds_service.commands.formats.grouping import Grouping
from evenodds_service.commands.formats.outcomes import Group, Tally, Wishes, chosen_reward, number_of, scaled

NAME = "trl"
_ANSWERS = ("answer", "solution")
COLUMNS = frozenset({"step", "prompt", "completion", "advantage"})


def recognises(columns: list[str]) -> bool:
    return set(columns) >= COLUMNS


def files_of(folder: Path) -> list[Path]:
    """Those of the folder, or of `completions` in it, in the order of their steps."""
    return sorted([*folder.glob("completions_*.parquet"), *folder.glob("completions/completions_*.parquet")])


class Reader:
    def __init__(self, wishes: Wishes, tally: Tally) -> None:
        self._wishes, self._tally = wishes, tally
        self._generation: bytes | None = None
        self._previous_step: int | None = None

    def read(self, file: LogFile) -> Iterator[Group]:
        """Raises LogRefused."""
        tally = Tally()  # what is left out of a file that counts
        grouping = Grouping(tally)
        generation = hashlib.sha256()
        names: list[str] | None = None
        step = number = 0
        for number, row in file.parquet_rows():
            place = f"{file.name} row {number}"
            names = names if names is not None else [name for name in row if _may_be_reward(name, row)]
            name = self._wishes.reward if self._wishes.reward in row else chosen_reward(names, self._wishes, place)
            step, prompt = int(row["step"]), str(row["prompt"])
            generation.update(repr((prompt, row["completion"], row[name])).encode())
            value = number_of(row[name])
            reward = None if value is None else scaled(value, self._wishes, place, others=names)
            answer = next((row[column] for column in _ANSWERS if isinstance(row.get(column), str)), None)
            about = Group(step, (), text=plain_text(prompt), templated=prompt, place=place, answer=answer)
            grouping.add((step, prompt), reward, about)
        if self._previous_step is not None and step > self._previous_step + 1:
            self._tally.note(
                "steps are missing between the files (logging_steps above 1): what was generated there is not in this "
                "log"
            )
        self._previous_step = step
        if generation.digest() == self._generation:
            self._tally.leave_out(
                "completions that the file before has: one generation for several steps", file.name, number
            )
            return
        self._tally.absorb(tally)
        self._generation = generation.digest()
        yield from grouping.groups()


def _may_be_reward(name: str, row: Row) -> bool:
    return name not in COLUMNS and (row[name] is None or number_of(row[name]) is not None)
