"""The log of a run: observations in, entries out, in positions without gaps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import numpy as np
from sqlalchemy import Connection, select

from evenodds_service.domain.arrays import IntArray
from evenodds_service.domain.log_entries import Entry, NewObservation, ObserveEntry, Outcomes
from evenodds_service.domain.prompts import NewPrompts
from evenodds_service.errors import PoolChanged, PromptUnknown, RequestConflict, SelectionUnknown, SelectionVoided
from evenodds_service.storage.entries import ENTRY_COLUMNS, append_entries, read_entry, seconds_of
from evenodds_service.storage.pool import GrownPool, grow_pool
from evenodds_service.storage.rewind import refuse_forgotten
from evenodds_service.storage.runs import lock_run
from evenodds_service.storage.tables import log, selections
from evenodds_service.storage.transactions import Transactions
from evenodds_service.storage.values import Appended, PromptVisit, Run, Written

_HISTORY_BLOCK = 200  # log entries that a look into one prompt's history reads at a time


class LogMethods(Transactions):
    def append_observations(
        self,
        run_id: int,
        outcomes: Outcomes,
        *,
        new: NewPrompts | None = None,
        known_at: int | None = None,
        now: datetime,
    ) -> Appended:
        """Append one observe entry (after a pool entry where prompts are new); all or nothing.

        A prompt of `new` that another caller has added meanwhile counts as existing. A known request id with the same
        hash is answered as the first time, whatever the other arguments; one whose observations were all voided since
        counts anew. The model version of the run is answered, and kept for repetitions.

        Args:
            known_at: The log position as of which the caller took the indices of prompts; None: of now.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
            PoolChanged: prompts were retired after `known_at`.
            RequestConflict: the request id was used with another body (hash).
            SelectionUnknown: no such selection in this run.
            SelectionVoided: a rewind has voided the selection, or ended the incarnation that made the observations.
            PromptUnknown: an observation's prompt is neither in the pool nor in `new`.
            PromptConflict, EmbedderFixed, EmbeddingWidthConflict, VectorUnstorable: as in add_prompts.
            ValueError: successes or attempts out of range; see ObserveEntry.
        """
        with self._writing() as connection:
            run = lock_run(connection, run_id)
            first = _first_answer(connection, run, outcomes)
            if first is not None:
                return first
            if known_at is not None and run.retired_position > known_at:
                raise PoolChanged(
                    f"prompts of run {run.name!r} were retired at log position {run.retired_position}: repeat the call"
                )
            selection_step = _selection_step(connection, run, outcomes.selection_id)
            if outcomes.selection_id is None and outcomes.request_id is not None and run.void_position > 0:
                refuse_forgotten(connection, run, outcomes.request_id, outcomes.step)
            grown = grow_pool(connection, run, new, now=now) if new is not None else GrownPool(0, {}, None)
            observations = outcomes.observations
            entry = ObserveEntry(
                run.log_position + (1 if grown.entry is None else 2),
                outcomes.step,
                prompts=_indices(observations, grown.indices, run.n_prompts + grown.added),
                successes=np.asarray([observation.successes for observation in observations], dtype=np.float64),
                attempts=np.asarray([observation.attempts for observation in observations], dtype=np.float64),
                informative=np.asarray([observation.informative for observation in observations], dtype=np.bool_),
                selection_id=outcomes.selection_id,
                selection_step=selection_step,
                at=seconds_of(now),
            )
            entries = (entry,) if grown.entry is None else (grown.entry, entry)
            written = Written(append_entries(connection, run, entries, now=now, request=_request(outcomes)), entries)
        return Appended(entry.position, len(observations), run.model_version, replayed=False, written=written)

    def entries(self, run_id: int, *, after: int, as_of: int | None = None, limit: int = 1_000) -> tuple[Entry, ...]:
        """Log entries with position > after, in order, without gaps. None where the run does not exist.

        Args:
            as_of: The log as it stood at this position, without what came later and with what was voided later;
                as it stands now by default.
        """
        statement = (
            select(*ENTRY_COLUMNS)
            .where(log.c.run_id == run_id, log.c.position > after)
            .order_by(log.c.position)
            .limit(limit)
        )
        if as_of is not None:
            statement = statement.where(log.c.position <= as_of)
        with self._reading() as connection:
            rows = connection.execute(statement).mappings().all()
        return tuple(read_entry(row, as_of=as_of) for row in rows)

    def prompt_history(self, run_id: int, index: int, *, limit: int = 100) -> tuple[PromptVisit, ...]:
        """Observations of one prompt, newest first. Reads the log back until it has found `limit` of them."""
        statement = (
            select(*ENTRY_COLUMNS)
            .where(log.c.run_id == run_id, log.c.kind == "observe", log.c.voided_at.is_(None))
            .order_by(log.c.position.desc())
            .limit(_HISTORY_BLOCK)
        )
        visits: list[PromptVisit] = []
        with self._reading() as connection:
            rows = connection.execute(statement).mappings().all()
            while rows and len(visits) < limit:
                for row in rows:
                    entry = read_entry(row)
                    assert isinstance(entry, ObserveEntry)
                    visits.extend(_visits(entry, index))
                older = statement.where(log.c.position < rows[-1]["position"])
                rows = connection.execute(older).mappings().all()
        return tuple(visits[:limit])


def _request(outcomes: Outcomes) -> tuple[str, str] | None:
    """Id and hash of the request, if it has an id."""
    if outcomes.request_id is None or outcomes.request_hash is None:
        return None
    return outcomes.request_id, outcomes.request_hash


def _first_answer(connection: Connection, run: Run, outcomes: Outcomes) -> Appended | None:
    """What the request was answered before. The run's lock is held: nobody can use the id meanwhile."""
    request = _request(outcomes)
    if request is None:
        return None
    request_id, request_hash = request
    statement = select(log.c.position, log.c.request_hash, log.c.created_at, log.c.body).where(
        log.c.run_id == run.id, log.c.request_id == request_id, log.c.voided_at.is_(None)
    )
    row = connection.execute(statement).one_or_none()
    if row is None:
        return None
    if row.request_hash != request_hash:
        raise RequestConflict(
            f"request_id {request_id!r} was used in run {run.name!r} at log position {row.position} "
            f"({row.created_at:%Y-%m-%d %H:%M:%S} UTC) with another body: send this one under a new id"
        )
    body = json.loads(row.body)
    return Appended(row.position, len(body["prompts"]), body["model_version"], replayed=True)


