"""Retirement: prompts leave a pool, and the log is compacted up to a checkpoint, the run's base.

Two steps, so that nothing large is computed under a run's lock. A retire entry marks prompts as retired: they are in
no answer from then on, and their features stay until nobody folds from below. Then a checkpoint behind that entry
becomes the base: processes start from it, and what is below (entries, older checkpoints, retired prompts with their
vectors, packed blocks, snapshots out of use) is deleted, a little at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import Connection, and_, delete, exists, func, insert, select, text, tuple_, update

from evenodds_service.domain.arrays import IntArray
from evenodds_service.domain.log_entries import RetireEntry, SnapshotEntry
from evenodds_service.domain.settings import CALLER
from evenodds_service.errors import RunUnknown
from evenodds_service.storage.engine import translated_faults
from evenodds_service.storage.entries import append_entries
from evenodds_service.storage.rewind import newest_standing_snapshot
from evenodds_service.storage.runs import lock_run, settings_to_json, stored_embedder
from evenodds_service.storage.tables import (
    bases,
    checkpoints,
    embeddings,
    log,
    pool_blocks,
    prompts,
    refits,
    runs,
    selections,
    snapshots,
)
from evenodds_service.storage.transactions import Transactions, chunks
from evenodds_service.storage.values import NewSnapshot, Run, Written

KEPT_REQUESTS = timedelta(hours=24)
MOST_KEPT_REQUESTS = 200_000
"""Reports below the base that are remembered by their request id, so that a repetition counts once."""

KEPT_SELECTIONS = 1_000
"""Selections below the base that are remembered."""

_ENTRIES_AT_ONCE, _PROMPTS_AT_ONCE = 2_000, 400
"""A tenth of a second's work, for which SQLite lets nobody else write."""
_ERASED_FROM = "prompts, embeddings, log, checkpoints, pool_blocks, snapshots, bases, decisions"


