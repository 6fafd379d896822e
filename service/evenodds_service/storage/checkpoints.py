"""Saved states of the fold, each at its log position, the older the sparser; and which snapshots they leave needed.

Who folds from a checkpoint reads the snapshot that was in use there and those that the log names behind it. So each new
checkpoint makes old snapshots superfluous. One that is dropped keeps its row, without its weights.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from datetime import datetime

from sqlalchemy import Connection, delete, func, select, update

from evenodds_service.storage.rewind import ENTRY_OF_SNAPSHOT, newest_checkpoint_position, newest_standing_snapshot
from evenodds_service.storage.runs import keep_run, lock_run
from evenodds_service.storage.tables import checkpoints, log, snapshots
from evenodds_service.storage.transactions import Transactions, insert_or_ignore

KEPT_SNAPSHOTS = 32
"""Most of its newest snapshots that a run keeps, unless told otherwise."""

_DROPPED_AT_ONCE = 8
"""More than a run publishes between two checkpoints, and little enough to write under its lock."""


class _Outdated(Exception):
    """Rolls the transaction back."""


class CheckpointMethods(Transactions):
    _keep_snapshots: int

    def save_checkpoint(self, run_id: int, *, position: int, state: bytes, now: datetime, keep: int = 8) -> bool:
        """Save the state at a log position, thin out the older ones (see `thinned`), and drop the snapshots that are
        then out of reach (see `needed`).

        The fold is a function of the log: a checkpoint that the position has already stays as it is.

        Args:
            keep: Most checkpoints that are kept, at least 1.

        Returns:
            Whether it was saved: not if something was voided behind the position, since the state may hold it, nor
            below the base, nor where the snapshot in use there is dropped.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
        """
        row = {"run_id": run_id, "position": position, "state": state, "created_at": now}
        of_run = checkpoints.c.run_id == run_id
        try:
            with self._writing() as connection:
                keep_run(connection, run_id)
                saved = insert_or_ignore(connection, checkpoints).values(row).returning(checkpoints.c.position)
                is_new = connection.execute(saved).scalar() is not None
                # The lock that stops the trainer comes last: the state may be large.
                run = lock_run(connection, run_id)
                if position < max(run.void_position, run.base_position):
                    raise _Outdated
                if not _has_model(connection, run_id, position):
                    raise _Outdated
                positions = connection.execute(select(checkpoints.c.position).where(of_run)).scalars().all()
                superfluous = set(positions) - set(thinned(positions, keep=keep)) - {run.base_position}
                connection.execute(delete(checkpoints).where(of_run, checkpoints.c.position.in_(superfluous)))
                if is_new:  # one that was there may be of another release, from which nobody can start
                    _drop_snapshots(connection, run_id, set(positions) - superfluous, most=self._keep_snapshots)
        except _Outdated:
            return False
        return True

    def checkpoint(self, run_id: int, position: int) -> bytes | None:
        """The state that was saved at this log position, if one was."""
        saved = (checkpoints.c.run_id == run_id, checkpoints.c.position == position)
        with self._reading() as connection:
            return connection.execute(select(checkpoints.c.state).where(*saved)).scalar()

    def newest_checkpoint_position(self, run_id: int) -> int:
        """Log position of the newest checkpoint; 0 where there is none."""
        with self._reading() as connection:
            return newest_checkpoint_position(connection, run_id)

    def newest_checkpoint(self, run_id: int, *, at_most: int | None = None) -> tuple[int, bytes] | None:
        """Log position and state of the newest checkpoint, of those up to `at_most` if it is given."""
        statement = (
            select(checkpoints.c.position, checkpoints.c.state)
            .where(checkpoints.c.run_id == run_id)
            .order_by(checkpoints.c.position.desc())
            .limit(1)
        )
        if at_most is not None:
            statement = statement.where(checkpoints.c.position <= at_most)
        with self._reading() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else (row.position, row.state)


def thinned(positions: Sequence[int], *, keep: int) -> list[int]:
    """Which of these checkpoints to keep, newest first: those without which the distance from the newest would more
    than quadruple from one to the next.

    A rewind by d entries then finds a checkpoint that is about 4 d back at most, not the log's beginning. Distances
    only grow more alike as the newest moves on, so that this holds after any number of saves.

    Args:
        keep: Most to keep; the oldest give way.
    """
    newest_first = sorted(set(positions), reverse=True)
    kept = newest_first[:2]
    for position, older in zip(newest_first[2:], [*newest_first[3:], None], strict=False):
        distance = newest_first[0] - kept[-1]
        if older is None or newest_first[0] - older > 4 * distance:
            kept.append(position)
    return kept[:keep]


def needed(published: Sequence[int], standing: Sequence[int], saved: Sequence[int], *, most: int) -> set[int]:
    """Which of these snapshots to keep, all by log position.

    All behind the oldest checkpoint that has at most so many behind it (the log's beginning counts as one): a rewind to
    there is exact. And those that were in use at each checkpoint, from which older rewinds start.

    Args:
        published: Of all snapshots that are there, in ascending order.
        standing: Of those of them that were not voided.
        saved: Of all checkpoints.
        most: Besides those in use at checkpoints.
    """
    whole_since = min(
        (since for since in (0, *saved) if len(published) - bisect_right(published, since) <= most),
        default=max(saved, default=0),
    )
    in_use = {standing[n - 1] for n in (bisect_right(standing, position) for position in saved) if n}
    return in_use.union(position for position in published if position > whole_since)


def _has_model(connection: Connection, run_id: int, position: int) -> bool:
    """Whether the snapshot in use at this log position is there."""
    version = newest_standing_snapshot(connection, run_id, at_most=position)
    in_use = (snapshots.c.run_id == run_id, snapshots.c.version == version)
    return connection.execute(select(func.length(snapshots.c.weights)).where(*in_use)).scalar() != 0


def _drop_snapshots(connection: Connection, run_id: int, saved: Collection[int], *, most: int) -> None:
    """Drop some of the snapshots that are out of reach, the oldest first. Versions are never given again."""
    there = (
        select(snapshots.c.log_position, log.c.voided_at)
        .outerjoin(log, ENTRY_OF_SNAPSHOT)
        .where(snapshots.c.run_id == run_id, func.length(snapshots.c.weights) > 0)
        .order_by(snapshots.c.log_position)
    )
    rows = connection.execute(there).all()
    published = [row.log_position for row in rows]
    standing = [row.log_position for row in rows if row.voided_at is None]
    kept = needed(published, standing, sorted(saved), most=most)
    gone = [position for position in published if position not in kept][:_DROPPED_AT_ONCE]
    if gone:
        dropped = (snapshots.c.run_id == run_id, snapshots.c.log_position.in_(gone))
        connection.execute(update(snapshots).where(*dropped).values(weights=b""))
