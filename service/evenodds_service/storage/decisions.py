"""Budgets that were answered, so that a verdict that comes later needs only their id. Kept for a day."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, insert, or_, select

from evenodds_service.storage.tables import decisions, runs
from evenodds_service.storage.transactions import Transactions
from evenodds_service.storage.values import Decision


class DecisionMethods(Transactions):
    def save_decisions(
        self, made: Sequence[Decision], *, forget_before: datetime | None = None, most: int = 500_000
    ) -> None:
        """Keep these decisions, but for those of runs that were deleted.

        Args:
            forget_before: Older ones are deleted, and those beyond the newest `most`.
            most: At least 1.
        """
        with self._writing() as connection:
            if forget_before is not None:
                newest = select(decisions.c.created_at).order_by(decisions.c.created_at.desc()).offset(most).limit(1)
                beyond = connection.execute(newest).scalar()
                if beyond is not None:
                    forget_before = max(forget_before, beyond)
                connection.execute(delete(decisions).where(decisions.c.created_at <= forget_before))
            asked = {decision.run_id for decision in made}
            there = set(connection.execute(select(runs.c.id).where(runs.c.id.in_(asked)).with_for_update()).scalars())
            rows = [
                {
                    "decision_id": decision.decision_id,
                    "run_id": decision.run_id,
                    "step": decision.step,
                    "prompt": decision.prompt,
                    "created_at": decision.created_at,
                    "prompt_id": decision.prompt_id,
                    "text_key": decision.text_key,
                }
                for decision in made
                if decision.run_id in there
            ]
            if rows:
                connection.execute(insert(decisions), rows)

    def erase_decisions(self, run_id: int, prompt_id: str, text_key: str | None) -> int:
        """Delete the run's decisions about this prompt or its text, and those of which that is not known.

        Returns:
            How many these were.
        """
        of_prompt = or_(decisions.c.prompt_id == prompt_id, decisions.c.prompt_id.is_(None))
        if text_key is not None:
            of_prompt = or_(of_prompt, decisions.c.text_key == text_key)
        with self._writing(in_bulk=True) as connection:
            return connection.execute(delete(decisions).where(decisions.c.run_id == run_id, of_prompt)).rowcount

    def decision(self, decision_id: str) -> Decision | None:
        """The decision of this id, if it is kept."""
        with self._reading() as connection:
            row = connection.execute(select(decisions).where(decisions.c.decision_id == decision_id)).one_or_none()
        return None if row is None else Decision(**row._mapping)
