"""Mixed traffic in a real LiteLLM proxy: the right run, no multiplied spend, honest outcomes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.conftest import Service, serving
from tests.gateways.conftest import NATURAL_TOKENS, ServedModel, running_proxy, serving_model, tokens_of
from tests.waiting import until

from evenodds.errors import InvalidRequest

pytestmark = pytest.mark.slow

HOOK = """
import asyncio, json, os
from evenodds.integrations.litellm import BudgetHook, ServedModel

async def verify(request, answers):
    while "Held back" in json.dumps(request.get("messages")) and not os.path.exists("go"):
        await asyncio.sleep(0.01)
    with open("asked.jsonl", "a") as log:
        log.write(json.dumps(list(answers)) + chr(10))
    with open("left_out.json", "w") as file:
        json.dump({served.run: gateway.counts.left_out for served, gateway in by_default.gateways.items()}, file)
    return [float(answer == "42") for answer in answers]

URL, DEADLINE = os.environ["EVENODDS_URL"], float(os.environ["EVENODDS_GATEWAY_DEADLINE_MS"])
by_default = BudgetHook(
    URL,
    models={
        **dict.fromkeys(("first", "flaky", "claude", "wild/m-g"), "served-a"),
        "old": ServedModel("served-b", step=2), "hosted_vllm/m-b": ServedModel("served-b", step=3),
    },
    verify=verify, deadline_ms=DEADLINE,
)
everything = BudgetHook(
    URL, models={"picked*": ServedModel("served-p", step=1)}, sets=("reasoning_effort", "n", "max_tokens"),
    picks=lambda request: "several" in json.dumps(request["messages"]), verify=verify, deadline_ms=DEADLINE,
)
"""
RUNS = ("served-a", "served-b", "served-p")
MODELS = {
    "first": "hosted_vllm/m-a",
    "second": "hosted_vllm/m-b",
    "flaky": "hosted_vllm/broken",
    "old": "hosted_vllm/broken",
    "wild/*": "hosted_vllm/*",
    "claude": "anthropic/m-c",
    "picked": "hosted_vllm/m-p",
    "unmapped": "hosted_vllm/m-u",
}
SETTINGS = {
    "callbacks": ["evenodds_hook.by_default", "evenodds_hook.everything"],
    "fallbacks": [{"flaky": ["second"]}, {"old": ["second"]}],
    "num_retries": 0,
}
TIERS = {"SIMPLE": "first", "MEDIUM": "second", "COMPLEX": "picked", "REASONING": "flaky"}
AT_LEAST = {"SIMPLE": 0.8, "MEDIUM": 0.4, "COMPLEX": 0.2, "REASONING": 0.0}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


@dataclass(frozen=True)
class Traffic:
    proxy: httpx.Client
    service: Service
    model: ServedModel
    asked: Path

    def post(self, path: str, **body: Any) -> httpx.Response:
        reply = self.proxy.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply

    def chat(self, model: str, content: Any, **more: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", model=model, messages=messages, **more)

    def left_out(self) -> Counter[str]:
        """Answers of the run served-a so far that were no outcomes, by reason."""
        text = "Count what was left out!"  # the hook tells it with every answer that it verifies
        booked(self, lambda: self.chat("first", text), "served-a", text)
        return Counter(json.loads(self.asked.with_name("left_out.json").read_text())["served-a"])

    def seen(self, text: str) -> dict[str, int]:
        """Outcomes of this text by run."""
        client = self.service.client
        return {run: client.predict(run, [{"text": text}]).predictions[0].attempts_seen for run in RUNS}


@pytest.fixture(scope="module")
def traffic(litellm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traffic]:
    """One proxy for all: starting one takes most of a minute. Beliefs .5 about new texts; an attempt that gains .09."""
    folder = tmp_path_factory.mktemp("traffic")
    with serving(f"sqlite:///{folder}/evenodds.db") as service, serving_model() as model:
        for run in RUNS:
            service.client.put_run(run, predictor="mopps", embedder="none")
            service.client.put_budget_policy(run, price=0.09, max_attempts=8)
        service.client.put_run("served", predictor="mopps", embedder="none")  # its policy is what routes
        service.client.put_budget_policy("served", "router", tiers=tiers_at(AT_LEAST))
        with running_proxy(
            litellm_python,
            folder,
            service_url=service.base_url,
            model_url=model.base_url,
            models=MODELS,
            hook=HOOK,
            settings=SETTINGS,
            tiers=TIERS,
        ) as proxy:
            yield Traffic(proxy, service, model, folder / "asked.jsonl")


@pytest.fixture(autouse=True)
def _clean(traffic: Traffic) -> None:
    traffic.model.bodies.clear()


def tiers_at(at_least: dict[str, float]) -> list[dict[str, Any]]:
    return [{"label": label, "at_least": rate} for label, rate in at_least.items()]


def booked(traffic: Traffic, ask: Callable[[], object], run: str, text: str) -> None:
    """Ask, and wait until the outcome stands in this run's log, and in no other."""
    seen = traffic.seen(text)
    ask()
    until(lambda: traffic.seen(text) != seen, f"the outcome of {text!r}")
    assert traffic.seen(text) == {**seen, run: seen[run] + 1}


