"""A run that lets go of prompts: its memory and its database stay within bounds, and its state the fold of its log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import func, select
from sqlalchemy.sql.schema import Table
from tests.waiting import PATIENCE_SECONDS, until

from evenodds_service.domain.learning import checkpoint
from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.domain.learning.features import Basis
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.prompts import FittedPrior, NewPrompt, NewPrompts, Vector, text_key
from evenodds_service.domain.selection.selection import SelectionRequest
from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import BelowBase, CheckpointUnusable, PoolChanged, PromptUnknown, StoreUnavailable
from evenodds_service.model.history import History
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.model.surface import SURFACE, SURFACE_NAMES
from evenodds_service.runtime import live_run, retention
from evenodds_service.runtime.decisions import Decisions
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.runtime.retention import Tidying, erase, tidy
from evenodds_service.storage import tables
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import NewSnapshot, Run, Store

NOW = datetime(2027, 1, 2, tzinfo=timezone.utc)
SETTINGS = RunSettings(embedder="e", retain_prompts=24)
"""Cut at 26 prompts."""


TEXTS = 4
"""New ones in each report."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_run, "PACKED", 16)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    opened = Store(engine)
    yield opened
    opened.close()


def report(store: Store, run_id: int, number: int, *, at: datetime, more: Sequence[int] = ()) -> None:
    """One outcome each of new texts, and of older prompts by their indices, under a request id."""
    rng = np.random.default_rng(number)
    new = NewPrompts([], [], "e", 4)
    for i in range(TEXTS * number, TEXTS * (number + 1)):
        key = text_key(f"text {i}")
        rates = {f"model {i % 3}": float(rng.random())}
        prompt = NewPrompt(f"p{i}", f"text {i}", key, group=f"g{i // 7}", prior_rates=rates, vector_key=key)
        vectors = [Vector(SURFACE, key, rng.normal(size=len(SURFACE_NAMES))), Vector("e", key, rng.normal(size=4))]
        new = replace(new, prompts=[*new.prompts, prompt], vectors=[*new.vectors, *vectors])
    outcomes = [NewObservation.of_counts(prompt.prompt_id, int(rng.integers(0, 3)), 2) for prompt in new.prompts]
    outcomes += [NewObservation.of_counts(index, int(rng.integers(0, 5)), 4) for index in more]
    reported = Outcomes(number, outcomes, request_id=f"r{number}", request_hash="h")
    store.append_observations(run_id, reported, new=new, now=at)


def fresh(store: Store, run: Run) -> LiveRun:
    """The run as a process has it that starts now."""
    live = LiveRun(run.id)
    live.catch_up(store, store.run_with_id(run.id))
    return live


