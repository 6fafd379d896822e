"""Even Odds behind a real LiteLLM proxy, with its mock responses and with a model on loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.gateways.conftest import EXAMPLE, NATURAL_TOKENS, ROOT, ServedModel, running_proxy
from tests.waiting import until

if TYPE_CHECKING:
    from tests.conftest import Service

pytestmark = pytest.mark.slow

EXAMPLE_HOOK = (EXAMPLE / "evenodds_hook.py").read_text()
LABELS = ("SIMPLE", "MEDIUM", "COMPLEX", "REASONING")


@dataclass(frozen=True)
class Gateway:
    proxy: httpx.Client
    service: Service
    model: ServedModel
    folder: Path

    def chat(self, model: str, text: str, **more: Any) -> dict[str, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        reply = self.proxy.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def contents(self, model: str, text: str, **more: Any) -> list[str]:
        return [choice["message"]["content"] for choice in self.chat(model, text, **more)["choices"]]


@pytest.fixture
def gateway(
    start_service: Callable[[str], Service], litellm_python: Path, served_model: ServedModel, tmp_path: Path
) -> Iterator[Gateway]:
    """Beliefs .9 about "Easy?", .1 about "Hard?", .5 about all others; an attempt is bought that gains .09."""
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db")
    service.client.put_run("served", predictor="mopps", embedder="none")
    service.client.observe("served", 0, [{"text": "Easy?", "successes": 8, "attempts": 8}])
    service.client.observe("served", 0, [{"text": "Hard?", "successes": 0, "attempts": 8}])
    service.client.put_budget_policy("served", price=0.09, max_attempts=8)
    tiers = [{"label": label, "at_least": at} for label, at in zip(LABELS, (0.8, 0.4, 0.2, 0), strict=True)]
    service.client.put_budget_policy("served", "router", tiers=tiers)
    with running_proxy(
        litellm_python,
        tmp_path,
        service_url=service.base_url,
        models={"served-too": "hosted_vllm/m"},
        model_url=served_model.base_url,
        hook=EXAMPLE_HOOK.replace('models={"served"', 'models={"served*"'),
    ) as proxy:
        yield Gateway(proxy, service, served_model, tmp_path)


def test_the_proxy_asks_for_budgets_reports_outcomes_and_does_without_the_service(gateway: Gateway) -> None:
    """One proxy for all of it: starting one takes most of a minute."""
    # A mock response, and what reaches a model.
    assert gateway.contents("served", "New?") == ["The answer is 42."]
    for text, more in (("Easy?", {}), ("Hard?", {"max_tokens": 100}), ("New?", {"reasoning_effort": "low"})):
        gateway.chat("served-too", text, **more)
    sent = [(body["reasoning_effort"], body.get("n"), body.get("max_tokens")) for body in gateway.model.bodies]
    assert sent == [("low", None, None), ("high", None, 100), ("low", None, None)]

    # Outcomes: a right answer of the mock, then a wrong one of the model, on the log soon after.
    before = gateway.service.client.run("served").observations
    gateway.chat("served", "What is 6 * 7?", metadata={"answer": "42"})
    gateway.chat("served-too", "Hard?", metadata={"answer": "42"})
    until(lambda: gateway.service.client.run("served").observations == before + 2, "both outcomes on the log")
    predictions = gateway.service.client.predict("served", [{"text": "What is 6 * 7?"}, {"text": "Hard?"}]).predictions
    assert [p.attempts_seen for p in predictions] == [1, 9]
    assert [p.success_rate for p in predictions] == pytest.approx([2 / 3, 1 / 11])
    assert gateway.service.client.run("served").head_step == 1

    # Other endpoints, and a stream, stand in the log of the example too.
    asked = [{"role": "user", "content": "Easy?"}]
    bodies: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": asked, "stream": True},
        "responses": {"input": "Easy?"},
        "messages": {"messages": asked, "max_tokens": 200},
    }
    for path, more in bodies.items():
        assert gateway.proxy.post(f"/v1/{path}", json={"model": "served-too", **more}).status_code == 200

    # LiteLLM's own complexity router takes the label of the chat facade.
    assert gateway.contents("routed", "Easy?", n=1) == ["small"]
    assert gateway.contents("routed", "Hard?", n=1) == ["large"]

    # Without the service every request passes as it came, also once the circuit is open.
    gateway.service.stop()
    gateway.model.bodies.clear()
    for _ in range(10):
        gateway.chat("served-too", "New?")
    assert all("reasoning_effort" not in body and "n" not in body for body in gateway.model.bodies)
    assert len(gateway.model.bodies) == 10

    # What the README's command draws of the log, of the requests that the model on loopback answered.
    log = gateway.folder / "access.log"
    until(lambda: log.read_text().count(" served-too ") == 17, "every request of the model on the log")
    assert drawn(log, of="served-too") == {
        "high": (2, NATURAL_TOKENS),
        "low": (4, 75),  # of the stream, which has no usage, LiteLLM counts the one token itself
        "medium": (1, NATURAL_TOKENS),
        "none": (10, NATURAL_TOKENS),
    }


def drawn(log: Path, *, of: str) -> dict[str, tuple[int, int]]:
    """Requests and tokens of each by effort, as the command of the README draws the lines of one model."""
    lines = [line for line in log.read_text().splitlines() if line.split()[2] == of]
    log.write_text("".join(f"{line}\n" for line in lines))
    readme = (EXAMPLE / "README.md").read_text()
    (command,) = re.findall(r"^\$ (awk .*?\| sort)$", readme, re.MULTILINE | re.DOTALL)
    shown = subprocess.run(command, shell=True, cwd=log.parent, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in shown.splitlines()]
    assert all(len(bar) == -(-int(tokens) // 20) for *_, tokens, _, _, bar in rows)
    return {effort: (int(requests), int(tokens)) for effort, requests, _, tokens, *_ in rows}


def test_streams_are_assembled_by_choice_and_wherever_their_pieces_end(litellm_python: Path) -> None:
    program = r"""
