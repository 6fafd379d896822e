"""The simulation finds nothing in the product, and what is broken on purpose it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
from tests.simulation.__main__ import calibration, seeds_of
from tests.simulation.scenario import Outcome, run_seed

from evenodds.training.outbox import Delivery, Outbox
from evenodds.training.sender import OutboxSender
from evenodds_service.domain.learning import fold
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.runtime.live_runs import FoldedRun, LiveRuns
from evenodds_service.storage import log, refits, selections, tables
from evenodds_service.storage.keys import KeyMethods
from evenodds_service.storage.store import Run, Store
from evenodds_service.storage.transactions import Transactions

MOST_SEEDS = 60


def outcome_of(seed: int, **options: Any) -> Outcome:
    outcome = run_seed(seed, **options)
    assert not outcome.violations, (f"make simulate SEEDS={seed} replays it", outcome.violations)
    return outcome


def test_a_seed_breaks_no_promise_and_is_the_same_again() -> None:
    first, again = outcome_of(1, steps=60), outcome_of(1, steps=60)

    assert first == again
    assert first.steps > 60
    assert first.sometimes["a batch was the service's"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("first", [1_000, 1_010, 1_020, 1_030])
def test_many_seeds_do_not(first: int) -> None:
    for seed in range(first, first + 10):
        outcome_of(seed)


@pytest.mark.slow
def test_long_seeds_in_which_most_snapshots_are_dropped_do_not_either() -> None:
    outcomes = [outcome_of(seed, steps=2_000) for seed in (2, 3, 4)]

    assert any(outcome.sometimes.get("a snapshot was dropped") for outcome in outcomes)


_remember, _catch_up, _at_head, _first = fold._remember, LiveRun.catch_up, LiveRuns.at_head, Outbox.first


def _remembered_twice(*arguments: Any) -> None:
    _remember(*arguments)
    _remember(*arguments)


def _blind_to_rewinds(self: LiveRun, store: Store, run: Run, **more: Any) -> None:
    _catch_up(self, store, replace(run, void_position=0), **more)


def _never_read_again(self: LiveRuns, name: str) -> FoldedRun:
    return self._folded.get(name) or _at_head(self, name)


def _removed_before_it_is_sent(self: Outbox) -> Delivery | None:
    delivery = _first(self)
    if delivery is not None:
        self.remove(delivery)
    return delivery


BROKEN: dict[str, tuple[Any, str, Callable[..., Any] | Any]] = {
    "request ids are not looked up": (log, "_first_answer", lambda *_: None),
    "observations are folded twice": (fold, "_remember", _remembered_twice),
    "a rewind is not noticed": (LiveRun, "catch_up", _blind_to_rewinds),
    "memory is taken for the log": (LiveRuns, "at_head", _never_read_again),
    "the outbox forgets before it delivers": (Outbox, "first", _removed_before_it_is_sent),
    "going back forgets nothing": (OutboxSender, "forget_after", lambda *_: None),
    "outcomes of voided selections fail": (log, "SelectionVoided", ArithmeticError),
    "leases are not kept": (refits, "_LATEST_END", timedelta(0)),
    "publishing is not fenced": (refits, "_is_held", lambda claimed: tables.refits.c.id == claimed.id),
    "choices are not looked at again": (selections, "_check_is_of_now", lambda *_: None),
    "erased texts stay in the write-ahead log": (Transactions, "_truncate_write_ahead_log", lambda _: None),
    "an old secret works on": (KeyMethods, "finish_rotation", lambda *_: None),
}
"""What to put in place of what, so that a promise is broken."""


@pytest.fixture
def broken(request: pytest.FixtureRequest) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patch.object(*BROKEN[request.param]))
        yield


def violated_in(seeds: range) -> bool:
    return any(run_seed(seed, steps=250).violations for seed in seeds)


@pytest.mark.parametrize("broken", ["observations are folded twice"], indirect=True)
def test_a_promise_that_is_broken_is_seen(broken: None) -> None:
    assert violated_in(range(1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN, indirect=True)
def test_each_promise_that_is_broken_is_seen(broken: None) -> None:
    assert violated_in(range(1, MOST_SEEDS))


def test_seeds_are_numbers_and_ranges() -> None:
    assert seeds_of(["7", "0:3"]) == [7, 0, 1, 2]


def test_calibration_compares_forecasts_with_true_rates() -> None:
    assert calibration([(0.1, 0.2), (0.9, 0.8)] * 5) == [
        (2, 0.1, 0.2),
        (2, 0.1, 0.2),
        (2, 0.5, 0.5),
        (2, 0.9, 0.8),
        (2, 0.9, 0.8),
    ]
