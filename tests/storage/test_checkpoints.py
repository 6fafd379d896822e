from __future__ import annotations

from datetime import datetime

import pytest

from evenodds_service.storage.errors import RunUnknown
from evenodds_service.storage.store import Run, Store


def test_newest_checkpoint_is_found_also_up_to_a_position(store: Store, run: Run, now: datetime) -> None:
    assert store.newest_checkpoint(run.id) is None

    for position in (10, 30):
        store.save_checkpoint(run.id, position=position, state=b"\x00at %d" % position, now=now)

    assert store.newest_checkpoint(run.id) == (30, b"\x00at 30")
    assert store.newest_checkpoint(run.id, at_most=29) == (10, b"\x00at 10")
    assert store.newest_checkpoint(run.id, at_most=9) is None


def test_only_the_newest_checkpoints_are_kept(store: Store, run: Run, now: datetime) -> None:
    for position in (10, 20, 30):
        store.save_checkpoint(run.id, position=position, state=b"state", now=now, keep=2)
    store.save_checkpoint(run.id, position=15, state=b"late", now=now, keep=2)

    assert store.newest_checkpoint(run.id, at_most=20) == (20, b"state")
    assert store.newest_checkpoint(run.id, at_most=19) is None


def test_second_checkpoint_at_a_position_changes_nothing(store: Store, run: Run, now: datetime) -> None:
    for state in (b"first", b"second"):
        store.save_checkpoint(run.id, position=10, state=state, now=now)

    assert store.newest_checkpoint(run.id) == (10, b"first")


def test_checkpoint_of_an_unknown_run_is_refused(store: Store, now: datetime) -> None:
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.save_checkpoint(0, position=1, state=b"state", now=now)
