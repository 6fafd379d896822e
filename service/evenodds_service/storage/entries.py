"""Rows of the log: how an entry is written at the next position and how it is read back.

The body of an entry is compact JSON. Of an observe entry: parallel lists `prompts`, `successes`, `attempts`
and `informative` (0 or 1), the `model_version` that was answered, and the `selection_step` where a selection was
named. Of a select entry: `prompts`; `a` and `b`, the belief about each, in six digits; where there is a control arm,
`control_share` and the places of its prompts in the batch, `control`. Of a pool entry: `n_prompts`. Of a snapshot
entry: `version`. Of a retire entry: `prompts`. Of a rewind or retract: what was asked and what it voided.

What is voided stays in the log, marked with the position of the entry that voided it, so that the log can be read
as it stood at any position. Where only some observations of an entry were voided, `voided_rows` lists them:
pairs of that position and the rows, counted in the body's lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, RowMapping, insert, update

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.log_entries import (
    Entry,
    ObserveEntry,
    PoolEntry,
    RetireEntry,
    SelectEntry,
    SnapshotEntry,
    VoidEntry,
    WrittenEntry,
)
from evenodds_service.storage.tables import log, runs
from evenodds_service.storage.values import Run

ENTRY_COLUMNS = (
    log.c.position,
    log.c.kind,
    log.c.step,
    log.c.selection_id,
    log.c.voided_at,
    log.c.voided_rows,
    log.c.body,
    log.c.created_at,
)
"""What `read_entry` needs of a row."""
_KINDS = {
    PoolEntry: "pool",
    ObserveEntry: "observe",
    SelectEntry: "select",
    SnapshotEntry: "snapshot",
    RetireEntry: "retire",
}
_MOVED = (
    *("log_position", "n_prompts", "head_step", "n_observations", "model_version"),
    *("n_retired", "retired_position"),
)
VOIDS = ("rewind", "retract")
"""The kinds of entries that void others."""


def append_entries(
    connection: Connection,
    run: Run,
    entries: Sequence[WrittenEntry],
    *,
    now: datetime,
    request: tuple[str, str] | None = None,
) -> Run:
    """Write the entries and move the run on to the last. Returns the run as it stands then.

    Args:
        run: As it stands; the caller holds its lock.
        entries: At least one, at the positions that follow the run's.
        request: Id and hash of the request that an observe entry comes from.
    """
    rows = []
    moved = run
    for entry in entries:
        moved = _moved(moved, entry)
        request_id, request_hash = request if request and isinstance(entry, ObserveEntry) else (None, None)
        rows.append(
            {
                "run_id": run.id,
                "position": entry.position,
                "kind": _KINDS[type(entry)],
                "step": entry.step if isinstance(entry, ObserveEntry | SelectEntry) else None,
                "request_id": request_id,
                "request_hash": request_hash,
                "selection_id": entry.selection_id if isinstance(entry, ObserveEntry | SelectEntry) else None,
                "n_observations": len(entry.prompts) if isinstance(entry, ObserveEntry) else 0,
                "body": compact_json(_body(entry, run)),
                "created_at": now,
            }
        )
    connection.execute(insert(log), rows)
    values = {name: getattr(moved, name) for name in _MOVED}
    connection.execute(update(runs).where(runs.c.id == run.id).values(values))
    return moved


def _moved(run: Run, entry: WrittenEntry) -> Run:
    assert entry.position == run.log_position + 1, f"log entry {entry.position} follows {run.log_position}"
    run = replace(run, log_position=entry.position)
    if isinstance(entry, PoolEntry):
        return replace(run, n_prompts=entry.n_prompts)
    if isinstance(entry, SnapshotEntry):
        return replace(run, model_version=entry.version)
    if isinstance(entry, RetireEntry):
        return replace(run, n_retired=run.n_retired + len(entry.prompts), retired_position=entry.position)
    head_step = entry.step if run.head_step is None else max(run.head_step, entry.step)
    n_observations = run.n_observations + (len(entry.prompts) if isinstance(entry, ObserveEntry) else 0)
    return replace(run, head_step=head_step, n_observations=n_observations)


def read_entry(row: RowMapping, *, as_of: int | None = None) -> Entry:
    """The entry that a row of the log holds, less what was voided up to log position `as_of` (None: ever)."""
    position: int = row["position"]
    if row["kind"] in VOIDS or _counts_by(row["voided_at"], as_of):
        return VoidEntry(position)
    body = json.loads(row["body"])
    if row["kind"] == "pool":
        return PoolEntry(position, body["n_prompts"], seconds_of(row["created_at"]))
    if row["kind"] == "snapshot":
        return SnapshotEntry(position, body["version"])
    prompts = np.asarray(body["prompts"], dtype=np.int64)
    if row["kind"] == "retire":
        return RetireEntry(position, prompts)
    if row["kind"] == "select":
        return _select_entry(row, body, prompts)
    kept: slice | NDArray[np.bool_] = slice(None)
    if row["voided_rows"] is not None:
        kept = np.ones(len(prompts), dtype=np.bool_)
        kept[voided_rows(row["voided_rows"], as_of=as_of)] = False
    return ObserveEntry(
        position,
        row["step"],
        prompts=prompts[kept],
        successes=np.asarray(body["successes"], dtype=np.float64)[kept],
        attempts=np.asarray(body["attempts"], dtype=np.float64)[kept],
        informative=np.asarray(body["informative"], dtype=np.bool_)[kept],
        selection_id=row["selection_id"],
        selection_step=body.get("selection_step"),
        at=seconds_of(row["created_at"]),
    )


def seconds_of(moment: datetime) -> int:
    """Whole seconds since 1970, as entries carry them."""
    return math.floor(moment.timestamp())


def kept_digits(values: FloatArray | None) -> FloatArray | None:
    """The values in the six digits that a select entry keeps of them."""
    return None if values is None else np.asarray([float(f"{value:.6g}") for value in values.tolist()])


def _body(entry: WrittenEntry, run: Run) -> dict[str, object]:
    if isinstance(entry, PoolEntry):
        return {"n_prompts": entry.n_prompts}
    if isinstance(entry, SnapshotEntry):
        return {"version": entry.version}
    body: dict[str, object] = {"prompts": entry.prompts.tolist()}
    if isinstance(entry, ObserveEntry):
        body["successes"] = entry.successes.tolist()
        body["attempts"] = entry.attempts.astype(np.int64).tolist()
        body["informative"] = entry.informative.astype(np.int64).tolist()
        body["model_version"] = run.model_version
        if entry.selection_step is not None:
            body["selection_step"] = entry.selection_step
        return body
    if isinstance(entry, RetireEntry):
        return body
    if entry.control_share:
        body["control_share"] = entry.control_share
    if entry.control is not None:
        body["control"] = np.flatnonzero(entry.control).tolist()
    if entry.a is not None and entry.b is not None:
        body |= {"a": entry.a.tolist(), "b": entry.b.tolist()}
    if entry.unseen_share is not None:
        body["unseen_share"] = entry.unseen_share
    return body


def _select_entry(row: RowMapping, body: Mapping[str, Any], prompts: IntArray) -> SelectEntry:
    control = None
    if "control" in body:
        control = np.zeros(len(prompts), dtype=np.bool_)
        control[body["control"]] = True
    return SelectEntry(
        row["position"],
        row["step"],
        prompts,
        selection_id=row["selection_id"],
        control_share=body.get("control_share", 0.0),
        control=control,
        a=np.asarray(body["a"], dtype=np.float64) if "a" in body else None,
        b=np.asarray(body["b"], dtype=np.float64) if "b" in body else None,
        unseen_share=body.get("unseen_share"),
    )


def voided_rows(stored: str | None, *, as_of: int | None = None) -> list[int]:
    """Which observations of an entry were voided alone, up to log position `as_of`."""
    marked = json.loads(stored) if stored is not None else []
    return [row for position, rows in marked if _counts_by(position, as_of) for row in rows]


def _counts_by(voided_at: int | None, as_of: int | None) -> bool:
    return voided_at is not None and (as_of is None or voided_at <= as_of)


def compact_json(body: object) -> str:
    return json.dumps(body, separators=(",", ":"), allow_nan=False)
