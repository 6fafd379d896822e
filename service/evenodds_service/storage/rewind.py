"""Rewind and retract: what a run is made to forget, in one transaction and as one entry of its log.

What is voided stays in the log, marked, and is read as if it had never been there. Whatever was derived from it goes
at the same position: checkpoints behind the first voided entry are dropped, snapshots that were fitted on voided
observations are voided with them (a refit is asked for), and a refit that is being fitted is put back in the queue,
which fences its worker. The run is then folded from the newest checkpoint that is left: snapshots behind it that were
dropped (checkpoints.py) are voided too, so that everybody folds the same log without them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, delete, func, insert, or_, select, update

from evenodds_service.errors import BelowBase, SelectionVoided
from evenodds_service.storage.entries import compact_json, voided_rows
from evenodds_service.storage.runs import lock_run
from evenodds_service.storage.tables import checkpoints, log, refits, runs, selections, snapshots
from evenodds_service.storage.transactions import Transactions
from evenodds_service.storage.values import Run, Voided

_PAGE = 1_000

ENTRY_OF_SNAPSHOT = and_(log.c.run_id == snapshots.c.run_id, log.c.position == snapshots.c.log_position)
"""Joins a snapshot with its entry of the log; below the run's base there is none."""


class RewindMethods(Transactions):
    def rewind(self, run_id: int, *, step: int, incarnation: str | None = None, now: datetime) -> Voided:
        """Void every observation and selection with a step above `step`. Without any, nothing is written, unless an
        incarnation is named: then what older ones report later is refused, see `refuse_forgotten`.

        Args:
            incarnation: Observations whose request id begins with it and a dot stay: the restarted trainer made them.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
            BelowBase: the log is compacted up to a later step.
        """
        with self._writing(in_bulk=True) as connection:
            return rewind_run(connection, lock_run(connection, run_id), step=step, incarnation=incarnation, now=now)

    def retract(
        self,
        run_id: int,
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        prompts: Sequence[int] | None = None,
        request_id: str | None = None,
        now: datetime,
    ) -> Voided:
        """Void the observations that fulfil every condition given; selections stay. Without any, nothing is written.

        Args:
            from_step, to_step: First and last step.
            prompts: Indices of prompts.
            request_id: Of the request that brought them.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
            BelowBase: some of what is named may have been compacted.
        """
        with self._writing(in_bulk=True) as connection:
            run = lock_run(connection, run_id)
            conditions = [log.c.run_id == run_id, log.c.kind == "observe", log.c.voided_at.is_(None)]
            _check_is_above_base(connection, run, from_step=from_step, request_id=request_id)
            if from_step is not None:
                conditions.append(log.c.step >= from_step)
            if to_step is not None:
                conditions.append(log.c.step <= to_step)
            if request_id is not None:
                conditions.append(log.c.request_id == request_id)
            position = run.log_position + 1
            if prompts is None:
                found = _mark_entries(connection, and_(*conditions), position)
            else:
                found = _mark_rows(connection, and_(*conditions), frozenset(prompts), position)
            asked = {
                "from_step": from_step,
                "to_step": to_step,
                "prompts": None if prompts is None else list(prompts),
                "request_id": request_id,
            }
            return _record(connection, run, "retract", asked, found, now=now)

    def give_up_checkpoints(self, run_id: int, *, refused: int, left: int, now: datetime) -> bool:
        """Delete the checkpoints behind log position `left`, which cannot be used, and void what is dropped there.

        One entry of the log, so that every process goes on from the same: those that still know the state, too.

        Args:
            refused: Log position of the newest checkpoint that the caller found; 0 where it found none.

        Returns:
            Whether it was done: not where there is another newest checkpoint by now, which may be used, nor where
            nothing was dropped.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
        """
        with self._writing(in_bulk=True) as connection:
            run = lock_run(connection, run_id)
            if newest_checkpoint_position(connection, run_id) != refused:
                return False
            unusable = (checkpoints.c.run_id == run_id, checkpoints.c.position > left)
            connection.execute(delete(checkpoints).where(*unusable))
            asked = {"checkpoints_above": left}
            voided = _record(connection, run, "retract", asked, _Found(None, None, 0, 0), now=now)
            return voided.log_position > run.log_position