def test_by_default_only_the_effort_is_set_and_a_header_says_so(traffic: Traffic) -> None:
    requests: list[tuple[Any, dict[str, Any]]] = [
        ("Plain?", {}),
        ("Limited?", {"max_tokens": 50}),
        ("Streamed?", {"stream": True}),
        ("With tools?", {"tools": [TOOL]}),
        ([{"type": "text", "text": "An image?"}, IMAGE], {}),
    ]
    replies = [traffic.chat("first", content, **more) for content, more in requests]

    assert [body.get("n") for body in traffic.model.bodies] == [None] * 5
    assert [body.get("max_tokens") for body in traffic.model.bodies] == [None, 50, None, None, None]
    assert {body["reasoning_effort"] for body in traffic.model.bodies} == {"medium"}
    assert {reply.headers["x-evenodds-changed"] for reply in replies} == {"reasoning_effort=medium"}
    assert {reply.headers["x-evenodds-run"] for reply in replies} == {"served-a"}
    own = traffic.chat("first", "Plain?", reasoning_effort="low")
    assert traffic.model.bodies[-1]["reasoning_effort"] == "low"
    assert own.headers["x-evenodds-changed"] == "nothing"


def test_several_answers_come_only_where_somebody_picks_and_the_best_one_is_the_first(traffic: Traffic) -> None:
    reply = traffic.chat("picked", "Give several!")

    choices = reply.json()["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [(0, "42"), (1, "41")]
    assert "n=2" in reply.headers["x-evenodds-changed"]
    for more in ({"stream": True}, {"tools": [TOOL]}, {"n": 1}):
        traffic.chat("picked", "Give several!", **more)
    traffic.chat("picked", [{"type": "text", "text": "Give several!"}, IMAGE])
    traffic.chat("picked", "Give one.")
    assert [body.get("n") for body in traffic.model.bodies] == [2, None, None, 1, None, None]


def test_a_sequential_policy_asks_for_no_attempts_at_once(traffic: Traffic) -> None:
    traffic.service.client.put_budget_policy("served-p", mode="sequential", target_attempts=2, max_attempts=8)
    try:
        traffic.chat("picked", "Give several, one after another!")
        until(lambda: traffic.chat("picked", "Give several!").json()["choices"][1:] == [], "the policy to be known")
    finally:
        traffic.service.client.put_budget_policy("served-p", price=0.09, max_attempts=8)

    assert traffic.model.bodies[-1].get("n") is None


def test_a_limit_is_never_lower_than_asked_for(traffic: Traffic) -> None:
    traffic.service.client.observe("served-p", 0, [{"text": "Easy?", "successes": 8, "attempts": 8}])
    traffic.service.client.observe("served-p", 0, [{"text": "Hard?", "successes": 0, "attempts": 8}])
    until(lambda: traffic.chat("picked", "Hard?").headers["x-evenodds-effort"] == "high", "the outcomes to be known")
    traffic.model.bodies.clear()

    for text in ("Easy?", "Hard?"):
        traffic.chat("picked", text, max_tokens=200)
        traffic.chat("picked", text)

    assert [body.get("max_tokens") for body in traffic.model.bodies] == [200, None, 400, None]


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_what_a_fallback_answered_is_booked_under_the_model_that_answered(
    traffic: Traffic, more: dict[str, Any]
) -> None:
    text = f"Who answers {more}?"

    booked(traffic, lambda: traffic.chat("flaky", text, **more), "served-b", text)

    assert [body["model"] for body in traffic.model.bodies] == ["broken", "m-b"]
    assert traffic.service.client.run("served-b").head_step == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("model", "run"), [("wild/m-b", "served-b"), ("wild/m-g", "served-a")])
