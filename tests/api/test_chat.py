"""The chat facade: a label for routers that know chat models only. OpenAI's own client asks it in tests/gateways."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Caller

pytestmark = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""The database does not matter here: one backend will do."""
LABELS = ["SIMPLE", "MEDIUM", "COMPLEX", "REASONING"]


@pytest.fixture
def mopps(caller: Caller) -> Caller:
    """Beliefs .9 about the text "Easy?", .1 about "Hard?", .5 about all others."""
    caller.create(predictor="mopps", retention={"prompts": 0})  # or the first budget bounds the pool, behind the reply
    caller.observe(
        0, {"text": "Easy?", "successes": 8, "attempts": 8}, {"text": "Hard?", "successes": 0, "attempts": 8}
    )
    return caller


def chat(caller: Caller, *messages: tuple[str, Any], policy: str = "", **more: Any) -> dict[str, Any]:
    turns = [{"role": role, "content": content} for role, content in messages]
    return caller.ok("POST", "/v1/chat/completions", json={"model": caller.run + policy, "messages": turns, **more})


def content(reply: dict[str, Any]) -> str:
    text: str = reply["choices"][0]["message"]["content"]
    return text


def json_schema(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "json_schema", "json_schema": {"name": "Label", "schema": schema, "strict": True}}


def test_a_request_gets_its_label(mopps: Caller) -> None:
    reply = chat(mopps, ("system", "Judge."), ("user", "Easy?"))

    assert content(reply) == "low"
    assert (reply["object"], reply["model"]) == ("chat.completion", mopps.run)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert reply["budget"]["success_rate"] == pytest.approx(0.9)
    assert content(chat(mopps, ("user", "Hard?"))) == "high"
    assert content(chat(mopps, ("user", "Another?"))) == "medium"


def test_parts_of_a_message_and_unknown_options_are_taken_as_clients_send_them(mopps: Caller) -> None:
    parts = [{"type": "text", "text": "Easy?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]

    reply = chat(mopps, ("user", parts), temperature=0, max_tokens=4, user="someone", stream=False)

    assert content(reply) == "low"


def test_what_a_router_writes_around_the_message_does_not_count(mopps: Caller) -> None:
    asked = "\nConversation so far: ~20 tokens across the request\n\nClassify this message:\nHard?"

    assert content(chat(mopps, ("user", asked))) == "high"


def test_a_follow_up_is_judged_with_what_it_follows(mopps: Caller) -> None:
    followed = [("user", "Hard?"), ("assistant", "Suppose ..."), ("user", "yes, go on")]
    judged = "user: Hard?\n\nassistant: Suppose ...\n\nuser: yes, go on"
    mopps.observe(0, {"text": judged, "successes": 0, "attempts": 8})

    assert content(chat(mopps, *followed)) == "high"
    assert content(chat(mopps, ("user", "yes, go on"))) == "medium"


def test_harness_text_is_not_taken_for_the_prompt(mopps: Caller) -> None:
    wrapped = "Hard?<system-reminder>Use the tools.</system-reminder>"

    assert content(chat(mopps, ("user", wrapped))) == "high"
    assert content(chat(mopps, ("user", "Hard?"), ("user", "<system-reminder>x</system-reminder>"))) == "high"


def test_a_policy_names_the_labels_and_json_is_answered_under_the_property_that_takes_them(mopps: Caller) -> None:
    tiers = [{"label": label, "at_least": at} for label, at in zip(LABELS, (0.8, 0.4, 0.2, 0), strict=True)]
    mopps.ok("PUT", f"/runs/{mopps.run}/budget_policies/router", json={"tiers": tiers})
    asked: dict[str, Any] = {
        "policy": ":router",
        "response_format": json_schema(why={"enum": ["x"]}, tier={"enum": LABELS}),
    }

    assert json.loads(content(chat(mopps, ("user", "Hard?"), **asked))) == {"tier": "REASONING"}
    assert json.loads(content(chat(mopps, ("user", "Easy?"), **asked))) == {"tier": "SIMPLE"}
    asked["response_format"] = {"type": "json_object"}
    assert json.loads(content(chat(mopps, ("user", "Other?"), **asked))) == {"tier": "MEDIUM"}
    asked["response_format"] = {"type": "text"}
    assert content(chat(mopps, ("user", "Other?"), **asked)) == "MEDIUM"


@pytest.mark.parametrize(
    ("change", "status", "code", "detail"),
    [
        (
            {"stream": True},
            422,
            "malformed",
            "stream: the answer is one short label and is not streamed: send stream false",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, 422, "malformed", "messages: no user message has a text"),
        (
            {"response_format": json_schema(tier={"enum": ["A", "B"]})},
            422,
            "malformed",
            "response_format: the budget policy's tier 'low' is none of 'A', 'B'; give the policy tiers with these "
            "labels (PUT /runs/{run}/budget_policies/{policy})",
        ),
        (
            {"response_format": json_schema(tier={"enum": "low or high"})},
            422,
            "malformed",
            "response_format: the budget policy's tier 'low' is none of 'low or high'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": [1]}},
            422,
            "malformed",
            "response_format: 'json_schema' is [1]; send a JSON schema, or leave it out",
        ),
        (
            {"response_format": json_schema(tier=5)},
            422,
            "malformed",
            "response_format: 'tier' is 5; send a JSON schema, or leave it out",
        ),
        (
            {"messages": [{"role": "user", "content": "\x00 "}]},
            422,
            "malformed",
            "messages: no user message has a text",
        ),
        ({"model": "no run"}, 422, "malformed", "model: String should match pattern"),
        ({"model": "nowhere"}, 404, "run_unknown", "run 'nowhere' does not exist: create it first"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    mopps: Caller, change: dict[str, Any], status: int, code: str, detail: str
) -> None:
    body = {"model": mopps.run, "messages": [{"role": "user", "content": "Easy?"}], **change}

    problem = mopps.refused("POST", "/v1/chat/completions", json=body)

    assert (problem.status, problem.code) == (status, code)
    assert problem.detail.startswith(detail)
