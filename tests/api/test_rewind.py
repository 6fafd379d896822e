"""Rewind and retract as a trainer and an operator see them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from evenodds import Client, Conflict, InvalidRequest

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""

IDS = [f"p{i}" for i in range(24)]


def learn(client: Client, run: str, steps: range, *, luck: int = 0) -> list[list[str]]:
    """Select, roll out and report each step, as a trainer does. Returns the batches."""
    batches = []
    for step in steps:
        batch = client.select_batch(run, step, 6, cooldown_steps=1)
        outcomes = [
            {"prompt_id": p.prompt_id, "successes": (int(p.prompt_id[1:]) + step + luck) % 5, "attempts": 4}
            for p in batch.prompts
        ]
        client.observe(run, step, outcomes, request_id=f"step-{step}", selection_id=batch.selection_id)
        batches.append([p.prompt_id for p in batch.prompts])
    return batches


def create(client: Client, run: str) -> str:
    client.put_run(run, embedder="none")
    client.add_prompts(run, [{"prompt_id": i, "text": f"What is {i}?"} for i in IDS])
    return run


def test_a_trainer_that_restarts_from_its_checkpoint_goes_on_as_if_nothing_had_happened(caller: Caller) -> None:
    client, twin = caller.client, create(caller.client, f"{caller.run}.twin")
    create(client, caller.run)
    learn(client, caller.run, range(3))
    abandoned = learn(client, caller.run, range(3, 8), luck=1)
    learn(client, twin, range(3))

    voided = client.rewind(caller.run, 2)

    assert (voided.run, voided.head_step) == (caller.run, 2)
    assert (voided.voided_observations, voided.voided_selections) == (30, 5)
    assert client.predict(caller.run, IDS).predictions == client.predict(twin, IDS).predictions
    again = learn(client, caller.run, range(3, 8), luck=2)  # the same steps, under the same request ids
    assert again == learn(client, twin, range(3, 8), luck=2)
    assert again[0] == abandoned[0]
    assert again != abandoned
    assert client.predict(caller.run, IDS).predictions == client.predict(twin, IDS).predictions
    state = client.run(caller.run)
    assert (state.observations, state.head_step) == (48, 7)
    assert client.prompt(caller.run, again[0][0]).history == tuple(
        visit.model_copy(update={"log_position": ours.log_position, "selection_id": ours.selection_id})
        for visit, ours in zip(
            client.prompt(twin, again[0][0]).history, client.prompt(caller.run, again[0][0]).history, strict=True
        )
    )


def test_a_rewind_keeps_what_the_restarted_trainer_has_reported_already(caller: Caller) -> None:
    client = caller.client
    create(client, caller.run)
    for request_id in ("old.1", "new.1", "newer.1", None):
        client.observe(caller.run, 3, [{"prompt_id": "p0", "rewards": [1]}], request_id=request_id)

    voided = client.rewind(caller.run, 2, incarnation="new")

    assert (voided.voided_observations, voided.head_step) == (3, 3)
    assert client.rewind(caller.run, 2).voided_observations == 1


def test_everything_may_be_forgotten_and_no_more_than_that(caller: Caller) -> None:
    client = caller.client
    create(client, caller.run)
    client.observe(caller.run, 0, [{"prompt_id": "p0", "rewards": [1]}])

    assert client.rewind(caller.run, -1).voided_observations == 1
    with pytest.raises(InvalidRequest, match="step: Input should be greater than or equal to -1"):
        client.rewind(caller.run, -2)


def test_outcomes_of_a_verifier_that_was_down_are_dropped_and_reported_again(caller: Caller) -> None:
    client, twin = caller.client, create(caller.client, f"{caller.run}.twin")
    create(client, caller.run)
    learn(client, twin, range(2))
    learn(client, caller.run, range(2))
    batch = client.select_batch(caller.run, 2, 6)
    outcomes = [{"prompt_id": p.prompt_id, "successes": 0, "attempts": 4} for p in batch.prompts]
    client.observe(caller.run, 2, outcomes, request_id="r", selection_id=batch.selection_id)

    voided = client.retract(caller.run, request_id="r")

    assert (voided.voided_observations, voided.voided_selections, voided.head_step) == (6, 0, 2)
    assert client.predict(caller.run, IDS).predictions == client.predict(twin, IDS).predictions
    assert client.select_batch(caller.run, 2, 6).selection_id == batch.selection_id
    verified = [{**outcome, "successes": 3} for outcome in outcomes]
    reply = client.observe(caller.run, 2, verified, request_id="r", selection_id=batch.selection_id)
    assert (reply.accepted, reply.replayed) == (6, False)
    assert client.run(caller.run).observations == 18


def test_one_prompts_outcomes_are_dropped(caller: Caller) -> None:
    caller.create(predictor="mopps")
    caller.load_texts("a", "b")
    caller.observe(0, {"prompt_id": "a", "rewards": [1, 1]}, {"prompt_id": "b", "rewards": [1, 1]})
    caller.observe(1, {"prompt_id": "a", "rewards": [0, 0]})

    reply = caller.ok("POST", f"/runs/{caller.run}/retract", json={"prompt_ids": ["a"], "to_step": 0})

    assert (reply["voided_observations"], reply["voided_selections"], reply["head_step"]) == (1, 0, 1)
    assert [p["success_rate"] for p in caller.predict("a", "b")] == [1 / 4, 3 / 4]


def test_repeating_a_rewind_or_a_retraction_changes_nothing(caller: Caller) -> None:
    create(caller.client, caller.run)
    learn(caller.client, caller.run, range(4))
    calls: list[tuple[str, dict[str, Any]]] = [
        ("rewind", {"step": 1}),
        ("retract", {"from_step": 1, "to_step": 1}),
        ("rewind", {"step": 0}),
    ]

    for name, body in calls:
        first = caller.ok("POST", f"/runs/{caller.run}/{name}", json=body)
        state = caller.state()
        again = caller.ok("POST", f"/runs/{caller.run}/{name}", json=body)

        assert again == {**first, "voided_observations": 0, "voided_selections": 0}
        assert caller.state() == state


def test_a_straggler_of_the_abandoned_policy_is_told(caller: Caller) -> None:
    create(caller.client, caller.run)
    batch = caller.client.select_batch(caller.run, 4, 2)
    caller.client.rewind(caller.run, 3)
    before = caller.state()

    with pytest.raises(Conflict, match=r"selection_voided.*was voided by the rewind at log position 3") as refused:
        caller.client.observe(caller.run, 4, [{"prompt_id": "p0", "rewards": [1]}], selection_id=batch.selection_id)

    assert refused.value.status == 409
    assert caller.state() == before


def test_every_replica_forgets_at_the_same_position(database_url: str, start_service: Callable[[str], Service]) -> None:
    one, two = (start_service(database_url).client for _ in range(2))
    create(one, "math")
    learn(one, "math", range(5))
    assert two.predict("math", IDS) == one.predict("math", IDS)

    position = two.rewind("math", 2).log_position
    replies = [client.predict("math", IDS) for client in (one, two, start_service(database_url).client)]

    assert [reply.log_position for reply in replies] == [position] * 3
    assert replies[0] == replies[1] == replies[2]
    learn(one, "math", range(3, 5), luck=1)
    assert one.predict("math", IDS) == two.predict("math", IDS)


def test_reports_and_choices_that_race_with_a_rewind_are_before_or_behind_it(caller: Caller) -> None:
    """None is counted and forgotten at once: what counts is what the beliefs show."""
    caller.create(predictor="mopps")
    create(caller.client, caller.run)

    def act(number: int) -> None:
        if number % 10 == 9:
            caller.client.rewind(caller.run, 50)
        elif number % 2:
            caller.client.select_batch(caller.run, 100 + number, 4)
        else:
            outcomes = [{"prompt_id": IDS[number % 24], "rewards": [1, 0]}]
            caller.client.observe(caller.run, number, outcomes, request_id=f"r{number}")

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(act, range(100)))

    run = caller.client.run(caller.run)
    seen = sum(p.attempts_seen for p in caller.client.predict(caller.run, IDS).predictions)
    assert seen == 2 * run.observations
    assert 26 <= run.observations <= 50
    caller.client.rewind(caller.run, 50)
    assert caller.client.run(caller.run).observations == 26
    assert caller.client.run(caller.run).head_step == 50


def test_unknown_runs_and_prompts_are_named(caller: Caller) -> None:
    caller.load_texts("a")

    prompt = caller.refused("POST", f"/runs/{caller.run}/retract", json={"prompt_ids": ["a", "x"]})

    assert (prompt.status, prompt.code) == (404, "prompt_unknown")
    assert prompt.detail == f"prompt_ids: 1 prompt is not in the pool of run {caller.run!r}: 'x'; leave it out"
    for name, body in (("rewind", {"step": 1}), ("retract", {"to_step": 1})):
        run = caller.refused("POST", f"/runs/nowhere/{name}", json=body)
        assert (run.status, run.code) == (404, "run_unknown")


@without_the_database
@pytest.mark.parametrize(
    ("call", "body", "detail"),
    [
        ("rewind", {}, "step: Field required"),
        ("rewind", {"step": -2}, "step: Input should be greater than or equal to -1, got -2"),
        ("retract", {}, "send at least one of from_step, to_step, prompt_ids and request_id"),
        ("retract", {"prompt_ids": []}, "prompt_ids: Tuple should have at least 1 item after validation, not 0"),
        ("retract", {"from_step": 3, "to_step": 2}, "from_step 3 is behind to_step 2"),
        ("retract", {"steps": 3}, "steps: there is no field of this name, got 3"),
    ],
)
def test_malformed_requests_are_refused(caller: Caller, call: str, body: dict[str, Any], detail: str) -> None:
    problem = caller.refused("POST", f"/runs/{caller.run}/{call}", json=body)

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail.startswith(detail)


def test_what_an_older_incarnation_still_reports_is_refused_without_a_selection_too(caller: Caller) -> None:
    client = caller.client
    create(client, caller.run)

    def report(incarnation: str, step: int) -> None:
        seen = [{"prompt_id": f"p{step}", "rewards": [1]}]
        client.observe(caller.run, step, seen, request_id=f"{incarnation}.{step}")

    for step in (1, 2):
        report("first", step)
    voided = client.rewind(caller.run, 2, incarnation="second")  # finds nothing, and is told all the same
    assert client.rewind(caller.run, 2, incarnation="second").log_position == voided.log_position
    with pytest.raises(Conflict, match=r"selection_voided.*incarnation 'first' at step 3.*went back behind that step"):
        report("first", 3)
    report("first", 0)  # a step that the second one has gone through too
    report("second", 3)
    report("third", 3)  # it has not gone back yet: its rewind is on its way
    client.observe(caller.run, 3, [{"prompt_id": "p9", "rewards": [1]}], request_id="another.callers")
    client.rewind(caller.run, 2, incarnation="third")
    with pytest.raises(Conflict, match="incarnation 'second' at step 4"):
        report("second", 4)
    report("third", 4)

    kept = [visit.step for prompt_id in IDS for visit in client.prompt(caller.run, prompt_id).history]
    assert sorted(kept) == [0, 1, 2, 3, 4]