def test_what_a_wildcard_answered_is_booked_under_the_one_model_that_answered(
    traffic: Traffic, model: str, run: str, stream: bool
) -> None:
    """Both are of the deployment `hosted_vllm/*`: one is known by its own name, the other by that of its group."""
    text = f"Which of all, {model} {stream}?"
    asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 500}
    for path, more in (("chat/completions", asked), ("responses", {"input": text}), ("messages", asked)):
        booked(traffic, partial(traffic.post, f"/v1/{path}", model=model, stream=stream, **more), run, text)

    assert {body["model"] for body in traffic.model.bodies} == {model.removeprefix("wild/")}


def test_a_verdict_by_the_header_cannot_count_for_another_version(traffic: Traffic) -> None:
    reply = traffic.chat("old", "Which version?")

    assert [body["model"] for body in traffic.model.bodies] == ["broken", "m-b"]
    assert reply.headers["x-evenodds-run"] == "served-b"
    assert "x-evenodds-decision-id" not in reply.headers  # version 2 was asked about, and 3 answered


def test_the_reply_does_not_wait_for_verify(traffic: Traffic) -> None:
    text = "Held back?"

    for stream in (False, True):
        traffic.chat("first", text, stream=stream)  # verify waits for a file that comes after the reply
    seen = traffic.seen(text)
    traffic.asked.with_name("go").touch()

    assert seen == dict.fromkeys(RUNS, 0)
    until(lambda: traffic.seen(text) == {**seen, "served-a": 2}, "both outcomes")


def test_a_model_that_is_not_mapped_is_left_alone(traffic: Traffic) -> None:
    reply = traffic.chat("unmapped", "Nobody asks.")
    booked(traffic, lambda: traffic.chat("first", "Afterwards?"), "served-a", "Afterwards?")

    assert "reasoning_effort" not in traffic.model.bodies[0]
    assert not [name for name in reply.headers if name.startswith("x-evenodds")]
    assert traffic.seen("Nobody asks.") == dict.fromkeys(RUNS, 0)


def test_answers_that_are_no_outcomes_are_left_out_before_verify(traffic: Traffic) -> None:
    texts = ("Cut off?", "Something forbidden?", "An empty one?", "Do call?")
    before = traffic.left_out()
    asked = traffic.asked.read_text()

    for more in ({}, {"stream": True}):
        traffic.chat("first", "Cut off?", max_tokens=5, **more)
        traffic.chat("first", "Something forbidden?", **more)
        traffic.chat("first", "An empty one?", **more)
        traffic.chat("first", "Do call?", tools=[TOOL], **more)
    booked(traffic, lambda: traffic.chat("first", "Finished?"), "served-a", "Finished?")

    assert [traffic.seen(text) for text in texts] == [dict.fromkeys(RUNS, 0)] * 4
    assert traffic.asked.read_text() == asked + '["41"]\n'  # verify saw none of the others
    assert traffic.left_out() - before == dict.fromkeys(("length", "content_filter", "empty", "tool_calls"), 2)


def test_a_stream_that_the_caller_leaves_is_no_outcome(traffic: Traffic) -> None:
    before = traffic.left_out()
    body = {"model": "first", "messages": [{"role": "user", "content": "An endless one?"}], "stream": True}

    with traffic.proxy.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert "4" in next(reply.iter_text())

    until(lambda: traffic.left_out() - before == {"aborted": 1}, "the stream to be counted as aborted")
    assert traffic.seen("An endless one?") == dict.fromkeys(RUNS, 0)