import json
from litellm import ModelResponseStream
from evenodds.answers import answers_of
from evenodds.integrations.litellm import assembled

def chunk(index, text, reason):
    choice = {"index": index, "delta": {"content": text}, "finish_reason": reason}
    return ModelResponseStream(id="x", model="m", choices=[choice])

def answers(*args, **more):
    return [(answer.text, answer.left_out) for answer in answers_of(assembled(*args, **more))]

told = [chunk(0, "The answer ", None), chunk(1, "It is ", None), chunk(0, "is 42.", None), chunk(1, "7.", None)]
ended = [*told, chunk(1, None, "length"), chunk(0, None, "stop")]
assert answers(ended) == [("The answer is 42.", None), ("It is 7.", "length")], answers(ended)
assert answers([*told, chunk(0, None, "stop")]) == [("The answer is 42.", "aborted"), ("It is 7.", "aborted")]
assert answers(told[::2]) == [("The answer is 42.", "aborted")]
assert answers([*told[::2], chunk(0, None, "stop")], sent=told[::2]) == [("The answer is 42.", "aborted")]
assert answers([*told[::2], chunk(0, None, "stop")], sent=[]) == [("The answer is 42.", None)]
assert answers([]) == [("", "aborted")]

events = [
    {"type": "message_start", "message": {"content": []}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "4\u2028é"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "2"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
]
lines = [f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in events]
whole = b"".join(lines)
for end in range(len(whole)):
    assert answers([whole[:end], whole[end:]]) == [("4\u2028é2", None)], end
assert answers([b"".join(lines[:3]), lines[3][:-20]]) == [("4\u2028é2", "aborted")]
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "client"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}

    done = subprocess.run(
        [str(litellm_python), "-c", program], capture_output=True, text=True, check=False, env=environment
    )

    assert done.returncode == 0, done.stderr


def test_openais_own_client_reads_the_label(
    start_service: Callable[[str], Service], litellm_python: Path, tmp_path: Path
) -> None:
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db")
    service.client.put_run("served", predictor="mopps", embedder="none")
    service.client.observe("served", 0, [{"text": "Easy?", "successes": 8, "attempts": 8}])
    program = """
import sys, json, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
reply = client.chat.completions.create(
    model="served",
    messages=[{"role": "system", "content": "Judge."}, {"role": "user", "content": "Easy?"}],
    temperature=0,
)
try:
    client.chat.completions.create(model="nowhere", messages=[{"role": "user", "content": "Easy?"}])
except openai.NotFoundError as error:
    print(json.dumps([reply.choices[0].message.content, reply.choices[0].finish_reason, error.status_code]))
"""

    asked = subprocess.run(
        [str(litellm_python), "-c", program, service.base_url], capture_output=True, text=True, check=False
    )

    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout) == ["low", "stop", 404]
