from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import numpy as np
import pytest

from evenodds_service.domain.log_entries import SelectEntry
from evenodds_service.domain.prompts import NewPrompt
from evenodds_service.errors import SelectionConflict
from evenodds_service.storage.store import NewSelection, Run, Selection, Store, Written


def test_recorded_selection_is_a_log_entry_and_can_be_read(store: Store, run: Run, now: datetime) -> None:
    store.add_prompts(run.id, [NewPrompt(name) for name in "abc"], now=now)

    selection, written = store.record_selection(
        run.id,
        NewSelection(selection_id="s1", step=4, arguments_hash="h", prompts=np.array([2, 0]), reply='{"é": 1}'),
        now=now,
    )

    assert written is not None
    assert written.run == store.run("math")
    assert selection == Selection("s1", 4, "h", '{"é": 1}', log_position=2)
    assert store.selection(run.id, 4, arguments_hash="h") == selection
    assert store.selection(run.id, 5, arguments_hash="h") is None
    (entry,) = store.entries(run.id, after=1)
    assert isinstance(entry, SelectEntry)
    assert (entry.position, entry.step, entry.prompts.tolist()) == (2, 4, [2, 0])
    assert (store.run("math").log_position, store.run("math").head_step) == (2, 4)


def test_same_arguments_get_the_recorded_batch_and_leave_no_gap(store: Store, run: Run, now: datetime) -> None:
    first, _ = store.record_selection(
        run.id,
        NewSelection(selection_id="s1", step=4, arguments_hash="h", prompts=np.array([0]), reply="first"),
        now=now,
    )

    again, written = store.record_selection(
        run.id,
        NewSelection(selection_id="s2", step=4, arguments_hash="h", prompts=np.array([1]), reply="second"),
        now=now,
    )

    assert written is None
    assert again == first
    assert store.run("math").log_position == 1


def test_other_arguments_for_the_same_step_are_a_conflict_and_write_nothing(
    store: Store, run: Run, now: datetime
) -> None:
    store.record_selection(
        run.id,
        NewSelection(selection_id="s1", step=4, arguments_hash="h", prompts=np.array([0]), reply="first"),
        now=now,
    )
    before = store.run("math")

    with pytest.raises(
        SelectionConflict,
        match=r"^run 'math': the batch for step 4 was chosen before with other arguments \(selection 's1'\): "
        "repeat the same arguments, or choose for a later step$",
    ):
        store.record_selection(
            run.id,
            NewSelection(selection_id="s2", step=4, arguments_hash="other", prompts=np.array([0]), reply="second"),
            now=now,
        )
    with pytest.raises(SelectionConflict, match=r"^run 'math': the batch for step 4 was chosen before"):
        store.selection(run.id, 4, arguments_hash="other")

    assert store.run("math") == before


def test_losers_of_a_race_for_a_step_get_the_recorded_batch(store: Store, run: Run, now: datetime) -> None:
    together = threading.Barrier(8)

    def choose(caller: int) -> tuple[Selection, Written | None]:
        together.wait()
        return store.record_selection(
            run.id,
            NewSelection(
                selection_id=f"s{caller}", step=0, arguments_hash="h", prompts=np.array([caller]), reply=f"{caller}"
            ),
            now=now,
        )

    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(choose, range(8)))

    assert sorted(written is None for _, written in answers) == [False] + [True] * 7
    assert {selection for selection, _ in answers} == {store.selection(run.id, 0, arguments_hash="h")}
    assert store.run("math").log_position == 1
