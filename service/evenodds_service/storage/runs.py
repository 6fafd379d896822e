"""Runs, and the row lock under which everything that belongs to a run's log is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, delete, or_, select, update

from evenodds_service.domain.settings import CALLER, BudgetPolicy, EffortTier, RunSettings
from evenodds_service.errors import EmbedderFixed, PolicyLimit, RunUnknown
from evenodds_service.storage.tables import decisions, embeddings, prompts, runs
from evenodds_service.storage.transactions import Transactions, insert_or_ignore
from evenodds_service.storage.values import Run

MAX_POLICIES = 64
"""Most budget policies of one run."""

_BY_NAME = select(runs).where(runs.c.name == bindparam("wanted"))  # made once: every question about a run asks it


class RunMethods(Transactions):
    def put_run(self, name: str, settings: RunSettings, *, now: datetime) -> tuple[Run, bool]:
        """Create the run or replace its settings. Returns the run and whether it is new.

        Where `settings.embedder` is None, the embedder that the pool's prompts have stays. A run that keeps
        no texts has none afterwards, and no answers, in no page of a SQLite file. Budget policies of an existing run
        stay as they are: see `put_budget_policy`.

        Raises:
            EmbedderFixed: the embedder or its prompt differs although the pool has prompts.
        """
        row = {"name": name, "settings": settings_to_json(settings), "created_at": now}
        with self._writing(in_bulk=not settings.keep_text) as connection:  # which may erase the texts of a whole pool
            created = insert_or_ignore(connection, runs).values(row).returning(runs.c.id)
            is_new = connection.execute(created).scalar() is not None
            run = lock_run(connection, runs.c.name == name, described=repr(name))
            if is_new:
                return run, True
            kept = settings_that_stand(run, settings)
            if not kept.keep_text:
                has_some = or_(prompts.c.text.is_not(None), prompts.c.answer.is_not(None))
                connection.execute(
                    update(prompts).where(prompts.c.run_id == run.id, has_some).values(text=None, answer=None)
                )
                connection.execute(delete(decisions).where(decisions.c.run_id == run.id))
            connection.execute(update(runs).where(runs.c.id == run.id).values(settings=settings_to_json(kept)))
            run = find_run(connection, name)
        if not kept.keep_text:
            self._truncate_write_ahead_log()
        return run, False

    def put_budget_policy(self, name: str, policy: BudgetPolicy) -> BudgetPolicy:
        """Store the policy in the run under its name, with the next version; one that is equal keeps its version.

        Args:
            policy: Its version is not looked at.

        Raises:
            RunUnknown: there is no such run.
            PolicyLimit: the run holds as many as it may.
        """
        with self._writing() as connection:
            run = lock_run(connection, runs.c.name == name, described=repr(name))
            stored = {known.name: known for known in run.settings.budget_policies}
            before = stored.get(policy.name)
            if before is None and len(stored) == MAX_POLICIES:
                raise PolicyLimit(
                    f"run {name!r} holds {MAX_POLICIES} budget policies, which is the limit: change one of them "
                    f"({', '.join(sorted(stored)[:5])}, ...) instead of adding {policy.name!r}"
                )
            policy = replace(policy, version=before.version if before is not None else 1)
            if before is not None and policy != before:
                policy = replace(policy, version=before.version + 1)
            stored[policy.name] = policy
            settings = replace(run.settings, budget_policies=tuple(stored[key] for key in sorted(stored)))
            connection.execute(update(runs).where(runs.c.id == run.id).values(settings=settings_to_json(settings)))
        return policy

    def run(self, name: str) -> Run:
        """Raises RunUnknown."""
        with self._reading() as connection:
            return find_run(connection, name)

    def run_with_id(self, run_id: int) -> Run:
        """Raises RunUnknown."""
        with self._reading() as connection:
            row = connection.execute(select(runs).where(runs.c.id == run_id)).mappings().one_or_none()
        if row is None:
            raise _unknown(f"with id {run_id}")
        return run_of(row)

    def runs(self, *, after: str = "", limit: int = 100) -> tuple[Run, ...]:
        """Runs by name, those after `after`. The order of names is the database's."""
        statement = select(runs).where(runs.c.name > after).order_by(runs.c.name).limit(limit)
        with self._reading() as connection:
            rows = connection.execute(statement).mappings().all()
        return tuple(run_of(row) for row in rows)

    def delete_run(self, name: str) -> None:
        """Delete the run with all it owns (also its caller-sent vectors). Raises RunUnknown."""
        with self._writing(in_bulk=True) as connection:
            run_id = connection.execute(delete(runs).where(runs.c.name == name).returning(runs.c.id)).scalar()
            if run_id is None:
                raise _unknown(repr(name))
            connection.execute(delete(embeddings).where(embeddings.c.embedder == stored_embedder(CALLER, run_id)))
        self._truncate_write_ahead_log()


