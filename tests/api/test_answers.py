"""Reference answers: what they tell of prompts, and where they stand and do not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError
from tests.api.test_text_privacy import where_it_stands

from evenodds import PromptIn

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

SECRET = "the answer of three words"


def answers(caller: Caller) -> list[Any]:
    return [prompt["answer"] for prompt in caller.ok("GET", f"/runs/{caller.run}/prompts")["prompts"]]


def other(caller: Caller, name: str) -> Caller:
    return type(caller)(caller.http, caller.client, f"{caller.run}.{name}")


def test_answers_come_in_every_way_that_prompts_do(caller: Caller) -> None:
    lines = '{"prompt_id": "a", "text": "A?", "answer": "\\\\frac{1}{2}"}\n{"prompt_id": "b", "answer": {"x": [1]}}\n'
    kind = {"Content-Type": "application/x-ndjson"}
    assert caller.ok("POST", f"/runs/{caller.run}/prompts", content=lines, headers=kind)["added"] == 2
    caller.observe(0, {"prompt_id": "c", "text": "C?", "rewards": [1, 0], "answer": 0.5})

    assert answers(caller) == ["\\frac{1}{2}", {"x": [1]}, 0.5]
    assert caller.client.prompt(caller.run, "c").answer == 0.5


def test_an_answer_is_the_same_however_it_is_written_and_may_be_left_out(caller: Caller) -> None:
    caller.load([{"prompt_id": "a", "text": "A?", "answer": 42}])

    for same in (42, 42.0, "42", " 42 ", [42], None):
        assert caller.load([{"prompt_id": "a", "text": "A?", "answer": same}])["existing"] == 1
    added = caller.client.add_prompts(caller.run, [{"prompt_id": "a", "answer": 43}], keep_existing=True)

    assert added.conflicts == {"a": "answer"}
    assert answers(caller) == [42]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ('"' + "1" * 20_000 + '"', "answer: 20002 characters as JSON, the limit is 20000"),
        ("1e999", "answer: an answer is JSON"),
        ('{"a": [NaN]}', "answer: an answer is JSON"),
    ],
)
def test_what_is_no_answer_is_refused_and_not_quoted(caller: Caller, answer: str, fault: str) -> None:
    body = f'{{"prompts": [{{"prompt_id": "a", "answer": {answer}}}]}}'

    kind = {"Content-Type": "application/json"}
    problem = caller.refused("POST", f"/runs/{caller.run}/prompts", content=body, headers=kind)

    assert problem.status == 422
    assert fault in json.dumps(problem.model_dump(mode="json"))
    assert len(problem.detail) < 400


NO_JSON = {
    "surrogate": "\ud800",
    "nested": {"a": ["\udc00"]},
    "nan": float("nan"),
    "inf": [float("inf")],
    "huge": 10**5_000,
}


@pytest.mark.parametrize("answer", NO_JSON.values(), ids=NO_JSON)
def test_what_no_json_can_hold_is_refused_before_it_is_sent(answer: Any) -> None:
    with pytest.raises(ValidationError, match="answer"):
        PromptIn(prompt_id="a", answer=answer)


def test_answers_tell_prompts_of_one_text_apart(caller: Caller) -> None:
    kinds = {"whole": "7", "broken": "\\frac{3}{7}"}
    pool = [{"prompt_id": f"{kind}-{i}", "text": "?", "answer": kinds[kind]} for kind in kinds for i in range(40)]
    caller.load(pool)
    for step in range(8):
        chosen = [prompt["prompt_id"] for prompt in pool[step * 3 : step * 3 + 3] + pool[40 + step * 3 : 43 + step * 3]]
        caller.observe(step, *({"prompt_id": i, "successes": 8 * i.startswith("w"), "attempts": 8} for i in chosen))

    easy, hard = (prediction["success_rate"] for prediction in caller.predict("whole-39", "broken-39"))
    asked = [{"text": "?", "answer": "9"}, {"text": "?", "answer": "\\frac{5}{9}"}, {"text": "?"}]
    body = {"run": caller.run, "prompts": [{**prompt, "prompt_id": f"new-{i}"} for i, prompt in enumerate(asked)]}
    new_easy, new_hard, unsaid = (
        told["success_rate"] for told in caller.ok("POST", "/predict", json=body)["predictions"]
    )

    assert hard < 0.3 < 0.7 < easy
    assert new_hard < 0.3 < unsaid < 0.7 < new_easy


def test_a_run_that_keeps_no_texts_keeps_features_of_answers_alone(caller: Caller, service: Service) -> None:
    private = other(caller, "private")
    private.create(keep_text=False)
    private.load([{"prompt_id": "a", "text": "A?", "answer": SECRET}, {"prompt_id": "b", "text": "B?", "answer": "7"}])
    private.observe(0, {"prompt_id": "c", "text": "C?", "answer": [SECRET], "rewards": [1]})
    body = {"run": private.run, "prompt": {"text": "D?", "answer": SECRET}}

    assert private.ok("POST", "/budget", json=body)["decision_id"] is None
    assert answers(private) == [None, None, None]
    assert where_it_stands(service.database_url, SECRET) == []
    assert private.load([{"prompt_id": "a", "answer": SECRET}])["existing"] == 1
    changed = {"prompts": [{"prompt_id": "a", "answer": "7"}]}
    assert private.refused("POST", f"/runs/{private.run}/prompts", json=changed).code == "prompt_conflict"


@pytest.mark.parametrize("way", ["keep_text", "delete", "fork", "erase"])
def test_an_answer_goes_where_the_text_goes(caller: Caller, service: Service, way: str) -> None:
    words = f"{SECRET} {caller.run} {way}"
    caller.load([{"prompt_id": "a", "text": "A?", "answer": words}, {"prompt_id": "b", "answer": words + "!"}])
    assert "prompts" in where_it_stands(service.database_url, words)

    if way == "fork":
        fork = other(caller, "fork")
        fork.create(fork_of=caller.run, keep_text=False)
        assert answers(fork) == [None, None]
        assert fork.load([{"prompt_id": "a", "answer": words}])["existing"] == 1
        assert answers(caller) == [words, words + "!"]
    elif way == "keep_text":
        caller.create(keep_text=False)
        assert answers(caller) == [None, None]
    elif way == "erase":
        for prompt_id in ("a", "b"):
            assert caller.http.delete(f"/runs/{caller.run}/prompts/{prompt_id}").status_code == 204
        assert answers(caller) == []
    else:
        assert caller.http.delete(f"/runs/{caller.run}").status_code == 204
    if way != "fork":
        assert where_it_stands(service.database_url, words) == []
