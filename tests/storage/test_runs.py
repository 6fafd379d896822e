from __future__ import annotations

from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from sqlalchemy import Engine, func, select

from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.prompts import NewPrompt, Vector
from evenodds_service.domain.report.summary import Summary
from evenodds_service.domain.settings import CALLER, RunSettings
from evenodds_service.errors import EmbedderFixed, RunUnknown
from evenodds_service.storage.store import NewSelection, NewSnapshot, Run, Store
from evenodds_service.storage.tables import NaiveDatetime, api_keys, embeddings, metadata


def test_new_run_is_empty_and_says_that_it_is_new(store: Store, now: datetime) -> None:
    settings = RunSettings(predictor="mopps", target_rate=0.1, embedder="builtin", embedder_prompt="Solve: é")

    run, is_new = store.put_run("math", settings, now=now)

    assert is_new
    assert run == Run(
        id=run.id,
        name="math",
        settings=settings,
        embedding_width=None,
        n_prompts=0,
        log_position=0,
        head_step=None,
        n_observations=0,
        model_version=0,
        created_at=now,
    )
    assert store.run("math") == run


def test_put_again_replaces_the_settings_and_keeps_the_rest(store: Store, run: Run, now: datetime) -> None:
    store.add_prompts(run.id, [NewPrompt("a")], embedder="builtin", now=now)

    changed, is_new = store.put_run("math", RunSettings(group_size=16, embedder="builtin"), now=now + timedelta(days=1))

    assert not is_new
    assert changed.settings == RunSettings(group_size=16, embedder="builtin")
    assert (changed.id, changed.n_prompts, changed.created_at) == (run.id, 1, now)


def test_unknown_run_is_named(store: Store, now: datetime) -> None:
    with pytest.raises(RunUnknown, match=r"^run 'code' does not exist: create it first$"):
        store.run("code")
    with pytest.raises(RunUnknown, match="run 'code' does not exist"):
        store.delete_run("code")
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.add_prompts(0, [NewPrompt("a")], now=now)


def test_runs_come_in_pages_by_name(store: Store, now: datetime) -> None:
    for name in ("c", "a", "b"):
        store.put_run(name, RunSettings(), now=now)

    first = store.runs(limit=2)
    second = store.runs(after=first[-1].name, limit=2)

    assert [run.name for run in first] == ["a", "b"]
    assert [run.name for run in second] == ["c"]


def test_embedder_may_change_while_the_pool_is_empty(store: Store, now: datetime) -> None:
    store.put_run("math", RunSettings(embedder="builtin"), now=now)

    run, _ = store.put_run("math", RunSettings(embedder="none", embedder_prompt="x"), now=now)

    assert run.settings.embedder == "none"


@pytest.mark.parametrize(
    "asked",
    [RunSettings(embedder="none"), RunSettings(embedder="builtin", embedder_prompt="Solve:")],
    ids=["embedder", "prompt"],
)
def test_embedder_and_its_prompt_are_fixed_once_the_pool_has_prompts(
    store: Store, run: Run, now: datetime, asked: RunSettings
) -> None:
    store.add_prompts(run.id, [NewPrompt("a")], embedder="builtin", now=now)

    with pytest.raises(EmbedderFixed, match="run 'math': its pool has vectors of embedder 'builtin'"):
        store.put_run("math", asked, now=now)

    assert store.run("math").settings == RunSettings(embedder="builtin")


def test_settings_without_an_embedder_keep_the_one_that_the_first_prompt_decided(
    store: Store, run: Run, now: datetime
) -> None:
    store.add_prompts(run.id, [NewPrompt("a")], embedder="caller", embedding_width=3, now=now)

    changed, _ = store.put_run("math", RunSettings(group_size=4), now=now)

    assert changed.settings == RunSettings(group_size=4, embedder="caller")
    assert changed.embedding_width == 3


def test_deleting_a_run_deletes_all_it_owns_and_nothing_else(
    store: Store, engine: Engine, run: Run, now: datetime
) -> None:
    shared = Vector("surface", "k", np.ones(2))
    for owner in (run, store.put_run("other", RunSettings(), now=now)[0]):
        own = Vector(CALLER, "v", np.ones(3))
        store.add_prompts(owner.id, [NewPrompt("a", vector_key="v")], [own, shared], now=now)
        store.record_selection(
            owner.id,
            NewSelection(selection_id=owner.name, step=0, arguments_hash="h", prompts=np.array([0]), reply="{}"),
            now=now,
        )
        observation = NewObservation.of_counts(0, 1, 2)
        store.append_observations(owner.id, Outcomes(step=0, observations=[observation]), now=now)
        store.save_checkpoint(owner.id, position=1, state=b"state", now=now)
        store.save_packed_block(owner.id, b"block", first=0, last=1, features="1")
        store.save_run_states([(owner.id, 1, Summary("learning"))], now=now)
        store.request_refit(owner.id, now=now)
        claimed = store.claim_refit(worker="w", lease=timedelta(minutes=1), now=now)
        assert claimed is not None
        store.publish_refit(claimed, NewSnapshot(CALLER, b"weights", fitted_position=3, report={}), now=now)

    store.delete_run("math")

    with engine.connect() as connection:
        left = {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar()
            for table in metadata.sorted_tables
            if table is not api_keys
        }
        vectors = set(connection.execute(select(embeddings.c.embedder)).scalars())
    other = store.run("other")
    assert left == {
        "runs": 1,
        "prompts": 1,
        "bases": 0,
        "pool_blocks": 1,
        "embeddings": 2,
        "log": 4,
        "selections": 1,
        "refits": 1,
        "snapshots": 1,
        "checkpoints": 1,
        "decisions": 0,
        "run_states": 1,
    }
    assert vectors == {"surface", f"caller:{other.id}"}


def test_id_of_a_deleted_run_is_not_used_again(store: Store, run: Run, now: datetime) -> None:
    store.delete_run("math")

    again, is_new = store.put_run("math", RunSettings(), now=now)

    assert is_new
    assert again.id != run.id


def test_naive_datetime_is_refused(store: Store) -> None:
    with pytest.raises(NaiveDatetime, match=r"datetime 2026-01-02T00:00:00 has no time zone: pass one in UTC"):
        store.put_run("math", RunSettings(), now=datetime(2026, 1, 2))

    assert store.runs() == ()


def test_datetime_of_another_zone_comes_back_in_utc(store: Store, now: datetime) -> None:
    elsewhere = now.astimezone(timezone(timedelta(hours=-7)))

    store.put_run("math", RunSettings(), now=elsewhere)

    created_at = store.run("math").created_at
    assert created_at == now
    assert created_at.utcoffset() == timedelta(0)
