from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from evenodds_service.domain.log_entries import SnapshotEntry
from evenodds_service.domain.prompts import NewPrompt
from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import RefitLost, RunUnknown, SnapshotUnknown
from evenodds_service.storage.store import NewSnapshot, Refit, Run, Snapshot, Store

LEASE = timedelta(minutes=5)


def publish(store: Store, refit: Refit, worker: str, now: datetime, *, attempt: int = 1) -> Snapshot:
    weights = b"\x00weights of " + worker.encode()
    model = NewSnapshot(embedder="builtin", weights=weights, fitted_position=1, report={"loss": 0.5})
    return store.publish_refit(replace(refit, worker=worker, attempts=attempt), model, now=now)


@pytest.fixture
def pool(store: Store, run: Run, now: datetime) -> Run:
    """The run with one prompt, at log position 1."""
    store.add_prompts(run.id, [NewPrompt("a")], now=now)
    return store.run("math")


def test_run_has_one_open_refit(store: Store, pool: Run, now: datetime) -> None:
    first = store.request_refit(pool.id, now=now)
    again = store.request_refit(pool.id, now=now + LEASE)
    store.claim_refit(worker="w", lease=LEASE, now=now)
    while_running = store.request_refit(pool.id, now=now)

    assert first == again
    assert (first.status, first.attempts, first.requested_at) == ("pending", 0, now)
    assert (while_running.id, while_running.status) == (first.id, "running")
    assert len(store.refits(pool.id)) == 1
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.request_refit(0, now=now)


def test_a_refit_that_was_found_due_before_another_one_ended_is_not_asked_for_again(
    store: Store, pool: Run, now: datetime
) -> None:
    first = store.request_refit(pool.id, now=now, newest_seen=0)
    store.claim_refit(worker="w", lease=LEASE, now=now)
    publish(store, first, "w", now)

    late = store.request_refit(pool.id, now=now, newest_seen=0)
    next_one = store.request_refit(pool.id, now=now, newest_seen=first.id)

    assert (late.id, late.status) == (first.id, "done")
    assert (next_one.id > first.id, next_one.status) == (True, "pending")


def test_oldest_pending_refit_is_claimed_first(store: Store, pool: Run, now: datetime) -> None:
    other = store.put_run("other", RunSettings(), now=now)[0]
    late = store.request_refit(pool.id, now=now + LEASE)
    early = store.request_refit(other.id, now=now)

    claims = [store.claim_refit(worker="w", lease=LEASE, now=now + LEASE) for _ in range(3)]

    assert [claim.id if claim else None for claim in claims] == [early.id, late.id, None]
    assert claims[0] is not None
    assert (claims[0].status, claims[0].worker, claims[0].attempts) == ("running", "w", 1)
    assert claims[0].lease_until == now + 2 * LEASE


def test_published_snapshot_enters_the_log_once_and_is_the_runs_version(store: Store, pool: Run, now: datetime) -> None:
    refit = store.request_refit(pool.id, now=now)
    store.claim_refit(worker="w", lease=LEASE, now=now)

    snapshot = publish(store, refit, "w", now)

    assert snapshot == Snapshot(
        run_id=pool.id,
        version=1,
        embedder="builtin",
        weights=b"\x00weights of w",
        fitted_position=1,
        log_position=2,
        created_at=now,
    )
    assert store.snapshot(pool.id, 1) == snapshot
    assert store.entries(pool.id, after=1) == (SnapshotEntry(2, 1),)
    assert (store.run("math").model_version, store.run("math").log_position) == (1, 2)
    (done,) = store.refits(pool.id)
    assert (done.status, done.finished_at, done.model_version) == ("done", now, 1)
    assert done.report == {"loss": 0.5}
    with pytest.raises(RefitLost):
        publish(store, refit, "w", now)
    assert store.run("math").log_position == 2


def test_next_refit_publishes_the_next_version(store: Store, pool: Run, now: datetime) -> None:
    for version in (1, 2):
        refit = store.request_refit(pool.id, now=now)
        store.claim_refit(worker="w", lease=LEASE, now=now)
        assert publish(store, refit, "w", now).version == version

    assert [refit.model_version for refit in store.refits(pool.id)] == [2, 1]
    assert [refit.model_version for refit in store.refits(pool.id, limit=1)] == [2]


