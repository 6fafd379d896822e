"""What counts as an observation, and what is refused without a trace."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Caller

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""

JSON = {"content-type": "application/json"}
GOOD = {"prompt_id": "a", "successes": 1, "attempts": 2}


@pytest.fixture
def mopps(caller: Caller) -> Caller:
    """Under mopps the belief shows the counts: its mean is (1 + S) / (2 + S + F)."""
    caller.create(predictor="mopps")
    caller.load_texts("a", "b")
    return caller


def test_fractional_rewards_count_as_fractional_successes(mopps: Caller) -> None:
    mopps.observe(0, {"prompt_id": "a", "rewards": [0.25, 1, 0, 0.5]})
    mopps.observe(0, {"prompt_id": "b", "successes": 1.75, "attempts": 4})

    a, b = mopps.predict("a", "b")

    assert a["success_rate"] == b["success_rate"] == 2.75 / 6
    assert a["attempts_seen"] == b["attempts_seen"] == 4


def test_one_attempt_is_an_observation(mopps: Caller) -> None:
    mopps.observe(0, {"prompt_id": "a", "successes": 1, "attempts": 1})

    assert mopps.predict("a")[0]["success_rate"] == 2 / 3


def test_a_million_attempts_are_an_observation(mopps: Caller) -> None:
    mopps.observe(0, {"prompt_id": "a", "successes": 250_000, "attempts": 1_000_000})

    assert mopps.predict("a")[0]["success_rate"] == pytest.approx(0.25, abs=1e-5)


def test_a_prompt_may_stand_in_several_rows(mopps: Caller) -> None:
    reply = mopps.observe(2, GOOD, {"prompt_id": "a", "rewards": [1, 1, 1]}, GOOD)

    assert reply["accepted"] == 3
    assert mopps.predict("a")[0]["success_rate"] == 6 / 9
    visits = mopps.client.prompt(mopps.run, "a")
    assert (visits.visits, visits.last_step, len(visits.history)) == (1, 2, 3)


def test_late_steps_are_accepted_and_the_head_stays(mopps: Caller) -> None:
    mopps.observe(9, GOOD)

    reply = mopps.observe(3, {"prompt_id": "b", "successes": 2, "attempts": 2})

    assert reply["log_position"] == 3
    assert mopps.client.run(mopps.run).head_step == 9
    assert mopps.predict("b")[0]["success_rate"] == 3 / 4


def test_the_largest_step_is_accepted(mopps: Caller) -> None:
    mopps.observe(2**53, GOOD)

    assert mopps.client.run(mopps.run).head_step == 2**53
    assert mopps.predict("a")[0]["attempts_seen"] == 2


def test_a_step_far_beyond_all_others_has_to_be_confirmed(mopps: Caller) -> None:
    mopps.observe(7, GOOD)
    before = mopps.state()
    far = 100_008
    observed = {"run": mopps.run, "step": far, "observations": [GOOD]}
    selected = {"run": mopps.run, "step": far, "batch_size": 1, "allow_outstanding": True}

    for path, body in (("/observe", observed), ("/select_batch", selected)):
        refused = mopps.http.post(path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (409, "step_jump")
        assert "100,001 steps beyond the newest" in refused.json()["detail"]
        assert "?confirm_step=true" in refused.json()["detail"]
    assert before is not None
    assert mopps.state() == before

    assert mopps.observe(far - 1, GOOD)["log_position"] == before["log_position"] + 1, "a resume is none"
    chosen = mopps.client.select_batch(mopps.run, 2**52, 1, allow_outstanding=True, confirm_step=True)
    assert mopps.client.select_batch(mopps.run, 2**52, 1, allow_outstanding=True).selection_id == chosen.selection_id
    mopps.client.observe(mopps.run, 2**53, [GOOD], confirm_step=True)
    assert mopps.client.run(mopps.run).head_step == 2**53


def test_a_new_prompt_with_its_text_joins_the_pool_in_the_same_call(mopps: Caller) -> None:
    new = {"prompt_id": "new", "text": "What is new?", "category": "g", "prior_rate": 0.5, "features": {"length": 3}}

    reply = mopps.observe(0, GOOD, {**new, "rewards": [1, 1]})

    assert (reply["log_position"], reply["accepted"]) == (3, 2)
    state = mopps.client.prompt(mopps.run, "new")
    assert (state.text, state.category, state.prior_rate, state.features) == ("What is new?", "g", 0.5, {"length": 3})
    assert state.belief.success_rate == 3 / 4


def test_a_new_prompt_needs_its_text_in_one_of_its_rows_only(mopps: Caller) -> None:
    mopps.observe(0, {"prompt_id": "new", "rewards": [1]}, {"prompt_id": "new", "text": "New?", "rewards": [1]})

    assert mopps.predict("new")[0]["attempts_seen"] == 2


def test_a_text_alone_names_its_prompt(mopps: Caller) -> None:
    mopps.observe(0, {"text": "What is  new?", "rewards": [1]})
    mopps.observe(0, {"text": "What is new? ", "rewards": [1]})

    assert mopps.client.run(mopps.run).pool_size == 3


def test_a_known_prompt_may_come_with_its_text_again(mopps: Caller) -> None:
    mopps.observe(0, {**GOOD, "text": "What is a?"})

    assert mopps.client.run(mopps.run).pool_size == 2


def test_observations_name_the_selection_that_they_answer(mopps: Caller) -> None:
    selection_id = mopps.select(0, 1, candidates=["a"])["selection_id"]

    mopps.observe(0, GOOD, selection_id=selection_id)

    assert mopps.client.prompt(mopps.run, "a").history[0].selection_id == selection_id


@without_the_database
@pytest.mark.parametrize(
    ("observation", "detail"),
    [
        ({"rewards": [0.5, 1.5]}, ".rewards[1]: Input should be less than or equal to 1, got 1.5"),
        ({"rewards": [-0.1]}, ".rewards[0]: Input should be greater than or equal to 0, got -0.1"),
        ({"rewards": [1, float("nan")]}, ".rewards[1]: Input should be a finite number, got nan"),
        ({"rewards": [float("inf")]}, ".rewards[0]: Input should be a finite number, got inf"),
        ({"rewards": [float("-inf")]}, ".rewards[0]: Input should be a finite number, got -inf"),
        ({"rewards": []}, ".rewards: Tuple should have at least 1 item after validation, not 0"),
        ({"rewards": [True, "x"]}, ".rewards: item 1 should be a reward, got 'x'"),
        ({"successes": True, "attempts": 2}, ".successes: Input should be a number, got True"),
        ({"successes": 0, "attempts": "2"}, ".attempts: Input should be a number, got '2'"),
        ({"successes": float("nan"), "attempts": 2}, ".successes: Input should be a finite number, got nan"),
        ({"successes": -1, "attempts": 2}, ".successes: Input should be greater than or equal to 0, got -1"),
        ({"successes": 0, "attempts": 0}, ".attempts: Input should be greater than or equal to 1, got 0"),
        ({"successes": 0, "attempts": -3}, ".attempts: Input should be greater than or equal to 1, got -3"),
        (
            {"successes": 0, "attempts": 10**6 + 1},
            ".attempts: Input should be less than or equal to 1000000, got 1000001",
        ),
        (
            {"successes": 0, "attempts": 10**30},
            f".attempts: Input should be less than or equal to 1000000, got {10**30}",
        ),
        (
            {"successes": 0, "attempts": 2.5},
            ".attempts: Input should be a valid integer, got a number with a fractional part, got 2.5",
        ),
        ({"successes": 9, "attempts": 8}, ": successes 9 exceeds attempts 8"),
        (
            {"successes": 1, "attempts": 1, "rewards": [1]},
            ": send either rewards or successes and attempts, not both",
        ),
        ({}, ": send successes and attempts, or rewards"),
        ({"attempts": 2}, ": send successes and attempts, or rewards"),
        ({"rewards": [1], "reward": 1}, ".reward: there is no field of this name, got 1"),
        ({"rewards": [1], "prompt_id": None}, ": an observation needs a prompt_id, a text, or both"),
        ({"rewards": [1], "prompt_id": ""}, ".prompt_id: String should have at least 1 character, got ''"),
        ({"rewards": [1], "prompt_id": 7}, ".prompt_id: Input should be a valid string, got 7"),
        ({"rewards": [1], "prior_rate": 2}, ".prior_rate: Input should be less than or equal to 1, got 2"),
    ],
)
def test_a_faulty_observation_is_named_and_none_is_counted(
    mopps: Caller, observation: dict[str, Any], detail: str
) -> None:
    content = json.dumps(mopps.observed(0, GOOD, {"prompt_id": "b", **observation}))

    problem = mopps.refused("POST", "/observe", content=content, headers=JSON)

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail == f"observations[1]{detail}"
    assert mopps.predict("a")[0]["attempts_seen"] == 0


@without_the_database
@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"observations": []}, "observations: Tuple should have at least 1 item after validation, not 0"),
        (
            {"observations": [GOOD] * 10_001},
            "observations: Tuple should have at most 10000 items after validation, not 10001",
        ),
        ({"step": -1}, "step: Input should be greater than or equal to 0, got -1"),
        ({"step": 2**53 + 1}, f"step: Input should be less than or equal to {2**53}, got {2**53 + 1}"),
        ({"step": 1.5}, "step: Input should be a valid integer, got a number with a fractional part, got 1.5"),
        ({"step": None}, "step: Input should be a valid integer"),
        ({"request_id": ""}, "request_id: String should have at least 1 character, got ''"),
        ({"request_id": "a\x00"}, r"request_id: a NUL character (\u0000) cannot be stored: remove it, got 'a\x00'"),
        ({"observation": []}, "observation: there is no field of this name"),
    ],
)
def test_a_malformed_report_is_refused(mopps: Caller, change: dict[str, Any], detail: str) -> None:
    problem = mopps.refused("POST", "/observe", json={**mopps.observed(0, GOOD), **change})

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


def test_all_faults_of_a_report_are_listed(mopps: Caller) -> None:
    body = mopps.observed(-1, {"prompt_id": "a"}, GOOD, {"prompt_id": "b", "successes": 3, "attempts": 2})

    problem = mopps.refused("POST", "/observe", json=body)

    assert problem.detail == "step: Input should be greater than or equal to 0, got -1 (and 2 more)"
    assert problem.errors[1:] == (
        "observations[0]: send successes and attempts, or rewards",
        "observations[2]: successes 3 exceeds attempts 2",
    )


def test_ten_thousand_observations_are_one_report(mopps: Caller) -> None:
    assert mopps.observe(0, *[GOOD] * 10_000)["accepted"] == 10_000
    assert mopps.predict("a")[0]["attempts_seen"] == 20_000


def test_an_unknown_prompt_without_a_text_is_refused_with_all_others(mopps: Caller) -> None:
    body = mopps.observed(0, GOOD, {"text": "What is new?", "rewards": [1]}, {"prompt_id": "x", "rewards": [1]})

    problem = mopps.refused("POST", "/observe", json=body)

    assert (problem.status, problem.code) == (404, "prompt_unknown")
    assert problem.detail == (
        f"observations: 1 prompt is not in the pool of run {mopps.run!r}: 'x'; "
        "send its text along, or load it with POST /runs/{run}/prompts"
    )


def test_a_known_id_with_another_text_is_refused_with_all_others(mopps: Caller) -> None:
    body = mopps.observed(0, GOOD, {"text": "What is new?", "rewards": [1]}, {**GOOD, "text": "What else?"})

    problem = mopps.refused("POST", "/observe", json=body)

    assert (problem.status, problem.code) == (409, "prompt_conflict")
    assert problem.detail == (
        "prompt 2 of 2: id 'a' is in the pool with another text: send it under another prompt_id, or leave the text out"
    )


def test_an_unknown_selection_is_refused_with_its_new_prompts(mopps: Caller) -> None:
    body = mopps.observed(0, {"text": "What is new?", "rewards": [1]}, selection_id="nothing")

    problem = mopps.refused("POST", "/observe", json=body)

    assert (problem.status, problem.code) == (404, "selection_unknown")
    assert problem.detail == (
        f"selection 'nothing' does not exist in run {mopps.run!r}: "
        "send the selection_id that select_batch answered, or leave it out"
    )


def test_a_selection_of_another_run_is_unknown(mopps: Caller) -> None:
    other = f"{mopps.run}.other"
    mopps.client.put_run(other, embedder="none")
    mopps.client.add_prompts(other, [{"prompt_id": "a"}])
    selection_id = mopps.client.select_batch(other, 0, 1).selection_id

    problem = mopps.refused("POST", "/observe", json=mopps.observed(0, GOOD, selection_id=selection_id))

    assert (problem.status, problem.code) == (404, "selection_unknown")


def test_a_vector_that_the_run_does_not_take_is_named_by_its_row(mopps: Caller) -> None:
    body = mopps.observed(0, GOOD, {"prompt_id": "new", "text": "New?", "rewards": [1], "embedding": [1, 0]})

    problem = mopps.refused("POST", "/observe", json=body)

    assert (problem.status, problem.code) == (409, "embedding_refused")
    assert problem.detail == (
        f"observations[1].embedding (prompt_id 'new'): run {mopps.run!r} computes its vectors with embedder "
        "'none'; leave the vector out, or create a run with embedder 'caller'"
    )


def test_a_refused_request_id_is_free(mopps: Caller) -> None:
    mopps.refused("POST", "/observe", json=mopps.observed(0, {"prompt_id": "x", "rewards": [1]}, request_id="r"))

    assert not mopps.observe(0, GOOD, request_id="r")["replayed"]
