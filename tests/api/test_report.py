"""The report and the alarms of a run, as a trainer causes them, on both databases."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.domain.learning.checkpoint import to_bytes
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

    from evenodds import Client

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)


def rate(prompt_id: str) -> float:
    """The truth: every fourth prompt is solved half of the time, the others never."""
    return 0.5 if int(prompt_id[1:]) % 4 == 0 else 0.0


def train(client: Client, run: str, *, steps: range, batch_size: int = 12, seed: int = 0) -> None:
    chance = random.Random(seed)
    for step in steps:
        batch = client.select_batch(run, step, batch_size)
        outcomes = [
            {"prompt_id": p.prompt_id, "rewards": [float(chance.random() < rate(p.prompt_id)) for _ in range(8)]}
            for p in batch.prompts
        ]
        client.observe(run, step, outcomes[:5], selection_id=batch.selection_id)
        client.observe(run, step, outcomes[5:])  # of the selection too: it chose them at this step


@pytest.fixture
def trained(caller: Caller) -> Caller:
    caller.create(control_share=0.25, cooldown_steps=0)  # a rest would cost a small pool much of the lift
    caller.load([{"prompt_id": f"p{i}", "text": f"Say {i}.", "category": "abc"[i % 3]} for i in range(60)])
    train(caller.client, caller.run, steps=range(12))
    return caller


def test_the_report_of_an_empty_run_says_that_nothing_happened(caller: Caller) -> None:
    report = caller.ok("GET", f"/runs/{caller.run}/report")

    assert (report["run"], report["observations"], report["selections"]) == (caller.run, 0, 0)
    assert (report["windows"], report["lift"], report["fallback"]) == ([], None, None)
    assert report["lift_missing"] == "no batch has been chosen yet: choose batches with POST /select_batch"


def test_the_report_tells_what_training_brought(trained: Caller) -> None:
    report = trained.client.report(trained.run)

    assert (report.observations, report.selections, report.window_steps) == (144, 12, 1)
    assert report.success_rate.count == report.informative.count == 144
    assert sum(bin_.count for bin_ in report.success_rate.reliability) == 144
    assert [window.first_step for window in report.windows] == list(range(12))
    assert report.rank_correlation is not None
    assert report.rank_correlation > 0.3
    policy, control = report.arms
    assert (policy.arm, policy.selected, policy.observed, policy.attempts) == ("policy", 108, 108, 864)
    assert (control.arm, control.selected, control.observed) == ("control", 36, 36)
    assert report.lift is not None
    assert report.lift_missing is None
    assert policy.informative_share is not None
    assert report.lift.policy_share == policy.informative_share
    low, high = report.lift.difference_interval
    assert low < report.lift.difference < high
    assert report.lift.difference > 0.1
    assert report.lift.rollouts_saved is not None
    assert report.lift.rollouts_saved > 0
    assert report.coverage.pool_size == 60
    assert {each.category: each.prompts for each in report.categories} == {"a": 20, "b": 20, "c": 20}
    assert sum(each.observed for each in report.categories) == 144
    assert report.skill.observations == 144


def test_forecasts_of_a_selection_are_those_that_it_answered(caller: Caller) -> None:
    caller.load_texts("a", "b", "c")
    caller.observe(0, {"prompt_id": "a", "successes": 7, "attempts": 8}, {"prompt_id": "b", "rewards": [0, 0, 0]})
    batch = caller.select(1, 3)
    caller.observe(0, {"prompt_id": "c", "successes": 8, "attempts": 8})  # late news change no forecast
    caller.observe(1, *({"prompt_id": p["prompt_id"], "successes": 4, "attempts": 8} for p in batch["prompts"]))

    report = caller.client.report(caller.run, since_step=1)

    (window,) = report.windows
    answered = [prompt["success_rate"] for prompt in batch["prompts"]]
    assert window.success_rate_forecast == pytest.approx(sum(answered) / 3, abs=1e-4)
    assert window.informative_forecast == pytest.approx(batch["forecast"]["informative_share"], abs=1e-4)
    assert (window.success_rate, window.informative_share) == (0.5, 1.0)


def test_outcomes_of_prompts_that_the_step_did_not_choose_belong_to_no_arm(caller: Caller) -> None:
    caller.load_texts(*(f"p{i}" for i in range(8)))
    chosen = caller.chosen(3, 2)
    other = next(f"p{i}" for i in range(8) if f"p{i}" not in chosen)

    caller.observe(3, {"prompt_id": other, "successes": 1, "attempts": 4})
    caller.observe(4, {"prompt_id": chosen[0], "successes": 1, "attempts": 4})

    report = caller.client.report(caller.run)
    assert [arm.observed for arm in report.arms] == [0, 0]
    assert report.success_rate.count == 2


def test_every_replica_gives_the_same_report(database_url: str, start_service: Callable[[str], Service]) -> None:
    one, two = (start_service(database_url).client for _ in range(2))
    one.put_run("math", embedder="none", control_share=0.25)
    one.add_prompts("math", [{"prompt_id": f"p{i}", "text": f"Say {i}."} for i in range(40)])
    train(one, "math", steps=range(4))
    two.report("math")
    train(two, "math", steps=range(4, 8))

    assert one.report("math") == two.report("math")
    assert one.run("math").alarms == two.run("math").alarms


def test_a_report_from_a_checkpoint_is_that_of_the_whole_log(
    database_url: str, start_service: Callable[[str], Service]
) -> None:
    whole = start_service(database_url).client
    whole.put_run("math", embedder="none", control_share=0.25)
    whole.add_prompts("math", [{"prompt_id": f"p{i}", "text": f"Say {i}."} for i in range(40)])
    train(whole, "math", steps=range(4))
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    store = Store(engine)
    run = store.run("math")
    live = LiveRun(run.id)
    live.catch_up(store, run)
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    store.save_checkpoint(run.id, position=live.state.position, state=to_bytes(live.state), now=now)
    engine.dispose()
    train(whole, "math", steps=range(4, 8))

    resumed = start_service(database_url).client

    assert resumed.report("math") == whole.report("math")


def test_an_unknown_run_has_no_report(caller: Caller) -> None:
    problem = caller.refused("GET", "/runs/nowhere/report")

    assert (problem.status, problem.code) == (404, "run_unknown")
    assert problem.detail == "run 'nowhere' does not exist: create it first"


@without_the_database
@pytest.mark.parametrize(
    ("since_step", "detail"),
    [
        ("-1", "since_step: Input should be greater than or equal to 0, got '-1'"),
        ("x", "since_step: Input should be a valid integer, unable to parse string as an integer, got 'x'"),
    ],
)
def test_a_bad_step_is_refused(caller: Caller, since_step: str, detail: str) -> None:
    problem = caller.refused("GET", f"/runs/{caller.run}/report", params={"since_step": since_step})

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


def alarms(caller: Caller) -> dict[str, dict[str, Any]]:
    return {alarm["code"]: alarm for alarm in caller.ok("GET", f"/runs/{caller.run}")["alarms"]}


def test_a_run_whose_outcomes_stop_raises_an_alarm_until_they_come(caller: Caller) -> None:
    caller.load_texts(*(f"p{i}" for i in range(8)))
    for step in range(2, 10):
        assert alarms(caller) == {}
        caller.select(step, 1)

    alarm = alarms(caller)["outcomes_stopped"]
    caller.observe(9, {"prompt_id": "p1", "rewards": [0, 1]})

    assert (alarm["since_step"], alarm["value"], alarm["limit"]) == (2, 8, 8)
    assert alarm["message"] == (
        "8 batches were selected since step 2 and no outcome was observed. Check that the trainer reports to POST "
        "/observe of this run, and that no filter drops all outcomes."
    )
    assert alarm["message"].endswith(alarm["next_step"])
    assert alarms(caller) == {}


def dead_verifier(caller: Caller, *, steps: range, dead_from: int) -> None:
    for step in steps:
        batch = caller.client.select_batch(caller.run, step, 32)
        chance = random.Random(step)
        outcomes = [
            {"prompt_id": p.prompt_id, "rewards": [float(step < dead_from and chance.random() < 0.5) for _ in range(8)]}
            for p in batch.prompts
        ]
        caller.client.observe(caller.run, step, outcomes, selection_id=batch.selection_id)


def test_a_dead_verifier_raises_an_alarm_whose_remedy_makes_the_run_forget_it(caller: Caller) -> None:
    caller.load([{"prompt_id": f"p{i}"} for i in range(400)])
    dead_verifier(caller, steps=range(8), dead_from=6)

    alarm = alarms(caller)["forecast_off"]
    report = caller.client.report(caller.run)
    assert (alarm["since_step"], alarm["remedy"]) == (
        6,
        {"operation": "retract", "body": {"from_step": 6, "to_step": 7}},
    )
    assert report.verdict == "broken"
    assert report.newest is not None
    assert (report.newest.first_step, report.newest.last_step) == (4, 7)

    caller.ok("POST", f"/runs/{caller.run}/{alarm['remedy']['operation']}", json=alarm["remedy"]["body"])

    assert alarms(caller) == {}
    assert caller.client.report(caller.run).verdict == "learning"


def misled(caller: Caller, *, steps: range, flip: int) -> None:
    """Rates known beforehand that are right until step `flip`, and then the contrary. No prompt comes twice."""
    for step in steps:
        names = range(64 * step, 64 * (step + 1))
        known = 0.05 if step % 2 else 0.95
        true = known if step < flip else 1 - known
        chance = random.Random(step)
        caller.observe(
            step,
            *(
                {
                    "prompt_id": f"p{i}",
                    "text": f"Say {i}.",
                    "prior_rate": known,
                    "rewards": [float(chance.random() < true) for _ in range(8)],
                }
                for i in names
            ),
        )


def test_where_forecasts_mislead_batches_are_uniform_and_say_why_until_they_do_no_more(caller: Caller) -> None:
    misled(caller, steps=range(12), flip=12)
    before = caller.select(12, 8)
    misled(caller, steps=range(12, 16), flip=12)

    during = caller.select(16, 8)
    raised = alarms(caller)
    reported = caller.client.report(caller.run).fallback
    caller.create(fallback=False)
    forced = caller.select(17, 8)
    without = alarms(caller)
    caller.create(fallback=None)
    uniform = caller.select(18, 8, acquisition="uniform")
    misled(caller, steps=range(19, 32), flip=12)
    after = caller.select(32, 8)

    assert before["fallback"] is None
    assert during["fallback"]["to"] == "uniform"
    assert during["fallback"]["reason"].startswith("over the newest 512 observations the model's skill against flat ")
    assert 12 <= during["fallback"]["since_step"] <= 15
    reason = during["fallback"]["reason"]
    assert raised["fallback"]["message"].startswith(f"{reason[0].upper()}{reason[1:]}. ")
    assert raised["fallback"]["value"] < 0
    assert reported is not None
    assert reported.reason == during["fallback"]["reason"]
    assert forced["fallback"] is None
    assert "fallback" not in without
    assert uniform["fallback"] is None  # it was asked for
    assert after["fallback"] is None
    assert "fallback" not in alarms(caller)
