"""How runs stand, as the store keeps it: one row for each run, the newest log position wins."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.prompts import NewPrompt
from evenodds_service.domain.report.alarms import KINDS, Alarm, Remedy
from evenodds_service.domain.report.summary import VERDICTS, Estimate, SharePoint, Summary
from evenodds_service.domain.settings import RunSettings
from evenodds_service.storage.store import NewSelection, NewSnapshot, Run, RunState, Store

SUMMARY = Summary(
    verdict="broken",
    head_step=23,
    alarms=(
        Alarm(
            "forecast_off",
            "Seen. Do.",
            20,
            14.5,
            9.2,
            "Do.",
            remedy=Remedy("retract", {"from_step": 20, "to_step": 23}),
        ),
        Alarm("category_silent", "Seen.", 3, 61.0, 30.0, category="code", scope="category"),
    ),
    notes=(Alarm("skill_not_positive", "Seen.", 2, -0.5, 0.0),),
    lift=Estimate(0.31, 0.16, 0.44),
    rollouts_saved=Estimate(2433.0, 1028.0, None),
    informative_shares=(SharePoint(0, 1, 0.5), SharePoint(2, 3, 0.25)),
    figures={"coverage": 0.5, "skill": -0.01},
)


def test_a_state_comes_back_as_it_was_saved(store: Store, run: Run, now: datetime) -> None:
    store.save_run_states([(run.id, 7, SUMMARY)], now=now)

    assert store.run_states([run.id]) == {run.id: RunState(run.id, 7, SUMMARY, None, None, now)}


def test_the_state_of_the_newer_log_position_stands(store: Store, run: Run, now: datetime) -> None:
    newer = replace(SUMMARY, verdict="helping", alarms=(), lift=None, rollouts_saved=None, informative_shares=())
    for position, summary in ((7, SUMMARY), (9, newer), (8, SUMMARY)):
        store.save_run_states([(run.id, position, summary)], now=now)

    assert store.run_states([run.id])[run.id] == RunState(run.id, 9, newer, None, None, now)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_and_code_can_be_kept(store: Store, run: Run, now: datetime, verdict: str) -> None:
    alarms = tuple(Alarm(code, "Seen.", 0, 1.0, 1.0) for code in KINDS)
    summary = Summary(verdict=verdict, alarms=alarms)  # type: ignore[arg-type]  # one of them

    store.save_run_states([(run.id, 0, summary)], now=now)

    assert store.run_states([run.id])[run.id].summary == summary


def test_the_last_activity_is_that_of_the_newest_batch_or_outcomes(store: Store, run: Run, now: datetime) -> None:
    later = now + timedelta(minutes=5)
    store.add_prompts(run.id, [NewPrompt("a")], now=now)
    store.append_observations(run.id, Outcomes(0, [NewObservation.of_counts(0, 1, 2)]), now=now)
    store.add_prompts(run.id, [NewPrompt("b")], now=later)

    store.save_run_states([(run.id, 3, SUMMARY)], now=later)

    assert store.run_states([run.id])[run.id].active_at == now


def test_a_saving_is_counted_from_the_first_batch_that_stands(store: Store, run: Run, now: datetime) -> None:
    store.add_prompts(run.id, [NewPrompt("a"), NewPrompt("b")], now=now)
    for step in range(3):
        chosen = NewSelection(
            selection_id=f"s{step}", step=step, arguments_hash="h", prompts=np.array([step % 2]), reply="{}"
        )
        store.record_selection(run.id, chosen, now=now + timedelta(minutes=step))
    helping = replace(SUMMARY, rollouts_saved=Estimate(10.0, 5.0, None))

    def began_at(position: int, summary: Summary) -> datetime | None:
        store.save_run_states([(run.id, position, summary)], now=now)
        return store.run_states([run.id])[run.id].began_at

    assert began_at(4, replace(SUMMARY, rollouts_saved=None)) is None
    assert began_at(5, helping) == now
    store.rewind(run.id, step=-1, now=now)
    assert began_at(6, helping) is None


def test_a_deleted_run_keeps_no_state_and_gets_none(store: Store, run: Run, now: datetime) -> None:
    store.save_run_states([(run.id, 1, SUMMARY)], now=now)
    store.delete_run(run.name)

    store.save_run_states([(run.id, 2, SUMMARY)], now=now)

    assert store.run_states([run.id]) == {}


def test_all_runs_are_watched_in_three_statements_those_without_a_state_last(
    store: Store, run: Run, now: datetime
) -> None:
    others = [store.put_run(f"run-{i}", RunSettings(), now=now)[0] for i in range(40)]
    store.save_run_states([(others[3].id, 1, SUMMARY), (run.id, 1, SUMMARY)], now=now)
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(store._engine, "before_cursor_execute", note)
    watched = store.watched_runs(limit=30)
    event.remove(store._engine, "before_cursor_execute", note)

    assert len([s for s in statements if s.startswith("SELECT")]) == 3
    assert len(watched) == 30
    assert {w.run.id for w in watched[:2]} == {run.id, others[3].id}
    assert [w.state is None for w in watched] == [False] * 2 + [True] * 28


def test_a_watched_run_shows_its_newest_refit_and_the_newest_that_is_done(
    store: Store, run: Run, now: datetime
) -> None:
    store.request_refit(run.id, now=now)
    claimed = store.claim_refit(worker="w", lease=timedelta(minutes=1), now=now)
    assert claimed is not None
    store.publish_refit(claimed, NewSnapshot("none", b"weights", 0, {"seconds_fitting": 2.0}), now=now)
    pending = store.request_refit(run.id, now=now)

    (watched,) = store.watched_runs(limit=10)

    assert watched.refit == pending
    assert watched.done_refit is not None
    assert (watched.done_refit.id, watched.done_refit.report) == (claimed.id, {"seconds_fitting": 2.0})
