"""The pool: what a prompt is, what repeats harmlessly, and what contradicts what the pool holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from evenodds import NotFound

if TYPE_CHECKING:
    from tests.api.conftest import Caller

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""

ODD_IDS = [
    "a/b",
    "/",
    "//",
    "a/",
    "a?b=c",
    "a#b",
    "100%",
    "%2F",
    "a b",
    " ",
    ".",
    "..",
    "../..",
    "a+b",
    "prompts",
    "ünï·çødé",
    "試験",
    "\U0001f3b2",
    "a\nb",
    "a\n",
    "a\\b",
    '"quoted"',
    "{prompt_id}",
    "x" * 256,
]


def prompts_path(caller: Caller) -> str:
    return f"/runs/{caller.run}/prompts"


def test_loading_again_is_harmless(caller: Caller) -> None:
    prompts = [{"prompt_id": "a", "text": "What is a?", "category": "g"}, {"prompt_id": "b"}]

    first, again = caller.load(prompts), caller.load(prompts)

    assert first == {"run": caller.run, "added": 2, "existing": 0, "pool_size": 2, "log_position": 1, "conflicts": {}}
    assert again == {"run": caller.run, "added": 0, "existing": 2, "pool_size": 2, "log_position": 1, "conflicts": {}}


def test_a_known_prompt_may_leave_out_what_the_pool_knows(caller: Caller) -> None:
    caller.load([{"prompt_id": "a", "text": "What is a?", "category": "g", "prior_rate": 0.5}])

    assert caller.load([{"prompt_id": "a"}])["existing"] == 1


def test_texts_that_differ_in_white_space_or_unicode_form_are_one_prompt(caller: Caller) -> None:
    reply = caller.load([{"text": "Is it café?"}, {"text": " Is  it\ncafe\u0301? "}, {"text": "Is it tea?"}])

    assert (reply["added"], reply["existing"]) == (2, 1)


def test_the_id_of_a_text_is_its_hash(caller: Caller) -> None:
    caller.load([{"text": "What is a?"}])

    (prompt,) = caller.client.prompts(caller.run)

    assert prompt.prompt_id.startswith("text:")
    assert len(prompt.prompt_id) == len("text:") + 32
    assert prompt.text == "What is a?"
    assert caller.client.predict(caller.run, [{"text": "What  is a?"}]).predictions[0].prompt_id == prompt.prompt_id


def test_a_prompt_keeps_what_it_came_with(caller: Caller) -> None:
    prompt = {
        "prompt_id": "a",
        "text": " What  is a?\n",
        "category": "arithmetic",
        "features": {"length": 12.5, "n_digits": 0},
        "prior_rate": 0.25,
        "prior_rates": {"qwen-7b": 0.5, "llama-8b": {"successes": 2.5, "attempts": 8}},
        "answer": {"value": [1, 2.5, "x"], "is_exact": True, "unit": None},
    }

    caller.load([prompt])

    (stored,) = caller.client.prompts(caller.run)
    assert stored.model_dump() == {**prompt, "group": "arithmetic"}
    state = caller.client.prompt(caller.run, "a")
    assert state.model_dump(include=set(prompt)) == prompt
    assert (state.visits, state.last_step, state.history) == (0, None, ())


def test_a_prompt_shows_its_own_history_newest_first(caller: Caller) -> None:
    caller.load_texts("a", "b")
    for step in range(3):
        caller.observe(step, {"prompt_id": "a", "successes": step, "attempts": 4}, {"prompt_id": "b", "rewards": [1]})

    state = caller.client.prompt(caller.run, "a")

    assert [(v.log_position, v.step, v.successes, v.attempts) for v in state.history] == [
        (4, 2, 2, 4),
        (3, 1, 1, 4),
        (2, 0, 0, 4),
    ]
    assert (state.visits, state.last_step, state.log_position) == (3, 2, 4)
    assert state.belief == caller.client.predict(caller.run, ["a"]).predictions[0]


def test_a_visit_tells_what_was_believed_when_its_batch_was_chosen(caller: Caller) -> None:
    caller.load_texts("a", "b")
    before = caller.predict("a", step=0)[0]
    batch = caller.select(0, 1, candidates=["a"])
    outcomes = ({"prompt_id": "a", "successes": 8, "attempts": 8}, {"prompt_id": "b", "successes": 0, "attempts": 8})
    caller.observe(0, *outcomes, selection_id=batch["selection_id"])
    caller.observe(1, {"prompt_id": "a", "successes": 8, "attempts": 8})

    (later, first), (unchosen,) = (caller.client.prompt(caller.run, name).history for name in "ab")

    assert later.forecast is None
    assert unchosen.forecast is None
    assert first.forecast is not None
    assert first.forecast.success_rate == pytest.approx(before["success_rate"], rel=1e-5)
    low, high = first.forecast.interval
    assert 0 <= low < first.forecast.success_rate < high <= 1


@pytest.mark.parametrize("prompt_id", ODD_IDS)
def test_any_id_finds_its_prompt_through_the_client(caller: Caller, prompt_id: str) -> None:
    caller.load([{"prompt_id": prompt_id}, {"prompt_id": "other"}])
    caller.client.observe(caller.run, 0, [{"prompt_id": prompt_id, "rewards": [1]}])

    assert caller.client.prompt(caller.run, prompt_id).prompt_id == prompt_id
    found = caller.ok("GET", f"/runs/{caller.run}/prompt", params={"prompt_id": prompt_id})
    assert (found["prompt_id"], found["visits"]) == (prompt_id, 1)
    assert caller.client.predict(caller.run, [prompt_id]).predictions[0].attempts_seen == 1
    assert caller.chosen(1, 1, candidates=[prompt_id]) == [prompt_id]


def test_an_unknown_prompt_is_named(caller: Caller) -> None:
    problem = caller.refused("GET", f"{prompts_path(caller)}/a%2Fb")

    assert (problem.status, problem.code) == (404, "prompt_unknown")
    assert problem.detail == "prompt 'a/b' is not in the pool: add it, or send its text"
    with pytest.raises(NotFound, match="prompt 'a/b' is not in the pool"):
        caller.client.prompt(caller.run, "a/b")


def test_an_id_that_no_prompt_can_have_is_malformed(caller: Caller) -> None:
    problem = caller.refused("GET", f"{prompts_path(caller)}/%00")

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail == r"prompt_id: a NUL character (\u0000) cannot be stored: remove it"


@pytest.mark.parametrize("attribute", ["text", "category", "features", "prior_rate", "answer"])
def test_a_known_id_that_states_something_else_is_refused(caller: Caller, attribute: str) -> None:
    known = {"prompt_id": "a", "text": "A?", "category": "g", "features": {"x": 1}, "prior_rate": 0.5, "answer": 42}
    other = {"text": "B?", "category": "h", "features": {"x": 2}, "prior_rate": 0.6, "answer": 43}
    caller.load([known])

    body = {"prompts": [{"prompt_id": "new"}, {**known, attribute: other[attribute]}]}
    problem = caller.refused("POST", prompts_path(caller), json=body)

    name = attribute.replace("_", " ")
    assert (problem.status, problem.code) == (409, "prompt_conflict")
    assert problem.detail == (
        f"prompt 2 of 2: id 'a' is in the pool with another {name}: "
        f"send it under another prompt_id, or leave the {name} out"
    )


def test_one_id_with_two_texts_in_one_call_is_refused(caller: Caller) -> None:
    body = {"prompts": [{"prompt_id": "a", "text": "A?"}, {"prompt_id": "b"}, {"prompt_id": "a", "text": "B?"}]}

    problem = caller.refused("POST", prompts_path(caller), json=body)

    assert (problem.status, problem.code) == (409, "prompt_conflict")
    assert problem.detail == (
        "prompt 3 of 3: id 'a' stands earlier in this call with another text: "
        "send it under another prompt_id, or leave the text out"
    )


@without_the_database
@pytest.mark.parametrize(
    ("prompt", "detail"),
    [
        ({}, ": a prompt needs a prompt_id, a text, or both"),
        ({"text": ""}, ".text: String should have at least 1 character, got ''"),
        ({"prompt_id": ""}, ".prompt_id: String should have at least 1 character, got ''"),
        ({"prompt_id": 5}, ".prompt_id: Input should be a valid string, got 5"),
        ({"text": "a\x00b"}, r".text: a NUL character (\u0000) cannot be stored: remove it, got 'a\x00b'"),
        ({"prompt_id": "\x00"}, r".prompt_id: a NUL character (\u0000) cannot be stored: remove it, got '\x00'"),
        (
            {"prompt_id": "a", "category": "\x00"},
            r".category: a NUL character (\u0000) cannot be stored: remove it, got '\x00'",
        ),
        ({"prompt_id": "a", "prior_rate": 1.5}, ".prior_rate: Input should be less than or equal to 1, got 1.5"),
        ({"prompt_id": "a", "features": {"x": "1"}}, ".features: x should be a number, got '1'"),
        ({"prompt_id": "a", "embedding": [1, True]}, ".embedding: item 1 should be a number, got True"),
        (
            {"prompt_id": "a", "features": {f"f{i}": 1 for i in range(65)}},
            ".features: Dictionary should have at most 64 items after validation, not more",
        ),
        (
            {"prompt_id": "a", "embedding": []},
            ".embedding: Tuple should have at least 1 item after validation, not 0",
        ),
        ({"prompt_id": "a", "difficulty": 1}, ".difficulty: there is no field of this name, got 1"),
        ("a", ": Input should be an object, got 'a'"),
    ],
)
def test_a_faulty_prompt_is_named_and_none_is_added(caller: Caller, prompt: Any, detail: str) -> None:
    problem = caller.refused("POST", prompts_path(caller), json={"prompts": [{"prompt_id": "good"}, prompt]})

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", f"prompts[1]{detail}")


def test_too_long_ids_and_texts_are_refused_and_shown_in_part(caller: Caller) -> None:
    body = {"prompts": [{"prompt_id": "x" * 257}, {"text": "x" * 200_001}]}

    problem = caller.refused("POST", prompts_path(caller), json=body)

    assert problem.errors[0].startswith("prompts[0].prompt_id: String should have at most 256 characters, got 'xxx")
    assert problem.errors[1].startswith("prompts[1].text: String should have at most 200000 characters, got 'xxx")
    assert all(len(line) < 200 for line in problem.errors)


@without_the_database
@pytest.mark.parametrize("field", ["prompt_id", "text", "category"])
def test_half_of_a_surrogate_pair_is_refused(caller: Caller, field: str) -> None:
    content = b'{"prompts": [{"prompt_id": "a", "text": "b", "%s": "\\ud800"}]}' % field.encode()

    problem = caller.refused(
        "POST", prompts_path(caller), content=content, headers={"Content-Type": "application/json"}
    )

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail.startswith("body: Invalid JSON: ")


@without_the_database
@pytest.mark.parametrize(
    ("n", "detail"),
    [
        (0, "prompts: Tuple should have at least 1 item after validation, not 0"),
        (10_001, "prompts: Tuple should have at most 10000 items after validation, not 10001"),
    ],
)
def test_lists_of_wrong_length_are_refused(caller: Caller, n: int, detail: str) -> None:
    problem = caller.refused("POST", prompts_path(caller), json={"prompts": [{"text": "a"}] * n})

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


def test_the_client_loads_pools_larger_than_one_call(caller: Caller) -> None:
    reply = caller.client.add_prompts(caller.run, [{"prompt_id": f"p{i}"} for i in range(10_005)])

    assert (reply.added, reply.pool_size, reply.log_position) == (10_005, 10_005, 2)


NO_CURSOR = (
    "cursor: it was not given as next_cursor by this listing to this caller: leave it out to start from the first page"
)


def test_pages_follow_each_other_without_gap_or_repetition(caller: Caller) -> None:
    names = [f"p{i}" for i in range(7)]
    caller.load_texts(*names)
    pages = []
    cursor: str | None = ""
    while cursor is not None:
        after = f"&cursor={cursor}" if cursor else ""
        page = caller.ok("GET", f"{prompts_path(caller)}?limit=3{after}")
        pages.append([prompt["prompt_id"] for prompt in page["prompts"]])
        cursor = page["next_cursor"]

    assert pages == [names[:3], names[3:6], names[6:]]


def test_a_full_last_page_has_no_next(caller: Caller) -> None:
    caller.load_texts("a", "b")

    assert caller.ok("GET", f"{prompts_path(caller)}?limit=2")["next_cursor"] is None


@without_the_database
@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("cursor=x", NO_CURSOR),
        ("cursor=-1", NO_CURSOR),
        ("cursor=99999999999", NO_CURSOR),
        ("limit=0", "limit: Input should be greater than or equal to 1, got '0'"),
        ("limit=1001", "limit: Input should be less than or equal to 1000, got '1001'"),
    ],
)
def test_a_bad_page_is_refused(caller: Caller, query: str, detail: str) -> None:
    problem = caller.refused("GET", f"{prompts_path(caller)}?{query}")

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_pool_of_an_unknown_run_is_404(caller: Caller, method: str) -> None:
    problem = caller.refused(method, "/runs/nowhere/prompts", json={"prompts": [{"prompt_id": "a"}]})

    assert (problem.status, problem.code) == (404, "run_unknown")


@pytest.mark.parametrize("media_type", ["json", "ndjson"])
def test_what_the_pool_has_with_another_content_is_kept_and_named_where_that_is_asked_for(
    caller: Caller, media_type: str
) -> None:
    client = caller.client
    client.put_run(caller.run, embedder="none")
    client.add_prompts(caller.run, [{"prompt_id": "a", "text": "A?"}, {"prompt_id": "b", "text": "B?"}])
    changed = [
        {"prompt_id": "a", "text": "Another A?"},
        {"prompt_id": "b", "text": "B?", "category": "letters"},
        {"prompt_id": "c", "text": "C?"},
    ]

    if media_type == "json":
        added = client.add_prompts(caller.run, changed, keep_existing=True)
        reply = (added.added, added.existing, added.conflicts, added.pool_size)
    else:
        lines = "\n".join(json.dumps(prompt) for prompt in changed)
        answer = caller.http.post(
            f"/runs/{caller.run}/prompts?keep_existing=true",
            content=lines,
            headers={"Content-Type": "application/x-ndjson"},
        ).json()
        reply = (answer["added"], answer["existing"], answer["conflicts"], answer["pool_size"])

    assert reply == (1, 0, {"a": "text", "b": "category"}, 3)
    assert client.prompt(caller.run, "a").text == "A?"


def test_what_others_showed_moves_the_forecast_and_may_come_with_new_texts(caller: Caller) -> None:
    rated = [{"prompt_id": f"p{i}", "text": f"What is {i}?", "prior_rates": {"other": i / 20}} for i in range(20)]
    caller.load(rated)

    easy, hard = (prediction["success_rate"] for prediction in caller.predict("p19", "p0"))
    body = {"run": caller.run, "prompts": [{"text": "And now?", "prior_rates": {"other": rate}} for rate in (0, 1)]}
    new_hard, new_easy = (told["success_rate"] for told in caller.ok("POST", "/predict", json=body)["predictions"])

    assert hard < 0.45 < 0.55 < easy
    assert new_hard < 0.45 < 0.55 < new_easy


def test_an_observation_may_add_a_prompt_with_what_others_showed(caller: Caller) -> None:
    rates = {"other": {"successes": 3, "attempts": 8}}
    observation = {"prompt_id": "new", "text": "What is new?", "rewards": [1, 0], "prior_rates": rates}

    caller.observe(0, observation)

    state = caller.client.prompt(caller.run, "new")
    assert state.model_dump()["prior_rates"] == rates


@pytest.mark.parametrize(
    ("rates", "fault"),
    [
        ({"a": 1.5}, "prior_rates.a"),
        ({"a": "0.5"}, "a should be a number, got '0.5'"),
        ({"a": {"successes": 9, "attempts": 8}}, "9 successes of 8 attempts: at most all can succeed"),
        ({"a": {"successes": 0, "attempts": 0}}, "attempts"),
        ({"": 0.5}, "at least 1 character"),
        ({f"m{i}": 0.5 for i in range(65)}, "at most 64 items"),
    ],
)
def test_rates_that_cannot_be_are_refused(caller: Caller, rates: dict[str, Any], fault: str) -> None:
    problem = caller.refused("POST", prompts_path(caller), json={"prompts": [{"prompt_id": "a", "prior_rates": rates}]})

    assert (problem.status, problem.code) == (422, "malformed")
    assert fault in problem.detail


def test_a_run_knows_the_rates_of_so_many_others_and_says_so(caller: Caller) -> None:
    caller.load([{"prompt_id": "a", "prior_rates": {f"m{i}": 0.5 for i in range(60)}}])
    caller.load([{"prompt_id": "b", "prior_rates": {f"m{i}": 0.5 for i in range(56, 64)}}])
    more = {"prompts": [{"prompt_id": "c", "prior_rates": {"m5": 0.5, "m64": 0.5}}]}

    problem = caller.refused("POST", prompts_path(caller), json=more)

    assert (problem.status, problem.code) == (409, "rate_names_limit")
    assert "prior_rates of 65 others, and the limit is 64 (the first above it is 'm64')" in problem.detail
    assert caller.load([{"prompt_id": "c", "prior_rates": {"m5": 0.5}}])["added"] == 1


def test_a_prompt_does_not_change_what_others_showed(caller: Caller) -> None:
    caller.load([{"prompt_id": "a", "prior_rates": {"other": 0.5}}])

    problem = caller.refused(
        "POST", prompts_path(caller), json={"prompts": [{"prompt_id": "a", "prior_rates": {"other": 0.6}}]}
    )

    assert (problem.status, problem.code) == (409, "prompt_conflict")
    assert "with another prior rates" in problem.detail
    assert caller.load([{"prompt_id": "a", "prior_rates": {"other": 0.5}}])["existing"] == 1


def test_rates_come_line_by_line_and_go_along_with_a_fork(caller: Caller) -> None:
    lines = '{"prompt_id": "a", "prior_rates": {"x": 0.9}}\n{"prompt_id": "b", "prior_rates": {"x": [1, 8]}}\n'
    kind = {"Content-Type": "application/x-ndjson"}
    problem = caller.refused("POST", prompts_path(caller), content=lines, headers=kind)
    assert problem.detail.startswith("line 2")
    good = lines.replace("[1, 8]", '{"successes": 1, "attempts": 8}')
    assert caller.ok("POST", prompts_path(caller), content=good, headers=kind)["added"] == 2
    fork = f"{caller.run}.fork"

    caller.client.put_run(fork, fork_of=caller.run)

    ours, theirs = (caller.client.predict(run, ["a", "b"]).predictions for run in (caller.run, fork))
    assert ours == theirs
    assert ours[0].success_rate > ours[1].success_rate
    many = {"prompts": [{"prompt_id": "c", "prior_rates": {f"m{i}": 0.5 for i in range(64)}}]}
    reply = caller.http.post(f"/runs/{fork}/prompts", json=many)
    assert reply.json()["code"] == "rate_names_limit"
