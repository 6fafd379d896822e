"""Which runs a process holds, and how old they may be."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import RunUnknown
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Run, Store

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)


class ChangedMeanwhile(Store):
    """A store where, once, somebody changes the run between its reading and the answer."""

    live_runs: LiveRuns | None = None

    def run(self, name: str) -> Run:
        run = super().run(name)
        if self.live_runs is not None:
            live_runs, self.live_runs = self.live_runs, None
            self.put_run(name, RunSettings(group_size=4), now=NOW)
            live_runs.forget(name)
        return run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChangedMeanwhile]:
    engine = open_engine(f"sqlite:///{tmp_path}/evenodds.db")
    upgrade(engine)
    store = ChangedMeanwhile(engine)
    for name in ("a", "b", "c"):
        store.put_run(name, RunSettings(group_size=8), now=NOW)
    yield store
    store.close()


def test_a_run_in_memory_answers_for_the_seconds_that_it_may(store: Store) -> None:
    clock = Clock()
    live_runs = LiveRuns(store, capacity=2, clock=clock)
    assert live_runs.held("a", 1.0) is None
    first = live_runs.at_head("a")

    clock.now = 1.0
    assert live_runs.within("a", 1.0) is first
    assert live_runs.within("a", 0.9).read_at == 1.0
    assert live_runs.held("a", 0.0) is None
    assert live_runs.at_head("a").live is first.live


def test_the_run_that_was_asked_for_the_longest_time_ago_goes_first(store: Store) -> None:
    live_runs = LiveRuns(store, capacity=2)
    a, b = live_runs.at_head("a"), live_runs.at_head("b")
    live_runs.at_head("a")

    c = live_runs.at_head("c")

    assert live_runs.in_memory() == (a.live, c.live)
    assert live_runs.held("b", 60.0) is None
    assert live_runs.at_head("b").live is not b.live


def test_what_was_read_before_a_change_is_not_held_after_it(store: ChangedMeanwhile) -> None:
    live_runs = LiveRuns(store, capacity=2)
    store.live_runs = live_runs

    assert live_runs.at_head("a").run.settings.group_size == 8

    assert live_runs.held("a", 60.0) is None
    assert live_runs.within("a", 60.0).run.settings.group_size == 4
    assert live_runs.held("a", 60.0) is not None


def test_a_deleted_run_is_dropped_and_its_name_is_free(store: Store) -> None:
    live_runs = LiveRuns(store, capacity=2)
    deleted = live_runs.at_head("a")
    store.delete_run("a")

    live_runs.drop(deleted.run)

    assert live_runs.in_memory() == ()
    assert live_runs.held("a", 60.0) is None
    with pytest.raises(RunUnknown):
        live_runs.within("a", 60.0)
    store.put_run("a", RunSettings(), now=NOW)
    assert live_runs.at_head("a").live is not deleted.live


def test_a_run_that_another_process_deleted_is_not_held_once_that_is_known(store: Store) -> None:
    live_runs = LiveRuns(store, capacity=2)
    live_runs.at_head("a")
    store.delete_run("a")

    with pytest.raises(RunUnknown):
        live_runs.at_head("a")

    assert live_runs.held("a", 60.0) is None
