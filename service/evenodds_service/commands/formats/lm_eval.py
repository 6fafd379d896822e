"""lm-eval: `samples_{task}_{date}.jsonl` (`--log_samples`), a row for each document and filter.

| here | in the file |
|---|---|
| step | none: `--step`, 0 by default. The run stands for the model that was evaluated |
| id | `doc_hash`, of the document's content |
| text | the question in `doc` (see below), else what was sent: `arguments` |
| answer | `target` |
| reward | the one metric that `metrics` names; `--reward NAME` where there are several |
| category | the task in the file's name |

The question is `question`, `problem`, `query`, `prompt`, `instruction` or `input`, whichever is there first.
Each filter of a task gives rows of its own for the same answers: the first filter counts, or the one of `--filter`. A
metric is of what the filter left of the answers, so that a row is one attempt even where several were sampled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from evenodds_service.commands.formats.chat import plain_text
from evenodds_service.commands.formats.files import LogFile, Row
from evenodds_service.commands.formats.grouping import NO_REWARD
from evenodds_service.commands.formats.outcomes import Group, Tally, Wishes, chosen_reward, number_of, scaled

NAME = "lm-eval"
KEYS = frozenset({"doc_id", "doc", "filtered_resps"})
_QUESTIONS = ("question", "problem", "query", "prompt", "instruction", "input")
_FILE = re.compile(r"samples_(?P<task>.+)_\d{4}-\d\d-\d\dT[\d.-]+\.jsonl(?:\.gz)?\Z")


def recognises(row: Row) -> bool:
    return row.keys() >= KEYS


def files_of(folder: Path) -> list[Path]:
    """Those of the folder: of one model."""
    return sorted(folder.glob("samples_*.jsonl*"))


class Reader:
    def __init__(self, wishes: Wishes, tally: Tally) -> None:
        self._wishes, self._tally = wishes, tally

    def read(self, file: LogFile) -> Iterator[Group]:
        """Raises LogRefused."""
        named = _FILE.match(file.path.name)
        kept = self._wishes.filter
        for line, row in file.json_lines(self._tally):
            place = file.at(line)
            filter_ = str(row.get("filter", "none"))
            kept = filter_ if kept is None else kept
            if filter_ != kept:
                self._tally.leave_out(f"rows of the filter {filter_!r}: the same answers under another filter", place)
                continue
            names = [str(name) for name in row.get("metrics") or ()]
            numeric = [name for name in names if number_of(row.get(name)) is not None]
            could_count = names if self._wishes.reward is not None else numeric
            number = number_of(row.get(chosen_reward(could_count, self._wishes, place))) if could_count else None
            if number is None:
                self._tally.leave_out(NO_REWARD, place)
                continue
            if _samples(row) > 1:
                self._tally.note(
                    "several answers were sampled for a document: its metric is of what the filter left of them, and "
                    "counts as one attempt"
                )
            doc_hash = row.get("doc_hash")
            text, sent = _texts(row)
            yield Group(
                self._wishes.step,
                (scaled(number, self._wishes, place, others=names),),
                prompt_id=str(doc_hash) if doc_hash else None,
                text=text,
                templated=sent,
                category=named["task"] if named is not None else None,
                place=place,
                answer=row.get("target"),
            )


def _samples(row: Row) -> int:
    """Answers to the first request; the answer to a multiple choice is a pair of its own."""
    first = (row.get("resps") or [None])[0]
    return len(first) if isinstance(first, list) and all(isinstance(answer, str) for answer in first) else 1


def _texts(row: Row) -> tuple[str | None, str | None]:
    """The question, and what was sent."""
    arguments = row.get("arguments")
    first = next(iter(arguments.values()), {}) if isinstance(arguments, dict) else (arguments or [{}])[0]
    sent = first.get("arg_0") if isinstance(first, dict) else first[0] if isinstance(first, list) and first else None
    sent = sent if isinstance(sent, str) and sent.strip() else None
    doc = row["doc"] if isinstance(row["doc"], dict) else {}
    for name in _QUESTIONS:
        if isinstance(doc.get(name), str) and doc[name].strip():
            return doc[name].strip(), sent
    return plain_text(sent) if sent is not None else None, sent
