"""What is predicted: the published baselines exactly, and never-seen prompts by their text."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Caller

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""


@pytest.fixture
def mopps(caller: Caller) -> Caller:
    caller.create(predictor="mopps")
    caller.load_texts("seen", "unseen")
    caller.observe(0, {"prompt_id": "seen", "successes": 3, "attempts": 8})
    caller.observe(4, {"prompt_id": "seen", "rewards": [1, 0.5]})
    return caller


def test_mopps_is_the_beta_of_one_plus_successes_and_failures(mopps: Caller) -> None:
    seen, unseen = mopps.predict("seen", "unseen")

    a, b = 1 + 4.5, 1 + 5.5
    assert seen["success_rate"] == a / (a + b)
    assert seen["std"] == pytest.approx(math.sqrt(a * b / (a + b + 1)) / (a + b), rel=1e-12)
    assert unseen["success_rate"] == 0.5
    assert unseen["std"] == pytest.approx(math.sqrt(1 / 12), rel=1e-12)
    assert unseen["interval"] == pytest.approx([0.05, 0.95])
    assert (seen["attempts_seen"], unseen["attempts_seen"]) == (10, 0)


def test_informative_probability_is_that_a_group_is_not_all_equal(mopps: Caller) -> None:
    """Under the flat belief, each number of successes out of G is equally likely: 1 - 2 / (G + 1)."""
    probabilities = [mopps.predict("unseen", group_size=g)[0]["informative_probability"] for g in (2, 8, 64)]

    assert probabilities == pytest.approx([1 - 2 / 3, 1 - 2 / 9, 1 - 2 / 65])
    assert mopps.predict("unseen")[0]["informative_probability"] == pytest.approx(1 - 2 / 9)


def test_uniform_learns_nothing(caller: Caller) -> None:
    caller.create(predictor="uniform")
    caller.load_texts("a")
    caller.observe(0, {"prompt_id": "a", "successes": 8, "attempts": 8})

    (prediction,) = caller.predict("a")

    assert prediction["success_rate"] == 0.5
    assert prediction["attempts_seen"] == 8


def test_predictions_stand_in_the_order_asked_repetitions_too(mopps: Caller) -> None:
    body = {"run": mopps.run, "prompts": [{"prompt_id": "unseen"}, {"text": "New?"}, *[{"prompt_id": "seen"}] * 2]}

    predictions = mopps.ok("POST", "/predict", json=body)["predictions"]

    assert [p["attempts_seen"] for p in predictions] == [0, 0, 10, 10]
    assert [p["prompt_id"] for p in predictions[:1] + predictions[2:]] == ["unseen", "seen", "seen"]


def test_predicting_a_new_text_stores_nothing(mopps: Caller) -> None:
    before = mopps.state()

    mopps.ok("POST", "/predict", json={"run": mopps.run, "prompts": [{"text": "What is new?"}]})

    assert mopps.state() == before


def test_gps_ranks_never_seen_prompts_by_their_text(caller: Caller) -> None:
    """A made world: sums are solved, proofs are not. Half of each is observed, the others are ranked."""
    run = f"{caller.run}.gps"
    sums = [f"What is {i} + {i + 3}? Give the number." for i in range(40)]
    proofs = [f"Prove that every group of order {i} squared is abelian if {i} is prime." for i in range(40)]
    caller.client.put_run(run)
    caller.client.add_prompts(run, [{"prompt_id": text, "text": text} for text in sums + proofs])
    for step in range(4):
        seen = slice(step * 5, step * 5 + 5)
        outcomes = [{"prompt_id": t, "successes": 7, "attempts": 8} for t in sums[seen]]
        outcomes += [{"prompt_id": t, "successes": 1, "attempts": 8} for t in proofs[seen]]
        caller.client.observe(run, step, outcomes)

    pooled = caller.client.predict(run, sums[20:] + proofs[20:]).predictions
    texts: list[dict[str, object]] = [{"text": "What is 91 + 5? Give the number."}]
    texts += [{"text": "Prove that every group of order 91 squared is abelian if 91 is prime."}]
    new_sum, new_proof = caller.client.predict(run, texts).predictions

    rates = [p.success_rate for p in pooled]
    assert min(rates[:20]) > max(rates[20:])
    assert new_sum.success_rate > new_proof.success_rate + 0.2


def test_a_new_text_is_predicted_like_a_prompt_of_the_pool(caller: Caller) -> None:
    run = f"{caller.run}.gps"
    caller.client.put_run(run)
    texts = [f"What is {i}?" for i in range(10)]
    caller.client.add_prompts(run, [{"prompt_id": t, "text": t} for t in texts])
    caller.client.observe(run, 0, [{"prompt_id": t, "rewards": [i % 2]} for i, t in enumerate(texts[:6])])

    pooled = caller.client.predict(run, [texts[8]]).predictions[0]
    new = caller.client.predict(run, [{"prompt_id": "elsewhere", "text": texts[8]}]).predictions[0]

    assert new.prompt_id == "elsewhere"
    assert new.success_rate == pytest.approx(pooled.success_rate, abs=2e-3)  # vectors are kept in half precision


@pytest.fixture
def solved(caller: Caller) -> Caller:
    """A run of the default predictor, in which one prompt was solved at step 10, and the head is 12."""
    caller.load_texts(*(f"p{i}" for i in range(20)))
    caller.observe(10, {"prompt_id": "p0", "successes": 8, "attempts": 8})
    caller.observe(12, {"prompt_id": "p1", "successes": 4, "attempts": 8})
    return caller


def test_evidence_ages_to_the_step_that_is_asked_for(solved: Caller) -> None:
    rates = [solved.predict("p0", step=step)[0]["success_rate"] for step in (0, 10, 11, 12, 20, 1_000)]
    (head,) = solved.predict("p0")
    unseen = [solved.predict("p9", step=step)[0] for step in (0, 1_000)]

    assert rates[0] == rates[1] > rates[2] > rates[3] > rates[4] > rates[5] > unseen[0]["success_rate"]
    assert rates[3] == head["success_rate"]
    assert unseen[0] == unseen[1] == solved.predict("p9")[0]


def test_a_step_means_the_same_in_every_way_to_ask(solved: Caller) -> None:
    """Alone and together with others at their own steps, and beside a new text, which has no evidence to age."""
    steps = [None, *range(8, 40)]
    alone = [solved.predict("p0", "p1", step=step) for step in steps]

    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda step: solved.predict("p0", "p1", step=step), steps))
    prompts = [{"prompt_id": "p0"}, {"prompt_id": "p1"}, {"text": "What is new?"}]
    mixed = [
        solved.ok("POST", "/predict", json={"run": solved.run, "prompts": prompts, "step": step})["predictions"]
        for step in steps
    ]

    for asked in (together, [answer[:2] for answer in mixed]):
        assert rates_of(asked) == [pytest.approx(each, rel=1e-12) for each in rates_of(alone)]
    assert len({answer[2]["success_rate"] for answer in mixed}) == 1


def rates_of(answers: list[list[dict[str, Any]]]) -> list[list[float]]:
    return [[prediction["success_rate"] for prediction in answer] for answer in answers]


def test_what_is_not_discounted_is_the_same_at_every_step(mopps: Caller) -> None:
    assert mopps.predict("seen", step=0) == mopps.predict("seen", step=1_000) == mopps.predict("seen")


def test_an_unknown_prompt_without_a_text_is_named(mopps: Caller) -> None:
    body = {"run": mopps.run, "prompts": [{"prompt_id": "seen"}, {"prompt_id": "x"}]}

    problem = mopps.refused("POST", "/predict", json=body)

    assert (problem.status, problem.code) == (404, "prompt_unknown")
    assert problem.detail == (
        f"prompts: 1 prompt is not in the pool of run {mopps.run!r}: 'x'; "
        "send its text instead, or load it with POST /runs/{run}/prompts"
    )


def test_a_long_list_of_unknown_prompts_is_cut(mopps: Caller) -> None:
    body = {"run": mopps.run, "prompts": [{"prompt_id": f"x{i}"} for i in range(9)]}

    problem = mopps.refused("POST", "/predict", json=body)

    assert "9 prompts are not in the pool" in problem.detail
    assert ": 'x0', 'x1', 'x2', 'x3', 'x4', ...;" in problem.detail


@without_the_database
@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"prompts": []}, "prompts: Tuple should have at least 1 item after validation, not 0"),
        (
            {"prompts": [{"prompt_id": "a"}] * 10_001},
            "prompts: Tuple should have at most 10000 items after validation, not 10001",
        ),
        ({"prompts": [{"prompt_id": "a"}, {}]}, "prompts[1]: a prompt needs a prompt_id, a text, or both"),
        ({"prompts": [{"text": ""}]}, "prompts[0].text: String should have at least 1 character, got ''"),
        ({"group_size": 0}, "group_size: Input should be greater than or equal to 1, got 0"),
        ({"step": -1}, "step: Input should be greater than or equal to 0, got -1"),
    ],
)
def test_a_malformed_question_is_refused(mopps: Caller, change: dict[str, Any], detail: str) -> None:
    body = {"run": mopps.run, "prompts": [{"prompt_id": "seen"}], **change}

    problem = mopps.refused("POST", "/predict", json=body)

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


def test_ten_thousand_prompts_are_answered_in_one_call(mopps: Caller) -> None:
    content = json.dumps({"run": mopps.run, "prompts": [{"prompt_id": "seen"}] * 10_000})

    reply = mopps.http.post("/predict", content=content, headers={"content-type": "application/json"})

    assert len(reply.json()["predictions"]) == 10_000
