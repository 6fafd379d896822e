"""The budget of single requests: policies and their versions, prices that keep to a target, and the hot path."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from tests.api.conftest import Caller
from tests.waiting import PATIENCE_SECONDS, until

if TYPE_CHECKING:
    from tests.conftest import Service

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""The database does not matter: one backend will do."""
DEFAULT_TIERS = [
    {"label": "low", "at_least": 0.8, "max_tokens_scale": 0.5},
    {"label": "medium", "at_least": 0.3, "max_tokens_scale": 1.0},
    {"label": "high", "at_least": 0.0, "max_tokens_scale": 2.0},
]


@pytest.fixture
def mopps(caller: Caller) -> Caller:
    """Beliefs Beta(9, 1) about `easy`, Beta(1, 9) about `hard`, Beta(1, 1) about `new`."""
    caller.create(predictor="mopps")
    caller.load_texts("easy", "hard", "new")
    caller.observe(0, {"prompt_id": "easy", "successes": 8, "attempts": 8})
    caller.observe(0, {"prompt_id": "hard", "successes": 0, "attempts": 8})
    return caller


def asked(caller: Caller, prompt_id: str, **more: Any) -> dict[str, Any]:
    return caller.ok("POST", "/budget", json={"run": caller.run, "prompt": {"prompt_id": prompt_id}, **more})


def put_policy(caller: Caller, name: str = "default", **policy: Any) -> dict[str, Any]:
    return caller.ok("PUT", f"/runs/{caller.run}/budget_policies/{name}", json=policy)


def test_a_run_has_a_default_policy_of_version_0(caller: Caller) -> None:
    (policy,) = caller.ok("GET", f"/runs/{caller.run}/budget_policies")["policies"]

    assert policy == {
        "run": caller.run,
        "policy": "default",
        "version": 0,
        "mode": "parallel",
        "target_attempts": 4.0,
        "min_attempts": 1,
        "max_attempts": 32,
        "price": None,
        "tiers": DEFAULT_TIERS,
    }


def test_a_policy_that_changes_gets_the_next_version_and_others_stay(caller: Caller) -> None:
    versions = [
        put_policy(caller, "cheap", target_attempts=2)["version"],
        put_policy(caller, "cheap", target_attempts=2)["version"],
        put_policy(caller, "cheap", target_attempts=3)["version"],
        put_policy(caller, "cheap", target_attempts=2)["version"],
        put_policy(caller, "other")["version"],
    ]

    assert versions == [1, 1, 2, 3, 1]
    caller.create(group_size=16)  # changes no policy
    policies = caller.ok("GET", f"/runs/{caller.run}/budget_policies")["policies"]
    assert [(p["policy"], p["version"]) for p in policies] == [("cheap", 3), ("default", 0), ("other", 1)]


def test_a_stored_policy_answers_and_is_named(mopps: Caller) -> None:
    put_policy(mopps, "fixed", price=0.09, max_attempts=8)

    replies = {name: asked(mopps, name, policy="fixed") for name in ("easy", "new", "hard")}

    # Gains: easy .9, .082; new 1/2, 1/6, 1/12; hard .1, .082.
    assert {name: reply["attempts"] for name, reply in replies.items()} == {"easy": 1, "new": 2, "hard": 1}
    assert [replies[name]["effort"] for name in ("easy", "new", "hard")] == ["low", "medium", "high"]
    assert [replies[name]["max_tokens_scale"] for name in ("easy", "new", "hard")] == [0.5, 1.0, 2.0]
    new = replies["new"]
    assert (new["policy"], new["policy_version"], new["mode"], new["price"]) == ("fixed", 1, "parallel", 0.09)
    assert new["success_rate"] == pytest.approx(0.5)
    assert new["solve_probability"] == pytest.approx(2 / 3)
    assert new["go_on"] is True
    assert (new["attempts_seen"], replies["easy"]["attempts_seen"]) == (0, 8)
    assert new["log_position"] == 3


def test_after_failures_one_more_attempt_or_stop(mopps: Caller) -> None:
    """Beta(1, 1): after j failures the next attempt succeeds with 1 / (2 + j); at .22 it goes on after up to 2."""
    put_policy(mopps, mode="sequential", price=0.22)

    replies = [asked(mopps, "new", failures=j) for j in range(5)]

    assert [reply["go_on"] for reply in replies] == [True, True, True, False, False]
    assert [reply["attempts"] for reply in replies] == [3, 2, 1, 0, 0]
    assert [reply["success_rate"] for reply in replies] == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6])
    assert replies[4]["solve_probability"] == 0.0


