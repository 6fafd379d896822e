"""Saved states of the fold, each at its log position, the older the sparser."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, func, select

from evenodds_service.storage.runs import keep_run, lock_run
from evenodds_service.storage.tables import checkpoints
from evenodds_service.storage.transactions import Transactions, insert_or_ignore


class _Outdated(Exception):
    """Rolls the transaction back."""


class CheckpointMethods(Transactions):
    def save_checkpoint(self, run_id: int, *, position: int, state: bytes, now: datetime, keep: int = 8) -> bool:
        """Save the state at a log position, and thin out the older ones; see `thinned`.

        The fold is a function of the log: a checkpoint that the position has already stays as it is.

        Args:
            keep: Most checkpoints that are kept, at least 1.

        Returns:
            Whether it was saved: not if something was voided behind the position, since the state may hold it, nor
            below the base.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
        """
        row = {"run_id": run_id, "position": position, "state": state, "created_at": now}
        of_run = checkpoints.c.run_id == run_id
        try:
            with self._writing() as connection:
                keep_run(connection, run_id)
                connection.execute(insert_or_ignore(connection, checkpoints).values(row))
                # The lock that stops the trainer comes last: the state may be large.
                run = lock_run(connection, run_id)
                if position < max(run.void_position, run.base_position):
                    raise _Outdated
                positions = connection.execute(select(checkpoints.c.position).where(of_run)).scalars().all()
                superfluous = set(positions) - set(thinned(positions, keep=keep)) - {run.base_position}
                connection.execute(delete(checkpoints).where(of_run, checkpoints.c.position.in_(superfluous)))
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
        statement = select(func.max(checkpoints.c.position)).where(checkpoints.c.run_id == run_id)
        with self._reading() as connection:
            return connection.execute(statement).scalar() or 0

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
