"""Recorded selections: one batch for each (run, step), whoever asks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from sqlalchemy import Connection, insert, select

from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.log_entries import SelectEntry
from evenodds_service.errors import ChoiceOutdated, SelectionConflict
from evenodds_service.storage.entries import append_entry
from evenodds_service.storage.runs import lock_run
from evenodds_service.storage.tables import log, runs, selections
from evenodds_service.storage.transactions import Transactions
from evenodds_service.storage.values import Selection


class SelectionMethods(Transactions):
    def selection(self, run_id: int, step: int, *, arguments_hash: str) -> Selection | None:
        """What was chosen for the step, if anything.

        Raises:
            SelectionConflict: the step was chosen before with other arguments.
        """
        with self._reading() as connection:
            return _find(connection, run_id, step, arguments_hash)

    def record_selection(
        self,
        run_id: int,
        *,
        selection_id: str,
        step: int,
        arguments_hash: str,
        prompts: Sequence[int],
        reply: str,
        now: datetime,
        control_share: float = 0.0,
        control: Sequence[bool] | None = None,
        beliefs: tuple[FloatArray, FloatArray] | None = None,
        chosen_at: int | None = None,
        is_alone: bool = False,
    ) -> tuple[Selection, bool]:
        """Record the batch as a log entry, or return what stands for (run, step). The flag says: replayed.

        Args:
            selection_id: Unique in the run.
            prompts: Indices of the chosen prompts.
            control_share, control: The share of the control arm, and which of the prompts are in it.
            beliefs: Parameters (a, b) of the belief about each prompt, positive.
            chosen_at: Log position of the state that the batch was chosen in.
            is_alone: Whether the choice holds only if no other was recorded after `chosen_at`.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
            ChoiceOutdated: something was voided after `chosen_at`, or another batch recorded by which the
                choice does not hold.
            SelectionConflict: the step was chosen before with other arguments.
        """
        with self._writing() as connection:
            run = lock_run(connection, run_id)
            standing = _find(connection, run_id, step, arguments_hash)
            if standing is not None:
                return standing, True
            if chosen_at is not None and chosen_at < run.void_position:
                raise ChoiceOutdated(
                    f"run {run.name!r}: the batch was chosen at log position {chosen_at}, and a rewind or retract at "
                    f"position {run.void_position} voided some of what it was chosen on: choose again"
                )
            if chosen_at is not None and is_alone and _is_recorded_after(connection, run_id, chosen_at):
                raise ChoiceOutdated(
                    f"run {run.name!r}: another batch was chosen after log position {chosen_at}, whose prompts are "
                    "outstanding: choose again"
                )
            position = run.log_position + 1
            a, b = beliefs if beliefs is not None else (None, None)
            chosen = SelectEntry(
                position,
                step,
                np.asarray(prompts, dtype=np.int64),
                selection_id=selection_id,
                control_share=control_share,
                control=None if control is None else np.asarray(control, dtype=np.bool_),
                a=a,
                b=b,
            )
            append_entry(connection, run_id, chosen, now=now)
            recorded = Selection(selection_id, step, arguments_hash, reply, log_position=position)
            connection.execute(
                insert(selections).values(
                    run_id=run_id,
                    selection_id=selection_id,
                    step=step,
                    arguments_hash=arguments_hash,
                    reply=reply,
                    log_position=position,
                )
            )
        return recorded, False


def _is_recorded_after(connection: Connection, run_id: int, position: int) -> bool:
    statement = select(log.c.position).where(
        log.c.run_id == run_id, log.c.position > position, log.c.kind == "select", log.c.voided_at.is_(None)
    )
    return connection.execute(statement.limit(1)).first() is not None


def _find(connection: Connection, run_id: int, step: int, arguments_hash: str) -> Selection | None:
    """Raises SelectionConflict."""
    columns = (
        selections.c.selection_id,
        selections.c.step,
        selections.c.arguments_hash,
        selections.c.reply,
        selections.c.log_position,
    )
    is_asked = (selections.c.run_id == run_id, selections.c.step == step, selections.c.voided_at.is_(None))
    row = connection.execute(select(*columns, runs.c.name).join(runs).where(*is_asked)).one_or_none()
    if row is None:
        return None
    *values, run_name = row
    if row.arguments_hash != arguments_hash:
        raise SelectionConflict(
            f"run {run_name!r}: the batch for step {step} was chosen before with other arguments "
            f"(selection {row.selection_id!r}): repeat those, or choose for a later step"
        )
    return Selection(*values)
