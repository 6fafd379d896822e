"""Each call: the request it makes and the reply it returns, or what it refuses to send."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from evenodds import (
    Alarm,
    AsyncClient,
    Client,
    Health,
    InvalidRequest,
    NotFound,
    Observation,
    PromptIn,
    PromptRef,
    RefitPolicy,
    RunState,
    Unavailable,
    Voided,
)
from evenodds.calls import MAX_CALL_BYTES, Calls
from evenodds.client import COMPRESSED_FROM_BYTES, RUN_HEADER
from evenodds.schemas import AllocateRequest, BudgetRequest, PolicyUpdate, RunUpdate, SelectRequest
from evenodds.version import __version__

if TYPE_CHECKING:
    from tests.client.conftest import Conversation, LoopbackServer

OBSERVED = {"run": "r", "log_position": 7, "accepted": 2, "model_version": 0, "replayed": False}
PREDICTED = {
    "run": "r",
    "model_version": 0,
    "log_position": 7,
    "predictions": [
        {
            "prompt_id": "a",
            "success_rate": 0.25,
            "std": 0.1,
            "interval": [0.1, 0.4],
            "informative_probability": 0.9,
            "attempts_seen": 8,
        }
    ],
}
NOTHING: dict[str, object] = {
    "count": 0,
    "mean_forecast": None,
    "mean_outcome": None,
    "calibration_error": None,
    "squared_error": None,
    "reliability": [],
}
REPORTED = {
    "run": "math-7b",
    "log_position": 0,
    "model_version": 0,
    "observations": 0,
    "selections": 0,
    "since_step": None,
    "window_steps": 1,
    "success_rate": NOTHING,
    "informative": NOTHING,
    "rank_correlation": None,
    "windows": [],
    "arms": [],
    "lift": None,
    "lift_missing": "none",
    "coverage": {"pool_size": 0, "chosen": 0, "observed": 0, "tried_share": 0, "mean_visits": 0, "visits": []},
    "categories": [],
    "other_groups": None,
    "skill": {"per_observation": None, "observations": 0, "recent": 0, "recent_observations": 0},
    "fallback": None,
}
SELECTED = {
    "run": "r",
    "step": 3,
    "selection_id": "s1",
    "model_version": 0,
    "log_position": 7,
    "replayed": False,
    "forecast": {"informative_share": 0.5, "informative_groups": 0.5, "pad_to": None},
    "prompts": [{"prompt_id": "a", "success_rate": 0.25, "std": 0.1, "informative_probability": 0.9}],
}
REFIT = {
    "refit_id": 5,
    "status": "done",
    "worker": "w",
    "attempts": 1,
    "requested_at": "2026-01-02T03:04:05Z",
    "finished_at": "2026-01-02T03:04:06Z",
    "model_version": 2,
    "report": {"seconds_fitting": 0.5},
    "error": None,
}
VOIDED = {"run": "r", "log_position": 9, "head_step": None, "voided_observations": 3, "voided_selections": 1}
PROMPT = {
    "run": "r",
    "prompt_id": "a",
    "text": "1+1?",
    "category": None,
    "features": None,
    "prior_rate": None,
    "model_version": 0,
    "log_position": 7,
    "belief": PREDICTED["predictions"][0],  # type: ignore[index]  # a list, as written above
    "visits": 1,
    "last_step": 3,
    "history": [{"log_position": 7, "step": 3, "successes": 2, "attempts": 8, "selection_id": None}],
}


def added(n: int, *, existing: int = 0, pool_size: int = 0) -> dict[str, object]:
    return {"run": "r", "added": n, "existing": existing, "pool_size": pool_size, "log_position": pool_size}


def test_put_run_sends_only_what_was_given(talk: Conversation) -> None:
    talk.replies_with_run(group_size=16)

    state = talk.call("put_run", "math-7b", group_size=16, predictor="gps")

    assert (talk.requests[0].method, talk.requests[0].url.path) == ("PUT", "/runs/math-7b")
    assert talk.body() == {"predictor": "gps", "group_size": 16}
    assert isinstance(state, RunState)
    assert state.group_size == 16


@pytest.mark.parametrize("policy", [RefitPolicy(every_seconds=60), {"every_seconds": 60}])
def test_put_run_sends_the_part_of_a_refit_policy_that_was_given(talk: Conversation, policy: object) -> None:
    talk.replies_with_run()

    state = talk.call("put_run", "math-7b", refit=policy)

    assert talk.body() == {"refit": {"every_seconds": 60}}
    assert state.refit == RefitPolicy(every_observations=2_048, every_seconds=600)


def test_a_reply_may_hold_fields_that_this_release_does_not_know(talk: Conversation) -> None:
    talk.replies_with_run(mood=["drift"])

    state = talk.call("run", "math-7b")

    assert state.run == "math-7b"


def test_every_request_names_the_release_and_carries_an_id(talk: Conversation) -> None:
    talk.replies_with_run()
    talk.replies_with_run()

    talk.call("run", "math-7b")
    talk.call("run", "math-7b")

    ids = [request.headers["x-request-id"] for request in talk.requests]
    assert [len(id_) for id_ in ids] == [32, 32]
    assert ids[0] != ids[1]
    assert talk.requests[0].headers["user-agent"] == f"evenodds/{__version__}"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", ()),
        ("report", ()),
        ("prompt", ("a",)),
        ("delete_run", ()),
        ("predict", (["a"],)),
        ("observe", (0, [{"prompt_id": "a", "successes": 1, "attempts": 2}])),
        ("select_batch", (0, 1)),
        ("allocate", (["a"], 8)),
        ("budget", ({"text": "1 + 1 = ?"},)),
        ("put_budget_policy", ("p",)),
    ],
)
def test_every_call_about_a_run_names_it_in_a_header(
    talk: Conversation, name: str, arguments: tuple[object, ...]
) -> None:
    talk.refuses(404, "run_not_found", "run 'math-7b' does not exist")

    with pytest.raises(NotFound):
        talk.call(name, "math-7b", *arguments)

    assert talk.requests[0].headers[RUN_HEADER] == "math-7b"


def test_a_call_about_no_run_names_none(talk: Conversation) -> None:
    talk.replies_with({"runs": [], "next_cursor": None, "total": 0})
    talk.replies_with(OBSERVED)

    talk.call("runs_page")
    talk.call("observe_decision", "d", [1.0])

    assert [RUN_HEADER in request.headers for request in talk.requests] == [False, False]


def test_add_prompt_lines_sends_them_as_they_are(talk: Conversation) -> None:
    talk.replies_with(added(2, pool_size=2))

    reply = talk.call("add_prompt_lines", "r", b'{"prompt_id": "a"}\n{"prompt_id": "b"}', first_line=2_001)

    (request,) = talk.requests
    assert (request.method, request.url.path, dict(request.url.params)) == (
        "POST",
        "/runs/r/prompts",
        {"first_line": "2001"},
    )
    assert request.headers["content-type"] == "application/x-ndjson"
    assert request.content == b'{"prompt_id": "a"}\n{"prompt_id": "b"}'
    assert (reply.added, reply.pool_size) == (2, 2)


def test_runs_follows_the_cursor_to_the_last_page(talk: Conversation) -> None:
    talk.replies_with({"runs": [{**talk.run, "run": "one"}], "next_cursor": "one&more"})
    talk.replies_with({"runs": [{**talk.run, "run": "two"}], "next_cursor": None})

    runs = talk.call("runs")

    assert [run.run for run in runs] == ["one", "two"]
    assert [dict(request.url.params) for request in talk.requests] == [{}, {"cursor": "one&more"}]


def test_prompts_follows_the_cursor_to_the_last_page(talk: Conversation) -> None:
    talk.replies_with({"prompts": [PROMPT], "next_cursor": "17"})
    talk.replies_with({"prompts": [{**PROMPT, "prompt_id": "b"}], "next_cursor": None})

    prompts = talk.call("prompts", "r")

    assert [prompt.prompt_id for prompt in prompts] == ["a", "b"]
    assert [str(request.url.raw_path, "ascii") for request in talk.requests] == [
        "/runs/r/prompts",
        "/runs/r/prompts?cursor=17",
    ]


def test_delete_run_returns_nothing(talk: Conversation) -> None:
    talk.replies.append(httpx.Response(204))

    assert talk.call("delete_run", "math-7b") is None
    assert (talk.requests[0].method, talk.requests[0].url.path) == ("DELETE", "/runs/math-7b")


def test_a_run_that_was_never_there_cannot_be_deleted(talk: Conversation) -> None:
    talk.refuses(404, "run_not_found", "there is no run 'math-7b'")

    with pytest.raises(NotFound):
        talk.call("delete_run", "math-7b")


def test_refit_asks_and_reads_the_refit(talk: Conversation) -> None:
    talk.replies_with({**REFIT, "status": "pending", "finished_at": None, "model_version": None, "report": None})

    refit = talk.call("refit", "math-7b")

    assert (talk.requests[0].method, talk.requests[0].url.path) == ("POST", "/runs/math-7b/refit")
    assert talk.body() == {"wait_seconds": 0.0}
    assert (refit.refit_id, refit.status, refit.model_version) == (5, "pending", None)


@pytest.mark.parametrize("wait_seconds", [0.0, 90.0])
def test_the_reply_of_refit_may_take_as_long_as_was_asked_on_top(talk: Conversation, wait_seconds: float) -> None:
    talk.options["timeout_seconds"] = 7.0
    talk.replies_with(REFIT)

    refit = talk.call("refit", "math-7b", wait_seconds=wait_seconds)

    assert talk.body() == {"wait_seconds": wait_seconds}
    timeout = talk.requests[0].extensions["timeout"]
    assert timeout == {"connect": 7.0, "read": 7.0 + wait_seconds, "write": 7.0, "pool": 7.0}
    assert (refit.status, refit.model_version, refit.report) == ("done", 2, {"seconds_fitting": 0.5})


def test_refits_lists_what_came_of_them(talk: Conversation) -> None:
    failed = {**REFIT, "refit_id": 6, "status": "failed", "model_version": None, "error": "ValueError: no"}
    talk.replies_with({"refits": [failed, REFIT]})

    found = talk.call("refits", "math-7b").refits

    assert (talk.requests[0].method, talk.requests[0].url.path) == ("GET", "/runs/math-7b/refits")
    assert [(refit.refit_id, refit.status, refit.error) for refit in found] == [
        (6, "failed", "ValueError: no"),
        (5, "done", None),
    ]


def test_rewind_sends_the_step_and_reads_what_was_forgotten(talk: Conversation) -> None:
    talk.replies_with(VOIDED)

    voided = talk.call("rewind", "math-7b", 11)

    assert (talk.requests[0].method, talk.requests[0].url.path) == ("POST", "/runs/math-7b/rewind")
    assert talk.body() == {"step": 11}
    assert voided == Voided(run="r", log_position=9, head_step=None, voided_observations=3, voided_selections=1)


@pytest.mark.parametrize(
    "conditions",
    [{"from_step": 0, "to_step": 4}, {"prompt_ids": ["a", "b"]}, {"request_id": "q", "from_step": 2}],
)
def test_retract_sends_the_conditions_that_were_given(talk: Conversation, conditions: dict[str, object]) -> None:
    talk.replies_with(VOIDED)

    voided = talk.call("retract", "math-7b", **conditions)

    assert (talk.requests[0].method, talk.requests[0].url.path) == ("POST", "/runs/math-7b/retract")
    assert talk.body() == conditions
    assert (voided.voided_observations, voided.voided_selections) == (3, 1)


def test_add_prompts_takes_models_and_mappings(talk: Conversation) -> None:
    talk.replies_with(added(2, pool_size=2))

    result = talk.call("add_prompts", "r", iter([PromptIn(prompt_id="a", category="g"), {"text": "2+2?"}]))

    assert (talk.requests[0].method, talk.requests[0].url.path) == ("POST", "/runs/r/prompts")
    assert talk.body() == {"prompts": [{"prompt_id": "a", "category": "g"}, {"text": "2+2?"}]}
    assert (result.added, result.pool_size) == (2, 2)


def test_a_large_pool_goes_out_in_several_calls_whose_counts_are_summed(talk: Conversation) -> None:
    talk.replies_with(added(10_000, pool_size=10_000))
    talk.replies_with(added(9_990, existing=10, pool_size=19_990))
    talk.replies_with(added(1, pool_size=19_991))

    result = talk.call("add_prompts", "r", ({"prompt_id": str(i)} for i in range(20_001)))

    assert [len(talk.body(i)["prompts"]) for i in range(3)] == [10_000, 10_000, 1]
    assert talk.body(2) == {"prompts": [{"prompt_id": "20000"}]}
    assert (result.added, result.existing) == (19_991, 10)
    assert (result.pool_size, result.log_position) == (19_991, 19_991)


def test_no_call_of_prompts_is_larger_than_its_limit(talk: Conversation) -> None:
    n = 45
    for _ in range(2):
        talk.replies_with(added(1))

    talk.call("add_prompts", "r", [{"prompt_id": str(i), "text": "x" * 200_000} for i in range(n)])

    sizes = [len(talk.content(i)) for i in range(2)]
    assert max(sizes) <= MAX_CALL_BYTES + 100
    assert sum(len(talk.body(i)["prompts"]) for i in range(2)) == n


def test_large_bodies_are_sent_packed_and_small_ones_plain(talk: Conversation) -> None:
    for n_bytes in (COMPRESSED_FROM_BYTES // 2, COMPRESSED_FROM_BYTES):
        talk.replies_with(added(1))
        talk.call("add_prompts", "r", [{"prompt_id": "a", "text": "x" * n_bytes}])

    small, large = talk.requests
    assert "content-encoding" not in small.headers
    assert (large.headers["content-encoding"], large.headers["content-type"]) == ("gzip", "application/json")
    assert int(large.headers["content-length"]) == len(large.content) < len(small.content)
    assert talk.body(1) == {"prompts": [{"prompt_id": "a", "text": "x" * COMPRESSED_FROM_BYTES}]}


def test_one_faulty_prompt_and_none_is_sent(talk: Conversation) -> None:
    prompts = [{"prompt_id": str(i)} for i in range(10_000)] + [{"prompt_id": "x", "prior_rate": 1.5}]

    with pytest.raises(InvalidRequest) as caught:
        talk.call("add_prompts", "r", prompts)

    assert str(caught.value) == (
        "add_prompts was not sent: prompts[10000].prior_rate: Input should be less than or equal to 1, got 1.5"
    )
    assert talk.requests == []


def test_prompt_reads_belief_and_history(talk: Conversation) -> None:
    talk.replies_with(PROMPT)

    state = talk.call("prompt", "r", "a")

    assert state.belief.success_rate == 0.25
    assert state.history[0].attempts == 8


AWKWARD_IDS = [
    "a/b",
    "a b",
    "50%",
    "%2F",
    "what?",
    "#1",
    ".",
    "..",
    "../../runs",
    "a/../b",
    "/a",
    "a//b/",
    "größe",
    "a;b=c&d+e",
    "a\\b",
    'say "hi"',
    "\n\t",
    "人\U0001f600",
]


@pytest.mark.parametrize("prompt_id", AWKWARD_IDS)
def test_any_prompt_id_reaches_the_service_as_it_is(talk: Conversation, server: LoopbackServer, prompt_id: str) -> None:
    """In the query: proxies resolve, decode and split paths."""
    server.body = PROMPT
    talk.base_url = f"{server.base_url}/prefix/"
    talk.over_the_wire = True

    talk.call("prompt", "r", prompt_id)

    (target,) = map(urlsplit, server.targets)
    assert (target.path, parse_qs(target.query)) == ("/prefix/runs/r/prompt", {"prompt_id": [prompt_id]})


@pytest.mark.parametrize(
    ("prompt_id", "target"),
    [("a.b", "/runs/r/prompts/a.b"), ("..", "/runs/r/prompt?prompt_id=.."), ("a/b", "/runs/r/prompt?prompt_id=a%2Fb")],
)
def test_a_prompt_is_erased_by_an_address_that_no_proxy_changes(
    talk: Conversation, prompt_id: str, target: str
) -> None:
    talk.replies.append(httpx.Response(204))

    assert talk.call("delete_prompt", "r", prompt_id) is None
    assert (talk.requests[0].method, str(talk.requests[0].url.raw_path, "ascii")) == ("DELETE", target)


def test_runs_are_asked_for_with_the_same_filters_on_every_page(talk: Conversation) -> None:
    talk.replies_with({"runs": [talk.run], "next_cursor": "17"})
    talk.replies_with({"runs": [talk.run], "next_cursor": None})

    found = talk.call("runs", state=["broken", "learning"], alarm="any", sort="lift", search="math-")

    assert len(found) == 2
    asked = "/runs?alarm=any&sort=lift&search=math-&state=broken&state=learning"
    assert [str(request.url.raw_path, "ascii") for request in talk.requests] == [asked, f"{asked}&cursor=17"]


def test_observe_sends_a_request_id_of_its_own(talk: Conversation) -> None:
    for _ in range(2):
        talk.replies_with(OBSERVED)
    observations = [
        Observation(prompt_id="a", successes=2, attempts=8),
        {"prompt_id": "b", "rewards": [0, 0.5]},
    ]

    first = talk.call("observe", "r", 3, observations, selection_id="s1")
    talk.call("observe", "r", 3, observations)

    assert talk.requests[0].url.path == "/observe"
    assert first.accepted == 2
    assert len(talk.body(0)["request_id"]) == 32
    assert talk.body(0)["request_id"] != talk.body(1)["request_id"]
    assert talk.body(0) == {
        "run": "r",
        "step": 3,
        "request_id": talk.body(0)["request_id"],
        "selection_id": "s1",
        "observations": [
            {"prompt_id": "a", "successes": 2.0, "attempts": 8},
            {"prompt_id": "b", "rewards": [0.0, 0.5]},
        ],
    }


def test_observe_keeps_the_request_id_of_the_caller(talk: Conversation) -> None:
    talk.replies_with(OBSERVED)

    talk.call("observe", "r", 3, [{"prompt_id": "a", "rewards": [1]}], request_id="step-3")

    assert talk.body()["request_id"] == "step-3"


def test_predict_takes_ids_references_and_mappings(talk: Conversation) -> None:
    talk.replies_with(PREDICTED)

    result = talk.call("predict", "r", iter(["a", PromptRef(text="2+2?"), {"prompt_id": "b"}]), group_size=4)

    assert talk.requests[0].url.path == "/predict"
    assert talk.body() == {
        "run": "r",
        "prompts": [{"prompt_id": "a"}, {"text": "2+2?"}, {"prompt_id": "b"}],
        "group_size": 4,
    }
    assert result.predictions[0].interval == (0.1, 0.4)


def test_select_batch_sends_its_options(talk: Conversation) -> None:
    talk.replies_with(SELECTED)

    options = {
        "seed": 5,
        "candidates": ["a", "b"],
        "categories": {"easy": 0.5},
        "categories_at_most": {"b": 0.25},
        "allow_outstanding": True,
    }
    result = talk.call("select_batch", "r", 3, 1, **options)

    assert talk.requests[0].url.path == "/select_batch"
    assert talk.body() == {
        "run": "r",
        "step": 3,
        "batch_size": 1,
        "seed": 5,
        "candidates": ["a", "b"],
        "categories": {"easy": 0.5},
        "categories_at_most": {"b": 0.25},
        "allow_outstanding": True,
    }
    assert result.fallback is None
    assert result.prompts[0].arm == "policy"
    assert result.forecast.pad_to is None


@pytest.mark.parametrize("name", ["healthz", "readyz"])
def test_an_unavailable_service_is_an_answer_to_the_question_of_its_health(talk: Conversation, name: str) -> None:
    talk.replies_with({"status": "unavailable", "reasons": ["database is locked"]}, status=503)

    assert talk.call(name) == Health(status="unavailable", reasons=("database is locked",))
    assert talk.waits == []


def test_a_503_of_another_hand_is_no_answer_of_readyz(talk: Conversation) -> None:
    talk.replies.append(httpx.Response(503, text="<h1>no upstream</h1>"))

    with pytest.raises(Unavailable, match=r"503 http_503: the reply is not problem\+json, but '<h1>no upstream</h1>'"):
        talk.call("readyz")


def test_put_run_sends_shares_and_rails(talk: Conversation) -> None:
    sent = {
        "control_share": 0.1,
        "reprobe_share": 0.2,
        "categories": {"a": 0.5},
        "categories_at_most": {"b": 0.5},
        "fallback": False,
    }
    alarm = {"code": "fallback", "message": "m", "since_step": 3, "value": -4.0, "limit": -3.0}
    talk.replies_with_run(**sent, alarms=[alarm])

    state = talk.call("put_run", "math-7b", **sent)

    assert talk.body() == sent
    assert (state.control_share, state.fallback) == (0.1, False)
    assert state.alarms == (Alarm(code="fallback", message="m", since_step=3, value=-4.0, limit=-3.0),)


def test_report_asks_for_the_steps_that_are_wanted(talk: Conversation) -> None:
    for _ in range(2):
        talk.replies_with(REPORTED)

    first = talk.call("report", "math-7b")
    talk.call("report", "math-7b", since_step=12)

    assert [str(request.url.raw_path, "ascii") for request in talk.requests] == [
        "/runs/math-7b/report",
        "/runs/math-7b/report?since_step=12",
    ]
    assert {request.method for request in talk.requests} == {"GET"}
    assert first.lift_missing == "none"


REFUSED: dict[str, tuple[str, tuple[object, ...], Mapping[str, object], str]] = {
    "run name": (
        "run",
        ("a/b",),
        {},
        "run was not sent: run: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$', got 'a/b'",
    ),
    "prompt id": (
        "prompt",
        ("r", ""),
        {},
        "prompt was not sent: prompt_id: String should have at least 1 character, got ''",
    ),
    "setting": (
        "put_run",
        ("r",),
        {"group_size": 0},
        "put_run was not sent: group_size: Input should be greater than or equal to 1, got 0",
    ),
    "step of a report": (
        "report",
        ("r",),
        {"since_step": -1},
        "report was not sent: since_step: Input should be greater than or equal to 0, got -1",
    ),
    "shares of a run": (
        "put_run",
        ("r",),
        {"categories": {"a": 0.75, "b": 0.5}},
        "put_run was not sent: categories: the shares sum to 1.25, the limit is 1",
    ),
    "wait": (
        "refit",
        ("r",),
        {"wait_seconds": 301},
        "refit was not sent: wait_seconds: Input should be less than or equal to 300, got 301",
    ),
    "endless wait": (
        "refit",
        ("r",),
        {"wait_seconds": float("inf")},
        "refit was not sent: wait_seconds: Input should be a finite number, got inf",
    ),
    "retraction of nothing": (
        "retract",
        ("r",),
        {},
        "retract was not sent: send at least one of from_step, to_step, prompt_ids and request_id",
    ),
    "steps the wrong way round": (
        "retract",
        ("r",),
        {"from_step": 5, "to_step": 4},
        "retract was not sent: from_step 5 is behind to_step 4",
    ),
    "refit policy": (
        "put_run",
        ("r",),
        {"refit": {"every_second": 5}},
        "put_run was not sent: refit.every_second: there is no field of this name, got 5",
    ),
    "NaN": (
        "observe",
        ("r", 1, [{"prompt_id": "a", "rewards": [0.5, float("nan")]}]),
        {},
        "observe was not sent: observations[0].rewards[1]: Input should be a finite number, got nan",
    ),
    "more successes than attempts": (
        "observe",
        ("r", 1, [{"prompt_id": "a", "rewards": [1]}, {"prompt_id": "b", "successes": 9, "attempts": 8}]),
        {},
        "observe was not sent: observations[1]: successes 9 exceeds attempts 8",
    ),
    "infinite successes": (
        "observe",
        ("r", 1, [{"prompt_id": "b", "successes": float("inf"), "attempts": 8}]),
        {},
        "observe was not sent: observations[0].successes: Input should be a finite number, got inf",
    ),
    "nothing observed": (
        "observe",
        ("r", 1, []),
        {},
        "observe was not sent: observations: Tuple should have at least 1 item after validation, not 0",
    ),
    "step": (
        "observe",
        ("r", -1, [{"prompt_id": "a", "rewards": [1]}]),
        {},
        "observe was not sent: step: Input should be greater than or equal to 0, got -1",
    ),
    "misspelt field": (
        "predict",
        ("r", [{"prompt_id": "a", "txt": "b"}]),
        {},
        "predict was not sent: prompts[0].txt: there is no field of this name, got 'b'",
    ),
    "one id instead of a list": (
        "predict",
        ("r", "abc"),
        {},
        "predict was not sent: prompts: Input should be a valid tuple, got 'abc'",
    ),
    "too many": (
        "predict",
        ("r", ["a"] * 10_001),
        {},
        "predict was not sent: prompts: Tuple should have at most 10000 items after validation, not 10001",
    ),
    "shares": (
        "select_batch",
        ("r", 1, 8),
        {"categories": {"a": 0.75, "b": 0.75}},
        "select_batch was not sent: categories: the shares sum to 1.5, the limit is 1",
    ),
    "no prompts": (
        "add_prompts",
        ("r", []),
        {},
        "add_prompts was not sent: prompts: at least 1 prompt is needed, got none",
    ),
    "prompt without identity": (
        "add_prompts",
        ("r", [{"category": "g"}]),
        {},
        "add_prompts was not sent: prompts[0]: a prompt needs a prompt_id, a text, or both",
    ),
    "budget below the least": (
        "allocate",
        ("r", ["a", "b"], 3),
        {"min_attempts": 2},
        "allocate was not sent: budget 3 is less than the minimum attempts of 2 prompts cost, 4: raise it, or lower "
        "min_attempts",
    ),
    "name of a policy": (
        "put_budget_policy",
        ("r", "a/b"),
        {},
        "put_budget_policy was not sent: policy: String should match pattern "
        "'^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$', got 'a/b'",
    ),
    "half a surrogate pair": (
        "add_prompts",
        ("r", [{"text": "\ud800"}]),
        {},
        "add_prompts was not sent: prompts[0].text: Input should be a valid string, "
        "unable to parse raw data as a unicode string, got '\\ud800'",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_breaks_the_contract_is_not_sent_and_is_named(talk: Conversation, case: str) -> None:
    name, args, kwargs, text = REFUSED[case]

    with pytest.raises(InvalidRequest) as caught:
        talk.call(name, *args, **kwargs)

    assert str(caught.value) == text
    assert talk.requests == []


def test_only_the_first_faults_are_printed_and_all_are_kept(talk: Conversation) -> None:
    with pytest.raises(InvalidRequest) as caught:
        talk.call("predict", "r", [1] * 12)

    assert len(caught.value.errors) == 12
    assert str(caught.value).count("prompts[") == 5
    assert str(caught.value).endswith("; and 7 more")


def test_allocate_sends_prompts_by_id_or_with_their_costs(talk: Conversation) -> None:
    talk.replies_with(
        {
            "run": "r",
            "model_version": 0,
            "log_position": 7,
            "objective": "solve",
            "method": "greedy",
            "allocations": [{"prompt_id": "a", "attempts": 5, "success_rate": 0.5, "expected_gain": 0.9}],
            "attempts": 5,
            "spent": 5,
            "expected_total": 0.9,
            "uniform_total": 0.9,
            "shortfall": 0,
            "worthwhile": False,
            "reason": "alike",
        }
    )

    reply = talk.call("allocate", "r", ["a", {"text": "b", "cost": 2.5}], 20, max_attempts=8)

    assert talk.requests[0].url.path == "/allocate"
    assert talk.body() == {
        "run": "r",
        "prompts": [{"prompt_id": "a"}, {"text": "b", "cost": 2.5}],
        "budget": 20,
        "objective": "solve",
        "method": "greedy",
        "max_attempts": 8,
    }
    assert reply.allocations[0].attempts == 5


def test_put_budget_policy_sends_only_what_was_given(talk: Conversation) -> None:
    talk.replies_with(
        {
            "run": "r",
            "policy": "p",
            "version": 2,
            "mode": "sequential",
            "target_attempts": 4,
            "min_attempts": 1,
            "max_attempts": 32,
            "price": None,
            "tiers": [{"label": "x", "at_least": 0}],
        }
    )

    state = talk.call("put_budget_policy", "r", "p", mode="sequential")

    assert (talk.requests[0].method, talk.requests[0].url.path) == ("PUT", "/runs/r/budget_policies/p")
    assert talk.body() == {"mode": "sequential"}
    assert (state.version, state.tiers[0].label) == (2, "x")


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_methods_show_their_arguments_and_their_reply(client: type[Client] | type[AsyncClient]) -> None:
    signature = inspect.signature(client.predict)

    assert list(signature.parameters) == ["self", "run", "prompts", "step", "group_size"]
    assert signature.return_annotation == "PredictReply"
    assert inspect.getdoc(client.predict) == inspect.getdoc(Calls.predict)
    assert inspect.iscoroutinefunction(client.predict) == (client is AsyncClient)


def test_settings_of_the_contract_are_arguments_of_the_calls() -> None:
    put_run = set(inspect.signature(Client.put_run).parameters) - {"self", "run"}
    select_batch = set(inspect.signature(Client.select_batch).parameters) - {"self"}

    put_policy = set(inspect.signature(Client.put_budget_policy).parameters) - {"self", "run", "policy"}
    budget = set(inspect.signature(Client.budget).parameters) - {"self"}
    allocate = set(inspect.signature(Client.allocate).parameters) - {"self"}
    assert put_run == set(RunUpdate.model_fields)
    assert select_batch == {*SelectRequest.model_fields, "confirm_step"}  # a parameter of the query
    assert put_policy == set(PolicyUpdate.model_fields)
    assert budget == set(BudgetRequest.model_fields)
    assert allocate == set(AllocateRequest.model_fields)


def test_both_clients_have_the_same_methods() -> None:
    names = [{name for name in vars(client) if not name.startswith("_")} for client in (Client, AsyncClient)]

    assert names[0] == names[1]