def test_the_least_and_the_most_attempts_are_kept(mopps: Caller) -> None:
    put_policy(mopps, mode="sequential", price=1.0, min_attempts=2, target_attempts=2)
    assert [asked(mopps, "hard", failures=j)["attempts"] for j in range(4)] == [2, 1, 0, 0]

    put_policy(mopps, mode="sequential", price=0.0, max_attempts=6)
    assert [asked(mopps, "hard", failures=j)["attempts"] for j in (0, 5, 6, 99)] == [6, 1, 0, 0]


@without_the_database
def test_the_price_follows_the_traffic_so_that_the_target_is_met_on_average(caller: Caller) -> None:
    """100 prompts with beliefs of all kinds, asked for 600 times."""
    chance = random.Random(0)
    caller.create(predictor="mopps")
    names = [f"p{i}" for i in range(100)]
    caller.load_texts(*names)
    outcomes = [{"prompt_id": n, "successes": chance.randint(0, 6), "attempts": 6} for n in names[::2]]
    caller.observe(0, *outcomes)
    put_policy(caller, target_attempts=5, max_attempts=24)

    attempts = [asked(caller, chance.choice(names))["attempts"] for _ in range(600)]

    assert np.mean(attempts[150:]) == pytest.approx(5, rel=0.1)
    assert len(set(attempts)) > 3


def test_a_new_text_is_priced_by_what_the_run_knows_of_texts(caller: Caller) -> None:
    run = f"{caller.run}.gps"
    caller.client.put_run(run)
    sums = [f"What is {i} + {i + 3}? Give the number." for i in range(40)]
    proofs = [f"Prove that every group of order {i} squared is abelian if {i} is prime." for i in range(40)]
    caller.client.put_budget_policy(run, mode="sequential", target_attempts=4)
    for first in range(0, 40, 10):
        outcomes = [{"text": t, "successes": 7, "attempts": 8} for t in sums[first : first + 10]]
        outcomes += [{"text": t, "successes": 1, "attempts": 8} for t in proofs[first : first + 10]]
        caller.client.observe(run, 3, outcomes)

    easy = caller.client.budget(run, {"text": "What is 91 + 5? Give the number."})
    hard = caller.client.budget(run, {"text": "Prove that every group of order 91 squared is abelian if 91 is prime."})

    assert easy.success_rate > hard.success_rate + 0.2
    assert (easy.mode, easy.policy_version) == ("sequential", 1)
    assert easy.effort != hard.effort


def test_many_at_once_are_answered_each_by_its_own_fault_or_answer(mopps: Caller) -> None:
    """As they wait together they are computed together; one that is at fault spoils no other."""
    put_policy(mopps, price=0.09, max_attempts=8)
    names = ["easy", "nobody", "new", "hard"] * 12

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=mopps.http.base_url, timeout=PATIENCE_SECONDS) as http:
            bodies = [{"run": mopps.run, "prompt": {"prompt_id": name}} for name in names]
            return await asyncio.gather(*(http.post("/budget", json=body) for body in bodies))

    replies = asyncio.run(ask_all())

    expected = {"easy": 1, "new": 2, "hard": 1, "nobody": None}
    assert [reply.json().get("attempts") for reply in replies] == [expected[name] for name in names]
    refused = replies[1].json()
    assert (refused["status"], refused["code"]) == (404, "prompt_unknown")
    assert refused["detail"].startswith(f"prompt: 1 prompt is not in the pool of run {mopps.run!r}: 'nobody'")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_view_may_be_older_than_the_log_but_not_older_than_stated(
    start_service: Callable[..., Service], database_url: str
) -> None:
    service = start_service(database_url, budget_staleness_ms=200)
    caller = Caller(service.http, service.client, run="r")
    caller.create(predictor="mopps", embedder="none")
    caller.load_texts("new")
    caller.predict("new")  # from here on it is in memory that the pool has the prompt
    asked(caller, "new")
    caller.observe(0, {"prompt_id": "new", "successes": 4, "attempts": 4})

    reply = until(lambda: (newer := asked(caller, "new"))["log_position"] > 1 and newer, "an answer with the outcomes")

    assert reply["log_position"] == 2
    assert reply["attempts_seen"] == 4
    assert caller.predict("new")[0]["attempts_seen"] == 4  # exact by default


