"""A run may keep no texts: they are embedded and forgotten, and everything else goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import MetaData, select, update
from tests.waiting import PATIENCE_SECONDS, until

from evenodds import NotFound
from evenodds_service.domain.prompts import text_key
from evenodds_service.storage.engine import open_engine
from evenodds_service.storage.store import Store
from evenodds_service.storage.tables import prompts

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

SECRET = "The patient's name is a secret of three words."


def texts(caller: Caller) -> list[str | None]:
    return [prompt["text"] for prompt in caller.ok("GET", f"/runs/{caller.run}/prompts")["prompts"]]


def test_texts_are_not_stored_and_prompts_are_known_again(caller: Caller, service: Service) -> None:
    run = f"{caller.run}.private"
    private = type(caller)(caller.http, caller.client, run)
    private.create(keep_text=False)
    private.load([{"prompt_id": "a", "text": SECRET}, {"text": SECRET + " Again."}])

    again = private.load([{"prompt_id": "a", "text": SECRET}])
    other = private.refused("POST", f"/runs/{run}/prompts", json={"prompts": [{"prompt_id": "a", "text": "Another."}]})
    private.observe(0, {"prompt_id": "b", "text": SECRET + " Third.", "successes": 1, "attempts": 8})

    assert texts(private) == [None, None, None]
    assert again["existing"] == 1
    assert other.code == "prompt_conflict"
    (known,) = private.predict("b")
    (new,) = private.ok("POST", "/predict", json={"run": run, "prompts": [{"text": SECRET + " Third. "}]})[
        "predictions"
    ]
    assert known["attempts_seen"] == 8
    assert new["success_rate"] > 0
    assert len(private.chosen(1, 3)) == 3


def test_taking_back_the_permission_erases_what_is_stored(caller: Caller) -> None:
    caller.load_texts("a", "b")

    caller.create(keep_text=False)
    caller.load_texts("c")
    caller.create(keep_text=True)
    caller.load_texts("d")

    assert texts(caller) == [None, None, None, "What is d?"]


def where_it_stands(database_url: str, words: str) -> list[str]:
    """The tables whose rows hold the words, and the files of a SQLite database that do anywhere."""
    engine = open_engine(database_url, timeout_seconds=PATIENCE_SECONDS)
    tables = MetaData()
    tables.reflect(engine)
    found = []
    with engine.connect() as connection:
        for table in tables.sorted_tables:
            rows = connection.execute(select(table)).all()
            held = [value for row in rows for value in row if isinstance(value, (str, bytes))]
            if any(words.encode() in (value.encode() if isinstance(value, str) else value) for value in held):
                found.append(table.name)
    engine.dispose()
    if database_url.startswith("sqlite"):
        file = Path(database_url.removeprefix("sqlite:///"))
        found += [other.suffix for other in file.parent.glob(file.name + "*") if words.encode() in other.read_bytes()]
    return found


@pytest.mark.parametrize("at_step", [None, 0])
def test_a_fork_that_keeps_no_texts_gets_none(caller: Caller, at_step: int | None) -> None:
    caller.load_texts("a", "b")
    fork = type(caller)(caller.http, caller.client, f"{caller.run}.fork-{at_step}")

    fork.create(fork_of=caller.run, keep_text=False, **({} if at_step is None else {"at_step": at_step}))

    assert texts(fork) == [None, None]
    assert texts(caller) == ["What is a?", "What is b?"]
    assert fork.load([{"prompt_id": "a", "text": "What is a?"}])["existing"] == 1


def test_texts_that_a_run_has_against_its_setting_go_when_it_is_said_again(caller: Caller, service: Service) -> None:
    """As a fork had them that an earlier release made."""
    caller.create(keep_text=False)
    caller.load_texts("a")
    engine = open_engine(service.database_url, timeout_seconds=PATIENCE_SECONDS)
    with engine.begin() as connection:
        row = (prompts.c.run_id == Store(engine).run(caller.run).id,)
        connection.execute(update(prompts).where(*row).values(text=SECRET))
    engine.dispose()
    assert texts(caller) == [SECRET]

    caller.create(keep_text=False)

    assert texts(caller) == [None]


@pytest.mark.parametrize("way", ["keep_text", "delete"])
def test_what_is_erased_stands_in_no_table_and_in_no_page(caller: Caller, service: Service, way: str) -> None:
    words = f"{SECRET} {caller.run} {way}"
    long = [{"prompt_id": f"long-{i}", "text": words * 300} for i in range(3)]  # over pages of their own
    caller.load([*long, *({"prompt_id": f"{i}", "text": f"{words} {i}"} for i in range(200))])
    caller.observe(0, {"prompt_id": "new", "text": words, "successes": 1, "attempts": 8})
    caller.select(1, 8)
    stood = where_it_stands(service.database_url, words)

    if way == "keep_text":
        caller.create(keep_text=False)
    else:
        assert caller.http.delete(f"/runs/{caller.run}").status_code == 204

    assert "prompts" in stood
    assert where_it_stands(service.database_url, words) == []


def test_an_erased_prompt_stands_in_no_table_and_in_no_page(caller: Caller, service: Service) -> None:
    """Its text, its vectors and decisions on budgets; the other prompts and what is believed of them stay."""
    words = f"{SECRET} {caller.run} to be erased"
    caller.load_texts("a", "b")
    caller.observe(0, {"prompt_id": "gone", "text": words, "successes": 1, "attempts": 8})
    decided = caller.ok("POST", "/budget", json={"run": caller.run, "prompt": {"text": words}})["decision_id"]
    until(lambda: "decisions" in where_it_stands(service.database_url, words), "the decision to be written")

    reply = caller.http.delete(f"/runs/{caller.run}/prompts/gone")

    assert reply.status_code == 204
    assert where_it_stands(service.database_url, words) == []
    assert where_it_stands(service.database_url, text_key(words)) == []  # nor under the name of its vectors
    assert [prompt["prompt_id"] for prompt in caller.ok("GET", f"/runs/{caller.run}/prompts")["prompts"]] == ["a", "b"]
    state = caller.ok("GET", f"/runs/{caller.run}")
    assert (state["pool_size"], state["base_step"]) == (2, 0)
    assert caller.refused("DELETE", f"/runs/{caller.run}/prompts/gone").code == "prompt_unknown"
    assert caller.refused("POST", "/observe", json={"decision_id": decided, "rewards": [1]}).code == "decision_unknown"
    assert len(caller.chosen(1, 2)) == 2
    problem = caller.refused("POST", f"/runs/{caller.run}/rewind", json={"step": -1})
    assert (problem.status, problem.code) == (409, "below_base")


def test_a_prompt_of_an_id_that_no_path_can_hold_is_erased(caller: Caller) -> None:
    caller.load([{"prompt_id": "..", "text": "1 + 1 = ?"}, {"prompt_id": "a", "text": "2 + 2 = ?"}])

    caller.client.delete_prompt(caller.run, "..")

    assert [prompt.prompt_id for prompt in caller.client.prompts(caller.run)] == ["a"]
    with pytest.raises(NotFound, match="prompt_unknown"):
        caller.client.delete_prompt(caller.run, "..")


def test_a_run_that_answers_budgets_keeps_so_many_prompts_unless_it_chooses_batches(caller: Caller) -> None:
    def retention() -> dict[str, Any] | None:
        kept: dict[str, Any] | None = caller.ok("GET", f"/runs/{caller.run}")["retention"]
        return kept

    def ask() -> None:
        caller.ok("POST", "/budget", json={"run": caller.run, "prompt": {"text": "Why?"}})

    caller.load_texts("a", "b")
    assert retention() is None
    ask()
    until(lambda: retention() == {"prompts": 200_000, "days": None}, "the run to be a served one")
    caller.create(retention={"prompts": 0, "days": 30})
    ask()
    assert retention() == {"prompts": 0, "days": 30}

    caller.create(retention=None)
    caller.select(1, 1)
    ask()
    assert retention() is None


def test_the_first_batch_takes_back_what_a_budget_has_settled(caller: Caller) -> None:
    """A look at a training's pool before its first batch must not bound it."""
    caller.create(predictor="uniform", embedder="none")
    caller.load_texts(*(f"p{i}" for i in range(12)))
    caller.ok("POST", "/budget", json={"run": caller.run, "prompt": {"prompt_id": "p0"}})
    until(lambda: caller.ok("GET", f"/runs/{caller.run}")["retention"] is not None, "the run to be a served one")

    caller.select(0, 4)

    assert caller.ok("GET", f"/runs/{caller.run}")["retention"] is None
    caller.ok("POST", "/budget", json={"run": caller.run, "prompt": {"prompt_id": "p0"}})
    caller.observe(0, {"prompt_id": "p0", "rewards": [1]})
    assert caller.ok("GET", f"/runs/{caller.run}")["retention"] is None


