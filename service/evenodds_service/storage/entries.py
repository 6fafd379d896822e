"""Rows of the log: how an entry is written at the next position and how it is read back.

The body of an entry is compact JSON. Of an observe entry: parallel lists `prompts`, `successes`, `attempts`
and `informative` (0 or 1), the `model_version` that was answered, and the `selection_step` where a selection was
named. Of a select entry: `prompts`; `a` and `b`, the belief about each, in six digits; where there is a control arm,
`control_share` and the places of its prompts in the batch, `control`. Of a pool entry: `n_prompts`. Of a snapshot
entry: `version`. Of a rewind or retract: what was asked and what it voided.

What is voided stays in the log, marked with the position of the entry that voided it, so that the log can be read
as it stood at any position. Where only some observations of an entry were voided, `voided_rows` lists them:
pairs of that position and the rows, counted in the body's lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, RowMapping, case, insert, update

from evenodds_service.domain.arrays import IntArray
from evenodds_service.domain.log_entries import Entry, ObserveEntry, PoolEntry, SelectEntry, SnapshotEntry, VoidEntry
from evenodds_service.storage.tables import log, runs

ENTRY_COLUMNS = (
    log.c.position,
    log.c.kind,
    log.c.step,
    log.c.selection_id,
    log.c.voided_at,
    log.c.voided_rows,
    log.c.body,
)
"""What `read_entry` needs of a row."""
VOIDS = ("rewind", "retract")
"""The kinds of entries that void others."""


def append_entry(
    connection: Connection,
    run_id: int,
    entry: PoolEntry | ObserveEntry | SelectEntry | SnapshotEntry,
    *,
    now: datetime,
    request_id: str | None = None,
    request_hash: str | None = None,
    model_version: int | None = None,
) -> None:
    """Write the entry and move the run on to it. The caller holds the run's lock.

    Args:
        entry: Its `position` is the run's log position plus one.
        model_version: The version that was answered, kept with an observe entry for repetitions.
    """
    row: dict[str, object] = {"run_id": run_id, "position": entry.position, "created_at": now}
    moved: dict[str, Any] = {"log_position": entry.position}
    if isinstance(entry, PoolEntry):
        row |= {"kind": "pool", "body": compact_json({"n_prompts": entry.n_prompts})}
        moved["n_prompts"] = entry.n_prompts
    elif isinstance(entry, ObserveEntry):
        row |= {
            "kind": "observe",
            "step": entry.step,
            "request_id": request_id,
            "request_hash": request_hash,
            "selection_id": entry.selection_id,
            "n_observations": len(entry.prompts),
            "body": _observe_body(entry, model_version),
        }
        moved["n_observations"] = runs.c.n_observations + len(entry.prompts)
    elif isinstance(entry, SelectEntry):
        row |= {
            "kind": "select",
            "step": entry.step,
            "selection_id": entry.selection_id,
            "body": _select_body(entry),
        }
    else:
        row |= {"kind": "snapshot", "body": compact_json({"version": entry.version})}
        moved["model_version"] = entry.version
    if isinstance(entry, ObserveEntry | SelectEntry):
        moved["head_step"] = case((runs.c.head_step > entry.step, runs.c.head_step), else_=entry.step)
    connection.execute(insert(log).values(row))
    connection.execute(update(runs).where(runs.c.id == run_id).values(moved))


def read_entry(row: RowMapping, *, as_of: int | None = None) -> Entry:
    """The entry that a row of the log holds, less what was voided up to log position `as_of` (None: ever)."""
    position: int = row["position"]
    if row["kind"] in VOIDS or _counts_by(row["voided_at"], as_of):
        return VoidEntry(position)
    body = json.loads(row["body"])
    if row["kind"] == "pool":
        return PoolEntry(position, body["n_prompts"])
    if row["kind"] == "snapshot":
        return SnapshotEntry(position, body["version"])
    prompts = np.asarray(body["prompts"], dtype=np.int64)
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
    )


def _select_body(entry: SelectEntry) -> str:
    body: dict[str, object] = {"prompts": entry.prompts.tolist()}
    if entry.control_share:
        body["control_share"] = entry.control_share
    if entry.control is not None and entry.control.any():
        body["control"] = np.flatnonzero(entry.control).tolist()
    if entry.a is not None and entry.b is not None:
        body |= {"a": [float(f"{a:.6g}") for a in entry.a.tolist()], "b": [float(f"{b:.6g}") for b in entry.b.tolist()]}
    return compact_json(body)


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
    )


def voided_rows(stored: str | None, *, as_of: int | None = None) -> list[int]:
    """Which observations of an entry were voided alone, up to log position `as_of`."""
    voids = json.loads(stored) if stored is not None else []
    return [row for position, rows in voids if _counts_by(position, as_of) for row in rows]


def _counts_by(voided_at: int | None, as_of: int | None) -> bool:
    return voided_at is not None and (as_of is None or voided_at <= as_of)


def _observe_body(entry: ObserveEntry, model_version: int | None) -> str:
    return compact_json(
        {
            "prompts": entry.prompts.tolist(),
            "successes": entry.successes.tolist(),
            "attempts": entry.attempts.astype(np.int64).tolist(),
            "informative": entry.informative.astype(np.int64).tolist(),
            "model_version": model_version,
            **({} if entry.selection_step is None else {"selection_step": entry.selection_step}),
        }
    )


def compact_json(body: object) -> str:
    return json.dumps(body, separators=(",", ":"), allow_nan=False)