class RetentionMethods(Transactions):
    def settle_retention(self, run_id: int, most: int) -> None:
        """Let the run keep so many prompts, or all that it has by now, unless that was set, or it has chosen a batch.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
        """
        with self._writing() as connection:
            run = lock_run(connection, run_id)
            chosen = select(log.c.position).where(log.c.run_id == run_id, log.c.kind == "select").limit(1)
            if run.settings.retain_prompts is None and connection.execute(chosen).first() is None:
                settled = replace(run.settings, retain_prompts=max(most, run.pool_size), is_retention_settled=True)
                settings = settings_to_json(settled)
                connection.execute(update(runs).where(runs.c.id == run_id).values(settings=settings))

    def retire_prompts(self, run_id: int, indices: IntArray, *, now: datetime) -> Written | None:
        """Retire the prompts of these indices, in one log entry; their texts and answers go at once.

        Returns:
            None where another caller has retired some of them, and nothing was written.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
        """
        try:
            with self._writing(in_bulk=True) as connection:
                run = lock_run(connection, run_id)
                position, retired = run.log_position + 1, 0
                for some in chunks(indices.tolist()):
                    there = (prompts.c.run_id == run_id, prompts.c.index.in_(some), prompts.c.retired_at.is_(None))
                    gone = update(prompts).where(*there).values(retired_at=position, text=None, answer=None)
                    retired += connection.execute(gone).rowcount
                if retired < len(indices):
                    raise _Outdated
                entry = RetireEntry(position, indices)
                return Written(append_entries(connection, run, [entry], now=now), (entry,))
        except _Outdated:
            return None

    def replace_snapshot(self, run_id: int, version: int, model: NewSnapshot, *, now: datetime) -> bool:
        """Put this model in the place of snapshot `version`, as the next version, and ask for a refit.

        Returns:
            Whether it was: not where the run uses another snapshot by now.
        """
        with self._writing() as connection:
            run = lock_run(connection, run_id)
            if run.model_version != version:
                return False
            newest = connection.execute(select(func.max(snapshots.c.version)).where(snapshots.c.run_id == run_id))
            entry = SnapshotEntry(run.log_position + 1, int(newest.scalar() or 0) + 1)
            append_entries(connection, run, [entry], now=now)
            connection.execute(
                insert(snapshots).values(
                    run_id=run_id,
                    version=entry.version,
                    embedder=model.embedder,
                    weights=model.weights,
                    fitted_position=model.fitted_position,
                    log_position=entry.position,
                    created_at=now,
                )
            )
            is_open = and_(refits.c.run_id == run_id, refits.c.status.in_(("pending", "running")))
            open_id = connection.execute(select(refits.c.id).where(is_open).with_for_update()).scalar()
            if open_id is None:
                connection.execute(insert(refits).values(run_id=run_id, status="pending", requested_at=now))
            else:  # what is being fitted may have read what is to be forgotten
                again = {"status": "pending", "worker": None, "lease_until": None}
                connection.execute(update(refits).where(refits.c.id == open_id).values(again))
        return True

    def base_history(self, run_id: int) -> tuple[int, bytes | None]:
        """Position of the run's base, and the history up to there as bytes; 0 and None where there is no base.

        Raises:
            RunUnknown
        """
        statement = select(runs.c.base_position, bases.c.history).outerjoin(bases).where(runs.c.id == run_id)
        with self._reading() as connection:
            row = connection.execute(statement).one_or_none()
        if row is None:
            raise RunUnknown(f"run with id {run_id} does not exist: create it first")
        return row.base_position, row.history

    def move_base(self, run_id: int, position: int, *, above: int, history: bytes) -> bool:
        """Make the checkpoint at this position the run's base. What is below is deleted by `clear_below_base`.

        Args:
            above: The base so far.
            history: Observations up to the position that count, of the prompts that are left.

        Returns:
            Whether it was: not where the base was moved or the checkpoint dropped meanwhile.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
        """
        with self._writing(in_bulk=True) as connection:
            run = lock_run(connection, run_id)
            saved = (checkpoints.c.run_id == run_id, checkpoints.c.position == position)
            is_saved = connection.execute(select(checkpoints.c.position).where(*saved)).first() is not None
            if run.base_position != above or position <= above or not is_saved:
                return False
            lies_between = and_(log.c.position > above, log.c.position <= position)
            between = (log.c.run_id == run_id, log.c.voided_at.is_(None), lies_between)
            count = select(func.max(log.c.step), func.coalesce(func.sum(log.c.n_observations), 0)).where(*between)
            step, n_observations = connection.execute(count).one()
            steps = [known for known in (step, run.base_step) if known is not None]
            in_use = newest_standing_snapshot(connection, run_id, at_most=position)
            values = {
                "base_position": position,
                "base_step": max(steps, default=None),
                "base_observations": run.base_observations + int(n_observations),
            }
            connection.execute(update(runs).where(runs.c.id == run_id).values(values))
            connection.execute(delete(bases).where(bases.c.run_id == run_id))
            connection.execute(insert(bases).values(run_id=run_id, history=history))
            connection.execute(delete(checkpoints).where(saved[0], checkpoints.c.position < position))
            retired = and_(prompts.c.run_id == run_id, prompts.c.retired_at <= position)
            within = and_(prompts.c.index >= pool_blocks.c.first, prompts.c.index < pool_blocks.c.last)
            holds_some = exists(select(prompts.c.index).where(retired, within).correlate(pool_blocks))
            connection.execute(delete(pool_blocks).where(pool_blocks.c.run_id == run_id, holds_some))
            old = (snapshots.c.run_id == run_id, snapshots.c.log_position <= position, snapshots.c.version != in_use)
            connection.execute(delete(snapshots).where(*old))
            remembered = (
                select(selections.c.log_position)
                .where(selections.c.run_id == run_id)
                .order_by(selections.c.log_position.desc())
                .offset(KEPT_SELECTIONS)
                .limit(1)
            )
            last = connection.execute(remembered).scalar()
            if last is not None:
                forgotten = (selections.c.run_id == run_id, selections.c.log_position <= min(last, position))
                connection.execute(delete(selections).where(*forgotten))
        return True

    def clear_below_base(self, run_id: int, *, now: datetime) -> bool:
        """Delete some of what is below the run's base. Returns whether there may be more.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
        """
        with self._writing(in_bulk=True) as connection:
            run = lock_run(connection, run_id)
            remembered = and_(
                log.c.request_id.is_not(None),
                log.c.created_at > now - KEPT_REQUESTS,
                log.c.position > run.base_position - MOST_KEPT_REQUESTS,
            )
            below = (log.c.run_id == run_id, log.c.position <= run.base_position, ~remembered)
            some = select(log.c.position).where(*below).limit(_ENTRIES_AT_ONCE)
            positions = connection.execute(some).scalars().all()
            for part in chunks(positions):
                connection.execute(delete(log).where(log.c.run_id == run_id, log.c.position.in_(part)))
            retired = (
                select(prompts.c.index, prompts.c.text_key, prompts.c.vector_key)
                .where(prompts.c.run_id == run_id, prompts.c.retired_at <= run.base_position)
                .limit(_PROMPTS_AT_ONCE)
            )
            rows = connection.execute(retired).all()
            for part in chunks([row.index for row in rows]):
                connection.execute(delete(prompts).where(prompts.c.run_id == run_id, prompts.c.index.in_(part)))
            _erase_vectors(connection, run, [row.text_key for row in rows], [row.vector_key for row in rows])
        return len(positions) == _ENTRIES_AT_ONCE or len(rows) == _PROMPTS_AT_ONCE

    def forget_deleted(self) -> None:
        """Let nothing of what was deleted stand in the database's files: SQLite's log, PostgreSQL's dead rows.

        Raises:
            StoreUnavailable: others hold on to it; the call may be repeated.
        """
        if self._engine.dialect.name == "sqlite":
            self._truncate_write_ahead_log()  # SQLite itself has overwritten it
            return
        outside = self._bulk_engine.execution_options(isolation_level="AUTOCOMMIT")
        with translated_faults(), closing(outside.connect()) as connection:
            connection.execute(text(f"VACUUM {_ERASED_FROM}"))