def _check_is_above_base(connection: Connection, run: Run, *, from_step: int | None, request_id: str | None) -> None:
    """Raises BelowBase where some of what a retraction names may have been compacted."""
    if run.base_position == 0 or (from_step is not None and run.base_step is not None and from_step > run.base_step):
        return
    if request_id is not None:
        named = (log.c.run_id == run.id, log.c.request_id == request_id, log.c.voided_at.is_(None))
        position = connection.execute(select(log.c.position).where(*named)).scalar()
        if position is not None and position > run.base_position:
            return
    raise BelowBase(
        f"run {run.name!r}: what was reported up to log position {run.base_position} (step {run.base_step}) is "
        "compacted and cannot be dropped any more: name a from_step above, or the request_id of a later report"
    )


def rewind_run(connection: Connection, run: Run, *, step: int, incarnation: str | None = None, now: datetime) -> Voided:
    """See `RewindMethods.rewind`. The caller holds the run's lock."""
    if run.base_step is not None and step < run.base_step:
        raise BelowBase(
            f"run {run.name!r} cannot go back to step {step}: its log is compacted up to step {run.base_step} (log "
            f"position {run.base_position}), where prompts were retired; go back to a step from {run.base_step} on, or "
            "begin a new run"
        )
    position = run.log_position + 1
    is_above = log.c.position > run.base_position
    is_later = and_(log.c.run_id == run.id, is_above, log.c.voided_at.is_(None), log.c.step > step)
    if incarnation is not None:
        is_own = log.c.request_id.startswith(f"{incarnation}.", autoescape=True)
        is_later = and_(is_later, or_(log.c.request_id.is_(None), ~is_own))
    found = _mark_entries(connection, is_later, position)
    chosen_later = and_(selections.c.run_id == run.id, selections.c.voided_at.is_(None), selections.c.step > step)
    connection.execute(update(selections).where(chosen_later).values(voided_at=position))
    asked = {"step": step} if incarnation is None else {"step": step, "incarnation": incarnation}
    is_news = incarnation is not None and asked not in [told for _, told in _rewinds(connection, run)]
    return _record(connection, run, "rewind", asked, found, is_news=is_news, now=now)


def refuse_forgotten(connection: Connection, run: Run, request_id: str, step: int) -> None:
    """Refuse what an incarnation of the trainer reports of a step that the run has gone back behind since.

    That is one which had reported or gone back itself before another went back: a process that hung, say, or what lay
    on the disk of another machine. Outcomes of a selection need no such look, because their selection is voided. It
    reads the run's log, which few reports make necessary: those without a selection, after a rewind.

    Args:
        request_id: Begins with the incarnation's name and a dot; others are nobody's.

    Raises:
        SelectionVoided: It is such a report.
    """
    name, dot, _ = request_id.partition(".")
    if not dot:
        return
    rewinds = _rewinds(connection, run)
    gone_back = [(at, told) for at, told in rewinds if told["step"] < step and told.get("incarnation", name) != name]
    if not gone_back:
        return
    is_own = and_(log.c.run_id == run.id, log.c.request_id.startswith(f"{name}.", autoescape=True))
    first = connection.execute(select(func.min(log.c.position)).where(is_own)).scalar()
    known_at = [at for at, told in rewinds if told.get("incarnation") == name] + ([] if first is None else [first])
    ended_at = gone_back[-1][0]
    if known_at and min(known_at) < ended_at:
        raise SelectionVoided(
            f"observations of incarnation {name!r} at step {step} of run {run.name!r}: the trainer went back behind "
            f"that step at log position {ended_at}, and they belong to a policy that the run has forgotten; drop them"
        )


