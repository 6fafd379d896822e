"""The load model multiplies right, and docs/past-one-database.md says what it computes and what the tables are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.capacity import BATCH, MEASURED, Load, limits, needs, table
from sqlalchemy import UniqueConstraint

from evenodds_service.storage.tables import metadata

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "past-one-database.md").read_text()
SMALL = Load(prompts=1e6, runs=10, active=0.5, steps=100, step_seconds=10.0, refit_observations=1_024, busy=0.5)


def test_needs_of_a_small_load_are_those_computed_by_hand() -> None:
    constants = replace(
        MEASURED,
        prompt_bytes=1_000.0,
        observation_bytes=10.0,
        selection_bytes=5_000.0,
        packed_bytes=600.0,
        checkpoint_bytes=100.0,
        checkpoints=8,
        snapshot_bytes=1e6,
        snapshot_prompt_bytes=10.0,
        snapshots=20,
        memory_bytes=2_000.0,
        select_seconds=0.04,
        observe_seconds=0.01,
        refit_seconds=20.0,
        import_rate=1e6 / 3_600.0,
        cold_start_seconds=2.0,
    )

    found = needs(SMALL, constants)

    assert found.prompts_bytes == 1e9
    assert found.log_bytes == 10 * 100 * (BATCH * 10.0 + 5_000.0)
    assert (found.packed_bytes, found.checkpoints_bytes) == (0.6e9, 0.8e9)
    assert found.snapshots_bytes == 10 * 20 * 2e6  # of 25 refits
    assert needs(replace(SMALL, steps=40), constants).snapshots_bytes == 10 * 10 * 2e6
    assert found.database_bytes == pytest.approx(1e9 + 7.56e6 + 1.4e9 + 400e6)
    assert found.requests_per_second == 1.0  # five runs, two calls each ten seconds
    assert found.api_processes == pytest.approx(0.5 * 0.05 / 0.5)
    assert found.memory_bytes == 5 * 100_000 * 2_000.0
    assert found.refits_per_second == pytest.approx(0.5 / 4)
    assert found.workers == pytest.approx(0.125 * 20.0 / 0.5)
    assert found.import_hours == pytest.approx(1.0)
    assert found.failover_seconds == pytest.approx(0.5 * 2.0)


@pytest.mark.parametrize("name", ["database_bytes", "api_processes", "memory_bytes", "workers", "import_hours"])
def test_twice_the_runs_of_the_same_size_need_twice_as_much(name: str) -> None:
    twice = replace(SMALL, prompts=2 * SMALL.prompts, runs=2 * SMALL.runs)

    assert getattr(needs(twice), name) == pytest.approx(2 * getattr(needs(SMALL), name))


def test_the_page_has_the_tables_that_the_command_prints() -> None:
    assert table(Load()) in PAGE
    assert limits(Load()) in PAGE


def test_the_page_names_every_table_whose_keys_lack_the_run() -> None:
    """A database that is distributed by run cannot keep such a key."""
    lacking = set()
    for each in metadata.sorted_tables:
        keys = [set(each.primary_key.columns.keys())]
        keys += [set(rule.columns.keys()) for rule in each.constraints if isinstance(rule, UniqueConstraint)]
        keys += [set(index.columns.keys()) for index in each.indexes if index.unique]
        lacking |= {(each.name, ", ".join(sorted(key))) for key in keys if "run_id" not in key}
    lacking -= {("runs", "id"), ("api_keys", "secret_hash"), ("api_keys", "second_hash")}
    rows = re.findall(r"^\| `(\w+)` \| `([\w, ]+)` \|", PAGE, flags=re.MULTILINE)

    assert set(rows) == lacking