def test_stale_refit_is_taken_over_and_its_result_refused(store: Store, pool: Run, now: datetime) -> None:
    refit = store.request_refit(pool.id, now=now)
    store.claim_refit(worker="dead", lease=LEASE, now=now)

    too_early = store.claim_refit(worker="heir", lease=LEASE, now=now + LEASE - timedelta(seconds=1))
    taken = store.claim_refit(worker="heir", lease=LEASE, now=now + LEASE)

    assert too_early is None
    assert taken is not None
    assert (taken.id, taken.worker, taken.attempts) == (refit.id, "heir", 2)
    assert not store.extend_lease(refit.id, worker="dead", lease=LEASE, now=now)
    assert not store.fail_refit(replace(taken, worker="dead", attempts=1), error="late", now=now)
    with pytest.raises(
        RefitLost, match=rf"^refit {refit.id}: attempt 1 of worker 'dead' no longer holds its lease, and its result"
    ):
        publish(store, refit, "dead", now)
    assert store.run("math").log_position == 1

    snapshot = publish(store, refit, "heir", now, attempt=2)

    assert snapshot.weights == b"\x00weights of heir"
    assert store.entries(pool.id, after=1) == (SnapshotEntry(2, 1),)


def test_worker_that_took_its_own_refit_over_cannot_publish_the_first_attempt(
    store: Store, pool: Run, now: datetime
) -> None:
    refit = store.request_refit(pool.id, now=now)
    store.claim_refit(worker="w", lease=LEASE, now=now)
    store.claim_refit(worker="w", lease=LEASE, now=now + LEASE)

    with pytest.raises(RefitLost, match="attempt 1 of worker 'w'"):
        publish(store, refit, "w", now)


def test_heartbeat_keeps_the_lease(store: Store, pool: Run, now: datetime) -> None:
    refit = store.request_refit(pool.id, now=now)
    store.claim_refit(worker="w", lease=LEASE, now=now)

    extended = store.extend_lease(refit.id, worker="w", lease=LEASE, now=now + LEASE / 2)

    assert extended
    assert store.claim_refit(worker="heir", lease=LEASE, now=now + LEASE) is None


def test_failed_refit_keeps_its_error_and_makes_room_for_another(store: Store, pool: Run, now: datetime) -> None:
    refit = store.request_refit(pool.id, now=now)
    claimed = store.claim_refit(worker="w", lease=LEASE, now=now)
    assert claimed is not None

    failed = store.fail_refit(claimed, error="no observations", now=now)

    assert failed
    assert not store.fail_refit(claimed, error="again", now=now)
    (kept,) = store.refits(pool.id)
    assert (kept.status, kept.error, kept.finished_at) == ("failed", "no observations", now)
    assert store.request_refit(pool.id, now=now).id != refit.id


def test_refit_of_a_deleted_run_is_lost(store: Store, pool: Run, now: datetime) -> None:
    refit = store.request_refit(pool.id, now=now)
    store.claim_refit(worker="w", lease=LEASE, now=now)
    store.delete_run("math")

    with pytest.raises(RefitLost, match="claim the next refit"):
        publish(store, refit, "w", now)

    assert not store.extend_lease(refit.id, worker="w", lease=LEASE, now=now)


def test_unknown_snapshot_is_named(store: Store, pool: Run) -> None:
    with pytest.raises(SnapshotUnknown, match=rf"^run with id {pool.id} has no snapshot 3: the newest is its model_v"):
        store.snapshot(pool.id, 3)


def test_workers_that_claim_at_once_never_share_a_refit(store: Store, pool: Run, now: datetime) -> None:
    others = [store.put_run(f"run{number}", RunSettings(), now=now)[0] for number in range(3)]
    wanted = {store.request_refit(run.id, now=now).id for run in (pool, *others)}
    together = threading.Barrier(8)

    def claim(worker: int) -> Refit | None:
        together.wait()
        return store.claim_refit(worker=f"w{worker}", lease=LEASE, now=now)

    with ThreadPoolExecutor(8) as workers:
        claims = [refit for refit in workers.map(claim, range(8)) if refit is not None]

    assert len({refit.id for refit in claims}) == len(claims)
    assert {refit.id for refit in claims} <= wanted
    assert {refit.attempts for refit in claims} == {1}


def test_callers_that_ask_at_once_get_the_same_refit(store: Store, pool: Run, now: datetime) -> None:
    together = threading.Barrier(6)

    def ask(_caller: int) -> int:
        together.wait()
        return store.request_refit(pool.id, now=now).id

    with ThreadPoolExecutor(6) as callers:
        ids = set(callers.map(ask, range(6)))

    assert len(ids) == 1
