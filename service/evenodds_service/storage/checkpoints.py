"""Saved states of the fold, each at its log position."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, func, select

from evenodds_service.storage.runs import keep_run, lock_run
from evenodds_service.storage.tables import checkpoints
from evenodds_service.storage.transactions import Transactions, insert_or_ignore


class _Outdated(Exception):
    """Rolls the transaction back."""


class CheckpointMethods(Transactions):
    def save_checkpoint(self, run_id: int, *, position: int, state: bytes, now: datetime, keep: int = 2) -> bool:
        """Save the state at a log position and drop all but the newest `keep` (at least 1).

        The fold is a function of the log: a checkpoint that the position has already stays as it is.

        Returns:
            Whether it was saved: not if something was voided behind the position, since the state may hold it.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
        """
        row = {"run_id": run_id, "position": position, "state": state, "created_at": now}
        of_run = checkpoints.c.run_id == run_id
        newest = select(checkpoints.c.position).where(of_run).order_by(checkpoints.c.position.desc()).limit(keep)
        oldest_kept = select(func.min(newest.subquery().c.position)).scalar_subquery()
        try:
            with self._writing() as connection:
                keep_run(connection, run_id)
                connection.execute(insert_or_ignore(connection, checkpoints).values(row))
                # The lock that stops the trainer comes last: the state may be large.
                if lock_run(connection, run_id).void_position > position:
                    raise _Outdated
                connection.execute(delete(checkpoints).where(of_run, checkpoints.c.position < oldest_kept))
        except _Outdated:
            return False
        return True

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
