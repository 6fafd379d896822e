"""A live run serves everybody while somebody chooses from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.domain.learning import features, raw_rows
from evenodds_service.domain.learning.checkpoint import block_to_bytes, to_bytes
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.prompts import NewPrompt, NewPrompts, RawBlock
from evenodds_service.domain.selection import part
from evenodds_service.domain.selection.selection import SelectionRequest, looked_at
from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import NotEnoughPrompts
from evenodds_service.runtime import live_run
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import NewSelection, Store

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
SETTINGS = RunSettings(cooldown_steps=0)
REQUEST = SelectionRequest(step=5, batch_size=20, are_groups_strict=True)


class Gate:
    """Computes block by block, but not before it may."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def each_block(self, compute: Callable[[slice], None], blocks: Iterable[slice]) -> Iterator[None]:
        self.reached.set()
        assert self.opened.wait(PATIENCE_SECONDS)
        return map(compute, blocks)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    store = Store(engine)
    run, _ = store.put_run("math", RunSettings(embedder="none"), now=NOW)
    store.add_prompts(run.id, [NewPrompt(f"p{i}", group=f"g{i % 3}") for i in range(200)], embedder="none", now=NOW)
    observe(store, 0, range(100))
    yield store
    store.close()


def observe(store: Store, step: int, prompts: Iterable[int]) -> None:
    outcomes = [NewObservation.of_counts(i, (i * 7) % 9, 8) for i in prompts]
    store.append_observations(store.run("math").id, Outcomes(step=step, observations=outcomes), now=NOW)


def test_a_choice_in_progress_keeps_nobody_waiting_and_is_that_of_its_own_state(store: Store) -> None:
    gate, run = Gate(), store.run("math")
    live, other = LiveRun(run.id, each_block=gate.each_block), LiveRun(run.id)
    live.catch_up(store, run)
    other.catch_up(store, run)
    expected = other.choose(SETTINGS, lambda: REQUEST)
    chosen = []
    chooser = threading.Thread(target=lambda: chosen.append(live.choose(SETTINGS, lambda: REQUEST)))

    chooser.start()
    assert gate.reached.wait(PATIENCE_SECONDS)
    observe(store, 1, range(100, 200))
    store.add_prompts(run.id, [NewPrompt("late", group="g9")], now=NOW)
    catching_up = threading.Thread(target=live.catch_up, args=(store, store.run("math")))
    catching_up.start()
    catching_up.join(PATIENCE_SECONDS)
    assert not catching_up.is_alive()
    assert (live.state.position, live.pool.n) == (run.log_position + 2, 201)
    gate.opened.set()
    chooser.join(PATIENCE_SECONDS)

    (choice,) = chosen
    assert (choice.position, choice.prompt_ids, choice.groups) == (
        run.log_position,
        expected.prompt_ids,
        expected.groups,
    )
    np.testing.assert_array_equal(choice.a, expected.a)
    assert live.choose(SETTINGS, lambda: REQUEST).position == run.log_position + 2


