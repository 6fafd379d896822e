"""How a budget is spent on prompts: against the closed forms, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import special

from evenodds import InvalidRequest

if TYPE_CHECKING:
    from tests.api.conftest import Caller

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""


@pytest.fixture
def mopps(caller: Caller) -> Caller:
    """Beliefs Beta(9, 1) about `easy`, Beta(1, 9) about `hard`, Beta(1, 1) about `new`."""
    caller.create(predictor="mopps")
    caller.load_texts("easy", "hard", "new")
    caller.observe(0, {"prompt_id": "easy", "successes": 8, "attempts": 8})
    caller.observe(0, {"prompt_id": "hard", "successes": 0, "attempts": 8})
    return caller


def allocated(caller: Caller, budget: float, *prompts: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    items = [{"prompt_id": p} if isinstance(p, str) else p for p in prompts]
    return caller.ok("POST", "/allocate", json={"run": caller.run, "prompts": items, "budget": budget, **more})


def attempts(reply: dict[str, Any]) -> list[int]:
    return [allocation["attempts"] for allocation in reply["allocations"]]


def solved(a: float, b: float, k: float) -> float:
    return float(1 - np.exp(special.betaln(a, b + k) - special.betaln(a, b)))


def test_attempts_go_where_they_solve_most_and_the_budget_is_spent(mopps: Caller) -> None:
    """First gains 9/10, 1/10, 1/2; then .082, .082, 1/6: easy and hard tie from the second attempt on."""
    reply = allocated(mopps, 12, "easy", "hard", "new")

    assert sum(attempts(reply)) == reply["attempts"] == reply["spent"] == 12
    best = max(
        solved(9, 1, e) + solved(1, 9, h) + solved(1, 1, 12 - e - h) for e in range(1, 11) for h in range(1, 12 - e)
    )
    assert reply["expected_total"] == pytest.approx(best, rel=1e-9)
    assert reply["uniform_total"] == pytest.approx(solved(9, 1, 4) + solved(1, 9, 4) + solved(1, 1, 4), rel=1e-9)
    assert reply["shortfall"] == 0.0
    gains = [a["expected_gain"] for a in reply["allocations"]]
    assert gains[2] == pytest.approx(solved(1, 1, attempts(reply)[2]))
    assert sum(gains) == pytest.approx(reply["expected_total"])
    assert [a["success_rate"] for a in reply["allocations"]] == pytest.approx([0.9, 0.1, 0.5])
    assert [a["prompt_id"] for a in reply["allocations"]] == ["easy", "hard", "new"]
    assert reply["log_position"] == 3


def test_a_text_that_the_pool_has_not_is_allocated_too_and_nothing_is_stored(mopps: Caller) -> None:
    before = mopps.state()

    reply = allocated(mopps, 8, {"text": "Never seen?"}, "new")

    assert attempts(reply) == [4, 4]
    assert mopps.state() == before


def test_signal_gives_groups_and_most_to_those_that_are_seldom_informative(mopps: Caller) -> None:
    reply = allocated(mopps, 24, "easy", "hard", "new", objective="signal")

    assert sum(attempts(reply)) == 24
    easy, hard, new = attempts(reply)
    assert abs(easy - hard) <= 1
    assert min(easy, hard) > new >= 2
    assert reply["expected_total"] <= 3


def test_costs_are_counted_and_the_rest_pays_no_further_attempt(mopps: Caller) -> None:
    prompts: list[str | dict[str, Any]] = [{"prompt_id": "new", "cost": 2.5}, {"prompt_id": "hard", "cost": 1}]

    reply = allocated(mopps, 11.2, *prompts)

    first, second = attempts(reply)
    assert reply["spent"] == 2.5 * first + second
    assert 0 <= 11.2 - reply["spent"] < 1
    assert 0 < reply["shortfall"] < 0.5


def test_limits_of_the_call_and_of_a_prompt_are_kept(mopps: Caller) -> None:
    prompts: list[str | dict[str, Any]] = ["easy", {"prompt_id": "hard", "max_attempts": 3}, "new"]

    reply = allocated(mopps, 100, *prompts, min_attempts=2, max_attempts=10)

    assert attempts(reply) == [10, 3, 10]
    assert reply["spent"] == 23
    assert not reply["worthwhile"]
    assert reply["reason"] == "the budget gives every prompt its maximum, so there is nothing to choose"


def test_a_hopeless_prompt_may_get_nothing_where_that_is_allowed(mopps: Caller) -> None:
    reply = allocated(mopps, 2, "easy", "hard", "new", min_attempts=0)

    assert attempts(reply) == [1, 0, 1]


def test_bins_favour_challenging_prompts_and_promise_nothing(mopps: Caller) -> None:
    """Easy 1, challenging 4 (a rate of .1), fair 2 shares."""
    reply = allocated(mopps, 70, "easy", "hard", "new", method="bins")

    assert attempts(reply) == [10, 40, 20]
    assert reply["shortfall"] is None


def test_allocation_is_not_worth_it_before_anything_was_observed(caller: Caller) -> None:
    caller.create(predictor="mopps")
    caller.load_texts("a", "b")

    reply = allocated(caller, 8, "a", "b")

    assert not reply["worthwhile"]
    assert "no outcome has been observed yet" in reply["reason"]


def test_allocation_is_worth_it_where_prompts_differ(mopps: Caller) -> None:
    """Two attempts at the new one solve 2/3 of it, one at each 1/2 and 1/10."""
    reply = allocated(mopps, 2, "hard", "new", min_attempts=0)

    assert reply["worthwhile"]
    assert reply["reason"] == "the expected total rises by 11.1% against uniform spending"


@without_the_database
@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (
            {"budget": 2},
            "budget 2 is less than the minimum attempts of 3 prompts cost, 3: raise it, or lower min_attempts",
        ),
        ({"budget": 0}, "budget: Input should be greater than 0, got 0"),
        (
            {"objective": "signal", "min_attempts": 1},
            "prompts[0]: min_attempts 1: a training group of fewer than 2 attempts carries no signal; send 2 or more, "
            "and leave out prompts that should get none",
        ),
        ({"min_attempts": 5, "max_attempts": 4}, "prompts[0]: min_attempts 5 exceeds max_attempts 4"),
        (
            {"prompts": [{"text": str(i)} for i in range(2_000)], "budget": 1e6, "max_attempts": 1024},
            "max_attempts 1024 for 2000 prompts: at most 1000 attempts each are possible: lower it, or send "
            "fewer prompts",
        ),
        (
            {"prompts": [{"text": "a", "cost": 0}]},
            "prompts[0].cost: Input should be greater than or equal to 0.01, got 0",
        ),
        ({"objective": "fun"}, "objective: Input should be 'solve' or 'signal', got 'fun'"),
    ],
)
def test_what_cannot_be_spent_is_refused(mopps: Caller, change: dict[str, Any], detail: str) -> None:
    body = {"run": mopps.run, "prompts": [{"prompt_id": i} for i in ("easy", "hard", "new")], "budget": 9, **change}

    problem = mopps.refused("POST", "/allocate", json=body)

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


def test_unknown_prompts_are_named(mopps: Caller) -> None:
    problem = mopps.refused("POST", "/allocate", json={"run": mopps.run, "prompts": [{"prompt_id": "x"}], "budget": 2})

    assert (problem.status, problem.code) == (404, "prompt_unknown")
    assert problem.detail.startswith(f"prompts: 1 prompt is not in the pool of run {mopps.run!r}: 'x'")


def test_the_client_speaks_it_and_refuses_before_it_sends(mopps: Caller) -> None:
    reply = mopps.client.allocate(mopps.run, ["easy", {"text": "Other?", "cost": 2}], 9, max_attempts=4)

    assert [a.attempts for a in reply.allocations] == [3, 3]
    with pytest.raises(
        InvalidRequest, match=r"allocate was not sent: budget 1 is less than the minimum attempts of 2 prompts cost, 2"
    ):
        mopps.client.allocate(mopps.run, ["easy", "new"], 1)


def test_ten_thousand_prompts_are_allocated_in_one_call(mopps: Caller) -> None:
    reply = allocated(mopps, 80_000, *["hard", "new"] * 5_000)

    assert reply["attempts"] == 80_000
    assert len(reply["allocations"]) == 10_000