def find_run(connection: Connection, name: str) -> Run:
    """Raises RunUnknown."""
    row = connection.execute(_BY_NAME, {"wanted": name}).mappings().one_or_none()
    if row is None:
        raise _unknown(repr(name))
    return run_of(row)


def lock_run(connection: Connection, which: ColumnElement[bool] | int, *, described: str | None = None) -> Run:
    """Lock the run's row until the transaction ends: log positions are taken one writer at a time.

    On SQLite the transaction has the write lock since it began. The lock leaves references to the row alone,
    so that a refit may be claimed meanwhile. Nothing is written yet: what turns out to be a repetition leaves
    no gap.

    Args:
        which: The run's id, or a condition that picks it.

    Raises:
        RunUnknown: also where the run was deleted since the caller looked it up.
    """
    condition = runs.c.id == which if isinstance(which, int) else which
    statement = select(runs).where(condition).with_for_update(key_share=True)
    row = connection.execute(statement).mappings().one_or_none()
    if row is None:
        raise _unknown(described or f"with id {which}")
    return run_of(row)


def keep_run(connection: Connection, run_id: int) -> None:
    """Keep the run from being deleted until the transaction ends. Raises RunUnknown."""
    statement = select(runs.c.id).where(runs.c.id == run_id).with_for_update(read=True, key_share=True)
    if connection.execute(statement).scalar() is None:
        raise _unknown(f"with id {run_id}")


def stored_embedder(embedder: str, run_id: int) -> str:
    """The name under which vectors are kept: those that callers sent belong to their run."""
    return f"{CALLER}:{run_id}" if embedder == CALLER else embedder


def settings_to_json(settings: RunSettings) -> str:
    return json.dumps(asdict(settings), allow_nan=False)


@lru_cache(maxsize=1_024)
def settings_from_json(content: str) -> RunSettings:
    fields = json.loads(content)
    policies = tuple(
        BudgetPolicy(**{**policy, "tiers": tuple(EffortTier(**tier) for tier in policy["tiers"])})
        for policy in fields.pop("budget_policies", ())
    )
    for name in ("learn_from", "learn_within"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    return RunSettings(**fields, budget_policies=policies)


def settings_that_stand(run: Run, asked: RunSettings) -> RunSettings:
    """What is asked for, with the embedder that the run's prompts have. Raises EmbedderFixed."""
    asked = replace(asked, budget_policies=run.settings.budget_policies)
    embedder, prompt = run.settings.embedder, run.settings.embedder_prompt
    if run.n_prompts == 0 or embedder is None:
        return asked
    if asked.embedder not in (None, embedder) or asked.embedder_prompt != prompt:
        raise EmbedderFixed(
            f"run {run.name!r}: its pool has vectors of embedder {embedder!r} "
            f"(prompt {prompt!r}), and the call asks for {asked.embedder!r} (prompt {asked.embedder_prompt!r}): "
            "create another run for that embedder"
        )
    return replace(asked, embedder=embedder)


def run_of(row: Mapping[Any, Any]) -> Run:
    rate_names = tuple(json.loads(row["rate_names"] or "[]"))
    return Run(**{**row, "settings": settings_from_json(row["settings"]), "rate_names": rate_names})


def _unknown(described: str) -> RunUnknown:
    return RunUnknown(f"run {described} does not exist: create it first")