def test_a_sample_that_does_not_do_gives_way_to_the_whole_pool(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a choice that it could not make nor an error that it cannot judge comes from a sample."""
    live, asked = LiveRun(store.run("math").id), replace(REQUEST, batch_size=2)
    live.catch_up(store, store.run("math"))
    settings = replace(SETTINGS, groups_at_most={"g0": 0.0, "g1": 0.0})
    monkeypatch.setattr(part, "FOR_EACH", 1)
    monkeypatch.setattr(part, "LOOKED_AT", 2)
    assert looked_at(live.state, live.pool, settings, asked).weights is not None

    assert live.choose(settings, lambda: asked).groups == ("g2", "g2")
    with pytest.raises(NotEnoughPrompts, match=r"pool 200"):
        live.choose(replace(settings, groups_at_most={f"g{i}": 0.0 for i in range(3)}), lambda: asked)


def test_a_batch_may_be_made_of_groups(store: Store) -> None:
    live = LiveRun(store.run("math").id)
    live.catch_up(store, store.run("math"))

    chosen = live.choose(replace(SETTINGS, groups={"g1": 0.5, "g2": 0.5}), lambda: REQUEST)

    assert sorted(group or "" for group in chosen.groups) == ["g1"] * 10 + ["g2"] * 10
    assert all(chosen.prompt_ids[i] == live.pool.prompt_ids[p] for i, p in enumerate(chosen.choice.prompts))


def test_what_a_process_folds_of_its_own_writing_is_what_others_read(store: Store) -> None:
    """Among what others wrote, new prompts, a batch with odd beliefs and a control arm: the states are the same."""
    run = store.run("math")
    live, other = LiveRun(run.id), LiveRun(run.id)
    live.catch_up(store, run)
    third = [NewObservation("new", 1 / 3, 3, informative=True), NewObservation.of_rewards(1, [0.1, 0.7])]

    new = NewPrompts([NewPrompt("new", group="g9")], embedder="none")
    appended = store.append_observations(run.id, Outcomes(3, third, request_id="r", request_hash="h"), new=new, now=NOW)
    observe(store, 4, range(5))  # elsewhere
    beliefs = np.array([1 / 3, 2 / 3, 1e-9])
    batch = np.array([1, 5, 200])
    chosen = NewSelection(
        "s", 5, "h", "{}", batch, control_share=0.5, control=np.array([True, False, False]), a=beliefs, b=1 + beliefs
    )
    _, recorded = store.record_selection(run.id, chosen, now=NOW)
    answering = Outcomes(5, [NewObservation.of_counts(5, 1, 2)], selection_id="s")
    answered = store.append_observations(run.id, answering, now=NOW)
    for written in (appended.written, recorded, answered.written):
        assert written is not None
        live.catch_up(store, written.run, written=written.entries)

    assert written is not None
    assert written.run == store.run("math")
    other.catch_up(store, store.run("math"))
    assert to_bytes(live.state) == to_bytes(other.state)
    assert live.pool.n == other.pool.n == 201
    assert live.known(["new", "p7", "nobody"]) == ({"new": 200, "p7": 7}, live.state.position)


def test_who_let_go_of_raw_features_saves_and_goes_back_as_one_that_keeps_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_rows, "PIECE", 64)
    monkeypatch.setattr(features, "_CHUNK", 64)
    monkeypatch.setattr(features, "ENOUGH_PROMPTS", 100)
    monkeypatch.setattr(live_run, "PACKED", 50)
    run, _ = store.put_run("lengths", RunSettings(embedder="none"), now=NOW)
    prompts = [NewPrompt(f"p{i}", features={"length": float(i % 37)}) for i in range(200)]
    store.add_prompts(run.id, prompts, embedder="none", now=NOW)
    letting_go, keeping = LiveRun(run.id), LiveRun(run.id, keeps_raw=True)

    def both_after(step: int) -> None:
        outcomes = [NewObservation.of_counts(i, (i * 7) % 9, 8) for i in range(100)]
        store.append_observations(run.id, Outcomes(step=step, observations=outcomes), now=NOW)
        both_at_head()

    def both_at_head() -> None:
        for live in (letting_go, keeping):
            live.catch_up(store, store.run("lengths"))
        chosen, expected = (live.choose(SETTINGS, lambda: REQUEST) for live in (letting_go, keeping))
        assert chosen.prompt_ids == expected.prompt_ids
        assert to_bytes(letting_go.state) == to_bytes(keeping.state)

    both_after(0)
    assert (letting_go.pool.n_let_go, keeping.pool.n_let_go) == (192, 0)
    for first in range(0, 200, 50):
        ours, theirs = (live.raw(store, run, first, first + 50) for live in (letting_go, keeping))
        assert ours is not None
        assert theirs is not None
        assert block_to_bytes(ours) == block_to_bytes(theirs)
    both_after(3)
    store.rewind(run.id, step=0, now=NOW)
    both_at_head()  # from the log's beginning, where the pool has no basis yet

    letting_go.save(store, store.run("lengths"), now=NOW)
    pool = letting_go.pool
    both_after(4)
    store.rewind(run.id, step=0, now=NOW)
    both_at_head()  # from the checkpoint, whose basis the pool has
    assert letting_go.pool is pool
    assert letting_go.pool.n_let_go == 192


def test_while_a_large_pool_is_loaded_few_of_its_raw_features_are_in_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_rows, "PIECE", 10)
    monkeypatch.setattr(features, "_CHUNK", 10)
    monkeypatch.setattr(features, "ENOUGH_PROMPTS", 40)
    monkeypatch.setattr(live_run, "PACKED", 20)
    monkeypatch.setattr(live_run, "RAW_MOST", 30)
    run, _ = store.put_run("lengths", RunSettings(embedder="none"), now=NOW)
    for first in range(0, 200, 40):
        prompts = [NewPrompt(f"p{i}", features={"length": float(i % 37)}) for i in range(first, first + 40)]
        store.add_prompts(run.id, prompts, embedder="none", now=NOW)
    held: list[int] = []
    append = features.Pool.append

    def counted(pool: features.Pool, block: RawBlock) -> None:
        append(pool, block)
        held.append(pool.n - pool.n_let_go)

    from_the_log, keeping = LiveRun(run.id), LiveRun(run.id, keeps_raw=True)
    keeping.catch_up(store, store.run("lengths"))
    keeping.save(store, store.run("lengths"), now=NOW)
    monkeypatch.setattr(features.Pool, "append", counted)
    from_the_log.catch_up(store, store.run("lengths"))
    most, from_the_checkpoint = max(held[2:]), LiveRun(run.id)  # the first two come before the basis
    held.clear()
    from_the_checkpoint.catch_up(store, store.run("lengths"))

    assert max(most, *held) <= 50  # 30, and the block of 20 that comes next
    for live in (from_the_log, from_the_checkpoint):
        assert live.pool.n == 200
        chosen, expected = (each.choose(SETTINGS, lambda: REQUEST) for each in (live, keeping))
        assert chosen.prompt_ids == expected.prompt_ids
