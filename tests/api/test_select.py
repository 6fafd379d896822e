"""What a choice depends on, what it forecasts, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Caller

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""

LIMITS = "ask for fewer, load more prompts, or loosen the settings that leave prompts out"


@pytest.fixture
def pool(caller: Caller) -> list[str]:
    """Sixteen prompts: four of group `hard` that always failed, twelve of `easy` that succeeded half of the time."""
    easy, hard = [f"easy-{i}" for i in range(12)], [f"hard-{i}" for i in range(4)]
    caller.load([{"prompt_id": i, "text": f"Add {i}.", "category": "easy"} for i in easy])
    caller.load([{"prompt_id": i, "text": f"Prove {i}.", "category": "hard"} for i in hard])
    for step in range(3):
        outcomes = [{"prompt_id": i, "successes": 4, "attempts": 8} for i in easy]
        caller.observe(step, *outcomes, *({"prompt_id": i, "successes": 0, "attempts": 8} for i in hard))
    return easy + hard


def test_only_candidates_are_chosen(caller: Caller, pool: list[str]) -> None:
    assert sorted(caller.chosen(3, 3, candidates=["hard-0", "hard-2", "easy-1"])) == ["easy-1", "hard-0", "hard-2"]


def test_what_is_excluded_is_not_chosen(caller: Caller, pool: list[str]) -> None:
    assert set(caller.chosen(3, 12, exclude=pool[:4])) == set(pool[4:])


def test_exclusion_counts_among_candidates_too(caller: Caller, pool: list[str]) -> None:
    assert caller.chosen(3, 1, candidates=pool[:2], exclude=pool[:1]) == [pool[1]]


def test_a_group_gets_its_share_though_its_prompts_score_low(caller: Caller, pool: list[str]) -> None:
    free = caller.select(3, 8)["prompts"]
    shared = caller.select(4, 8, categories={"hard": 0.5})["prompts"]

    assert sum(prompt["category"] == "hard" for prompt in free) <= 1
    assert sum(prompt["category"] == "hard" for prompt in shared) >= 4


def test_a_group_gets_no_more_than_its_largest_share(caller: Caller, pool: list[str]) -> None:
    chosen = caller.chosen(3, 6, categories_at_most={"easy": 0.5})

    assert sum(i.startswith("easy") for i in chosen) == 3


def test_the_runs_shares_hold_where_a_selection_states_none(caller: Caller, pool: list[str]) -> None:
    caller.create(categories={"hard": 0.25}, categories_at_most={"easy": 0.5})

    by_run = caller.chosen(3, 8)
    by_request = caller.chosen(4, 8, categories={"easy": 0.75}, categories_at_most={"easy": 0.75})

    assert sum(i.startswith("easy") for i in by_run) == 4
    assert sum(i.startswith("easy") for i in by_request) == 6


def test_the_runs_least_share_does_not_stop_a_trainer_when_the_group_runs_out(caller: Caller, pool: list[str]) -> None:
    caller.create(categories={"hard": 0.5, "poetry": 0.25})

    chosen = caller.chosen(3, 12)

    assert sum(i.startswith("hard") for i in chosen) == 4


def test_a_least_share_above_the_runs_largest_is_a_conflict(caller: Caller, pool: list[str]) -> None:
    caller.create(categories_at_most={"hard": 0.25})
    body = {"run": caller.run, "step": 3, "batch_size": 4, "categories": {"hard": 0.5}}

    problem = caller.refused("POST", "/select_batch", json=body)

    assert (problem.status, problem.code) == (409, "shares_conflict")
    assert problem.detail == (
        "category 'hard' has a least share of 0.5 (categories) above its largest share of 0.25 (categories_at_most): "
        "lower the first or raise the second"
    )


def test_the_control_arm_is_marked_and_ignores_what_is_known(caller: Caller, pool: list[str]) -> None:
    caller.create(control_share=0.5, lease_steps=0)

    prompts = [prompt for step in range(3, 43) for prompt in caller.select(step, 4)["prompts"]]

    control = [prompt["category"] == "hard" for prompt in prompts if prompt["arm"] == "control"]
    policy = [prompt["category"] == "hard" for prompt in prompts if prompt["arm"] == "policy"]
    assert len(control) == len(policy) == 80
    assert 0.12 < sum(control) / 80 < 0.4  # a quarter of the pool
    assert sum(policy) / 80 < 0.12


def test_a_repeated_selection_keeps_its_arms(caller: Caller, pool: list[str]) -> None:
    caller.create(control_share=0.25)
    first = caller.select(3, 8)

    caller.create(control_share=0.0)

    repeated = caller.http.post("/select_batch", json={"run": caller.run, "step": 3, "batch_size": 8})
    assert repeated.json() == {**first, "replayed": True}
    assert repeated.headers["idempotent-replayed"] == "true"
    assert {prompt["arm"] for prompt in caller.select(4, 8)["prompts"]} == {"policy"}


def test_the_floor_tries_hopeless_prompts_again(caller: Caller, pool: list[str]) -> None:
    chosen = {}
    for first, share in ((3, 0.0), (23, 0.25)):
        caller.create(reprobe_share=share, lease_steps=0)
        chosen[share] = {i for step in range(first, first + 16) for i in caller.chosen(step, 4)}

    assert not any(i.startswith("hard") for i in chosen[0.0])
    assert sum(i.startswith("hard") for i in chosen[0.25]) == 4


def test_prompts_half_solved_are_preferred_to_those_that_always_fail(caller: Caller, pool: list[str]) -> None:
    forecast = {p["prompt_id"]: p["informative_probability"] for p in caller.select(3, 16)["prompts"]}

    assert min(forecast[i] for i in pool[:12]) > max(forecast[i] for i in pool[12:])


def test_a_chosen_prompt_rests_for_the_cooldown(caller: Caller) -> None:
    caller.load_texts(*(f"p{i}" for i in range(16)))

    batches = [set(caller.chosen(step, 5, cooldown_steps=2)) for step in range(6)]

    for step in range(len(batches) - 2):
        assert not batches[step] & (batches[step + 1] | batches[step + 2])
    assert batches[0] & batches[3] | batches[1] & batches[4] | batches[2] & batches[5]


def test_by_default_a_chosen_prompt_rests_for_four_tenths_of_a_short_epoch(caller: Caller) -> None:
    caller.load_texts(*(f"p{i}" for i in range(80)))
    caller.observe(0, *({"prompt_id": f"p{i}", "successes": 4 if i < 8 else 0, "attempts": 8} for i in range(80)))

    def repeats(first: int, **arguments: Any) -> int:
        """How many of the next nine batches repeat a prompt of the four before them: .4 x 80 / 8 = 4 steps."""
        batches = [set(caller.chosen(step, 8, **arguments)) for step in range(first, first + 9)]
        return sum(bool(batches[i] & set().union(*batches[max(i - 4, 0) : i])) for i in range(1, 9))

    caller.create(lease_steps=0, reprobe_share=0)
    assert repeats(10) == 0
    assert repeats(30, cooldown_steps=0) > 0
    assert repeats(50, acquisition="paper") > 0


def test_the_rest_never_stops_a_trainer(caller: Caller) -> None:
    """Where too few others are left, those come back first that have rested the longest."""
    caller.load_texts(*(f"p{i}" for i in range(80)))
    caller.create(lease_steps=0)
    first, second = (caller.chosen(step, 1, candidates=["p1", "p2"])[0] for step in (5, 6))

    third = caller.chosen(7, 1, candidates=["p1", "p2"])

    assert {first, second} == {"p1", "p2"}
    assert third == [first]
    assert set(caller.chosen(8, 2, candidates=["p1", "p2"])) == {"p1", "p2"}


def test_with_a_visit_limit_prompts_do_not_repeat_until_all_were_chosen_and_then_the_trainer_goes_on(
    caller: Caller,
) -> None:
    caller.load_texts(*(names := [f"p{i}" for i in range(12)]))
    caller.create(max_visits=1)

    batches = [caller.chosen(step, 4) for step in range(3)]
    again = caller.chosen(3, 4)

    assert sorted(name for batch in batches for name in batch) == sorted(names)
    assert set(again) <= set(names)


def test_of_prompts_that_had_their_visits_the_least_visited_come_back(caller: Caller) -> None:
    caller.load_texts(*(names := [f"p{i}" for i in range(6)]))
    caller.create(max_visits=2, lease_steps=0, cooldown_steps=0)
    for step in range(4):
        often = names if step < 2 else names[:3]
        caller.observe(step, *({"prompt_id": name, "rewards": [1, 0]} for name in often))

    assert set(caller.chosen(9, 3)) == set(names[3:])


def test_an_observed_prompt_counts_as_visited(caller: Caller) -> None:
    caller.load_texts("a", "b")
    caller.observe(0, {"prompt_id": "a", "rewards": [1]})

    assert caller.chosen(1, 1, max_visits=1) == ["b"]


def test_a_target_rate_moves_the_choice(caller: Caller) -> None:
    caller.load_texts(*(names := [f"p{i}" for i in range(20)]))
    for step in range(4):
        outcomes = [{"prompt_id": name, "successes": i / 2, "attempts": 10} for i, name in enumerate(names)]
        caller.observe(step, *outcomes)

    low, high = (
        [p["success_rate"] for p in caller.select(step, 5, target_rate=target)["prompts"]]
        for step, target in ((4, 0.1), (5, 0.9))
    )

    assert sum(low) / 5 + 0.2 < sum(high) / 5


def test_diversity_lets_prompts_of_another_kind_in(caller: Caller) -> None:
    """As an argument and as a setting of the run."""
    alike = [{"prompt_id": f"alike-{i}", "text": f"What is {i + 10} + 10?"} for i in range(40)]
    others = [{"prompt_id": f"other-{i}", "text": "Prove that " + "x < y, " * (5 + i) + "\n" * i} for i in range(40)]
    caller.load([*alike, *others])
    caller.observe(0, *({"prompt_id": f"alike-{i}", "successes": 2, "attempts": 4} for i in range(40)))
    caller.observe(0, *({"prompt_id": f"other-{i}", "successes": 1, "attempts": 8} for i in range(40)))

    def others_in(step: int, **arguments: Any) -> int:
        return sum(i.startswith("other") for i in caller.chosen(step, 12, optimism=0, **arguments))

    little, much = others_in(1), others_in(2, diversity=1)
    caller.create(diversity=1)

    assert little <= 2
    assert much >= 4
    assert others_in(3) >= 4


def test_a_larger_group_is_likelier_to_be_informative(caller: Caller, pool: list[str]) -> None:
    small = caller.select(3, 16, group_size=2)["forecast"]["informative_share"]
    large = caller.select(4, 16, group_size=32)["forecast"]["informative_share"]

    assert 0 < small < large < 1


def test_uniform_acquisition_ignores_what_is_known(caller: Caller, pool: list[str]) -> None:
    chosen = [i for step in range(40) for i in caller.chosen(step, 4, acquisition="uniform")]

    assert 0.15 < sum(i.startswith("hard") for i in chosen) / len(chosen) < 0.35


def test_the_seed_and_nothing_else_moves_a_choice_by_chance(caller: Caller) -> None:
    """Runs with the same history choose alike under the same seed, and otherwise not."""
    chosen: list[list[str]] = []
    for seed in (1, 1, 2):
        caller.client.delete_run(caller.run)
        caller.create(embedder="none", acquisition="thompson")
        caller.load_texts(*(f"p{i}" for i in range(50)))
        chosen.append(caller.chosen(0, 10, seed=seed))

    assert chosen[0] == chosen[1]
    assert set(chosen[0]) != set(chosen[2])


def test_the_forecast_is_the_sum_over_the_batch(caller: Caller, pool: list[str]) -> None:
    reply = caller.select(3, 6)
    probabilities = [prompt["informative_probability"] for prompt in reply["prompts"]]

    assert reply["forecast"]["informative_groups"] == pytest.approx(sum(probabilities))
    assert reply["forecast"]["informative_share"] == pytest.approx(sum(probabilities) / 6)
    assert 6 < reply["forecast"]["pad_to"] <= 16
    assert {prompt["arm"] for prompt in reply["prompts"]} == {"policy"}
    for prompt in reply["prompts"]:
        assert prompt["category"] == prompt["prompt_id"].split("-")[0]
        assert 0 < prompt["success_rate"] < 1
        assert 0 < prompt["std"] < 0.5


def test_a_pool_that_cannot_fill_a_batch_with_informative_groups_has_no_pad(caller: Caller, pool: list[str]) -> None:
    assert caller.select(3, 16)["forecast"]["pad_to"] is None


@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        ({"batch_size": 17}, "batch_size asks for 17 prompts, 16 may be selected (pool 16, cooldown_steps 0):"),
        ({"batch_size": 2, "candidates": ["easy-1"]}, "batch_size asks for 2 prompts, 1 may be selected (pool 16,"),
        (
            {"batch_size": 10, "categories": {"hard": 0.5}},
            "categories: the share of 'hard' asks for 5 prompts, 4 may be selected (pool 16, cooldown_steps 0):",
        ),
        (
            {"batch_size": 10, "categories_at_most": {"easy": 0.5}},
            "batch_size asks for 10 prompts, 9 may be selected (pool 16, cooldown_steps 0, "
            "categories_at_most {'easy': 0.5}): ask for",
        ),
        ({"batch_size": 4, "categories": {"other": 0.5}}, "categories: the share of 'other' asks for 2 prompts, 0 may"),
        ({"batch_size": 1, "cooldown_steps": 9}, "batch_size asks for 1 prompts, 0 may be selected (pool 16, coold"),
    ],
)
def test_more_than_may_be_selected_is_refused(
    caller: Caller, pool: list[str], arguments: dict[str, Any], detail: str
) -> None:
    problem = caller.refused("POST", "/select_batch", json={"run": caller.run, "step": 3, **arguments})

    assert (problem.status, problem.code) == (409, "not_enough_prompts")
    assert problem.detail.startswith(detail)
    assert problem.detail.endswith(LIMITS)


def test_a_refused_choice_leaves_the_step_free(caller: Caller, pool: list[str]) -> None:
    caller.refused("POST", "/select_batch", json={"run": caller.run, "step": 3, "batch_size": 17})

    assert not caller.select(3, 16)["replayed"]


def test_nothing_can_be_chosen_from_an_empty_pool(caller: Caller) -> None:
    problem = caller.refused("POST", "/select_batch", json={"run": caller.run, "step": 0, "batch_size": 1})

    assert (problem.status, problem.code) == (409, "not_enough_prompts")
    assert problem.detail == (f"batch_size asks for 1 prompts, 0 may be selected (pool 0, cooldown_steps 0): {LIMITS}")


@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        (
            {"candidates": ["easy-1", "x", "y"]},
            "candidates: 2 prompts are not in the pool of run {run!r}: 'x', 'y'; "
            "load it with POST /runs/{{run}}/prompts, or leave it out",
        ),
        ({"exclude": ["x"]}, "exclude: 1 prompt is not in the pool of run {run!r}: 'x'; leave it out"),
    ],
)
def test_unknown_prompts_are_named(caller: Caller, pool: list[str], arguments: dict[str, Any], detail: str) -> None:
    body = {"run": caller.run, "step": 3, "batch_size": 1, **arguments}

    problem = caller.refused("POST", "/select_batch", json=body)

    assert (problem.status, problem.code) == (404, "prompt_unknown")
    assert problem.detail == detail.format(run=caller.run)


@without_the_database
@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1, got 0"),
        ({"batch_size": 10_001}, "batch_size: Input should be less than or equal to 10000, got 10001"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, got -1"),
        ({"seed": 2**63}, f"seed: Input should be less than {2**63}, got {2**63}"),
        ({"target_rate": 1}, "target_rate: Input should be less than 1, got 1"),
        ({"group_size": 1025}, "group_size: Input should be less than or equal to 1024, got 1025"),
        ({"acquisition": "best"}, "acquisition: Input should be 'yield', 'paper', 'thompson' or 'uniform', got 'best'"),
        ({"optimism": 11}, "optimism: Input should be less than or equal to 10, got 11"),
        ({"diversity": -0.1}, "diversity: Input should be greater than or equal to 0, got -0.1"),
        ({"diversity": 1.5}, "diversity: Input should be less than or equal to 1, got 1.5"),
        ({"max_visits": -1}, "max_visits: Input should be greater than or equal to 0, got -1"),
        ({"candidates": []}, "candidates: Tuple should have at least 1 item after validation, not 0"),
        ({"categories": {"a": 0.7, "b": 0.4}}, "categories: the shares sum to 1.1, the limit is 1"),
        ({"categories": {"a": 1.5}}, "categories.a: Input should be less than or equal to 1, got 1.5"),
        ({"categories_at_most": {"a": -1}}, "categories_at_most.a: Input should be greater than or equal to 0, got -1"),
        (
            {"categories": {"a": 0.5}, "categories_at_most": {"a": 0.25}},
            "categories.a: 0.5 is more than categories_at_most allows, 0.25: lower the first or raise the second",
        ),
        ({"temperature": 1}, "temperature: there is no field of this name, got 1"),
    ],
)
def test_arguments_out_of_range_are_refused(caller: Caller, arguments: dict[str, Any], detail: str) -> None:
    body = {"run": caller.run, "step": 0, "batch_size": 1, **arguments}

    problem = caller.refused("POST", "/select_batch", json=body)

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)