class _Outdated(Exception):
    """Rolls the transaction back."""


def _erase_vectors(
    connection: Connection, run: Run, text_keys: Sequence[str | None], vector_keys: Sequence[str | None]
) -> None:
    """Delete the vectors under these keys that no prompt of any run has.

    They are locked first and looked for among the prompts afterwards: whoever relies on a stored vector holds it until
    its prompt is committed (`hold_vectors`).
    """
    for keys in chunks(sorted({key for key in text_keys if key is not None})):
        named = select(embeddings.c.embedder, embeddings.c.key).where(
            embeddings.c.key.in_(keys), ~embeddings.c.embedder.startswith(f"{CALLER}:", autoescape=True)
        )
        locked = connection.execute(named.order_by(embeddings.c.embedder, embeddings.c.key).with_for_update()).all()
        used = set(connection.execute(select(prompts.c.text_key).where(prompts.c.text_key.in_(keys))).scalars())
        unused = [tuple(row) for row in locked if row.key not in used]
        for part in chunks(unused):
            connection.execute(delete(embeddings).where(tuple_(embeddings.c.embedder, embeddings.c.key).in_(part)))
    own = stored_embedder(CALLER, run.id)
    for keys in chunks(sorted({key for key in vector_keys if key is not None and key.startswith("prompt:")})):
        again = select(prompts.c.vector_key).where(
            prompts.c.run_id == run.id, prompts.c.vector_key.in_(keys), prompts.c.prompt_id.in_(_ids_of(keys))
        )
        left = set(connection.execute(again).scalars())
        gone = [key for key in keys if key not in left]
        connection.execute(delete(embeddings).where(embeddings.c.embedder == own, embeddings.c.key.in_(gone)))


def _ids_of(vector_keys: Sequence[str]) -> list[str]:
    """Ids of the prompts whose own vectors these are."""
    return [key.removeprefix("prompt:") for key in vector_keys]