def test_a_batch_leaves_a_retention_that_somebody_has_set(caller: Caller) -> None:
    caller.create(predictor="uniform", embedder="none")
    caller.load_texts(*(f"p{i}" for i in range(12)))
    caller.ok("POST", "/budget", json={"run": caller.run, "prompt": {"prompt_id": "p0"}})
    until(lambda: caller.ok("GET", f"/runs/{caller.run}")["retention"] is not None, "the run to be a served one")
    caller.create(retention={"prompts": 200_000})

    caller.select(0, 4)

    assert caller.ok("GET", f"/runs/{caller.run}")["retention"] == {"prompts": 200_000, "days": None}


def test_a_served_run_lets_go_of_texts_behind_the_replies(caller: Caller) -> None:
    caller.create(retention={"prompts": 10})
    for i in range(4):
        caller.observe(1, *({"text": f"Text {i} {j}?", "rewards": [1]} for j in range(5)))
    until(lambda: caller.ok("GET", f"/runs/{caller.run}")["pool_size"] == 10, "the pool to be cut")

    state = caller.ok("GET", f"/runs/{caller.run}")
    listed = [prompt["text"] for prompt in caller.ok("GET", f"/runs/{caller.run}/prompts")["prompts"]]
    again = caller.observe(1, {"text": "Text 0 0?", "rewards": [0]})

    assert state["observations"] == 20
    assert listed == [f"Text {i} {j}?" for i in (2, 3) for j in range(5)]
    assert again["accepted"] == 1
    assert caller.ok("GET", f"/runs/{caller.run}")["pool_size"] == 11
