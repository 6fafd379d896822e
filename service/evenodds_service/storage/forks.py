"""Forks: a new run that starts from the memory of another, as it stood at a step."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, Table, and_, func, insert, literal, or_, select, true, update

from evenodds_service.domain.settings import CALLER, RunSettings
from evenodds_service.errors import BelowBase, RunExists
from evenodds_service.storage.rewind import newest_standing_snapshot, rewind_run
from evenodds_service.storage.runs import find_run, lock_run, settings_that_stand, settings_to_json, stored_embedder
from evenodds_service.storage.tables import (
    bases,
    checkpoints,
    embeddings,
    log,
    pool_blocks,
    prompts,
    runs,
    selections,
    snapshots,
)
from evenodds_service.storage.transactions import Transactions, insert_or_ignore
from evenodds_service.storage.values import Run

_BLOCK = 20_000  # rows that one statement copies
_RETIRED = ("n_retired", "retired_position", "base_position", "base_step", "base_observations")


class ForkMethods(Transactions):
    def fork_run(
        self, name: str, settings: RunSettings, *, fork_of: str, at_step: int | None, now: datetime
    ) -> tuple[Run, bool]:
        """Create a run with the pool and the memory of another. Returns the run and whether it is new.

        It stands as the other would after a rewind to `at_step`, and keeps log positions, request ids, selections,
        snapshots and checkpoints. The two share nothing afterwards. Repeated, it changes nothing.

        Args:
            settings: Of the new run.
            fork_of: Name of the run to start from.
            at_step: What came later is left out; None takes everything.

        Raises:
            RunUnknown: there is no run `fork_of`.
            RunExists: there is a run `name` that is not this fork.
            BelowBase: the other's log is compacted up to a later step.
            EmbedderFixed: the pool's vectors come from another embedder than `settings` ask for.
        """
        row = {"name": name, "settings": "{}", "fork_of": fork_of, "fork_step": at_step, "created_at": now}
        with self._writing(in_bulk=True, of_one_moment=True) as connection:
            created = insert_or_ignore(connection, runs).values(row).returning(runs.c.id)
            new_id = connection.execute(created).scalar()
            if new_id is None:
                return _standing_fork(find_run(connection, name), fork_of, at_step), False
            source = find_run(connection, fork_of)
            if at_step is not None and source.base_step is not None and at_step < source.base_step:
                raise BelowBase(
                    f"run {fork_of!r} cannot be forked at step {at_step}: its log is compacted up to step "
                    f"{source.base_step}; fork at a step from {source.base_step} on, or without at_step"
                )
            kept = settings_that_stand(source, settings)
            cut = _cut(connection, source, at_step)
            _copy_all(connection, source.id, new_id, cut, with_texts=kept.keep_text)
            counts = select(func.coalesce(func.sum(log.c.n_observations), 0), func.max(log.c.step)).where(
                log.c.run_id == new_id, log.c.voided_at.is_(None), log.c.position > source.base_position
            )
            n_observations, step = connection.execute(counts).one()
            steps = [known for known in (step, source.base_step) if known is not None]
            memory = {
                "settings": settings_to_json(kept),
                "embedding_width": source.embedding_width,
                "n_prompts": source.n_prompts,
                "rate_names": json.dumps(source.rate_names) if source.rate_names else None,
                "log_position": cut,
                "head_step": max(steps, default=None),
                "n_observations": int(n_observations) + source.base_observations,
                "model_version": newest_standing_snapshot(connection, new_id),
                "void_position": source.void_position,
                **{name: getattr(source, name) for name in _RETIRED},
            }
            connection.execute(update(runs).where(runs.c.id == new_id).values(memory))
            if at_step is not None:
                rewind_run(connection, lock_run(connection, new_id), step=at_step, now=now)
            return find_run(connection, name), True


def _standing_fork(run: Run, fork_of: str, at_step: int | None) -> Run:
    """Raises RunExists where the run is not this fork."""
    if (run.fork_of, run.fork_step) != (fork_of, at_step):
        asked = repr(fork_of) + ("" if at_step is None else f" at step {at_step}")
        raise RunExists(
            f"run {run.name!r} exists already and is no fork of {asked}: fork under another name, or delete it first"
        )
    return run


def _cut(connection: Connection, source: Run, at_step: int | None) -> int:
    """The last log position that the fork has a use for."""
    if at_step is None:
        return source.log_position
    counts = (log.c.run_id == source.id, log.c.voided_at.is_(None))
    later = select(func.min(log.c.position)).where(*counts, log.c.kind == "observe", log.c.step > at_step)
    first_later = connection.execute(later).scalar()
    published = select(snapshots.c.log_position).where(snapshots.c.run_id == source.id)
    if first_later is not None:
        published = published.where(snapshots.c.fitted_position < first_later)
    kept = or_(log.c.kind.in_(("pool", "retire")), log.c.step <= at_step, log.c.position.in_(published))
    last = connection.execute(select(func.max(log.c.position)).where(*counts, kept)).scalar()
    return max(last or 0, source.void_position, source.base_position)


def _copy_all(connection: Connection, source_id: int, new_id: int, cut: int, *, with_texts: bool) -> None:
    n_prompts = select(func.max(prompts.c.index)).where(prompts.c.run_id == source_id)
    for first in range(0, (connection.execute(n_prompts).scalar() or 0) + 1, _BLOCK):
        block = and_(prompts.c.index >= first, prompts.c.index < first + _BLOCK)
        _copy(connection, prompts, source_id, new_id, block, without=() if with_texts else ("text",))
        packed = and_(pool_blocks.c.first >= first, pool_blocks.c.first < first + _BLOCK)
        _copy(connection, pool_blocks, source_id, new_id, packed)
    for first in range(1, cut + 1, _BLOCK):
        block = and_(log.c.position >= first, log.c.position < first + _BLOCK, log.c.position <= cut)
        _copy(connection, log, source_id, new_id, block)
    _copy(connection, selections, source_id, new_id, selections.c.log_position <= cut)
    _copy(connection, snapshots, source_id, new_id, snapshots.c.log_position <= cut)
    _copy(connection, checkpoints, source_id, new_id, checkpoints.c.position <= cut)
    _copy(connection, bases, source_id, new_id, true())
    columns = [embeddings.c.key, embeddings.c.width, embeddings.c.vector]
    own = select(literal(stored_embedder(CALLER, new_id)), *columns).where(
        embeddings.c.embedder == stored_embedder(CALLER, source_id)
    )
    names = ["embedder", *(column.name for column in columns)]
    connection.execute(insert(embeddings).from_select(names, own))


def _copy(
    connection: Connection,
    table: Table,
    source_id: int,
    new_id: int,
    condition: ColumnElement[bool],
    *,
    without: Collection[str] = (),
) -> None:
    """The run's rows of the table, as rows of the new run; columns `without` which they are stay empty."""
    others = [column for column in table.c if column.name not in ("run_id", *without)]
    rows = select(literal(new_id), *others).where(table.c.run_id == source_id, condition)
    names = ["run_id", *(column.name for column in others)]
    connection.execute(insert(table).from_select(names, rows))
