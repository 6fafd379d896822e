"""Recorded selections: one batch for each (run, step), whoever asks."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from evenodds_service.domain.log_entries import SelectEntry
from evenodds_service.errors import ChoiceOutdated, SelectionConflict
from evenodds_service.storage.entries import append_entries, kept_digits
from evenodds_service.storage.runs import find_run, lock_run, settings_to_json
from evenodds_service.storage.tables import log, runs, selections
from evenodds_service.storage.transactions import Transactions
from evenodds_service.storage.values import NewSelection, Run, Selection, Written


class SelectionMethods(Transactions):
    def selection(self, run_id: int, step: int, *, arguments_hash: str) -> Selection | None:
        """What was chosen for the step, if anything.

        Raises:
            SelectionConflict: the step was chosen before with other arguments.
        """
        with self._reading() as connection:
            return _find(connection, run_id, step, arguments_hash)

    def run_and_selection(self, name: str, step: int, *, arguments_hash: str) -> tuple[Run, Selection | None]:
        """The run of this name, and what was chosen for the step in it, if anything.

        Raises:
            RunUnknown: there is no such run.
            SelectionConflict: the step was chosen before with other arguments.
        """
        with self._reading() as connection:
            run = find_run(connection, name)
            return run, _find(connection, run.id, step, arguments_hash)

    def record_selection(self, run_id: int, chosen: NewSelection, *, now: datetime) -> tuple[Selection, Written | None]:
        """Record the batch as a log entry, or return what stands for (run, step), where nothing was written.

        Raises:
            RunUnknown: also where the run was deleted since the caller looked it up.
            ChoiceOutdated: something was voided after `chosen_at`, or another batch recorded by which the
                choice does not hold.
            SelectionConflict: the step was chosen before with other arguments.
        """
        with self._writing() as connection:
            run = lock_run(connection, run_id)
            standing = _find(connection, run_id, chosen.step, chosen.arguments_hash)
            if standing is not None:
                return standing, None
            _check_is_of_now(connection, run, chosen)
            entry = SelectEntry(
                run.log_position + 1,
                chosen.step,
                chosen.prompts,
                selection_id=chosen.selection_id,
                control_share=chosen.control_share,
                control=chosen.control if chosen.control is not None and chosen.control.any() else None,
                a=kept_digits(chosen.a),
                b=kept_digits(chosen.b),
                unseen_share=chosen.unseen_share,
            )
            written = Written(append_entries(connection, run, [entry], now=now), (entry,))
            recorded = Selection(
                chosen.selection_id, chosen.step, chosen.arguments_hash, chosen.reply, log_position=entry.position
            )
            connection.execute(insert(selections).values(run_id=run_id, **asdict(recorded)))
            if run.settings.is_retention_settled:  # it proves to be a training run: its pool is nobody's to cut
                unsettled = replace(run.settings, retain_prompts=None, is_retention_settled=False)
                kept = update(runs).where(runs.c.id == run_id).values(settings=settings_to_json(unsettled))
                connection.execute(kept)
        return recorded, written


def _check_is_of_now(connection: Connection, run: Run, chosen: NewSelection) -> None:
    """Raises ChoiceOutdated."""
    if chosen.chosen_at is None:
        return
    if chosen.chosen_at < run.void_position:
        raise ChoiceOutdated(
            f"run {run.name!r}: the batch was chosen at log position {chosen.chosen_at}, and a rewind or retract at "
            f"position {run.void_position} voided some of what it was chosen on: choose again"
        )
    if chosen.chosen_at < run.retired_position:
        raise ChoiceOutdated(
            f"run {run.name!r}: the batch was chosen at log position {chosen.chosen_at}, and prompts were retired at "
            f"position {run.retired_position}: choose again"
        )
    is_newest = chosen.chosen_at == run.log_position
    if chosen.is_alone and not is_newest and _is_recorded_after(connection, run.id, chosen.chosen_at):
        raise ChoiceOutdated(
            f"run {run.name!r}: another batch was chosen after log position {chosen.chosen_at}, whose prompts are "
            "outstanding: choose again"
        )


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
            f"(selection {row.selection_id!r}): repeat the same arguments, or choose for a later step"
        )
    return Selection(*values)
