"""Folders of recorded success rates, small and made up."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

WriteFolder = Callable[..., Path]


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Writes `prompts.jsonl.gz` and `rates.csv.gz` into a new folder and returns it."""

    def write(texts: Mapping[str, str], columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
        folder = tmp_path / "recorded"
        folder.mkdir()
        with gzip.open(folder / "prompts.jsonl.gz", "wt", encoding="utf-8") as lines:
            for prompt_id, text in texts.items():
                lines.write(json.dumps({"prompt_id": prompt_id, "text": text, "meta": {}}) + "\n")
        with gzip.open(folder / "rates.csv.gz", "wt", encoding="utf-8", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(columns)
            writer.writerows(rows)
        return folder

    return write


@pytest.fixture
def sums_folder(write_folder: WriteFolder) -> Path:
    """A recorded run of 60 prompts and 9 visits, 8 attempts each. Long sums are hard, short ones easy."""
    chance = np.random.default_rng(7)
    lengths = chance.integers(2, 30, 60)
    rates = 1 / (1 + np.exp((lengths - 16) / 3))
    texts = {
        f"sum-{i}": " + ".join(str(chance.integers(10, 99)) for _ in range(n)) + " = ?" for i, n in enumerate(lengths)
    }
    rows = [(f"sum-{i}", visit, chance.binomial(8, rate), 8) for visit in range(9) for i, rate in enumerate(rates)]
    return write_folder(texts, ("prompt_id", "visit", "n_success", "n_samples"), rows)
