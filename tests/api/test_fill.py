"""A batch for so many informative groups: how large it is, what is said of it, and what is refused."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Caller

N = 200
RATES = {f"p{i}": (0.5 if i % 2 else 0.02) for i in range(N)}
"""Every other prompt is of use."""


@pytest.fixture
def pool(caller: Caller) -> Caller:
    caller.load([{"prompt_id": i, "text": f"What is {i}?", "category": "ab"[int(i[1:]) % 2]} for i in RATES])
    return caller


def fill(caller: Caller, step: int, n: int, **more: Any) -> dict[str, Any]:
    return caller.ok("POST", "/select_batch", json={"run": caller.run, "step": step, "informative_groups": n, **more})


def roll_out(caller: Caller, reply: dict[str, Any]) -> int:
    """Report all groups of a batch. How many are informative."""
    chance = Random(reply["step"])
    rewards = {p["prompt_id"]: [chance.random() < RATES[p["prompt_id"]] for _ in range(8)] for p in reply["prompts"]}
    observations = [{"prompt_id": i, "rewards": given} for i, given in rewards.items()]
    caller.observe(reply["step"], *observations, selection_id=reply["selection_id"])
    return sum(0 < sum(given) < 8 for given in rewards.values())


def test_as_many_prompts_come_as_make_so_many_informative_groups(pool: Caller) -> None:
    found, sizes, held = [], [], []
    for step in range(24):
        reply = fill(pool, step, 6)
        told, n = reply["fill"], len(reply["prompts"])
        assert 6 <= n <= 36
        assert told["informative_groups"] == 6
        assert n == 36 or told["expected_informative"] == pytest.approx(6, abs=1.2)
        found.append(roll_out(pool, reply))
        sizes.append(n)
        held.append(told["low"] <= found[-1] <= told["high"])

    assert 5 <= sum(found[8:]) / 16 <= 8
    assert sum(sizes[16:]) < sum(sizes[:8])  # what is known of the pool makes it cheaper
    assert sum(held) >= 21


def test_expectations_follow_what_past_batches_found(pool: Caller) -> None:
    """Of a pool that looks fine and is hopeless: forecasts that do not come true make batches larger."""
    sizes = []
    for step in range(4):
        reply = fill(pool, step, 4, seed=1, max_prompts=20)
        sizes.append(len(reply["prompts"]))
        ids = [prompt["prompt_id"] for prompt in reply["prompts"]]
        pool.observe(step, *({"prompt_id": i, "rewards": [0] * 8} for i in ids), selection_id=reply["selection_id"])

    assert sizes[0] < sizes[-1] == 20
    assert reply["fill"]["expected_informative"] < 0.8 * reply["forecast"]["informative_groups"]


def test_no_prompt_of_a_filled_batch_comes_back_at_once(pool: Caller) -> None:
    batches = [{p["prompt_id"] for p in fill(pool, step, 6)["prompts"]} for step in range(4)]

    assert all(not one & other for i, one in enumerate(batches) for other in batches[:i])


def test_factor_and_limit_are_heeded(pool: Caller) -> None:
    whole, half = (fill(pool, step, 10, fill_factor=factor) for step, factor in ((0, 1.0), (1, 0.5)))
    limited = fill(pool, 2, 10, max_prompts=11)

    assert len(half["prompts"]) == pytest.approx(len(whole["prompts"]) / 2, abs=1)
    assert len(limited["prompts"]) == 11


def test_a_category_gets_its_share_of_a_filled_batch(pool: Caller) -> None:
    reply = fill(pool, 0, 8, categories={"a": 0.75})

    n = len(reply["prompts"])
    assert sum(prompt["category"] == "a" for prompt in reply["prompts"]) >= int(0.75 * n)


def test_where_the_pool_is_small_there_is_what_there_is(pool: Caller) -> None:
    few = list(RATES)[:5]

    assert sorted(p["prompt_id"] for p in fill(pool, 0, 8, candidates=few)["prompts"]) == sorted(few)
    limited = fill(pool, 1, 8, categories_at_most={"a": 0.0}, candidates=few)
    assert {p["category"] for p in limited["prompts"]} == {"b"}
    body = {"run": pool.run, "step": 2, "informative_groups": 8, "candidates": few, "exclude": few}
    problem = pool.refused("POST", "/select_batch", json=body)
    assert problem.code == "not_enough_prompts"
    assert problem.detail.startswith("informative_groups asks for 8 prompts, 0 may be selected (pool 200,")


def test_a_filled_batch_may_be_asked_for_again_and_is_another_than_a_plain_one(pool: Caller) -> None:
    first = fill(pool, 0, 6)

    assert fill(pool, 0, 6) == {**first, "replayed": True}
    for arguments in ({"informative_groups": 7}, {"informative_groups": 6, "fill_factor": 2}, {"batch_size": 6}):
        body = {"run": pool.run, "step": 0, **arguments}
        assert pool.refused("POST", "/select_batch", json=body).code == "selection_conflict"
    assert pool.select(1, 6)["fill"] is None


def test_whether_filling_pays_is_said_where_the_cost_of_an_update_is_known(pool: Caller) -> None:
    told = [fill(pool, step, 8, update_cost=cost)["fill"] for step, cost in enumerate((0.1, 100.0))]

    assert fill(pool, 2, 8)["fill"]["pays"] is None
    assert [each["pays"] for each in told] == [each["relative_cost"] < 1 for each in told] == [False, True]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"cooldown_steps": 0}, "cooldown_steps is 0"),
        ({"acquisition": "paper"}, "prompts do not rest by default under 'paper'"),
        ({"acquisition": "thompson"}, "prompts do not rest by default under 'thompson'"),
    ],
)
def test_without_a_rest_no_batch_is_filled(pool: Caller, settings: dict[str, Any], why: str) -> None:
    body = {"run": pool.run, "step": 0, "informative_groups": 8, **settings}

    problem = pool.refused("POST", "/select_batch", json=body)

    assert (problem.status, problem.code) == (409, "fill_needs_rest")
    assert problem.detail == (
        f"informative_groups needs prompts to rest after they were chosen, and {why}: filled batches would have the "
        "same "
        "prompts again and again. Set cooldown_steps to 10 or more, or ask for a batch_size"
    )
    assert fill(pool, 0, 8, **{**settings, "cooldown_steps": 10})["fill"]["informative_groups"] == 8
    assert fill(pool, 1, 8, acquisition="uniform", cooldown_steps=0)["prompts"]


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        ({}, "send either batch_size or informative_groups"),
        ({"batch_size": 4, "informative_groups": 4}, "send either batch_size or informative_groups"),
        (
            {"batch_size": 4, "max_prompts": 9},
            "max_prompts goes with informative_groups: leave it out, or send those instead of batch_size",
        ),
        (
            {"informative_groups": 9, "max_prompts": 8},
            "max_prompts 8 is less than informative_groups 9: raise it, or ask for fewer",
        ),
        ({"informative_groups": 0}, "informative_groups: Input should be greater than or equal to 1, got 0"),
        (
            {"informative_groups": 1, "fill_factor": 0},
            "fill_factor: Input should be greater than or equal to 0.1, got 0",
        ),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(caller: Caller, arguments: dict[str, Any], detail: str) -> None:
    problem = caller.refused("POST", "/select_batch", json={"run": caller.run, "step": 0, **arguments})

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


def test_a_rewind_forgets_what_batches_found(pool: Caller) -> None:
    before = fill(pool, 0, 6)
    roll_out(pool, before)
    expected = fill(pool, 1, 6)["fill"]
    pool.ok("POST", f"/runs/{pool.run}/rewind", json={"step": 0})

    for step in (1, 2, 3):
        roll_out(pool, fill(pool, step, 6, seed=step))
    pool.ok("POST", f"/runs/{pool.run}/rewind", json={"step": 0})

    assert fill(pool, 1, 6)["fill"] == expected
