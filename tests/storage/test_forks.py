"""A fork stands as the run that it came from would after a rewind, and from then on by itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import numpy as np
import pytest

from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.domain.prompts import NewPrompt, Vector
from evenodds_service.domain.settings import CALLER, RunSettings
from evenodds_service.errors import EmbedderFixed, RunExists, RunUnknown, StoreUnavailable
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.store import NewSelection, Run, Store

N = 12
SETTINGS = RunSettings(embedder=CALLER, group_size=4)


def load(store: Store, name: str, now: datetime) -> Run:
    """A run with vectors of its caller."""
    run, _ = store.put_run(name, SETTINGS, now=now)
    rng = np.random.default_rng(0)
    vectors = [Vector(CALLER, f"v{i}", rng.normal(size=3)) for i in range(N)]
    prompts = [NewPrompt(f"p{i}", group="ab"[i % 2], vector_key=f"v{i}") for i in range(N)]
    store.add_prompts(run.id, prompts, vectors, embedder=CALLER, embedding_width=3, now=now)
    return store.run(name)


def learn(store: Store, name: str, now: datetime, steps: range, *, late: bool = True, era: str = "") -> None:
    run = store.run(name)
    for step in steps:
        chosen = [(step * 3 + i) % N for i in range(4)]
        store.record_selection(
            run.id,
            NewSelection(
                selection_id=f"s{step}{era}",
                step=step,
                arguments_hash="h",
                prompts=np.array(chosen),
                reply=f'{{"step":{step}}}',
            ),
            now=now,
        )
        if late and step:
            observe(store, run.id, now, step - 1, [(step * 5) % N], f"late-{step}")
        observe(store, run.id, now, step, chosen, f"r{step}")


def observe(store: Store, run_id: int, now: datetime, step: int, prompts: list[int], request_id: str) -> bool:
    """Returns whether the request was known."""
    return store.append_observations(
        run_id,
        Outcomes(
            step=step,
            observations=[NewObservation.of_counts(prompt, (prompt + step) % 5, 4) for prompt in prompts],
            request_id=request_id,
            request_hash="h",
        ),
        now=now,
    ).replayed


def state_of(store: Store, name: str) -> bytes:
    """All that was learned, but for the position."""
    run = store.run(name)
    live = LiveRun(run.id)
    live.catch_up(store, run)
    live.state.position = 0
    return to_bytes(live.state)


@pytest.fixture
def source(store: Store, now: datetime) -> Run:
    load(store, "source", now)
    learn(store, "source", now, range(6))
    return store.run("source")


@pytest.mark.parametrize("at_step", [0, 2, 5, 9, None])
def test_a_fork_stands_as_its_source_after_a_rewind(
    store: Store, source: Run, now: datetime, at_step: int | None
) -> None:
    fork, created = store.fork_run("fork", SETTINGS, fork_of="source", at_step=at_step, now=now)

    assert created
    assert store.run("source") == source
    assert (fork.fork_of, fork.fork_step, fork.settings) == ("source", at_step, SETTINGS)
    if at_step is not None:
        store.rewind(source.id, step=at_step, now=now)
    rewound = store.run("source")
    assert state_of(store, "fork") == state_of(store, "source")
    assert (fork.n_prompts, fork.embedding_width) == (rewound.n_prompts, rewound.embedding_width)
    assert (fork.head_step, fork.n_observations) == (rewound.head_step, rewound.n_observations)
    for first in (0, 7):
        ours, theirs = (store.prompts(run.id, first=first) for run in (fork, source))
        assert ours == theirs
    block, other = (
        store.pool_block(run.id, first=0, last=N, surface="surface", embedder=CALLER) for run in (fork, source)
    )
    np.testing.assert_array_equal(block.embedding_N_D, other.embedding_N_D)
    assert np.isfinite(block.embedding_N_D).all()


def test_a_fork_knows_the_requests_and_selections_that_it_holds(store: Store, source: Run, now: datetime) -> None:
    fork, _ = store.fork_run("fork", SETTINGS, fork_of="source", at_step=2, now=now)

    assert observe(store, fork.id, now, 2, [6, 7, 8, 9], "r2")
    assert not observe(store, fork.id, now, 3, [9, 10, 11, 0], "r3")
    kept = store.selection(fork.id, 2, arguments_hash="h")
    assert kept is not None
    assert (kept.selection_id, kept.reply) == ("s2", '{"step":2}')
    assert store.selection(fork.id, 3, arguments_hash="h") is None


def test_a_fork_leaves_out_what_it_has_no_use_for(store: Store, source: Run, now: datetime) -> None:
    fork, _ = store.fork_run("fork", SETTINGS, fork_of="source", at_step=1, now=now)

    # One load, two steps, the next step's selection, the late report behind it, and the rewind.
    assert fork.log_position == 1 + 2 + 3 + 2 + 1
    assert source.log_position == 18


def test_a_fork_and_its_source_go_on_apart(store: Store, source: Run, now: datetime) -> None:
    load(store, "never", now)
    learn(store, "never", now, range(3), late=False)
    store.fork_run("fork", SETTINGS, fork_of="never", at_step=None, now=now)
    learn(store, "never", now, range(3, 5), late=False)
    before = state_of(store, "never")

    learn(store, "fork", now, range(3, 4), late=False)
    store.rewind(store.run("fork").id, step=0, now=now)
    assert state_of(store, "never") == before
    forked = state_of(store, "fork")
    store.delete_run("never")

    assert state_of(store, "fork") == forked
    block = store.pool_block(store.run("fork").id, first=0, last=N, surface="surface", embedder=CALLER)
    assert np.isfinite(block.embedding_N_D).all()


def test_a_repeated_fork_changes_nothing_also_when_its_source_is_gone(store: Store, source: Run, now: datetime) -> None:
    fork, _ = store.fork_run("fork", SETTINGS, fork_of="source", at_step=2, now=now)
    learn(store, "source", now, range(6, 7))
    store.delete_run("source")

    again, created = store.fork_run("fork", RunSettings(), fork_of="source", at_step=2, now=now)

    assert not created
    assert again == fork


@pytest.mark.parametrize(
    ("name", "at_step", "asked"),
    [("fork", 3, "'source' at step 3"), ("fork", None, "'source'"), ("source", 2, "'source' at step 2")],
)
def test_a_fork_must_be_a_new_run(
    store: Store, source: Run, now: datetime, name: str, at_step: int | None, asked: str
) -> None:
    store.fork_run("fork", SETTINGS, fork_of="source", at_step=2, now=now)
    before = store.runs()

    with pytest.raises(
        RunExists,
        match=f"^run '{name}' exists already and is no fork of {asked}: fork under another name, or delete it first$",
    ):
        store.fork_run(name, SETTINGS, fork_of="source", at_step=at_step, now=now)

    assert store.runs() == before


def test_a_fork_of_an_unknown_run_leaves_none_behind(store: Store, now: datetime) -> None:
    with pytest.raises(RunUnknown, match=r"^run 'nowhere' does not exist"):
        store.fork_run("fork", SETTINGS, fork_of="nowhere", at_step=2, now=now)

    assert store.runs() == ()


def test_a_fork_keeps_the_embedder_of_its_pool(store: Store, source: Run, now: datetime) -> None:
    with pytest.raises(EmbedderFixed, match=r"^run 'source': its pool has vectors of embedder 'caller'"):
        store.fork_run("fork", RunSettings(embedder="builtin"), fork_of="source", at_step=2, now=now)

    fork, _ = store.fork_run("fork", RunSettings(predictor="mopps"), fork_of="source", at_step=2, now=now)

    assert (fork.settings.embedder, fork.settings.predictor) == (CALLER, "mopps")


def test_a_fork_of_a_run_that_was_rewound_and_forked_itself(store: Store, source: Run, now: datetime) -> None:
    store.rewind(source.id, step=3, now=now)
    store.retract(source.id, prompts=[0, 1], to_step=1, now=now)
    learn(store, "source", now, range(4, 6), era="-again")

    store.fork_run("one", SETTINGS, fork_of="source", at_step=4, now=now)
    store.fork_run("two", SETTINGS, fork_of="one", at_step=1, now=now)

    assert store.run("one").n_observations < store.run("source").n_observations
    store.rewind(source.id, step=1, now=now)
    assert state_of(store, "two") == state_of(store, "source")
    assert store.run("two").n_observations == store.run("source").n_observations


def test_of_many_callers_one_forks_and_the_others_find_it(store: Store, source: Run, now: datetime) -> None:
    together = threading.Barrier(6)

    def attempt() -> bool | None:
        try:
            return store.fork_run("fork", SETTINGS, fork_of="source", at_step=2, now=now)[1]
        except StoreUnavailable:  # PostgreSQL: the run has come up since the transaction began
            return None

    def fork(_caller: int) -> bool:
        together.wait()
        created = attempt()
        while created is None:
            created = attempt()
        return created

    with ThreadPoolExecutor(6) as callers:
        created = list(callers.map(fork, range(6)))

    assert sorted(created) == [False] * 5 + [True]
    assert store.run("fork").n_observations == 4 + 5 + 5 + 1


def test_a_run_that_goes_on_while_it_is_forked_is_copied_as_of_one_moment(
    store: Store, source: Run, now: datetime
) -> None:
    done = threading.Event()

    def go_on() -> None:
        step = 6
        while not done.is_set():
            learn(store, "source", now, range(step, step + 1))
            step += 1

    with ThreadPoolExecutor(1) as trainer:
        going_on = trainer.submit(go_on)
        forks = [store.fork_run(f"f{i}", SETTINGS, fork_of="source", at_step=None, now=now)[0] for i in range(8)]
        done.set()
        going_on.result()

    for fork in forks:
        entries = store.entries(fork.id, after=0)
        assert [entry.position for entry in entries] == list(range(1, fork.log_position + 1))
        live = LiveRun(fork.id)
        live.catch_up(store, fork)
        assert live.state.n_observations == fork.n_observations
