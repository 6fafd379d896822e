from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import numpy as np
import pytest

from evenodds_service.domain.log_entries import NewObservation, ObserveEntry, Outcomes, PoolEntry
from evenodds_service.domain.prompts import NewPrompt, NewPrompts, Vector
from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import PromptConflict, PromptUnknown, RequestConflict, RunUnknown, SelectionUnknown
from evenodds_service.storage.store import Appended, NewSelection, NewSnapshot, PromptVisit, Run, Store

WRITE_AND_DIE = """
import os, signal, sys
from datetime import datetime, timezone
from evenodds_service.domain.log_entries import NewObservation, Outcomes
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store
store = Store(open_engine(sys.argv[1], timeout_seconds=60))
run = store.run("math")
seen = [NewObservation.of_counts(0, 1, 2)]
answer = store.append_observations(
    run.id, Outcomes(step=7, observations=seen), now=datetime.now(timezone.utc)
)
print(answer.log_position, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def pool(store: Store, run: Run, now: datetime) -> Run:
    """The run with three prompts, at log position 1."""
    store.add_prompts(run.id, [NewPrompt(name) for name in "abc"], now=now)
    return store.run("math")


def test_observations_come_back_as_they_were_sent(store: Store, pool: Run, now: datetime) -> None:
    observations = [
        NewObservation.of_counts(2, 3, 8),
        NewObservation.of_rewards(0, [0.1, 0.2, 0.30000000000000004]),
        NewObservation.of_counts(2, 0, 1),
    ]

    answer = store.append_observations(pool.id, Outcomes(step=5, observations=observations), now=now)

    assert answer == Appended(log_position=2, accepted=3, model_version=0, replayed=False)
    (entry,) = store.entries(pool.id, after=1)
    assert isinstance(entry, ObserveEntry)
    assert (entry.position, entry.step, entry.selection_id) == (2, 5, None)
    assert entry.prompts.tolist() == [2, 0, 2]
    assert entry.successes.tolist() == [3.0, observations[1].successes, 0.0]
    assert entry.attempts.tolist() == [8.0, 3.0, 1.0]
    assert entry.informative.tolist() == [True, True, False]
    assert [array.dtype for array in (entry.prompts, entry.successes, entry.attempts, entry.informative)] == [
        np.int64,
        np.float64,
        np.float64,
        np.bool_,
    ]


def test_run_counts_observations_and_keeps_the_highest_step(store: Store, pool: Run, now: datetime) -> None:
    seen = [NewObservation.of_counts(0, 1, 2)]

    for step in (0, 2**62, 3):
        store.append_observations(pool.id, Outcomes(step=step, observations=seen * 2), now=now)

    run = store.run("math")
    assert (run.log_position, run.head_step, run.n_observations) == (4, 2**62, 6)


def test_entries_come_in_order_after_a_position_up_to_a_limit(store: Store, pool: Run, now: datetime) -> None:
    seen = [NewObservation.of_counts(0, 1, 2)]
    for step in range(5):
        store.append_observations(pool.id, Outcomes(step=step, observations=seen), now=now)

    assert [entry.position for entry in store.entries(pool.id, after=0)] == [1, 2, 3, 4, 5, 6]
    assert [entry.position for entry in store.entries(pool.id, after=2, limit=3)] == [3, 4, 5]
    assert store.entries(pool.id, after=6) == ()


def test_new_prompts_enter_the_pool_before_the_observations(store: Store, pool: Run, now: datetime) -> None:
    observations = [NewObservation.of_counts("d", 1, 2), NewObservation.of_counts(0, 1, 2)]
    vector = Vector("surface", "k", np.ones(2))

    answer = store.append_observations(
        pool.id,
        Outcomes(step=0, observations=observations),
        new=NewPrompts(prompts=[NewPrompt("d")], vectors=[vector], embedder="builtin", embedding_width=8),
        now=now,
    )

    grown, observed = store.entries(pool.id, after=1)
    assert answer.log_position == 3
    assert grown == PoolEntry(2, 4)
    assert isinstance(observed, ObserveEntry)
    assert observed.prompts.tolist() == [3, 0]
    run = store.run("math")
    assert (run.n_prompts, run.log_position, run.embedding_width) == (4, 3, 8)
    assert run.settings.embedder == "builtin"
    assert store.missing_vectors(["surface"], ["k"]) == frozenset()


def test_new_prompt_that_another_caller_added_meanwhile_is_used(store: Store, pool: Run, now: datetime) -> None:
    answer = store.append_observations(
        pool.id,
        Outcomes(step=0, observations=[NewObservation.of_counts("b", 1, 2)]),
        new=NewPrompts(prompts=[NewPrompt("b")]),
        now=now,
    )

    (entry,) = store.entries(pool.id, after=1)
    assert answer.log_position == 2
    assert isinstance(entry, ObserveEntry)
    assert entry.prompts.tolist() == [1]


@pytest.mark.parametrize("prompt", ["zz", 3, -1])
def test_observation_of_an_unknown_prompt_names_it_and_writes_nothing(
    store: Store, pool: Run, now: datetime, prompt: int | str
) -> None:
    observations = [NewObservation.of_counts(0, 1, 2), NewObservation.of_counts(prompt, 1, 2)]

    with pytest.raises(
        PromptUnknown, match=f"^observation 2 of 2: prompt {prompt!r} is not in the pool of 3 prompts: add it"
    ):
        store.append_observations(pool.id, Outcomes(step=0, observations=observations), now=now)

    assert store.run("math") == pool


def test_conflicting_new_prompt_writes_nothing(store: Store, pool: Run, now: datetime) -> None:
    with pytest.raises(PromptConflict, match="prompt 2 of 2: id 'a' is in the pool with another category"):
        store.append_observations(
            pool.id,
            Outcomes(step=0, observations=[NewObservation.of_counts("d", 1, 2)]),
            new=NewPrompts(prompts=[NewPrompt("d"), NewPrompt("a", group="g")]),
            now=now,
        )

    assert store.run("math") == pool
    assert store.entries(pool.id, after=1) == ()


def test_impossible_counts_never_reach_the_log(store: Store, pool: Run, now: datetime) -> None:
    impossible = NewObservation(0, successes=3, attempts=2, informative=True)

    with pytest.raises(ValueError, match="successes must lie in"):
        store.append_observations(
            pool.id,
            Outcomes(step=0, observations=[impossible, NewObservation.of_counts("d", 1, 2)]),
            new=NewPrompts(prompts=[NewPrompt("d")]),
            now=now,
        )

    assert store.run("math") == pool


def test_repeated_request_gets_the_first_answer_and_leaves_no_gap(store: Store, pool: Run, now: datetime) -> None:
    def append(step: int, n: int) -> Appended:
        seen = [NewObservation.of_counts(0, 1, 2)] * n
        return store.append_observations(pool.id, Outcomes(step, seen, request_id="r1", request_hash="h1"), now=now)

    first = append(3, n=2)
    publish(store, pool, now)  # another version is answered from here on
    again = append(9, n=1)
    other = store.append_observations(pool.id, Outcomes(4, [NewObservation.of_counts(0, 1, 2)]), now=now)

    assert first == Appended(log_position=2, accepted=2, model_version=0, replayed=False)
    assert again == Appended(log_position=2, accepted=2, model_version=0, replayed=True)
    assert other == Appended(log_position=4, accepted=1, model_version=1, replayed=False)
    run = store.run("math")
    assert (run.log_position, run.head_step, run.n_observations) == (4, 4, 3)


def publish(store: Store, pool: Run, now: datetime) -> None:
    store.request_refit(pool.id, now=now)
    claimed = store.claim_refit(worker="w", lease=timedelta(minutes=1), now=now)
    assert claimed is not None
    store.publish_refit(claimed, NewSnapshot("builtin", b"weights", fitted_position=2, report={}), now=now)


def test_request_id_with_another_body_is_a_conflict_and_writes_nothing(store: Store, pool: Run, now: datetime) -> None:
    seen = [NewObservation.of_counts(0, 1, 2)]
    store.append_observations(pool.id, Outcomes(step=0, observations=seen, request_id="r1", request_hash="h1"), now=now)
    before = store.run("math")

    with pytest.raises(
        RequestConflict,
        match=r"^request_id 'r1' was used in run 'math' at log position 2 \(2026-01-02 03:04:05 UTC\) with another "
        "body: send this one under a new id$",
    ):
        store.append_observations(
            pool.id,
            Outcomes(step=0, observations=[NewObservation.of_counts("d", 1, 2)], request_id="r1", request_hash="h2"),
            new=NewPrompts(prompts=[NewPrompt("d")]),
            now=now,
        )

    assert store.run("math") == before


def test_same_request_id_in_two_runs_are_two_requests(store: Store, pool: Run, now: datetime) -> None:
    other = store.put_run("other", RunSettings(), now=now)[0]
    store.add_prompts(other.id, [NewPrompt("a")], now=now)

    answers = [
        store.append_observations(
            run.id,
            Outcomes(step=0, observations=[NewObservation.of_counts(0, 1, 2)], request_id="r1", request_hash=run.name),
            now=now,
        )
        for run in (pool, other)
    ]

    assert [answer.replayed for answer in answers] == [False, False]


def test_unknown_selection_is_named(store: Store, pool: Run, now: datetime) -> None:
    seen = [NewObservation.of_counts(0, 1, 2)]
    other = store.put_run("other", RunSettings(), now=now)[0]
    store.record_selection(
        other.id, NewSelection(selection_id="s", step=0, arguments_hash="h", prompts=np.array([]), reply="{}"), now=now
    )

    with pytest.raises(SelectionUnknown, match=r"^selection 's' does not exist in run 'math': send the selection_id"):
        store.append_observations(pool.id, Outcomes(step=0, observations=seen, selection_id="s"), now=now)

    assert store.run("math") == pool


def test_unknown_run_is_refused(store: Store, now: datetime) -> None:
    with pytest.raises(RunUnknown, match="run with id 0 does not exist"):
        store.append_observations(0, Outcomes(step=0, observations=[]), now=now)


def test_history_of_a_prompt_is_newest_first_and_limited(store: Store, pool: Run, now: datetime) -> None:
    store.record_selection(
        pool.id, NewSelection(selection_id="s", step=0, arguments_hash="h", prompts=np.array([1]), reply="{}"), now=now
    )
    for step in range(240):
        seen = [NewObservation.of_counts(step % 3, 1, 2), NewObservation.of_counts(2, 0.5, 1)]
        store.append_observations(pool.id, Outcomes(step=step, observations=seen, selection_id="s"), now=now)

    newest = store.prompt_history(pool.id, 2, limit=3)
    whole = store.prompt_history(pool.id, 1, limit=999)

    assert newest == (
        PromptVisit(242, 239, 0.5, 1, "s"),
        PromptVisit(242, 239, 1, 2, "s"),
        PromptVisit(241, 238, 0.5, 1, "s"),
    )
    assert [visit.step for visit in whole] == list(range(238, 0, -3))
    assert store.prompt_history(pool.id, 7) == ()


def test_positions_are_gapless_under_writers_of_every_kind(store: Store, run: Run, now: datetime) -> None:
    """And a reader that has seen a position has seen everything up to it."""
    store.add_prompts(run.id, [NewPrompt("a")], now=now)
    together, n_writers, n_each = threading.Barrier(9), 8, 12
    written = threading.Event()

    def write(writer: int) -> list[int]:
        together.wait()
        positions = []
        for turn in range(n_each):
            number = writer * n_each + turn
            if writer % 4 == 0:
                positions.append(store.add_prompts(run.id, [NewPrompt(f"p{number}")], now=now).log_position)
            elif writer % 4 == 1:
                selection, _ = store.record_selection(
                    run.id,
                    NewSelection(
                        selection_id=f"s{number}", step=number, arguments_hash="h", prompts=np.array([0]), reply="{}"
                    ),
                    now=now,
                )
                positions.append(selection.log_position)
            else:
                seen = [NewObservation.of_counts(0, 1, 2)]
                answer = store.append_observations(run.id, Outcomes(step=turn, observations=seen), now=now)
                positions.append(answer.log_position)
        return positions

    def read() -> list[int]:
        together.wait()
        seen: list[int] = []
        while not written.is_set():
            seen += [entry.position for entry in store.entries(run.id, after=len(seen))]
        return seen + [entry.position for entry in store.entries(run.id, after=len(seen))]

    with ThreadPoolExecutor(9) as threads:
        reader = threads.submit(read)
        positions = [position for some in threads.map(write, range(n_writers)) for position in some]
        written.set()

    last = 1 + n_writers * n_each
    assert sorted(positions) == list(range(2, last + 1))
    assert reader.result() == list(range(1, last + 1))
    assert store.run("math").log_position == last
    assert store.run("math").n_prompts == 1 + 2 * n_each


def test_one_of_many_callers_with_the_same_request_id_writes_and_the_others_replay(
    store: Store, pool: Run, now: datetime
) -> None:
    together = threading.Barrier(8)

    def append(_caller: int) -> Appended:
        together.wait()
        return store.append_observations(
            pool.id,
            Outcomes(step=0, observations=[NewObservation.of_counts("d", 1, 2)], request_id="r1", request_hash="h1"),
            new=NewPrompts(prompts=[NewPrompt("d")]),
            now=now,
        )

    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(append, range(8)))

    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 7
    assert {answer.log_position for answer in answers} == {3}
    assert store.run("math").log_position == 3


def test_acknowledged_observations_survive_the_death_of_the_process(
    store: Store, pool: Run, shared_database_url: str
) -> None:
    died = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, shared_database_url], capture_output=True, text=True)

    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [entry.position for entry in store.entries(pool.id, after=1)] == [int(died.stdout)]
    assert store.run("math").head_step == 7
