"""Budget policies of a run, on every database: versions that count changes, and settings that leave them alone."""

from __future__ import annotations

from datetime import datetime

import pytest

from evenodds_service.domain.settings import BudgetPolicy, EffortTier, RunSettings
from evenodds_service.errors import PolicyLimit, RunUnknown
from evenodds_service.storage.runs import MAX_POLICIES
from evenodds_service.storage.store import Store

SEQUENTIAL = BudgetPolicy(
    name="a",
    mode="sequential",
    target_attempts=2.5,
    price=0.25,
    tiers=(EffortTier("é", 0.5, 3.0), EffortTier("b", 0.0)),
)


def test_a_policy_is_kept_whole(store: Store, now: datetime) -> None:
    store.put_run("math", RunSettings(), now=now)

    stored = store.put_budget_policy("math", SEQUENTIAL)

    assert stored.version == 1
    assert store.run("math").settings.budget_policies == (stored,)
    assert (stored.mode, stored.target_attempts, stored.price, stored.tiers) == (
        SEQUENTIAL.mode,
        SEQUENTIAL.target_attempts,
        SEQUENTIAL.price,
        SEQUENTIAL.tiers,
    )


def test_the_version_counts_changes_whatever_version_is_sent(store: Store, now: datetime) -> None:
    store.put_run("math", RunSettings(), now=now)
    changed = BudgetPolicy(name="a", target_attempts=3.0, version=77)

    versions = [
        store.put_budget_policy("math", policy).version for policy in (SEQUENTIAL, SEQUENTIAL, changed, changed)
    ]

    assert versions == [1, 1, 2, 2]


def test_settings_of_the_run_change_no_policy(store: Store, now: datetime) -> None:
    store.put_run("math", RunSettings(), now=now)
    stored = store.put_budget_policy("math", SEQUENTIAL)

    run, _ = store.put_run("math", RunSettings(group_size=16), now=now)

    assert run.settings == RunSettings(group_size=16, budget_policies=(stored,))


def test_a_run_holds_so_many(store: Store, now: datetime) -> None:
    store.put_run("math", RunSettings(), now=now)
    for i in range(MAX_POLICIES):
        store.put_budget_policy("math", BudgetPolicy(name=f"p{i}"))

    with pytest.raises(PolicyLimit, match="run 'math' holds 64 budget policies, which is the limit"):
        store.put_budget_policy("math", SEQUENTIAL)
    assert store.put_budget_policy("math", BudgetPolicy(name="p0", target_attempts=2)).version == 2


def test_an_unknown_run_is_named(store: Store) -> None:
    with pytest.raises(RunUnknown, match="run 'nowhere' does not exist"):
        store.put_budget_policy("nowhere", SEQUENTIAL)
