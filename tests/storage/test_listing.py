"""Lists of runs: what they hold, in which order, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event

from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.prompts import NewPrompt
from evenodds_service.domain.report.alarms import Alarm
from evenodds_service.domain.report.summary import Estimate, SharePoint, Summary
from evenodds_service.domain.settings import RunSettings
from evenodds_service.storage.store import RunListing, Store

OFF = Alarm("forecast_off", "Seen.", 20, 14.5, 9.2)
SILENT = Alarm("category_silent", "Seen.", 3, 61.0, 30.0, category="code")


@dataclass(frozen=True)
class Listed:
    store: Store

    def names(self, *, skipped: int = 0, limit: int = 100, after: str = "", **asked: Any) -> str:
        """First letters of the names, in order."""
        found = self.store.listed_runs(RunListing(**asked), skipped=skipped, limit=limit, after=after)
        return "".join(listed.run.name[0] for listed in found)


@pytest.fixture
def listed(store: Store, now: datetime) -> Listed:
    """Runs of each verdict, the later ones active and created later; nobody has looked at f and g yet."""
    states = {
        "alpha": Summary("helping", lift=Estimate(0.3, 0.1, 0.5), informative_shares=(SharePoint(0, 1, 0.5),)),
        "Bravo": Summary("broken", alarms=(OFF,)),
        "charlie": Summary("learning", alarms=(SILENT, SILENT)),
        "delta": Summary("not_helping", lift=Estimate(-0.1, -0.2, 0.0), informative_shares=(SharePoint(0, 1, 0.9),)),
        "echo": Summary("no_data"),
    }
    for i, name in enumerate([*states, "foxtrot_1", "golf"]):
        later = now + timedelta(hours=i)
        run, _ = store.put_run(name, RunSettings(embedder="none"), now=later)
        if name not in ("echo", "golf"):
            store.add_prompts(run.id, [NewPrompt("p")], now=later)
            outcomes = Outcomes(step=0, observations=[NewObservation.of_counts(0, 1.0, 2)])
            store.append_observations(run.id, outcomes, now=later)
        if name in states:
            store.save_run_states([(run.id, 2, states[name])], now=later)
    return Listed(store)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"verdicts": ("broken", "helping")}, "Ba"),
        ({"verdicts": ("no_data",)}, "eg"),
        ({"alarm": "any"}, "Bc"),
        ({"alarm": "category_silent"}, "c"),
        ({"alarm": "category"}, ""),
        ({"search": "A"}, "Bacd"),
        ({"search": "_"}, "f"),
        ({"names": "*l*a"}, "ad"),
        ({"names": "?olf"}, "g"),
    ],
)
def test_runs_are_found(listed: Listed, asked: dict[str, Any], found: str) -> None:
    assert sorted(listed.names(**asked)) == sorted(found)


@pytest.mark.parametrize(
    ("sort", "first"),
    [("alarms", "Bcda"), ("activity", "dcBa"), ("lift", "ad"), ("informative", "da"), ("created", "gfedcBa")],
)
def test_runs_are_sorted_and_those_that_the_order_says_nothing_of_come_last(
    listed: Listed, sort: str, first: str
) -> None:
    names = listed.names(sort=sort)

    assert names.startswith(first)
    assert sorted(names) == sorted("aBcdefg")


def test_pages_go_on_where_the_one_before_ended(listed: Listed) -> None:
    whole = listed.names(sort="created")

    assert [listed.names(sort="created", skipped=i, limit=3) for i in (0, 3, 6)] == [whole[:3], whole[3:6], whole[6:]]
    assert listed.names(after="delta", verdicts=("no_data", "not_helping")) == "eg"


def test_a_list_costs_three_statements_however_long_it_is(listed: Listed) -> None:
    statements: list[str] = []
    event.listen(listed.store._engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    assert len(listed.names(sort="alarms")) == 7

    assert len([statement for statement in statements if statement.startswith("SELECT")]) == 3
