"""Recorded success rates as worlds to replay: what came of any prompt at any step, the same for every predictor.

Reads a folder with `prompts.jsonl.gz` (`prompt_id`, `text`, `meta`) and `rates.csv.gz` (`prompt_id`, `n_success`,
`n_samples`). A column `visit` or `step` makes it a recorded training run, a column `model` a table of models, and
neither a static table. Knows nothing of predictors.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evenodds import PromptIn

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

Kind = Literal["run", "models", "static"]
DEFAULT_STEPS = 44
ENOUGH_SAMPLES = 8
ENOUGH_COVERAGE = 0.75
_OUTCOMES = 1


class RecordingError(Exception):
    """A folder cannot be replayed, or not like this. The message names the file, the fault and the next step."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A world: N prompts and V stages of a policy, in the order of time.

    The stages of a recorded run are its visits: visit v of a prompt is what came of it at time v. The stages of a
    table of models are models from weak to strong. A static table has one stage.

    Attributes:
        name: Name of the folder.
        prompts: The N prompts that have outcomes in every stage.
        left_out: Prompts of the folder that have not.
        successes_V_N, attempts_V_N: Recorded counts, 0 <= successes <= attempts, attempts >= 1.
        stages: What each stage is, in words, V of them.
    """

    name: str
    kind: Kind
    prompts: tuple[PromptIn, ...]
    left_out: int
    successes_V_N: IntArray
    attempts_V_N: IntArray
    stages: tuple[str, ...]

    @property
    def n_prompts(self) -> int:
        return len(self.prompts)

    @property
    def default_steps(self) -> int:
        return len(self.stages) if self.kind == "run" else DEFAULT_STEPS

    def check(self, *, n_steps: int, group_size: int) -> None:
        """Refuse what the recording cannot answer.

        Raises:
            RecordingError: More steps than visits, or more attempts than were recorded.
        """
        if self.kind != "run":
            return
        if n_steps > len(self.stages):
            raise RecordingError(
                f"--steps {n_steps}: every prompt of {self.name} was visited {len(self.stages)} times; "
                f"ask for at most {len(self.stages)} steps"
            )
        least = int(self.attempts_V_N.min())
        if group_size > least:
            raise RecordingError(
                f"--group-size {group_size}: {self.name} records {least} attempts a visit; ask for at most {least}"
            )

    def outcomes(self, *, seed: int, step: int, n_steps: int, group_size: int) -> IntArray:
        """Successes out of `group_size` attempts that each prompt has at this step, [N].

        A function of its arguments alone, so that every predictor meets the same outcome. A recorded run gives
        attempts of the visit whose turn it is (all of them, if so many are asked for). A table gives binomial
        draws at the rate of the policy, which moves evenly through the stages between step 0 and n_steps - 1.
        """
        generator = np.random.default_rng([seed, step, _OUTCOMES])
        last = len(self.stages) - 1
        time = last * step / max(n_steps - 1, 1)
        if self.kind == "run":
            k, n = self.successes_V_N[round(time)], self.attempts_V_N[round(time)]
            return np.asarray(generator.hypergeometric(k, n - k, group_size), dtype=np.int64)
        before = min(math.floor(time), max(last - 1, 0))
        after = min(before + 1, last)
        share = time - before
        rates_V_N = self.successes_V_N[[before, after]] / self.attempts_V_N[[before, after]]
        rates_N = (1 - share) * rates_V_N[0] + share * rates_V_N[1]
        return np.asarray(generator.binomial(group_size, rates_N), dtype=np.int64)


def read_recording(folder: Path, *, models: str = "") -> Recording:
    """Read a folder.

    Args:
        models: Of a table of models, only those whose name contains this text.

    Raises:
        RecordingError: A file is missing or malformed, or holds nothing to replay.
    """
    if not folder.is_dir():
        raise RecordingError(
            f"{folder}: there is no such file or folder: name a trainer's log, or a folder with prompts.jsonl.gz and "
            "rates.csv.gz"
        )
    prompts = _read_prompts(folder / "prompts.jsonl.gz")
    path = folder / "rates.csv.gz"
    columns, rows = _read_rates(path, known=prompts)
    if "visit" in columns or "step" in columns:
        kind: Kind = "run"
        stages, counts = _visits(path, rows, order="visit" if "visit" in columns else "step")
    elif "model" in columns:
        kind = "models"
        stages, counts = _models(path, rows, models)
    else:
        kind = "static"
        stages, counts = _static(rows)
    kept = [prompt_id for prompt_id in prompts if prompt_id in counts]
    if len(kept) < 2:
        raise RecordingError(f"{path}: {len(kept)} prompts of prompts.jsonl.gz have outcomes; at least 2 are needed")
    table = np.array([counts[prompt_id] for prompt_id in kept], dtype=np.int64)  # [N, V, 2]
    return Recording(
        name=folder.resolve().name,
        kind=kind,
        prompts=tuple(prompts[prompt_id] for prompt_id in kept),
        left_out=len(prompts) - len(kept),
        successes_V_N=np.ascontiguousarray(table[:, :, 0].T),
        attempts_V_N=np.ascontiguousarray(table[:, :, 1].T),
        stages=stages,
    )


Count = tuple[int, int]
Stages = tuple[tuple[str, ...], dict[str, list[Count]]]


@dataclass(frozen=True, slots=True)
class _Row:
    prompt_id: str
    successes: int
    attempts: int
    order: int
    model: str


def _visits(path: Path, rows: Sequence[_Row], *, order: str) -> Stages:
    """The visits of each prompt in their order, cut to the number that all prompts have."""
    visits: defaultdict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        visits[row.prompt_id].append(row)
    n = min(len(v) for v in visits.values())
    if n < 2:
        raise RecordingError(f"{path}: a recorded run needs 2 visits or more of every prompt, some have {n}")
    ordered = {i: sorted(v, key=lambda row: row.order)[:n] for i, v in visits.items()}
    counts = {i: [(row.successes, row.attempts) for row in v] for i, v in ordered.items()}
    return tuple(f"{order} {v}" for v in range(n)), counts


def _static(rows: Iterable[_Row]) -> Stages:
    return ("static",), {i: [count] for i, count in _summed(rows).items()}


def _models(path: Path, rows: Sequence[_Row], wanted: str) -> Stages:
    """Models from weak to strong; where each has few samples, windows of neighbours stand for one policy."""
    by_model: defaultdict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        if wanted in row.model:
            by_model[row.model].append(row)
    if not by_model:
        raise RecordingError(f"--models {wanted!r}: no model of {path} has this in its name; see its column `model`")
    tables = {model: _summed(model_rows) for model, model_rows in by_model.items()}
    widest = max(len(table) for table in tables.values())
    tables = {m: table for m, table in tables.items() if len(table) >= ENOUGH_COVERAGE * widest}
    well_sampled = {m: t for m, t in tables.items() if _samples(t) >= ENOUGH_SAMPLES}
    tables = well_sampled if len(well_sampled) >= 2 else tables
    names = sorted(tables, key=lambda model: _mean_rate(tables[model]))
    mean_samples = float(np.mean([_samples(tables[name]) for name in names]))
    window = min(len(names), math.ceil(ENOUGH_SAMPLES / mean_samples))
    common = set.intersection(*(set(table) for table in tables.values()))
    counts: dict[str, list[Count]] = {}
    for prompt_id in common:
        cells = [tables[name][prompt_id] for name in names]
        windows = [cells[first : first + window] for first in range(len(names) - window + 1)]
        counts[prompt_id] = [(sum(k for k, _ in w), sum(n for _, n in w)) for w in windows]
    stages = [names[first : first + window] for first in range(len(names) - window + 1)]
    return tuple(s[0] if len(s) == 1 else f"{s[0]} .. {s[-1]}" for s in stages), counts


def _summed(rows: Iterable[_Row]) -> dict[str, Count]:
    table: dict[str, Count] = {}
    for row in rows:
        k, n = table.get(row.prompt_id, (0, 0))
        table[row.prompt_id] = (k + row.successes, n + row.attempts)
    return table


def _samples(table: Mapping[str, Count]) -> float:
    return float(np.mean([n for _, n in table.values()]))


def _mean_rate(table: Mapping[str, Count]) -> float:
    return float(np.mean([k / n for k, n in table.values()]))


def _read_prompts(path: Path) -> dict[str, PromptIn]:
    prompts: dict[str, PromptIn] = {}
    for number, line in enumerate(_lines(path), start=1):
        try:
            row: Any = json.loads(line)
            meta = row.get("meta") or {}
            category = row.get("category") or row.get("group") or meta.get("task")
            prompt = PromptIn(prompt_id=row["prompt_id"], text=row["text"], category=category)
        except (ValueError, KeyError, AttributeError) as error:
            raise RecordingError(
                f"{path} line {number}: {_one_line(error)}; each line is a JSON object with prompt_id and text"
            ) from error
        prompts[row["prompt_id"]] = prompt
    return prompts


def _read_rates(path: Path, *, known: Mapping[str, PromptIn]) -> tuple[frozenset[str], list[_Row]]:
    reader = csv.DictReader(_lines(path))
    columns = frozenset(reader.fieldnames or ())
    missing = {"prompt_id", "n_success", "n_samples"} - columns
    if missing:
        raise RecordingError(
            f"{path}: no column {', '.join(sorted(missing))}; the columns are {', '.join(sorted(columns)) or 'none'}"
        )
    order = "visit" if "visit" in columns else "step"
    rows = []
    for cells in reader:
        try:
            row = _Row(
                cells["prompt_id"],
                int(cells["n_success"]),
                int(cells["n_samples"]),
                int(cells.get(order) or 0),
                cells.get("model") or "",
            )
        except (TypeError, ValueError) as error:
            raise RecordingError(f"{path} line {reader.line_num}: {_one_line(error)}; counts are integers") from error
        if not 0 <= row.successes <= row.attempts or row.attempts < 1:
            raise RecordingError(
                f"{path} line {reader.line_num}: n_success {row.successes} of n_samples {row.attempts}; "
                "0 <= n_success <= n_samples and n_samples >= 1 must hold"
            )
        if row.prompt_id in known:
            rows.append(row)
    if not rows:
        raise RecordingError(f"{path}: no row belongs to a prompt of prompts.jsonl.gz; compare their prompt_id")
    return columns, rows


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from lines
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else _one_line(error)
        raise RecordingError(f"{path}: {reason}; a folder to replay holds prompts.jsonl.gz and rates.csv.gz") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
