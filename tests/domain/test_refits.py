"""When a run is fitted anew."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from evenodds_service.domain.refits import FIRST_FIT_OBSERVATIONS, is_due
from evenodds_service.domain.settings import RunSettings
from evenodds_service.storage.store import Refit, Run
from evenodds_service.storage.values import RefitStatus

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)


def run_with(n_observations: int, *, every_observations: int = 2_048, every_seconds: int = 600) -> Run:
    settings = RunSettings(refit_every_observations=every_observations, refit_every_seconds=every_seconds)
    return Run(
        id=1,
        name="math",
        settings=settings,
        embedding_width=None,
        n_prompts=10,
        log_position=9,
        head_step=3,
        n_observations=n_observations,
        model_version=1,
        created_at=NOW,
    )


def refit(status: RefitStatus, *, observations: int | None = None, age: float = 0.0) -> Refit:
    """Ended `age` seconds ago, if it has ended."""
    ended = status in ("done", "failed")
    return Refit(
        id=1,
        run_id=1,
        status=status,
        worker="w",
        attempts=1,
        requested_at=NOW - timedelta(seconds=age),
        lease_until=None,
        finished_at=NOW - timedelta(seconds=age) if ended else None,
        model_version=1 if status == "done" else None,
        report=None if observations is None else {"observations": observations},
        error=None,
    )


def due(run: Run, *refits: Refit) -> bool:
    """`refits` are newest first."""
    return is_due(run, refits, now=NOW)


def test_the_first_fit_is_due_at_128_observations() -> None:
    assert FIRST_FIT_OBSERVATIONS == 128
    assert not due(run_with(127))
    assert due(run_with(128))


def test_a_run_that_asks_for_fewer_observations_gets_its_first_fit_then() -> None:
    assert not due(run_with(9, every_observations=10))
    assert due(run_with(10, every_observations=10))


@pytest.mark.parametrize("fitted", [128, 300, 2_048])
def test_while_there_are_few_observations_their_doubling_is_due(fitted: int) -> None:
    done = refit("done", observations=fitted)

    assert not due(run_with(2 * fitted - 1), done)
    assert due(run_with(2 * fitted), done)


def test_later_the_set_number_of_new_observations_is_due() -> None:
    done = refit("done", observations=10_000)

    assert not due(run_with(12_047), done)
    assert due(run_with(12_048), done)
    assert due(run_with(10_100, every_observations=100), done)


def test_after_the_set_time_anything_new_is_due() -> None:
    assert due(run_with(1_001), refit("done", observations=1_000, age=600))
    assert not due(run_with(1_001), refit("done", observations=1_000, age=599))
    assert due(run_with(1_001, every_seconds=5), refit("done", observations=1_000, age=5))


def test_time_alone_is_no_reason() -> None:
    assert not due(run_with(1_000), refit("done", observations=1_000, age=1e6))
    assert not due(run_with(100))


@pytest.mark.parametrize("status", ["pending", "running"])
def test_nothing_is_due_while_a_refit_is_open(status: RefitStatus) -> None:
    assert not due(run_with(100_000), refit(status), refit("done", observations=128, age=1e6))


def test_after_a_failure_a_tenth_of_the_set_time_passes_first() -> None:
    assert not due(run_with(128), refit("failed", age=59))
    assert due(run_with(128), refit("failed", age=60))
    assert not due(run_with(128, every_seconds=6_000), refit("failed", age=599))


def test_after_a_failure_half_a_minute_passes_at_least() -> None:
    assert not due(run_with(128, every_seconds=1), refit("failed", age=29))
    assert due(run_with(128, every_seconds=1), refit("failed", age=30))


def test_a_failed_refit_does_not_count_as_fitted() -> None:
    done, failed = refit("done", observations=1_000, age=100), refit("failed", age=100)

    assert not due(run_with(1_999), failed, done)
    assert due(run_with(2_000), failed, done)


def test_an_end_in_the_future_keeps_nothing_from_being_fitted() -> None:
    """The clock was ahead and has been set back."""
    assert is_due(run_with(501), (refit("done", observations=500, age=-86_400),), now=NOW)
    assert is_due(run_with(500), (refit("failed", age=-86_400),), now=NOW)
