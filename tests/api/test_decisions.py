"""A verdict that comes later needs only the decision's id."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select
from tests.waiting import PATIENCE_SECONDS, until

from evenodds_service.domain.prompts import text_key
from evenodds_service.domain.settings import RunSettings
from evenodds_service.errors import DecisionExpired, DecisionUnknown
from evenodds_service.runtime.decisions import Decisions
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.migration import upgrade
from evenodds_service.storage.store import Store
from evenodds_service.storage.tables import decisions

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service


def decided(caller: Caller, **more: Any) -> str:
    body = {"run": caller.run, "prompt": {"text": "Why?", "category": "c"}, **more}
    decision_id: str = caller.ok("POST", "/budget", json=body)["decision_id"]
    return decision_id


def test_a_verdict_counts_for_the_text_and_the_version_that_were_asked_about(caller: Caller) -> None:
    caller.create(predictor="mopps")
    decision_id = decided(caller, step=7)

    reply = caller.ok("POST", "/observe", json={"decision_id": decision_id, "rewards": [1, 0]})

    assert (reply["run"], reply["accepted"], reply["replayed"]) == (caller.run, 1, False)
    (prompt,) = caller.ok("GET", f"/runs/{caller.run}/prompts")["prompts"]
    assert (prompt["text"], prompt["category"]) == ("Why?", "c")
    (visit,) = caller.ok("GET", f"/runs/{caller.run}/prompts/{prompt['prompt_id']}")["history"]
    assert (visit["step"], visit["successes"], visit["attempts"]) == (7, 1, 2)


def test_one_verdict_counts_for_a_decision_and_a_further_one_needs_an_id(caller: Caller) -> None:
    caller.create(predictor="mopps")
    verdict: dict[str, Any] = {"decision_id": decided(caller), "rewards": [1]}
    first, repeated = (caller.http.post("/observe", json=verdict) for _ in range(2))

    assert (first.json()["replayed"], first.headers.get("idempotent-replayed")) == (False, None)
    assert (repeated.json()["replayed"], repeated.headers["idempotent-replayed"]) == (True, "true")
    problem = caller.refused("POST", "/observe", json={**verdict, "rewards": [0]})
    assert (problem.status, problem.code) == (409, "request_conflict")
    assert problem.detail == (
        f"decision {verdict['decision_id']!r} has a verdict with other rewards, and that one counts: send a request_id "
        "of your own to report a further attempt"
    )
    assert not caller.ok("POST", "/observe", json={**verdict, "rewards": [0], "request_id": "second"})["replayed"]


def test_a_decision_is_known_to_every_process(service: Service, caller: Caller) -> None:
    caller.create(predictor="mopps")
    decision_id = decided(caller)

    from evenodds_service.storage.engine import open_engine
    from evenodds_service.storage.store import Store

    store = Store(open_engine(service.database_url, timeout_seconds=PATIENCE_SECONDS))
    try:
        decision = until(lambda: store.decision(decision_id), "the decision to be written")
        late = datetime.now(timezone.utc) + timedelta(hours=25)
        store.save_decisions([], forget_before=datetime.now(timezone.utc) - timedelta(hours=24))
        assert store.decision(decision_id) == decision
        with pytest.raises(DecisionExpired, match=r"is kept for 24 hours: report the outcome with its run"):
            Decisions(store, now=lambda: late).find(decision_id)
        store.save_decisions([], forget_before=late)
        with pytest.raises(DecisionUnknown):
            Decisions(store, now=lambda: datetime.now(timezone.utc)).find(decision_id)
    finally:
        store.close()


def test_an_old_decision_is_gone_and_an_unknown_one_is_not_found(caller: Caller) -> None:
    caller.create(predictor="mopps")

    old = caller.refused("POST", "/observe", json={"decision_id": f"{caller.run}.1.{'0' * 32}", "rewards": [1]})
    unknown = caller.refused("POST", "/observe", json={"decision_id": "x", "rewards": [1]})

    assert (old.status, old.code) == (410, "decision_expired")
    assert (unknown.status, unknown.code) == (404, "decision_unknown")
    assert unknown.detail == (
        "decision 'x' is not known: it is none that a budget answered, or not among the newest 500,000 any more "
        "(EVENODDS_DECISIONS): report the outcome with its run, step and text"
    )


def test_a_decision_of_a_deleted_run_is_not_found(caller: Caller) -> None:
    caller.create(predictor="mopps")
    decision_id = decided(caller)
    caller.client.delete_run(caller.run)

    problem = caller.refused("POST", "/observe", json={"decision_id": decision_id, "rewards": [1]})

    assert problem.status == 404


def test_a_verdict_counts_where_its_prompt_was_retired_meanwhile(caller: Caller) -> None:
    caller.create(predictor="mopps", retention={"prompts": 10})
    caller.observe(0, {"text": "Why?", "rewards": [1]})
    decision_id = until(lambda: decided(caller), "the prompt to be known")

    for i in range(4):
        caller.observe(1, *({"text": f"Later {i} {j}?", "rewards": [1]} for j in range(5)))
    until(lambda: caller.ok("GET", f"/runs/{caller.run}")["pool_size"] == 10, "the pool to be cut")

    assert caller.ok("POST", "/observe", json={"decision_id": decision_id, "rewards": [0]})["accepted"] == 1
    prompts = caller.ok("GET", f"/runs/{caller.run}/prompts")["prompts"]
    assert prompts[-1]["text"] == "Why?"


@pytest.mark.parametrize("is_in_pool", [True, False])
@pytest.mark.parametrize("asked", ["My name is\u00a0Alice,  am I  right?", "My name is Alice, am I right? " * 6_000])
def test_an_erased_text_is_in_no_decision_and_others_stay(
    caller: Caller, service: Service, asked: str, is_in_pool: bool
) -> None:
    """However it was spelled when it was asked about, and however long it is."""
    caller.create(predictor="mopps")
    kept = decided(caller)
    erased = decided(caller, prompt={"text": asked})
    again = decided(caller, prompt={"text": " ".join(asked.split())})
    if is_in_pool:
        caller.ok("POST", "/observe", json={"decision_id": erased, "rewards": [1]})
    prompt_id = f"text:{text_key(asked)}"

    assert caller.http.delete(f"/runs/{caller.run}/prompts/{prompt_id}").status_code == 204

    for gone in (erased, again):
        problem = caller.refused("POST", "/observe", json={"decision_id": gone, "rewards": [0], "request_id": "x"})
        assert problem.code == "decision_unknown"
    assert caller.ok("POST", "/observe", json={"decision_id": kept, "rewards": [1]})["accepted"] == 1
    engine = open_engine(service.database_url, timeout_seconds=PATIENCE_SECONDS)
    with engine.connect() as connection:
        stored = connection.execute(select(decisions.c.prompt)).scalars().all()
    engine.dispose()
    assert not any("Alice" in prompt for prompt in stored)
    assert caller.http.delete(f"/runs/{caller.run}/prompts/{prompt_id}").status_code == 404


def test_a_decision_that_is_just_being_written_is_erased_too(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime(2027, 1, 2, tzinfo=timezone.utc)
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    store = Store(engine)
    run, _ = store.put_run("served", RunSettings(), now=now)
    writes, may_write = threading.Event(), threading.Event()
    save = store.save_decisions

    def slow(made: Any, **more: Any) -> None:
        writes.set()
        assert may_write.wait(PATIENCE_SECONDS)
        save(made, **more)

    monkeypatch.setattr(store, "save_decisions", slow)
    made = Decisions(store, now=lambda: now)
    decision_id = made.keep("served", run.id, step=1, prompt_id="p", prompt="{}")
    assert decision_id is not None
    assert writes.wait(PATIENCE_SECONDS)
    erasing = threading.Thread(target=made.erase, args=(run.id, "p", None))
    erasing.start()
    may_write.set()
    erasing.join(PATIENCE_SECONDS)

    assert store.decision(decision_id) is None
    with pytest.raises(DecisionUnknown):
        made.find(decision_id)
    store.close()


def test_a_run_that_keeps_no_texts_decides_only_about_prompts_that_it_has(caller: Caller) -> None:
    caller.create(predictor="mopps", keep_text=False)

    assert decided(caller) is None
    caller.observe(0, {"text": "Why?", "successes": 1, "attempts": 1})
    decision_id = until(lambda: decided(caller), "the prompt to be known")
    assert caller.ok("POST", "/observe", json={"decision_id": decision_id, "rewards": [1]})["accepted"] == 1


def test_what_is_wrong_with_a_verdict_is_named(caller: Caller) -> None:
    problem = caller.refused("POST", "/observe", json={"decision_id": "x", "rewards": []})

    assert (problem.status, problem.detail.partition(":")[0]) == (422, "rewards")


def test_no_thread_is_left_when_all_is_written(caller: Caller) -> None:
    caller.create(predictor="mopps")
    decided(caller)

    until(lambda: "decisions" not in {thread.name for thread in threading.enumerate()}, "the thread to end")


def test_the_newest_decisions_are_kept_and_none_where_that_is_set(database_url: str) -> None:
    now = datetime(2027, 1, 2, tzinfo=timezone.utc)
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    upgrade(engine)
    store = Store(engine)
    run, _ = store.put_run("served", RunSettings(), now=now)
    clock = iter(now + timedelta(seconds=i) for i in range(10_000))
    few = Decisions(store, now=lambda: next(clock), most=20)
    for _ in range(10):
        kept = [few.keep("served", run.id, step=1, prompt_id="p", prompt="{}") for _ in range(10)]
        few.close()  # writes them

    with engine.connect() as connection:
        left = connection.execute(select(decisions.c.decision_id)).scalars().all()
    assert 20 <= len(left) <= 40
    assert set(kept) <= set(left)
    assert Decisions(store, now=lambda: now, most=0).keep("served", run.id, step=1, prompt_id="p", prompt="{}") is None
    store.close()
