"""Tables of pass rates: CSV, JSON lines or parquet, a row for each prompt.

| here | in the file |
|---|---|
| id | a column of a usual name (`prompt_id`, `id`, `uid`, `task_id`, ...), or `--id COLUMN` |
| text | one of a usual name (`text`, `prompt`, `question`, `problem`, ...): a text or messages; or `--text COLUMN` |
| rates | see below, or `--rate COLUMN`, several times |
| answer | `answer`, `final_answer`, `ground_truth`, `reward_model.ground_truth`, `solution` or `target` |
| category | `category`, `data_source`, `source`, `domain` |

Rates are the columns that are named like one (`llama8b_solve_rate`, `pass_rate`, `accuracy`) or hold `3/8`; where there
are none, a pair of counts (such as `n_success` and `n_samples`). A rate is a number in [0, 1], `3/8`, `37%`,
`{"successes": 3, "attempts": 8}`, or a list of outcomes of 0 and 1. A column of `{"model-a": .., "model-b": ..}` gives
a rate for each. Other numbers need to be told: `--of 16` says that they are counts out of 16, `--failures` that
they are of failures. A dot leads into nested columns (`extra_info.pass_rate`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from evenodds_service.commands.formats.chat import text_of
from evenodds_service.commands.formats.files import LogFile, Row
from evenodds_service.commands.formats.outcomes import KnownRates, LogRefused, Rate, Tally, Wishes, number_of

NAME = "table"
_IDS = ("prompt_id", "id", "uid", "unique_id", "task_id", "question_id", "problem_id")
_TEXTS = ("text", "prompt", "question", "problem", "query", "instruction", "input")
_ANSWERS = ("answer", "final_answer", "ground_truth", "reward_model.ground_truth", "solution", "target")
_CATEGORIES = ("category", "data_source", "source", "domain")
_PAIRS = (
    ("n_success", "n_samples"),
    ("successes", "attempts"),
    ("num_correct", "num_samples"),
    ("n_correct", "n_samples"),
    ("correct", "total"),
    ("k", "n"),
)
_RATE = re.compile(
    r"(?:^|_)(?:pass|solve|success|solved|correct)_?rate|(?:^|_)rate$|^acc(?:uracy)?$|^pass@1$", re.IGNORECASE
)
_FRACTION = re.compile(r"\s*(\d+)\s*/\s*(\d+)\s*")
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
COUNTS = "counts"
"""Name of the rate that a pair of counts gives."""


def recognises(row: Row) -> bool:
    """Whether the row says a rate of a prompt."""
    return bool(_rate_columns(row)) and any(name in row for name in (*_IDS, *_TEXTS))


class Reader:
    def __init__(self, wishes: Wishes, tally: Tally) -> None:
        self._wishes, self._tally = wishes, tally
        self._seen: set[str] = set()

    def read(self, file: LogFile) -> Iterator[KnownRates]:
        """Raises LogRefused."""
        columns: tuple[str, ...] = self._wishes.rate_columns
        id_column = text_column = None
        is_first = True
        for line, row in _rows(file, self._tally):
            place = file.at(line)
            if is_first:
                is_first = False
                columns = columns or _rate_columns(row)
                id_column = _column(row, self._wishes.id_column, _IDS, place)
                text_column = _column(row, self._wishes.text_column, _TEXTS, place)
                self._check(row, columns, (id_column, text_column), place)
            prompt_id = _id_of(_value(row, id_column))
            text = text_of(_value(row, text_column))
            rates: dict[str, Rate] = {}
            for column in columns:
                rates |= self._rates(row, column, place)
            if prompt_id is None and text is None:
                self._tally.leave_out("rows without an id or a text", place)
            elif not rates:
                self._tally.leave_out("rows without a rate", place)
            elif (key := prompt_id or text or "") in self._seen:
                self._tally.leave_out("rows of a prompt that an earlier row has already", place)
            else:
                self._seen.add(key)
                category = next(
                    (row[name] for name in _CATEGORIES if isinstance(row.get(name), str) and row[name]), None
                )
                answers = (_value(row, name) for name in _ANSWERS if name not in columns)
                answer = next((value for value in answers if value not in (None, "")), None)
                yield KnownRates(rates, prompt_id, text, category, place, answer)

    def _check(self, row: Row, columns: tuple[str, ...], named: tuple[str | None, str | None], place: str) -> None:
        """Raises LogRefused: nothing tells the prompts or their rates, or a named column is not there."""
        listed = ", ".join(row) or "none"
        if named == (None, None):
            raise LogRefused(
                f"{place}: no column identifies the prompts: name one with --id or --text; the columns are: {listed}"
            )
        if not columns:
            raise LogRefused(
                f"{place}: no column has the name of a rate: name the columns with --rate; the columns are: {listed}"
            )
        for column in columns:
            if column != COUNTS and column.partition(".")[0] not in row:
                raise LogRefused(f"{place}: there is no column {column!r}; the columns are: {listed}")

    def _rates(self, row: Row, column: str, place: str) -> dict[str, Rate]:
        """The rates of one column, by name; none where it is empty."""
        if column == COUNTS:
            value: object = _counts(row)
        else:
            value = _value(row, column)
        if isinstance(value, Mapping) and set(value) != {"successes", "attempts"}:
            parts = {f"{column}.{name}": each for name, each in value.items()}
            found = {name: self._rate(each, name, place) for name, each in parts.items()}
        else:
            found = {column: self._rate(value, column, place)}
        return {name: rate for name, rate in found.items() if rate is not None}

    def _rate(self, value: object, column: str, place: str) -> Rate | None:
        """Raises LogRefused: it is no rate."""
        wishes = self._wishes
        if isinstance(value, str) and (fraction := _FRACTION.fullmatch(value)):
            return self._of_counts(float(fraction[1]), float(fraction[2]), column, place)
        if isinstance(value, str) and (percent := _PERCENT.fullmatch(value)):
            value = float(percent[1]) / 100
        if isinstance(value, Mapping):
            successes, attempts = number_of(value["successes"]), number_of(value["attempts"])
            return None if successes is None or not attempts else self._of_counts(successes, attempts, column, place)
        if isinstance(value, list):
            outcomes = [number for each in value if (number := number_of(each)) is not None]
            return self._of_counts(sum(outcomes), float(len(outcomes)), column, place) if outcomes else None
        number = number_of(value)
        if number is None:
            return None
        if wishes.of is not None:
            return self._of_counts(number, float(wishes.of), column, place)
        if not 0 <= number <= 1:
            raise LogRefused(
                f"{place}: {column} {number:g} is not a rate in [0, 1]: if the numbers are counts out of 16 or "
                "percentages, add --of 16 or --of 100 (and --failures if they count failures)"
            )
        return 1.0 - number if wishes.counts_failures else number

    def _of_counts(self, successes: float, attempts: float, column: str, place: str) -> Rate:
        if not 0 <= successes <= attempts or attempts < 1:
            raise LogRefused(
                f"{place}: {column}: {successes:g} of {attempts:g} is not a rate: successes must lie in [0, attempts]"
            )
        successes = attempts - successes if self._wishes.counts_failures else successes
        return {"successes": successes, "attempts": attempts}


def _rows(file: LogFile, tally: Tally) -> Iterator[tuple[int, Row]]:
    name = file.path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return file.parquet_rows()
    return file.csv_rows() if name.endswith(".csv") else file.json_lines(tally)


def _rate_columns(row: Row) -> tuple[str, ...]:
    """Those that look like rates, by their names or by what they hold; else a pair of counts."""
    named = [name for name in row if _RATE.search(name)]
    fractions = [name for name, value in row.items() if isinstance(value, str) and _FRACTION.fullmatch(value)]
    found = list(dict.fromkeys([*named, *(name for name in fractions if name not in (*_IDS, *_TEXTS))]))
    return tuple(found) or ((COUNTS,) if _counts(row) is not None else ())


def _counts(row: Row) -> dict[str, object] | None:
    for successes, attempts in _PAIRS:
        if successes in row and attempts in row:
            return {"successes": row[successes], "attempts": row[attempts]}
    return None


def _column(row: Row, wished: str | None, usual: tuple[str, ...], place: str) -> str | None:
    """Raises LogRefused: the wished one is not there."""
    if wished is None:
        return next((name for name in usual if name in row), None)
    if wished.partition(".")[0] not in row:
        raise LogRefused(f"{place}: there is no column {wished!r}; the columns are: {', '.join(row)}")
    return wished


def _value(row: Row, column: str | None) -> object:
    """What a column holds; a dot leads into nested ones."""
    if column is None:
        return None
    value: object = row
    if column in row:
        return row[column]
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _id_of(value: object) -> str | None:
    return str(value) if isinstance(value, str | int) and str(value).strip() else None
