"""How each run stands: one row for each run, which lists of runs, the page and `/metrics` of any replica read.

A row says what the fold of the run's log said at `log_position`. It is written behind the calls that change a run and
may be a few seconds old; who needs the present state folds the log.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Case, Function, and_, case, func, select

from evenodds_service.domain.report.alarms import Alarm, Remedy
from evenodds_service.domain.report.summary import Estimate, SharePoint, Summary
from evenodds_service.storage.refits import refit_of
from evenodds_service.storage.runs import run_of
from evenodds_service.storage.tables import log, refits, run_states, runs
from evenodds_service.storage.transactions import Transactions, chunks, insert_or_update
from evenodds_service.storage.values import RunState, WatchedRun

_ESTIMATES = ("lift", "rollouts_saved")


class RunStateMethods(Transactions):
    def save_run_states(self, states: Sequence[tuple[int, int, Summary]], *, now: datetime) -> None:
        """Save how these runs stand. A state of an older log position than the saved one is left out.

        Runs that were deleted meanwhile are left out as well.

        Args:
            states: Id of the run, log position that the summary speaks of, and the summary.
        """
        by_id = {run_id: (log_position, summary) for run_id, log_position, summary in states}
        with self._writing() as connection:
            active_at: dict[int, datetime | None] = {}
            began_at: dict[int, datetime | None] = {}
            for ids in chunks(sorted(by_id)):
                there = select(runs.c.id, _active_at().label("active_at")).where(runs.c.id.in_(ids)).order_by(runs.c.id)
                locked = there.with_for_update(read=True, key_share=True, of=runs)
                active_at |= {row.id: row.active_at for row in connection.execute(locked)}
                saving = [run_id for run_id in ids if by_id[run_id][1].rollouts_saved is not None]  # these have batches
                if saving:
                    began = select(runs.c.id, _began_at().label("began_at")).where(runs.c.id.in_(saving))
                    began_at |= {row.id: row.began_at for row in connection.execute(began)}
            rows = [
                {
                    "run_id": run_id,
                    "log_position": by_id[run_id][0],
                    **_columns(by_id[run_id][1]),
                    "active_at": active,
                    "began_at": began_at.get(run_id),
                    "saved_at": now,
                }
                for run_id, active in active_at.items()
            ]
            if rows:
                statement = insert_or_update(connection, run_states, keys=("run_id",), newer_by="log_position")
                connection.execute(statement, rows)

    def run_states(self, run_ids: Collection[int]) -> dict[int, RunState]:
        """States of these runs by id, of those that have one."""
        found: dict[int, RunState] = {}
        with self._reading() as connection:
            for ids in chunks(sorted(run_ids)):
                rows = connection.execute(select(run_states).where(run_states.c.run_id.in_(ids))).mappings()
                found |= {row["run_id"]: state_of(row) for row in rows}
        return found

    def watched_runs(self, *, limit: int) -> tuple[WatchedRun, ...]:
        """The runs that were active last, with their states and newest refits; runs without a state come last.

        Costs three statements, whatever the number of runs.
        """
        newest = (run_states.c.run_id.is_(None), run_states.c.active_at.desc().nulls_last(), runs.c.id.desc())
        statement = (
            select(runs, *(column.label(f"state_{column.name}") for column in run_states.c))
            .outerjoin(run_states, run_states.c.run_id == runs.c.id)
            .order_by(*newest)
            .limit(limit)
        )
        is_newest = select(func.max(refits.c.id)).group_by(refits.c.run_id)
        is_standing = and_(refits.c.run_id == runs.c.id, refits.c.model_version <= runs.c.model_version)
        is_newest_standing = select(func.max(refits.c.id)).join(runs, is_standing).group_by(refits.c.run_id)
        with self._reading() as connection:
            rows = connection.execute(statement).mappings().all()
            latest, done = (
                {row["run_id"]: refit_of(row) for row in connection.execute(refits_among).mappings()}
                for refits_among in (
                    select(refits).where(refits.c.id.in_(is_newest)),
                    select(refits).where(refits.c.id.in_(is_newest_standing)),
                )
            )
        return tuple(
            WatchedRun(
                run=run_of({column.name: row[column.name] for column in runs.c}),
                state=None if row["state_run_id"] is None else state_of(_part(row, "state_")),
                refit=latest.get(row["id"]),
                done_refit=done.get(row["id"]),
            )
            for row in rows
        )


def state_of(row: Mapping[Any, Any]) -> RunState:
    """The state that a row of `run_states` holds."""
    estimates = {
        name: Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"]) if row[name] is not None else None
        for name in _ESTIMATES
    }
    summary = Summary(
        verdict=row["verdict"],
        head_step=row["head_step"],
        alarms=_alarms_of(row["alarms"]),
        notes=_alarms_of(row["notes"]),
        lift=estimates["lift"],
        rollouts_saved=estimates["rollouts_saved"],
        informative_shares=tuple(SharePoint(*point) for point in json.loads(row["informative_shares"])),
        figures=json.loads(row["figures"]),
    )
    return RunState(row["run_id"], row["log_position"], summary, row["active_at"], row["began_at"], row["saved_at"])


def _part(row: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _columns(summary: Summary) -> dict[str, Any]:
    estimates: dict[str, float | None] = {}
    for name in _ESTIMATES:
        estimate: Estimate | None = getattr(summary, name)
        ends = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
        estimates |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    shares = [[point.first_step, point.last_step, point.share] for point in summary.informative_shares]
    codes = dict.fromkeys(alarm.code for alarm in summary.alarms)
    return {
        "verdict": summary.verdict,
        "head_step": summary.head_step,
        "n_alarms": len(summary.alarms),
        "alarm_codes": "".join(f" {code} " for code in codes),
        "alarms": _json([asdict(alarm) for alarm in summary.alarms]),
        "notes": _json([asdict(note) for note in summary.notes]),
        **estimates,
        "informative_share": shares[-1][-1] if shares else None,
        "informative_shares": _json(shares),
        "figures": _json(dict(summary.figures)),
    }


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _alarms_of(content: str) -> tuple[Alarm, ...]:
    return tuple(
        Alarm(**{**fields, "remedy": Remedy(**fields["remedy"]) if fields["remedy"] else None})
        for fields in json.loads(content)
    )


def _began_at() -> Case[datetime]:
    """When the first batch of a run was chosen that stands.

    What the state said before stands where the log was compacted.
    """
    first = (
        select(log.c.created_at)
        .where(log.c.run_id == runs.c.id, log.c.kind == "select", log.c.voided_at.is_(None))
        .order_by(log.c.position)
        .limit(1)
        .correlate(runs)
        .scalar_subquery()
    )
    before = select(run_states.c.began_at).where(run_states.c.run_id == runs.c.id).correlate(runs).scalar_subquery()
    return case((runs.c.base_position == 0, first), else_=func.coalesce(before, first))


def _active_at() -> Function[datetime]:
    """When the newest batch of a run was chosen or outcomes were reported; null before any.

    What the state said before stands where the log was compacted since.
    """
    newest = (
        select(log.c.created_at)
        .where(log.c.run_id == runs.c.id, log.c.kind.in_(("observe", "select")))
        .order_by(log.c.position.desc())
        .limit(1)
        .correlate(runs)
        .scalar_subquery()
    )
    before = select(run_states.c.active_at).where(run_states.c.run_id == runs.c.id).correlate(runs).scalar_subquery()
    return func.coalesce(newest, before)