def _rewinds(connection: Connection, run: Run) -> list[tuple[int, dict[str, Any]]]:
    """Where each rewind stands in the log, and what was asked: `step`, and `incarnation` where it was named."""
    if run.void_position == 0:
        return []
    statement = select(log.c.position, log.c.body).where(
        log.c.run_id == run.id, log.c.kind == "rewind", log.c.position <= run.void_position
    )
    rows = connection.execute(statement.order_by(log.c.position)).all()
    asked = [(row.position, json.loads(row.body)) for row in rows]
    return [(at, {name: body[name] for name in ("step", "incarnation") if name in body}) for at, body in asked]


@dataclass(frozen=True, slots=True)
class _Found:
    """What was marked as voided: how much, and from which log position on (None: nothing)."""

    first: int | None
    first_observed: int | None
    n_observations: int
    n_selections: int


def _mark_entries(connection: Connection, condition: ColumnElement[bool], position: int) -> _Found:
    """Void whole entries."""
    is_observe = log.c.kind == "observe"
    count = select(
        func.min(log.c.position),
        func.min(case((is_observe, log.c.position))),
        func.coalesce(func.sum(log.c.n_observations), 0),
        func.count(case((log.c.kind == "select", 1))),
    ).where(condition)
    first, first_observed, n_observations, n_selections = connection.execute(count).one()
    if first is not None:
        connection.execute(update(log).where(condition).values(voided_at=position))
    return _Found(first, first_observed, int(n_observations), n_selections)


def _mark_rows(
    connection: Connection, condition: ColumnElement[bool], prompts: frozenset[int], position: int
) -> _Found:
    """Void the observations of these prompts, and an entry whole where no other is left in it."""
    columns = (log.c.run_id, log.c.position, log.c.n_observations, log.c.voided_rows, log.c.body)
    page = select(*columns).where(condition).order_by(log.c.position).limit(_PAGE)
    marks: list[dict[str, object]] = []
    total, after = 0, 0
    while rows := connection.execute(page.where(log.c.position > after)).all():
        for row in rows:
            gone = set(voided_rows(row.voided_rows))
            observed = json.loads(row.body)["prompts"]
            hit = [i for i, prompt in enumerate(observed) if prompt in prompts and i not in gone]
            if not hit:
                continue
            total += len(hit)
            is_whole = len(hit) == row.n_observations
            marked = [*json.loads(row.voided_rows or "[]"), [position, hit]]
            marks.append(
                {
                    "of_run": row.run_id,
                    "at": row.position,
                    "whole": position if is_whole else None,
                    "rows": row.voided_rows if is_whole else compact_json(marked),
                    "left": row.n_observations if is_whole else row.n_observations - len(hit),
                }
            )
        after = rows[-1].position
    if not marks:
        return _Found(None, None, 0, 0)
    mark = (
        update(log)
        .where(log.c.run_id == bindparam("of_run"), log.c.position == bindparam("at"))
        .values(voided_at=bindparam("whole"), voided_rows=bindparam("rows"), n_observations=bindparam("left"))
    )
    connection.execute(mark, marks)
    first = marks[0]["at"]
    assert isinstance(first, int)
    return _Found(first, first, total, 0)


