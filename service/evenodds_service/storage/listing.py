"""Lists of runs: which ones, in which order, and how each stands."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, or_, select

from evenodds_service.storage.refits import refit_of
from evenodds_service.storage.run_states import state_of
from evenodds_service.storage.runs import run_of
from evenodds_service.storage.tables import refits, run_states, runs
from evenodds_service.storage.transactions import Transactions
from evenodds_service.storage.values import ListedRun, RunListing, RunSort

_ORDERS: dict[RunSort, tuple[ColumnElement[Any], ...]] = {
    "name": (),
    "alarms": (
        (func.coalesce(run_states.c.verdict, "") == "broken").desc(),
        func.coalesce(run_states.c.n_alarms, 0).desc(),
        run_states.c.active_at.desc().nulls_last(),
    ),
    "activity": (run_states.c.active_at.desc().nulls_last(),),
    "lift": (run_states.c.lift.desc().nulls_last(),),
    "informative": (run_states.c.informative_share.desc().nulls_last(),),
    "created": (runs.c.created_at.desc(),),
}
"""By name comes last in each."""


class ListingMethods(Transactions):
    def listed_runs(
        self, listing: RunListing, *, after: str = "", skipped: int = 0, limit: int = 100
    ) -> tuple[ListedRun, ...]:
        """The runs that the listing asks for, in its order, with their states and newest refits.

        Costs three statements, whatever the number of runs.

        Args:
            after: Leave out the runs up to this name. The order of names is the database's.
            skipped: Leave out so many of the first runs. The order by anything else than the name moves with the runs.
        """
        statement = _selected(listing).where(runs.c.name > after).offset(skipped).limit(limit)
        with self._reading() as connection:
            found = [run_of(row) for row in connection.execute(statement).mappings()]
            ids = [run.id for run in found]
            asked = select(run_states).where(run_states.c.run_id.in_(ids))
            states = {row["run_id"]: state_of(row) for row in connection.execute(asked).mappings()}
            newest = select(func.max(refits.c.id)).where(refits.c.run_id.in_(ids)).group_by(refits.c.run_id)
            fits = connection.execute(select(refits).where(refits.c.id.in_(newest))).mappings()
            latest = {row["run_id"]: refit_of(row) for row in fits}
        return tuple(ListedRun(run, states.get(run.id), latest.get(run.id)) for run in found)

    def newest_change(self) -> tuple[int, str]:
        """How many runs there are, and a text that differs after each change of one of them or of how it stands."""
        whole = select(func.count(), func.sum(runs.c.log_position), func.max(runs.c.id)).select_from(runs)
        with self._reading() as connection:
            counted = connection.execute(whole).one()
            saved = connection.execute(select(func.max(run_states.c.saved_at))).scalar()
        return counted[0], f"{counted[0]}.{counted[1] or 0}.{counted[2] or 0}.{saved.timestamp() if saved else 0:.6f}"


def _selected(listing: RunListing) -> Select[Any]:
    statement = select(runs).outerjoin(run_states, run_states.c.run_id == runs.c.id)
    if listing.names is not None:
        pattern = re.escape(listing.names).replace(r"\*", ".*").replace(r"\?", ".")
        statement = statement.where(runs.c.name.regexp_match(f"^{pattern}$"))
    if listing.search:
        statement = statement.where(func.lower(runs.c.name).contains(listing.search.lower(), autoescape=True))
    if listing.verdicts:
        wanted: ColumnElement[bool] = run_states.c.verdict.in_(listing.verdicts)
        if "no_data" in listing.verdicts:  # also where nobody has looked yet
            wanted = or_(wanted, and_(run_states.c.verdict.is_(None), runs.c.n_observations == 0))
        statement = statement.where(wanted)
    if listing.alarm == "any":
        statement = statement.where(run_states.c.n_alarms > 0)
    elif listing.alarm is not None:
        statement = statement.where(run_states.c.alarm_codes.contains(f" {listing.alarm} ", autoescape=True))
    return statement.order_by(*_ORDERS[listing.sort], runs.c.name)
