"""A log with voided entries is folded as if they had never been there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenodds_service.domain.learning.checkpoint import from_bytes, to_bytes
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.log_entries import Entry, ObserveEntry, PoolEntry, SelectEntry, SnapshotEntry, VoidEntry

if TYPE_CHECKING:
    from tests.domain.conftest import MakeBlock

N = 60


@pytest.fixture(scope="module")
def pool(make_block: MakeBlock) -> Pool:
    rng = np.random.default_rng(0)
    pool = Pool(surface_width=3, embedding_width=4)
    pool.append(make_block(N, surface=rng.normal(size=(N, 3)), embedding=rng.normal(size=(N, 4))))
    pool.attach(1, {})
    return pool


def random_entries(seed: int, n: int) -> list[Entry]:
    """Growth, selections and outcomes in any order of steps, and one snapshot; from position 1 on."""
    rng = np.random.default_rng(seed)
    entries: list[Entry] = [PoolEntry(1, N // 2)]
    for position in range(2, n + 2):
        kind, step = rng.integers(0, 9), int(rng.integers(0, 6))
        prompts = rng.choice(N // 2, size=5, replace=False)
        if position == n // 2:
            entries.append(SnapshotEntry(position, 1))
        elif position == n // 3:
            entries.append(PoolEntry(position, N // 2))
        elif kind < 3:
            entries.append(SelectEntry(position, step, prompts))
        else:
            counts = rng.choice([1.0, 8.0], size=5)
            k = rng.binomial(counts.astype(int), 0.4).astype(float)
            entries.append(ObserveEntry(position, step, prompts, k, counts, (k > 0) & (k < counts)))
    return [*entries, PoolEntry(n + 2, N)]


def folded(entries: list[Entry], pool: Pool, state: State | None = None) -> State:
    state = State() if state is None else state
    for entry in entries:
        fold(state, entry, pool)
    return state


def at_zero(state: State) -> bytes:
    """The state without its position."""
    state.position = 0
    return to_bytes(state)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), voided=st.sets(st.integers(2, 25)), cut=st.integers(0, 26))
def test_voided_entries_leave_no_trace(pool: Pool, seed: int, voided: set[int], cut: int) -> None:
    entries = random_entries(seed, 24)
    voided = {e.position for e in entries if e.position in voided and not isinstance(e, PoolEntry)}
    marked: list[Entry] = [VoidEntry(e.position) if e.position in voided else e for e in entries]
    left = [e for e in entries if e.position not in voided]
    never = [replace(e, position=position) for position, e in enumerate(left, start=1)]

    whole = folded(marked, pool)
    resumed = folded(marked[cut:], pool, from_bytes(to_bytes(folded(marked[:cut], pool))))
    expected = folded(never, pool)

    assert whole.position == len(entries)
    assert at_zero(whole) == at_zero(resumed) == at_zero(expected)
