"""Refits and the snapshots they publish.

A run has at most one open refit (a partial unique index holds it). A worker claims it for a lease; no
transaction is open while the model fits. A worker that dies loses its lease, another one takes over, and the
number of the claim fences what the first one still publishes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, false, func, insert, or_, select, update

from evenodds_service.domain.log_entries import SnapshotEntry
from evenodds_service.errors import RefitLost, RunUnknown, SnapshotUnknown
from evenodds_service.storage.entries import append_entries
from evenodds_service.storage.runs import lock_run
from evenodds_service.storage.tables import refits, snapshots
from evenodds_service.storage.transactions import Transactions
from evenodds_service.storage.values import NewSnapshot, Refit, Snapshot

_LATEST_END = timedelta(hours=2)  # from now; a lease is an hour at most, and clocks differ a little


class RefitMethods(Transactions):
    def request_refit(self, run_id: int, *, now: datetime, newest_seen: int | None = None) -> Refit:
        """The pending or running refit of the run, else a new pending one (one open refit per run).

        Args:
            newest_seen: Id of the newest refit that the caller knew of when it found one due, 0 where there was none:
                if there is a newer one by now, that is returned instead of a new one.

        Raises:
            RunUnknown
        """
        is_open = refits.c.status.in_(("pending", "running"))
        is_newer = false() if newest_seen is None else refits.c.id > newest_seen
        pending = insert(refits).values(run_id=run_id, status="pending", requested_at=now).returning(refits)
        with self._writing() as connection:
            lock_run(connection, run_id)
            statement = select(refits).where(refits.c.run_id == run_id, or_(is_open, is_newer))
            row = connection.execute(statement.order_by(refits.c.id.desc()).limit(1)).mappings().one_or_none()
            if row is None:
                row = connection.execute(pending).mappings().one()
        return refit_of(row)

    def claim_refit(self, *, worker: str, lease: timedelta, now: datetime) -> Refit | None:
        """Claim the oldest pending refit, or a running one whose lease has run out; None if there is none.

        Two workers never claim the same one: a refit that another is just claiming is passed over. A lease that ends
        later than any may was given by a clock that was ahead: it counts as run out, or nobody would come for days.

        Args:
            lease: How long the claim holds, at most an hour.
        """
        has_run_out = or_(refits.c.lease_until <= now, refits.c.lease_until > now + _LATEST_END)
        is_free = or_(refits.c.status == "pending", and_(refits.c.status == "running", has_run_out))
        free = (
            select(refits.c.id)
            .where(is_free)
            .order_by(refits.c.requested_at, refits.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        claim = update(refits).values(
            status="running", worker=worker, attempts=refits.c.attempts + 1, lease_until=now + lease
        )
        with self._writing() as connection:
            refit_id = connection.execute(free).scalar()
            if refit_id is None:
                return None
            row = connection.execute(claim.where(refits.c.id == refit_id).returning(refits)).mappings().one()
        return refit_of(row)

    def extend_lease(self, refit_id: int, *, worker: str, lease: timedelta, now: datetime) -> bool:
        """Heartbeat; False where the refit is no longer this worker's."""
        held = and_(refits.c.id == refit_id, refits.c.status == "running", refits.c.worker == worker)
        statement = update(refits).where(held).values(lease_until=now + lease).returning(refits.c.id)
        with self._writing() as connection:
            return connection.execute(statement).scalar() is not None

    def publish_refit(self, claimed: Refit, model: NewSnapshot, *, now: datetime) -> Snapshot:
        """One commit: the snapshot, its log entry, the refit done.

        Args:
            claimed: As `claim_refit` returned it: its id, worker and number of the claim fence what is published.

        Raises:
            RefitLost: another worker has taken the refit over, or it is finished, or its run is gone, or a rewind or
                retract has voided what it was fitted on and put it back in the queue.
        """
        done = {
            "status": "done",
            "finished_at": now,
            "lease_until": None,
            "report": json.dumps(model.report, allow_nan=False),
        }
        with self._writing() as connection:
            try:
                run = lock_run(connection, claimed.run_id)  # before the refit's row, as everywhere: no deadlock
            except RunUnknown:
                raise _lost(claimed) from None
            version, position = _newest_version(connection, run.id) + 1, run.log_position + 1
            finish = update(refits).where(_is_held(claimed)).values(done | {"model_version": version})
            if connection.execute(finish.returning(refits.c.id)).scalar() is None:
                raise _lost(claimed)
            snapshot = Snapshot(
                run_id=run.id,
                version=version,
                embedder=model.embedder,
                weights=model.weights,
                fitted_position=model.fitted_position,
                log_position=position,
                created_at=now,
            )
            append_entries(connection, run, [SnapshotEntry(position, version)], now=now)
            connection.execute(insert(snapshots).values(asdict(snapshot)))
        return snapshot

    def fail_refit(self, claimed: Refit, *, error: str, now: datetime) -> bool:
        """Record that the fit failed; False where the refit is no longer this worker's."""
        failed = {"status": "failed", "finished_at": now, "lease_until": None, "error": error}
        statement = update(refits).where(_is_held(claimed)).values(failed).returning(refits.c.id)
        with self._writing() as connection:
            return connection.execute(statement).scalar() is not None

    def refit(self, refit_id: int) -> Refit:
        """Raises RunUnknown where the refit went with its run."""
        with self._reading() as connection:
            row = connection.execute(select(refits).where(refits.c.id == refit_id)).mappings().one_or_none()
        if row is None:
            raise RunUnknown(f"refit {refit_id} does not exist: its run was deleted")
        return refit_of(row)

    def refits(self, run_id: int, *, limit: int = 100) -> tuple[Refit, ...]:
        """Newest first."""
        statement = select(refits).where(refits.c.run_id == run_id).order_by(refits.c.id.desc()).limit(limit)
        with self._reading() as connection:
            rows = connection.execute(statement).mappings().all()
        return tuple(refit_of(row) for row in rows)

    def snapshot(self, run_id: int, version: int) -> Snapshot:
        """Raises SnapshotUnknown."""
        statement = select(snapshots).where(snapshots.c.run_id == run_id, snapshots.c.version == version)
        with self._reading() as connection:
            row = connection.execute(statement).mappings().one_or_none()
        if row is None:
            raise SnapshotUnknown(
                f"run with id {run_id} has no snapshot {version}: the newest is its model_version (0: none)"
            )
        return Snapshot(**row)


def _newest_version(connection: Connection, run_id: int) -> int:
    """Also of snapshots that were voided: a version never names two of them."""
    newest = select(func.max(snapshots.c.version)).where(snapshots.c.run_id == run_id)
    return int(connection.execute(newest).scalar() or 0)


def _is_held(claimed: Refit) -> ColumnElement[bool]:
    return and_(
        refits.c.id == claimed.id,
        refits.c.status == "running",
        refits.c.worker == claimed.worker,
        refits.c.attempts == claimed.attempts,
    )


def _lost(claimed: Refit) -> RefitLost:
    return RefitLost(
        f"refit {claimed.id}: attempt {claimed.attempts} of worker {claimed.worker!r} no longer holds its lease, "
        "and its result is dropped: claim the next refit"
    )


def refit_of(row: RowMapping) -> Refit:
    report = row["report"]
    return Refit(**{**row, "report": None if report is None else json.loads(report)})