def _selection_step(connection: Connection, run: Run, selection_id: str | None) -> int | None:
    """The step that the selection was for. Raises SelectionUnknown, SelectionVoided."""
    if selection_id is None:
        return None
    statement = select(selections.c.step, selections.c.voided_at).where(
        selections.c.selection_id == selection_id, selections.c.run_id == run.id
    )
    row = connection.execute(statement).one_or_none()
    if row is not None and row.voided_at is not None:
        raise SelectionVoided(
            f"selection {selection_id!r} of run {run.name!r} for step {row.step} was voided by the rewind at log "
            f"position {row.voided_at}: its outcomes belong to a policy that the run has forgotten; drop them, and "
            "select for the step again"
        )
    if row is None:
        raise SelectionUnknown(
            f"selection {selection_id!r} does not exist in run {run.name!r}: send the selection_id that "
            "select_batch answered, or leave it out"
        )
    return int(row.step)


def _indices(observations: Sequence[NewObservation], added: Mapping[str, int], n_prompts: int) -> IntArray:
    found = []
    for number, observation in enumerate(observations, start=1):
        index = added.get(observation.prompt) if isinstance(observation.prompt, str) else int(observation.prompt)
        if index is None or not 0 <= index < n_prompts:
            raise PromptUnknown(
                f"observation {number} of {len(observations)}: prompt {observation.prompt!r} is not in "
                f"the pool of {n_prompts} prompts: add it, or send its text"
            )
        found.append(index)
    return np.asarray(found, dtype=np.int64)


def _visits(entry: ObserveEntry, index: int) -> list[PromptVisit]:
    """The entry's observations of the prompt, last first."""
    return [
        PromptVisit(
            log_position=entry.position,
            step=entry.step,
            successes=float(entry.successes[row]),
            attempts=float(entry.attempts[row]),
            selection_id=entry.selection_id,
        )
        for row in np.flatnonzero(entry.prompts == index)[::-1]
    ]
