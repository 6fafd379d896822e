"""The trainer's loop over HTTP: what may be repeated, and what happens when many call at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from evenodds import Conflict, NotFound

if TYPE_CHECKING:
    from tests.api.conftest import Caller

N_THREADS = 8
T = TypeVar("T")


def at_once(call: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(N_THREADS) as threads:
        return list(threads.map(call, range(N_THREADS)))


def test_a_trainer_creates_loads_selects_observes_and_predicts(caller: Caller) -> None:
    client, run = caller.client, f"{caller.run}.trainer"
    texts = {f"sum-{i}": f"What is {i} + {i}?" for i in range(20)}

    created = client.put_run(run, group_size=4)
    added = client.add_prompts(run, [{"prompt_id": i, "text": text} for i, text in texts.items()])
    batch = client.select_batch(run, step=0, batch_size=5)
    outcomes = [{"prompt_id": prompt.prompt_id, "rewards": [1, 1, 0, 1]} for prompt in batch.prompts]
    observed = client.observe(run, 0, outcomes, selection_id=batch.selection_id)
    predicted = client.predict(run, [prompt.prompt_id for prompt in batch.prompts], step=1)

    assert (created.pool_size, created.log_position, created.head_step) == (0, 0, None)
    assert (added.added, added.existing, added.pool_size, added.log_position) == (20, 0, 20, 1)
    assert len({prompt.prompt_id for prompt in batch.prompts} & set(texts)) == 5
    assert (batch.log_position, batch.replayed, observed.log_position, observed.accepted) == (1, False, 3, 5)
    assert predicted.log_position == 3
    assert [p.prompt_id for p in predicted.predictions] == [p.prompt_id for p in batch.prompts]
    for before, after in zip(batch.prompts, predicted.predictions, strict=True):
        assert before.success_rate < after.success_rate < 1
        assert 0 < after.interval[0] < after.success_rate < after.interval[1] < 1
        assert after.attempts_seen == 4
    state = client.run(run)
    assert (state.log_position, state.head_step, state.observations) == (3, 0, 5)


def test_a_repeated_select_returns_the_same_batch(caller: Caller) -> None:
    caller.load_texts(*"abcdefgh")

    first = caller.select(3, 4, seed=7)
    caller.observe(3, {"prompt_id": "a", "successes": 1, "attempts": 8})
    again = caller.select(3, 4, seed=7)

    assert (first["replayed"], again["replayed"]) == (False, True)
    assert {**again, "replayed": False} == first


def test_a_select_for_a_chosen_step_by_other_arguments_is_refused(caller: Caller) -> None:
    caller.load_texts(*"abcdefgh")
    selection_id = caller.select(3, 4)["selection_id"]

    problem = caller.refused("POST", "/select_batch", json={"run": caller.run, "step": 3, "batch_size": 5})

    assert (problem.status, problem.code) == (409, "selection_conflict")
    assert problem.detail == (
        f"run {caller.run!r}: the batch for step 3 was chosen before with other arguments "
        f"(selection {selection_id!r}): repeat the same arguments, or choose for a later step"
    )


def test_a_repeated_observe_is_counted_once(caller: Caller) -> None:
    caller.load_texts("a")
    report = {"prompt_id": "a", "successes": 3, "attempts": 8}

    first = caller.observe(0, report, request_id="report-1")
    again = caller.observe(0, report, request_id="report-1")

    assert first == {
        "run": caller.run,
        "log_position": 2,
        "accepted": 1,
        "model_version": 0,
        "replayed": False,
    }
    assert again == {**first, "replayed": True}
    assert caller.predict("a")[0]["attempts_seen"] == 8


def test_a_repeated_observe_of_a_new_prompt_is_counted_once(caller: Caller) -> None:
    report = {"prompt_id": "new", "text": "What is new?", "rewards": [1, 0]}

    first = caller.observe(0, report, request_id="report-1")
    again = caller.observe(0, report, request_id="report-1")

    assert again == {**first, "replayed": True}
    assert caller.predict("new")[0]["attempts_seen"] == 2


def test_without_a_request_id_equal_reports_are_two(caller: Caller) -> None:
    caller.load_texts("a")

    replies = [caller.observe(0, {"prompt_id": "a", "successes": 3, "attempts": 8}) for _ in range(2)]

    assert [(reply["log_position"], reply["replayed"]) for reply in replies] == [(2, False), (3, False)]
    assert caller.predict("a")[0]["attempts_seen"] == 16


@pytest.mark.parametrize("change", [{"step": 1}, {"observations": [{"prompt_id": "a", "rewards": [0]}]}])
def test_a_request_id_with_another_body_is_refused(caller: Caller, change: dict[str, Any]) -> None:
    caller.load_texts("a")
    caller.observe(0, {"prompt_id": "a", "rewards": [1]}, request_id="report-1")
    body = {**caller.observed(0, {"prompt_id": "a", "rewards": [1]}, request_id="report-1"), **change}

    problem = caller.refused("POST", "/observe", json=body)

    assert (problem.status, problem.code) == (409, "request_conflict")
    start, end = problem.detail.split(" (")
    assert start == f"request_id 'report-1' was used in run {caller.run!r} at log position 2"
    assert end.endswith(" UTC) with another body: send this one under a new id")


def test_concurrent_selects_for_one_step_get_one_batch(caller: Caller) -> None:
    caller.load_texts(*(f"p{i}" for i in range(60)))

    replies = at_once(lambda _: caller.select(0, 10))

    assert sorted(reply["replayed"] for reply in replies) == [False] + [True] * (N_THREADS - 1)
    assert [{**reply, "replayed": None} for reply in replies] == [{**replies[0], "replayed": None}] * N_THREADS
    assert caller.client.run(caller.run).log_position == 2


def test_concurrent_observes_take_positions_without_gaps_and_all_count(caller: Caller) -> None:
    caller.load_texts("a")

    def report(_: int) -> list[int]:
        outcome = {"prompt_id": "a", "successes": 1, "attempts": 2}
        return [caller.observe(0, outcome)["log_position"] for _ in range(4)]

    positions = [position for report in at_once(report) for position in report]

    assert sorted(positions) == list(range(2, 2 + 4 * N_THREADS))
    assert caller.predict("a")[0]["attempts_seen"] == 2 * 4 * N_THREADS
    assert caller.client.run(caller.run).observations == 4 * N_THREADS


def test_one_request_id_from_many_threads_is_counted_once(caller: Caller) -> None:
    caller.load_texts("a")

    replies = at_once(lambda _: caller.observe(0, {"prompt_id": "a", "rewards": [1, 0]}, request_id="report-1"))

    assert sorted(reply["replayed"] for reply in replies) == [False] + [True] * (N_THREADS - 1)
    assert {reply["log_position"] for reply in replies} == {2}
    assert caller.predict("a")[0]["attempts_seen"] == 2


def test_one_new_prompt_from_many_threads_joins_the_pool_once(caller: Caller) -> None:
    report = {"prompt_id": "new", "text": "What is new?", "rewards": [1]}

    at_once(lambda _: caller.observe(0, report))

    assert caller.client.run(caller.run).pool_size == 1
    assert caller.predict("new")[0]["attempts_seen"] == N_THREADS


def test_prompts_are_read_while_others_arrive(caller: Caller) -> None:
    """A prompt is either unknown or answered whole, never half there."""
    names = [f"p{i}" for i in range(30)]

    def add_or_look(thread: int) -> set[int]:
        if thread == 0:
            for name in names:
                caller.load_texts(name)
            return {200}
        return {caller.http.get(f"/runs/{caller.run}/prompts/{name}").status_code for name in names}

    assert set().union(*at_once(add_or_look)) <= {200, 404}


def test_the_client_raises_what_the_service_says(caller: Caller) -> None:
    client = caller.client
    caller.load_texts("a")

    with pytest.raises(NotFound, match=r"404 run_unknown: run 'nowhere' does not exist: create it first"):
        client.predict("nowhere", ["a"])
    with pytest.raises(Conflict, match="409 not_enough_prompts: batch_size asks for 2 prompts, 1 may be selected"):
        client.select_batch(caller.run, step=0, batch_size=2)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/observe", {"step": 0, "observations": [{"prompt_id": "a", "rewards": [1]}]}),
        ("/predict", {"prompts": [{"prompt_id": "a"}]}),
        ("/select_batch", {"step": 0, "batch_size": 1}),
    ],
)
def test_an_unknown_run_is_404(caller: Caller, path: str, body: dict[str, Any]) -> None:
    problem = caller.refused("POST", path, json={"run": "nowhere", **body})

    assert (problem.status, problem.code) == (404, "run_unknown")
    assert problem.detail == "run 'nowhere' does not exist: create it first"
