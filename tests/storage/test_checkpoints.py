from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenodds_service.errors import RunUnknown
from evenodds_service.storage.checkpoints import thinned
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


def test_second_checkpoint_at_a_position_changes_nothing(store: Store, run: Run, now: datetime) -> None:
    for state in (b"first", b"second"):
        store.save_checkpoint(run.id, position=10, state=state, now=now)

    assert store.newest_checkpoint(run.id) == (10, b"first")


def test_checkpoint_of_an_unknown_run_is_refused(store: Store, now: datetime) -> None:
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.save_checkpoint(0, position=1, state=b"state", now=now)