@without_the_database
@pytest.mark.parametrize(
    ("body", "status", "code", "detail"),
    [
        (
            {"policy": "mine"},
            404,
            "policy_unknown",
            "run RUN has no budget policy 'mine': create it with PUT /runs/{run}/budget_policies/{policy}, or name one "
            "of default",
        ),
        ({"run": "nowhere"}, 404, "run_unknown", "run 'nowhere' does not exist: create it first"),
        ({"prompt": {}}, 422, "malformed", "prompt: a prompt needs a prompt_id, a text, or both"),
        ({"failures": -1}, 422, "malformed", "failures: Input should be greater than or equal to 0, got -1"),
        ({"deadline_ms": 0}, 422, "malformed", "deadline_ms: Input should be greater than 0, got 0"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    mopps: Caller, body: dict[str, Any], status: int, code: str, detail: str
) -> None:
    problem = mopps.refused("POST", "/budget", json={"run": mopps.run, "prompt": {"prompt_id": "new"}, **body})

    assert (problem.status, problem.code, problem.detail) == (status, code, detail.replace("RUN", repr(mopps.run)))


@without_the_database
@pytest.mark.parametrize(
    ("policy", "detail"),
    [
        (
            {"target_attempts": 9, "max_attempts": 8},
            "target_attempts 9 must lie between min_attempts 1 and max_attempts 8",
        ),
        (
            {"tiers": [{"label": "a", "at_least": 0.2}, {"label": "b", "at_least": 0.5}]},
            "tiers: tiers[0] ('a') and tiers[1] ('b') have at_least 0.2 and 0.5, so that the second is never reached: "
            "at_least must fall from tier to tier",
        ),
        (
            {"tiers": [{"label": "a", "at_least": at} for at in (0.5, 0.3, 0.3, 0)]},
            "tiers: tiers[0] ('a') and tiers[1] ('a') have the same label and max_tokens_scale: leave one out",
        ),
        (
            {"tiers": [{"label": label, "at_least": at} for label, at in (("a", 0.5), ("b", 0.3), ("c", 0.3))]},
            "tiers: tiers[1] ('b') and tiers[2] ('c') have at_least 0.3 and 0.3, so that the second is never reached: "
            "at_least must fall from tier to tier",
        ),
        (
            {"tiers": [{"label": "a", "at_least": 1}, {"label": "b", "at_least": 0}]},
            "tiers: tiers[0] ('a') has at_least 1, which no predicted success rate reaches: lower it",
        ),
        (
            {"tiers": [{"label": "a", "at_least": 0.5}, {"label": "b", "at_least": 0.2}]},
            "tiers: the last one, tiers[1] ('b'), has at_least 0.2: give it 0, so that every request falls into a tier",
        ),
        ({"price": 2}, "price: Input should be less than or equal to 1, got 2"),
    ],
)
def test_a_malformed_policy_is_refused(caller: Caller, policy: dict[str, Any], detail: str) -> None:
    problem = caller.refused("PUT", f"/runs/{caller.run}/budget_policies/default", json=policy)

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


def test_a_run_holds_so_many_policies_and_says_so(caller: Caller) -> None:
    for i in range(64):
        put_policy(caller, f"p{i:02}")

    problem = caller.refused("PUT", f"/runs/{caller.run}/budget_policies/more", json={})

    assert (problem.status, problem.code) == (409, "policy_limit")
    assert problem.detail == (
        f"run {caller.run!r} holds 64 budget policies, which is the limit: change one of them "
        "(p00, p01, p02, p03, p04, ...) instead of adding 'more'"
    )


def test_a_policy_of_no_run_is_refused(caller: Caller) -> None:
    problem = caller.refused("PUT", "/runs/nowhere/budget_policies/p", json={})

    assert (problem.status, problem.code) == (404, "run_unknown")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_deadline_that_cannot_be_kept_is_answered_in_time(
    start_service: Callable[..., Service], database_url: str
) -> None:
    """The first request of a run has to read its log, which takes longer than a hundredth of a millisecond."""
    start_service(database_url).client.put_run("r", embedder="none")
    service = start_service(database_url)

    reply = service.http.post("/budget", json={"run": "r", "prompt": {"text": "a"}, "deadline_ms": 0.01})

    assert reply.status_code == 503
    assert reply.json()["code"] == "deadline_passed"
    assert reply.json()["detail"] == (
        "no budget within 0.01 ms: continue without a budget, or allow more time (deadline_ms, "
        "EVENODDS_BUDGET_DEADLINE_MS)"
    )
    assert service.http.post("/budget", json={"run": "r", "prompt": {"text": "a"}}).status_code == 200


def test_the_client_speaks_it(mopps: Caller) -> None:
    stored = mopps.client.put_budget_policy(
        mopps.run, "p", price=0.09, max_attempts=8, tiers=[{"label": "x", "at_least": 0}]
    )

    reply = mopps.client.budget(mopps.run, "new", policy="p", deadline_ms=30_000)

    assert (stored.version, reply.attempts, reply.effort) == (1, 2, "x")
    assert [p.policy for p in mopps.client.budget_policies(mopps.run).policies] == ["default", "p"]
    assert json.loads(stored.model_dump_json())["price"] == 0.09
