from __future__ import annotations

from datetime import datetime
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds_service.errors import RunUnknown
from evenodds_service.storage.checkpoints import KEPT_SNAPSHOTS, needed, thinned
from evenodds_service.storage.store import Run, Store

pytestmark = pytest.mark.numbers


def test_newest_checkpoint_is_found_also_up_to_a_position(store: Store, run: Run, now: datetime) -> None:
    assert store.newest_checkpoint(run.id) is None

    for position in (10, 30):
        store.save_checkpoint(run.id, position=position, state=b"\x00at %d" % position, now=now)

    assert store.newest_checkpoint(run.id) == (30, b"\x00at 30")
    assert store.newest_checkpoint(run.id, at_most=29) == (10, b"\x00at 10")
    assert store.newest_checkpoint(run.id, at_most=9) is None


def test_older_checkpoints_are_thinned_out(store: Store, run: Run, now: datetime) -> None:
    for position in range(10, 410, 10):
        store.save_checkpoint(run.id, position=position, state=b"at %d" % position, now=now)

    kept, at_most = [], 400
    while (found := store.newest_checkpoint(run.id, at_most=at_most)) is not None:
        kept.append(found[0])
        at_most = found[0] - 1

    assert kept[:2] == [400, 390]
    assert 4 <= len(kept) <= 8
    assert kept[-1] == 10


def test_at_most_so_many_checkpoints_are_kept(store: Store, run: Run, now: datetime) -> None:
    for position in (10, 20, 30):
        store.save_checkpoint(run.id, position=position, state=b"state", now=now, keep=2)

    assert store.newest_checkpoint(run.id, at_most=20) == (20, b"state")
    assert store.newest_checkpoint(run.id, at_most=19) is None


@given(gaps=st.lists(st.integers(1, 40), min_size=1, max_size=200), back=st.integers(1, 3_000))
def test_a_checkpoint_is_kept_near_every_position_that_a_rewind_may_go_to(gaps: list[int], back: int) -> None:
    """However far back, at most four times as far, and a few saves more, from the newest."""
    kept: list[int] = []
    position = 0
    for gap in gaps:
        position += gap
        kept = thinned([*kept, position], keep=99)

    assert kept == sorted(kept, reverse=True)
    assert kept[0] == position
    assert len(kept) <= 3 + position.bit_length()
    wanted = position - back
    usable = [p for p in kept if p <= wanted]
    if sum(gaps[:1]) <= position - 4 * back - 80:
        assert usable
        assert position - usable[0] <= 4 * back + 80


@given(
    gaps=st.lists(st.integers(1, 40), min_size=1, max_size=200),
    most=st.integers(1, 20),
    voided=st.sets(st.integers(0, 200)),
)
def test_whoever_starts_from_a_checkpoint_finds_its_snapshot_and_from_the_newest_one_all_that_follow(
    gaps: list[int], most: int, voided: set[int]
) -> None:
    """After each refit, with a checkpoint behind it. Their number has a bound."""
    there: list[int] = []
    standing: list[int] = []
    saved: list[int] = []
    position = 0
    for number, gap in enumerate(gaps):
        position += gap + 1
        there.append(position - 1)
        standing += [] if number in voided else [position - 1]
        saved = thinned([*saved, position], keep=8)
        kept = needed(there, [p for p in standing if p in there], saved, most=most)
        there = [p for p in there if p in kept]

        assert len(there) <= most + len(saved)
        assert {p for p in standing if p > max(saved)} <= kept
        assert {max(p for p in standing if p < c) for c in saved if standing and standing[0] < c} <= kept
        assert number >= most or len(there) == number + 1


def test_thousands_of_refits_leave_few_snapshots_and_all_of_the_newest_seven_at_least() -> None:
    """Behind one checkpoint, that is, where a rewind to any of them is exact."""
    random = Random(0)
    there: list[int] = []
    saved: list[int] = []
    position = 0
    n_whole = []
    for _ in range(3_000):
        for _ in range(random.randint(8, 24)):
            position += 1
            if position % 500 == 0:
                saved = thinned([*saved, position], keep=8)
        position += 2
        there.append(position - 1)
        saved = thinned([*saved, position], keep=8)
        published = list(there)
        there = sorted(needed(published, published, saved, most=KEPT_SNAPSHOTS))
        assert len(there) <= KEPT_SNAPSHOTS + 8
        n_whole.append(
            max(sum(p > c for p in published) for c in (0, *saved) if {p for p in published if p > c} <= set(there))
        )

    assert min(n_whole[KEPT_SNAPSHOTS:]) >= 7
    assert sum(n_whole) / len(n_whole) > 24


def test_second_checkpoint_at_a_position_changes_nothing(store: Store, run: Run, now: datetime) -> None:
    for state in (b"first", b"second"):
        store.save_checkpoint(run.id, position=10, state=state, now=now)

    assert store.newest_checkpoint(run.id) == (10, b"first")


def test_checkpoint_of_an_unknown_run_is_refused(store: Store, now: datetime) -> None:
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.save_checkpoint(0, position=1, state=b"state", now=now)