def assert_same(one: LiveRun, other: LiveRun) -> None:
    """To the last bit, beliefs about the pool too."""
    assert to_bytes(one.state) == to_bytes(other.state)
    assert (one.pool.prompt_ids, one.pool.groups, one.pool.group_names) == (
        other.pool.prompt_ids,
        other.pool.groups,
        other.pool.group_names,
    )
    for ours, theirs in zip(one.beliefs("gps"), other.beliefs("gps"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def snapshot(store: Store, live: LiveRun, run: Run, *, at: datetime) -> None:
    """Publish a model fitted on the pool as it is."""
    basis = live.state.basis
    assert isinstance(basis, Basis)
    means = np.random.default_rng(live.state.position).random(live.state.n_prompts).astype(np.float32)
    priors = {name: FittedPrior(means, np.full(len(means), 2.0, np.float32)) for name in ("ngrams", "latent")}
    model = SharedModel("e", 8, basis, priors, {}, {}, serials_N=live.state.serials_N)
    store.request_refit(run.id, now=at)
    refit = store.claim_refit(worker="w", lease=timedelta(hours=1), now=at)
    assert refit is not None
    store.publish_refit(refit, NewSnapshot("e", model.to_bytes(), live.state.position, {}), now=at)


def lived(store: Store, n: int) -> tuple[Run, LiveRun, LiveRun]:
    """A run after n reports with a snapshot and a prompt seen again: as whoever tidied it has it, and as one that only
    reads along."""
    run, _ = store.put_run("served", SETTINGS, now=NOW)
    live, reader = LiveRun(run.id), LiveRun(run.id)
    for number in range(n):
        at = NOW + timedelta(minutes=number)
        report(store, run.id, number, at=at, more=[0] if number % 2 else [])  # prompt 0 stays, the others go by and by
        run = store.run_with_id(run.id)
        live.catch_up(store, run)
        if number % 3:
            reader.catch_up(store, run)
        if number in (4, 9):
            snapshot(store, live, run, at=at)
        tidy(store, live, store.run_with_id(run.id), now=at)
    run = store.run_with_id(run.id)
    live.catch_up(store, run)
    reader.catch_up(store, run)
    return run, live, reader


def test_a_run_keeps_so_many_prompts_and_any_process_folds_the_same_state(store: Store) -> None:
    run, live, reader = lived(store, 12)

    assert 24 <= run.pool_size <= 25
    assert (run.n_prompts, run.n_observations, live.state.n_observations) == (48, 54, 54)
    assert "p0" in live.pool.index  # its last outcome is not old
    assert "p1" not in live.pool.index
    assert live.state.n_prompts == len(live.pool.prompt_ids) == run.pool_size
    assert run.base_position > 0
    assert_same(live, reader)
    assert_same(live, fresh(store, run))
    for number in range(12, 15):  # and it goes on alike
        report(store, run.id, number, at=NOW + timedelta(days=1), more=[0])
    started = fresh(store, run)
    live.catch_up(store, store.run_with_id(run.id))
    assert_same(live, started)


def test_a_process_that_starts_while_another_compacts_finds_the_model_of_its_checkpoint(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has moved the base, and is not done with what is below: its log is there, an old snapshot is not."""
    run, live, _ = lived(store, 9)
    monkeypatch.setattr(retention, "_clear", lambda *_, **__: None)

    class Overtaken(Store):
        def newest_checkpoint(self, run_id: int, *, at_most: int | None = None) -> tuple[int, bytes] | None:
            found = super().newest_checkpoint(run_id, at_most=at_most)
            base = store.run_with_id(run_id).base_position
            if base == run.base_position:
                snapshot(store, live, run, at=NOW)
                for number in range(9, 12):
                    report(store, run_id, number, at=NOW)
                    tidy(store, live, store.run_with_id(run_id), now=NOW)
                assert store.run_with_id(run_id).base_position > base
            return found

    started = LiveRun(run.id)
    started.catch_up(Overtaken(store._engine), run)

    live.catch_up(store, store.run_with_id(run.id))
    assert live.model is not None
    assert_same(started, live)


def test_a_base_of_another_release_begins_from_the_outcomes_that_are_kept_on_every_process_alike(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, live, _ = lived(store, 12)
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)

    one, other = fresh(store, run), fresh(store, run)

    assert "was written by another release" in caplog.text
    assert_same(one, other)
    assert one.pool.prompt_ids == live.pool.prompt_ids
    for name in ("position", "head_step", "n_observations", "model_version", "n_retired"):
        assert getattr(one.state, name) == getattr(live.state, name)
    for name in ("serials_N", "touched_N", "last_step_N", "attempts_N"):
        np.testing.assert_array_equal(getattr(one.state, name), getattr(live.state, name))
    assert one.model is not None
    ours, theirs = (a / (a + b) for a, b in (one.beliefs("gps"), live.beliefs("gps")))
    assert np.abs(ours - theirs).mean() < 0.05
    for number in range(12, 22):  # it goes on, and lets go behind a base of its own
        report(store, run.id, number, at=NOW + timedelta(days=1), more=[0])
    tidy(store, one, store.run_with_id(run.id), now=NOW + timedelta(days=1))
    caplog.clear()
    one.catch_up(store, store.run_with_id(run.id))
    assert_same(one, fresh(store, run))
    assert not caplog.text


def test_a_base_that_can_be_read_is_gone_on_from_exactly_though_no_newer_checkpoint_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, live, _ = lived(store, 12)
    monkeypatch.setattr(store, "newest_checkpoint", lambda *_, **__: None)

    assert_same(live, fresh(store, run))


def test_a_damaged_base_is_told_with_what_to_do(store: Store) -> None:
    run, _, _ = lived(store, 12)
    with store._writing() as connection:
        connection.execute(tables.checkpoints.update().values(state=b"damaged"))

    with pytest.raises(CheckpointUnusable, match=r"7 bytes are no checkpoint.*: restore a backup, or begin a new run$"):
        fresh(store, run)


def test_the_database_is_as_large_after_many_prompts_as_after_few(store: Store) -> None:
    run, live, _ = lived(store, 12)

    def rows(table: Table) -> int:
        with store._reading() as connection:
            return int(connection.execute(select(func.count()).select_from(table)).scalar() or 0)

    assert rows(tables.prompts) == run.pool_size
    assert rows(tables.embeddings) == 2 * run.pool_size
    assert rows(tables.checkpoints) <= 2
    assert rows(tables.snapshots) == 1
    assert rows(tables.pool_blocks) <= 5
    with store._reading() as connection:
        entries = connection.execute(select(tables.log.c.position, tables.log.c.request_id)).all()
    below = [request_id for position, request_id in entries if position <= run.base_position]
    assert all(below)  # reports are remembered for a day, so that a repetition counts once
    while store.clear_below_base(run.id, now=NOW + timedelta(days=3)):
        pass
    assert rows(tables.log) == run.log_position - run.base_position
    assert_same(live, fresh(store, run))


def test_a_report_is_counted_once_though_its_entry_is_below_the_base(store: Store) -> None:
    run, _, _ = lived(store, 12)

    again = Outcomes(3, [NewObservation.of_counts(0, 1, 2)], request_id="r3", request_hash="h")

    answered = store.append_observations(run.id, again, now=NOW)

    assert answered.log_position <= run.base_position
    assert answered.replayed


def test_refits_read_the_outcomes_of_all_prompts_that_are_left(store: Store) -> None:
    run, live, _ = lived(store, 12)

    base, content = store.base_history(run.id)

    assert content is not None
    history = History.from_bytes(content)
    assert base == run.base_position
    assert set(history.prompts.tolist()) <= set(live.state.serials_N.tolist())
    of_first = history.rows(history.prompts == 0)
    assert len(of_first) <= 9  # the newest eight, and the sum of those before
    state = live.state
    assert of_first.attempts.sum() == state.attempts_N[0] - 4 * sum(
        1 for entry in store.entries(run.id, after=base) if 0 in getattr(entry, "prompts", ())
    )


def test_prompts_go_when_their_last_outcome_is_too_long_ago(store: Store) -> None:
    run, _ = store.put_run("served", RunSettings(embedder="e", retain_days=2.0), now=NOW)
    for number in range(5):
        report(store, run.id, number, at=NOW + timedelta(days=number), more=[1] if number == 4 else ())
    live = fresh(store, run)

    tidy(store, live, store.run_with_id(run.id), now=NOW + timedelta(days=5, minutes=1))

    assert live.pool.prompt_ids == ["p1", "p16", "p17", "p18", "p19"]
    assert_same(live, fresh(store, run))


def test_what_reaches_back_behind_the_base_is_refused_by_name(store: Store) -> None:
    run, live, _ = lived(store, 12)
    assert run.base_step is not None

    with pytest.raises(BelowBase, match=f"cannot go back to step 3: its log is compacted up to step {run.base_step}"):
        store.rewind(run.id, step=3, now=NOW)
    with pytest.raises(BelowBase, match="is compacted and cannot be dropped any more: name a from_step above"):
        store.retract(run.id, prompts=[0], now=NOW)
    with pytest.raises(BelowBase, match="name a from_step above"):
        store.retract(run.id, request_id="r1", now=NOW)
    with pytest.raises(BelowBase, match="run 'served' cannot be forked at step 3"):
        store.fork_run("fork", SETTINGS, fork_of="served", at_step=3, now=NOW)

    for number in range(12, 16):
        report(store, run.id, number, at=NOW)
    store.retract(run.id, request_id="r13", now=NOW)
    store.rewind(run.id, step=14, now=NOW)
    live.catch_up(store, store.run("served"))
    assert live.state.head_step == store.run("served").head_step == 14
    assert_same(live, fresh(store, run))
    fork, _ = store.fork_run("fork", SETTINGS, fork_of="served", at_step=None, now=NOW)
    assert to_bytes(fresh(store, fork).state) == to_bytes(live.state)
    assert store.run("fork").n_observations == store.run("served").n_observations == live.state.n_observations


def test_an_index_from_before_a_retirement_is_not_used(store: Store) -> None:
    run, live, _ = lived(store, 5)
    _, known_at = live.known([])
    store.retire_prompts(run.id, np.array([15]), now=NOW)

    with pytest.raises(PoolChanged, match="were retired at log position"):
        store.append_observations(run.id, Outcomes(9, [NewObservation.of_counts(15, 1, 1)]), known_at=known_at, now=NOW)

    assert store.retire_prompts(run.id, np.array([15, 16]), now=NOW) is None  # one of them is retired already


def test_a_retired_text_that_comes_back_is_a_new_prompt(store: Store) -> None:
    run, live, _ = lived(store, 12)
    assert "p5" not in live.pool.index

    again = NewPrompts([NewPrompt("p5", "text 5", text_key("text 5"))], [], "e", 4)
    outcomes = Outcomes(12, [NewObservation.of_counts("p5", 1, 2)])
    store.append_observations(run.id, outcomes, new=again, now=NOW)
    report(store, run.id, 12, at=NOW + timedelta(days=1))
    live.catch_up(store, store.run("served"))

    assert store.prompt(run.id, "p5").index == 48
    assert live.state.attempts_N[live.pool.index["p5"]] == 2
    assert_same(live, fresh(store, run))


def test_whoever_saves_states_is_told_of_a_run_that_was_tidied_behind_a_reply(store: Store) -> None:
    run, live, _ = lived(store, 12)
    report(store, run.id, 12, at=NOW)
    told: list[tuple[str, int]] = []

    def tidied(name: str) -> None:
        told.append((name, store.run(name).pool_size))

    Tidying(store, tidied=tidied).behind(live, store.run_with_id(run.id), now=NOW)

    until(lambda: told == [("served", 24)], "the run to be tidied")


def test_batches_are_chosen_and_answered_while_prompts_retire(store: Store) -> None:
    run, live, _ = lived(store, 12)

    chosen = live.choose(SETTINGS, lambda: SelectionRequest(step=30, batch_size=5))

    assert [store.prompt(run.id, i).index for i in chosen.prompt_ids] == chosen.prompts.tolist()


def test_an_erasure_that_died_behind_the_new_base_is_finished_by_whoever_comes_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object, **__: object) -> bool:
        raise StoreUnavailable("killed")

    def rows_of(prompt_id: str) -> int:
        with store._reading() as connection:
            where = tables.prompts.c.prompt_id == prompt_id
            return connection.execute(select(func.count()).select_from(tables.prompts).where(where)).scalar_one()

    _, live, _ = lived(store, 5)
    for prompt_id, is_asked_again in (("p7", True), ("p8", False)):
        with monkeypatch.context() as dying:
            dying.setattr(store, "clear_below_base", dies)
            with pytest.raises(StoreUnavailable):
                erase(store, Decisions(store, now=lambda: NOW), live, store.run("served"), prompt_id, now=NOW)
        assert rows_of(prompt_id) == 1

        if is_asked_again:
            with pytest.raises(PromptUnknown):
                erase(store, Decisions(store, now=lambda: NOW), live, store.run("served"), prompt_id, now=NOW)
        else:
            Tidying(store).now(live, store.run("served"), now=NOW)

        assert rows_of(prompt_id) == 0


def test_an_erased_prompt_is_nowhere_in_the_database(store: Store, database_url: str) -> None:
    run, live, _ = lived(store, 5)
    live.save(store, run, now=NOW)
    erased, kept = "text 7", "text 8"
    assert store.prompt(run.id, "p7").text == erased

    erase(store, Decisions(store, now=lambda: NOW), live, store.run("served"), "p7", now=NOW)

    with pytest.raises(PromptUnknown, match="'p7' is not in the pool"):
        store.prompt(run.id, "p7")
    with pytest.raises(PromptUnknown):
        erase(store, Decisions(store, now=lambda: NOW), live, store.run("served"), "p7", now=NOW)
    assert store.missing_vectors([SURFACE, "e"], [text_key(erased), text_key(kept)]) == {
        (SURFACE, text_key(erased)),
        ("e", text_key(erased)),
    }
    assert "p7" not in fresh(store, run).pool.index
    assert_same(live, fresh(store, run))
    with store._reading() as connection:
        assert connection.execute(select(func.count()).select_from(tables.checkpoints)).scalar() == 1
        blocks = connection.execute(select(tables.pool_blocks.c.content)).scalars().all()
    assert blocks == []
    live.save(store, store.run("served"), now=NOW)
    packed = store.packed_block(run.id, first=0, features=live_run._packing("e"))
    assert packed is not None
    assert b'"p8"' in packed
    assert b'"p7"' not in packed
    assert_same(live, fresh(store, run))
    if database_url.startswith("sqlite"):
        path = Path(database_url.removeprefix("sqlite:///"))
        stored = path.read_bytes() + path.with_name(f"{path.name}-wal").read_bytes()
        assert kept.encode() in stored
        assert erased.encode() not in stored


def test_a_pool_that_was_loaded_is_not_cut_because_it_answers_budgets(store: Store) -> None:
    run, _ = store.put_run("served", replace(SETTINGS, retain_prompts=None), now=NOW)
    for number in range(4):
        report(store, run.id, number, at=NOW)
    n_prompts = store.run("served").pool_size

    store.settle_retention(run.id, n_prompts // 2)
    settled = store.run("served")
    Tidying(store).now(LiveRun(run.id), settled, now=NOW)

    assert settled.settings.retain_prompts == n_prompts
    assert store.run("served").pool_size == n_prompts


def test_between_two_deletions_others_may_write(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's lock has no queue: without a pause whoever waits for it finds it taken until all is deleted."""
    run, live, _ = lived(store, 5)
    monkeypatch.setattr("evenodds_service.storage.retention._PROMPTS_AT_ONCE", 1)
    written: list[int] = []

    def others_write(seconds: float) -> None:
        assert seconds > 0.1  # who waits looks so often
        report(store, run.id, 100 + len(written), at=NOW)
        written.append(store.run("served").log_position)

    monkeypatch.setattr("evenodds_service.runtime.retention.time.sleep", others_write)
    for number in range(50, 60):
        report(store, run.id, number, at=NOW)
    tidy(store, live, store.run("served"), now=NOW)

    assert len(written) > 3