def test_a_stream_whose_end_is_not_known_is_no_outcome(traffic: Traffic) -> None:
    """LiteLLM ends a stream that broke off with a `stop` of its own, and passes on one finish reason of several."""
    texts = ("Was it broken off?", "Two at a time?")
    before = traffic.left_out()

    traffic.chat("first", texts[0], stream=True)
    traffic.chat("first", texts[1], stream=True, n=2)

    assert traffic.left_out() - before == {"aborted": 3}
    assert [traffic.seen(text) for text in texts] == [dict.fromkeys(RUNS, 0)] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_messages_of_anthropic_itself_are_reported(traffic: Traffic, stream: bool) -> None:
    text = f"Of Anthropic {stream}?"
    asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 500, "stream": stream}

    booked(traffic, lambda: traffic.post("/v1/messages", model="claude", **asked), "served-a", text)

    assert traffic.model.paths[-1].endswith("/messages")


@pytest.mark.parametrize("stream", [False, True])
def test_every_endpoint_gets_budget_and_report(traffic: Traffic, stream: bool) -> None:
    text = f"Of responses {stream}?"
    booked(traffic, lambda: traffic.post("/v1/responses", model="first", input=text, stream=stream), "served-a", text)
    messages = [{"role": "user", "content": f"Of messages {stream}?"}]
    asked = {"model": "first", "messages": messages, "max_tokens": 500, "stream": stream}
    booked(traffic, lambda: traffic.post("/v1/messages", **asked), "served-a", messages[0]["content"])
    assert traffic.post("/v1/messages", **asked).headers["x-evenodds-effort"] == "medium"
    traffic.model.bodies.pop()
    text = f"Of chat {stream}?"
    booked(traffic, lambda: traffic.chat("first", text, stream=stream), "served-a", text)

    responses, messages_body, chat = traffic.model.bodies
    assert (responses["reasoning"], chat["reasoning_effort"]) == ({"effort": "medium"}, "medium")
    assert "medium" not in json.dumps(messages_body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_verdict_that_comes_later_needs_only_the_header_of_the_reply(traffic: Traffic, stream: bool) -> None:
    text = f"Judged later {stream}?"
    reply = traffic.chat("picked", text, stream=stream, max_tokens=5)  # cut off: no outcome of its own
    decision_id = reply.headers["x-evenodds-decision-id"]

    first = traffic.service.client.observe_decision(decision_id, [1.0])
    again = traffic.service.client.observe_decision(decision_id, [1.0])

    assert (first.run, first.accepted, first.replayed, again.replayed) == ("served-p", 1, False, True)
    assert traffic.seen(text) == {**dict.fromkeys(RUNS, 0), "served-p": 1}
    assert traffic.service.client.run("served-p").head_step == 1


def test_a_harness_is_not_judged_and_a_follow_up_is_judged_with_what_it_follows(traffic: Traffic) -> None:
    question = "How many prime numbers lie between one and a hundred?"
    wrapped = f"<system-reminder>Today is Monday.</system-reminder>{question}"
    booked(traffic, lambda: traffic.chat("first", wrapped), "served-a", question)
    assert traffic.model.bodies[-1]["messages"][-1]["content"] == wrapped  # the model reads what the caller sent

    turns = [("user", question), ("assistant", "25."), ("user", "yes, go on")]
    messages = [{"role": role, "content": content} for role, content in turns]
    judged = f"user: {question}\n\nassistant: 25.\n\nuser: yes, go on"
    booked(traffic, lambda: traffic.post("/v1/chat/completions", model="first", messages=messages), "served-a", judged)

    follow_up = {"input": "yes, go on", "previous_response_id": "resp_1"}  # what it follows, only the model has
    reply = traffic.post("/v1/responses", model="first", **follow_up)
    booked(traffic, lambda: traffic.chat("first", "Afterwards?"), "served-a", "Afterwards?")
    assert "x-evenodds-effort" not in reply.headers
    assert traffic.seen("yes, go on") == dict.fromkeys(RUNS, 0)


def test_every_tier_is_reached_through_litellms_router_and_booked_under_the_model_that_answered(
    traffic: Traffic,
) -> None:
    """The caller names the router; what its tier's model, or that model's fallback, answered is that model's."""
    expected = {8: ("m-a", "served-a"), 5: ("m-b", "served-b"), 2: ("m-p", "served-p"), 0: ("m-b", "served-b")}
    texts = {successes: f"Routed by {successes} of 8?" for successes in expected}
    observations = [{"text": text, "successes": successes, "attempts": 8} for successes, text in texts.items()]
    traffic.service.client.observe("served", 0, observations)

    for successes, (answered, run) in expected.items():
        text = texts[successes]
        booked(traffic, partial(traffic.chat, "routed", text), run, text)
        assert traffic.model.bodies[-1]["model"] == answered
    assert [body["model"] for body in traffic.model.bodies].count("broken") == 1


def test_tiers_that_cross_are_refused_with_the_pair_and_the_router_goes_on_as_before(traffic: Traffic) -> None:
    crossing = {**AT_LEAST, "MEDIUM": 0.1}
    pair = "tiers[1] ('MEDIUM') and tiers[2] ('COMPLEX') have at_least 0.1 and 0.2, so that the second is never reached"

    with pytest.raises(InvalidRequest) as refused:
        traffic.service.client.put_budget_policy("served", "router", tiers=tiers_at(crossing))
    traffic.chat("routed", "Nobody knows?")

    assert pair in str(refused.value)
    assert [body["model"] for body in traffic.model.bodies] == ["m-b"]


def test_a_follow_up_is_routed_by_what_it_follows(traffic: Traffic) -> None:
    """LiteLLM's router quotes the conversation to its classifier: "yes, go on" is not one prompt for everybody."""
    easy, hard = "Name a colour that a clear sky may have at noon.", "Settle whether there are odd perfect numbers."
    judged = {text: f"user: {text}\n\nuser: yes, go on" for text in (easy, hard)}
    for text, successes in ((easy, 8), (hard, 2)):
        traffic.service.client.observe("served", 0, [{"text": judged[text], "successes": successes, "attempts": 8}])

    for text in (easy, hard):
        turns = [("user", text), ("assistant", "Well."), ("user", "yes, go on")]
        messages = [{"role": role, "content": content} for role, content in turns]
        traffic.post("/v1/chat/completions", model="routed", messages=messages)

    assert [body["model"] for body in traffic.model.bodies] == ["m-a", "m-p"]


def test_a_caller_cannot_claim_a_decision(traffic: Traffic) -> None:
    claimed = {"evenodds": {"run": "x", "policy": "x", "policy_version": 0, "changed": {}}}

    reply = traffic.chat("unmapped", "Claimed?", metadata=claimed)

    assert not [name for name in reply.headers if name.startswith("x-evenodds")]


def test_mixed_traffic_spends_no_more_than_its_target_and_every_outcome_counts_for_who_answered(
    traffic: Traffic,
) -> None:
    """By default a request is one attempt, as without the hook; where several are picked from, those of the policy."""
    tools, attempts = {"tools": [TOOL]}, 2
    requests: list[tuple[str, Any, dict[str, Any]]] = [
        *[("first", f"Plain {i}?", {}) for i in range(4)],
        *[("first", f"Streamed {i}?", {"stream": True}) for i in range(4)],
        *[("first", f"Tools {i}?", tools) for i in range(4)],
        *[("first", [{"type": "text", "text": f"Image {i}?"}, IMAGE], {}) for i in range(4)],
        *[("second", f"Second {i}?", {}) for i in range(4)],
        *[("flaky", f"Fallback {i}?", {}) for i in range(4)],
        *[("first", f"Cut off {i}?", {"max_tokens": 5}) for i in range(4)],
        *[("unmapped", f"Unmapped {i}?", {}) for i in range(4)],
        *[("picked", f"Pick from several, {i}?", {}) for i in range(4)],
        *[("picked", f"Pick from several, streamed, {i}?", {"stream": True}) for i in range(4)],
    ]

    def counted() -> dict[str, int]:
        return {run: traffic.service.client.run(run).observations for run in RUNS}

    for model, run in (("first", "served-a"), ("second", "served-b"), ("picked", "served-p")):
        booked(traffic, partial(traffic.chat, model, f"Before {run}?"), run, f"Before {run}?")
    traffic.model.bodies.clear()  # what was asked before has arrived: outcomes of a run go in order
    before = counted()
    for model, content, more in requests:
        traffic.chat(model, content, **more)
    spent = sum(tokens_of(body) for body in traffic.model.bodies if body["model"] != "broken")

    assert spent == (32 + 4 * attempts) * NATURAL_TOKENS + 4 * 5
    expected = {"served-a": 12, "served-b": 8, "served-p": 8}  # neither tools nor what was cut off
    until(lambda: sum(counted().values()) == sum(before.values()) + 28, "all outcomes")
    assert counted() == {run: before[run] + expected[run] for run in RUNS}