def _record(
    connection: Connection,
    run: Run,
    kind: str,
    asked: Mapping[str, object],
    found: _Found,
    *,
    is_news: bool = False,
    now: datetime,
) -> Voided:
    """Write the entry that voids, drop what was derived from what is voided, and move the run on.

    Args:
        is_news: Write it also where nothing is voided.
    """
    position = run.log_position + 1
    if found.first is not None:
        stale = (checkpoints.c.run_id == run.id, checkpoints.c.position >= found.first)
        connection.execute(delete(checkpoints).where(*stale))
    n_dropped = _void_dropped(connection, run.id, position)
    if found.first is None and n_dropped == 0 and not is_news:
        return Voided(run.log_position, run.head_step, 0, 0)
    body = {
        **asked,
        "first": found.first,
        "observations": found.n_observations,
        "selections": found.n_selections,
    }
    connection.execute(
        insert(log).values(run_id=run.id, position=position, kind=kind, body=compact_json(body), created_at=now)
    )
    n_observations = run.n_observations - found.n_observations
    if found.first_observed is not None:
        _void_snapshots(connection, run.id, found.first_observed, position)
    model_version = run.model_version
    if found.first_observed is not None or n_dropped:
        model_version = newest_standing_snapshot(connection, run.id)
    if found.first_observed is not None:
        _refit_again(connection, run.id, is_wanted=model_version < run.model_version and n_observations > 0, now=now)
    head = select(func.max(log.c.step)).where(log.c.run_id == run.id, log.c.voided_at.is_(None))
    steps = [step for step in (connection.execute(head).scalar(), run.base_step) if step is not None]
    head_step = max(steps, default=None)
    connection.execute(
        update(runs)
        .where(runs.c.id == run.id)
        .values(
            log_position=position,
            void_position=position,
            head_step=head_step,
            n_observations=n_observations,
            model_version=model_version,
        )
    )
    return Voided(position, head_step, found.n_observations, found.n_selections)


def newest_checkpoint_position(connection: Connection, run_id: int) -> int:
    """Its log position; 0 where there is none."""
    newest = select(func.max(checkpoints.c.position)).where(checkpoints.c.run_id == run_id)
    return connection.execute(newest).scalar() or 0


def _void_dropped(connection: Connection, run_id: int, position: int) -> int:
    """Void the dropped snapshots behind the newest checkpoint, from which the run is folded. Returns how many."""
    published = select(snapshots.c.log_position).where(
        snapshots.c.run_id == run_id,
        snapshots.c.log_position > newest_checkpoint_position(connection, run_id),
        func.length(snapshots.c.weights) == 0,
    )
    standing = (log.c.run_id == run_id, log.c.voided_at.is_(None), log.c.position.in_(published))
    return connection.execute(update(log).where(*standing).values(voided_at=position)).rowcount


def _void_snapshots(connection: Connection, run_id: int, first_observed: int, position: int) -> None:
    """Void the snapshots that were fitted on voided observations."""
    published = select(snapshots.c.log_position).where(
        snapshots.c.run_id == run_id, snapshots.c.fitted_position >= first_observed
    )
    stale = (log.c.run_id == run_id, log.c.voided_at.is_(None), log.c.position.in_(published))
    connection.execute(update(log).where(*stale).values(voided_at=position))


def newest_standing_snapshot(connection: Connection, run_id: int, *, at_most: int | None = None) -> int:
    """The newest version that was not voided, of those published up to a log position; 0 where there is none.

    Of those below the run's base only one is left, and its log entry is not.
    """
    standing = (
        select(func.max(snapshots.c.version))
        .outerjoin(log, ENTRY_OF_SNAPSHOT)
        .where(snapshots.c.run_id == run_id, log.c.voided_at.is_(None))
    )
    if at_most is not None:
        standing = standing.where(snapshots.c.log_position <= at_most)
    return int(connection.execute(standing).scalar() or 0)


def _refit_again(connection: Connection, run_id: int, *, is_wanted: bool, now: datetime) -> None:
    """Put a refit that is being fitted back in the queue; ask for one if that `is_wanted` and none is open.

    A worker that is just claiming it holds its row, not the run's: it is waited for, else its fit would not be fenced.
    """
    is_open = and_(refits.c.run_id == run_id, refits.c.status.in_(("pending", "running")))
    refit_id = connection.execute(select(refits.c.id).where(is_open).with_for_update()).scalar()
    if refit_id is not None:
        again = {"status": "pending", "worker": None, "lease_until": None}
        connection.execute(update(refits).where(refits.c.id == refit_id).values(again))
    elif is_wanted:
        connection.execute(insert(refits).values(run_id=run_id, status="pending", requested_at=now))
