"""The example for any gateway that forwards HTTP, between a caller and a model, both on loopback."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
import yaml
from tests.gateways.conftest import ROOT, ServedModel, serving_model, tokens_of
from tests.nginx import free_address, running_nginx
from tests.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from tests.conftest import Service

EXAMPLE = ROOT / "examples" / "http_shim"


@pytest.fixture
def service(start_service: Callable[[str], Service], tmp_path: Path) -> Service:
    """Beliefs .9 about "Easy?", .1 about "Hard?"."""
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db")
    service.client.put_run("served", predictor="mopps", embedder="none")
    service.client.observe("served", 0, [{"text": "Easy?", "successes": 8, "attempts": 8}])
    service.client.observe("served", 0, [{"text": "Hard?", "successes": 0, "attempts": 8}])
    return service


@pytest.fixture
def shim(service: Service, served_model: ServedModel) -> Iterator[httpx.Client]:
    with serving_shim(served_model.base_url.removesuffix("/v1"), service) as http:
        yield http


@contextmanager
def serving_shim(upstream: str, service: Service) -> Iterator[httpx.Client]:
    spec = importlib.util.spec_from_file_location("shim", EXAMPLE / "shim.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = module.create_app(upstream, service.base_url, "served", deadline_ms=30_000)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=PATIENCE_SECONDS) as http:
        yield http
    server.should_exit = True
    thread.join()


def chat(shim: httpx.Client, text: str, **more: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    reply = shim.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer x"})
    assert reply.status_code == 200, reply.text
    return reply


def test_a_chat_request_goes_on_with_its_difficulty(shim: httpx.Client, served_model: ServedModel) -> None:
    reply = chat(shim, "Hard?", metadata={"cohort": "beta"}, temperature=0.5)
    chat(shim, "Easy?")

    assert reply.json()["choices"][0]["message"]["content"] == "41"
    hard, easy = served_model.bodies
    assert hard["metadata"] == {"cohort": "beta", "difficulty": "high"}
    assert (hard["temperature"], hard["messages"]) == (0.5, [{"role": "user", "content": "Hard?"}])
    assert easy["metadata"] == {"difficulty": "low"}
    hard_headers, easy_headers = served_model.headers
    assert (hard_headers["x-evenodds-effort"], easy_headers["x-evenodds-effort"]) == ("high", "low")
    assert easy_headers["x-evenodds-success-rate"] == "0.900"
    assert hard_headers["authorization"] == "Bearer x"


def test_a_follow_up_is_judged_with_what_it_follows(
    shim: httpx.Client, service: Service, served_model: ServedModel
) -> None:
    judged = "user: Easy?\n\nassistant: Yes.\n\nuser: go on"
    service.client.observe("served", 0, [{"text": judged, "successes": 0, "attempts": 8}])
    turns = [{"role": "user", "content": "Easy?<system-reminder>x</system-reminder>"}]

    shim.post("/v1/chat/completions", json={"messages": turns})
    turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "go on"}]
    shim.post("/v1/chat/completions", json={"messages": turns})

    assert [body["metadata"]["difficulty"] for body in served_model.bodies] == ["low", "high"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/chat/completions?x=1"])
def test_every_endpoint_of_a_conversation_is_judged(shim: httpx.Client, served_model: ServedModel, path: str) -> None:
    conversation = {"input": "Hard?"} if "responses" in path else {"messages": [{"role": "user", "content": "Hard?"}]}

    reply = shim.post(path, json=conversation)

    assert served_model.bodies[0]["metadata"] == {"difficulty": "high"}
    assert reply.headers["x-evenodds-effort"] == "high"
    assert served_model.paths == [path]


def test_what_a_caller_claims_to_be_a_judgement_is_removed(
    shim: httpx.Client, service: Service, served_model: ServedModel
) -> None:
    body = {"messages": [{"role": "user", "content": "Hard?"}], "metadata": {"difficulty": "low", "cohort": "beta"}}
    claimed = {"X-EvenOdds-Effort": "low", "x-evenodds-anything": "1"}

    shim.post("/v1/chat/completions", json=body, headers=claimed)
    service.stop()
    shim.post("/v1/chat/completions", json=body, headers=claimed)
    shim.post("/v1/other", json=body, headers=claimed)

    judged, unjudged, other = served_model.headers
    assert (judged["x-evenodds-effort"], "x-evenodds-anything" in judged) == ("high", False)
    assert not [name for headers in (unjudged, other) for name in headers if name.startswith("x-evenodds")]
    metadata = [body["metadata"] for body in served_model.bodies]
    assert metadata[0] == {"difficulty": "high", "cohort": "beta"}
    assert metadata[1] == {"cohort": "beta"}
    assert served_model.bodies[2] == body


def test_paths_queries_and_repeated_headers_go_on_as_they_came(shim: httpx.Client, served_model: ServedModel) -> None:
    path = "/v1/models/org%2Fmodel?q=a%2Fb&q=c%20d&empty"

    reply = shim.get(path)

    assert served_model.paths == [path]
    assert reply.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert "x-evenodds-effort" not in reply.headers


def test_without_the_service_requests_go_on_as_they_came(
    shim: httpx.Client, service: Service, served_model: ServedModel
) -> None:
    service.stop()

    for _ in range(10):
        chat(shim, "Hard?")

    assert all("metadata" not in body for body in served_model.bodies)
    assert all("x-evenodds-effort" not in headers for headers in served_model.headers)
    assert len(served_model.bodies) == 10


@pytest.mark.parametrize("body", [{"model": "m"}, {"messages": []}, {"messages": [{"role": "user", "content": 3}]}])
def test_what_is_no_chat_request_is_the_models_to_judge(
    shim: httpx.Client, served_model: ServedModel, body: dict[str, Any]
) -> None:
    shim.post("/v1/chat/completions", json=body)

    assert served_model.bodies == [body]


def test_a_model_that_is_not_there_is_named(shim: httpx.Client, served_model: ServedModel) -> None:
    served_model.stop()

    reply = shim.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hard?"}]})

    assert reply.status_code == 502
    assert reply.text.startswith(f"upstream {served_model.base_url.removesuffix('/v1')}: ")


def test_the_router_example_names_the_labels_and_the_key_that_the_shim_writes() -> None:
    routing = yaml.safe_load((EXAMPLE / "semantic_router.yaml").read_text())["routing"]

    signals = {signal["name"]: signal for signal in routing["signals"]["metadata"]}
    assert [signal["predicate"]["equals"] for signal in signals.values()] == ["low", "medium", "high"]
    assert {signal["key"] for signal in signals.values()} == {"difficulty"}
    conditions = [condition for decision in routing["decisions"] for condition in decision["rules"]["conditions"]]
    assert [condition["name"] for condition in conditions] == list(signals)


@pytest.mark.skipif(shutil.which("jq") is None, reason="the shell example needs jq")
def test_the_shell_example_has_a_default_for_when_there_is_no_answer(service: Service) -> None:
    (script,) = [block for block in (EXAMPLE / "README.md").read_text().split("```")[1::2] if block.startswith("sh\n")]
    script = script.removeprefix("sh\n").replace("--max-time 0.1", "--max-time 10").replace("50}", "5000}")

    def effort(text: str) -> str:
        command = ["bash", "-o", "pipefail", "-c", f'{script}\nbudget "{text}"']
        done = subprocess.run(
            command,
            env={"PATH": "/usr/bin:/bin", "EVENODDS_URL": service.base_url},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert (effort("Easy?"), effort("Hard?")) == ("low", "high")
    service.stop()
    assert effort("Easy?") == "medium"


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[tuple[str, ServedModel, ServedModel]]:
    """The example's nginx between the shim and two models: its address, the usual model and the small one."""
    address = free_address()
    with serving_model() as usual, serving_model() as small:
        config = (EXAMPLE / "nginx.conf").read_text()
        for there, here in (
            ("127.0.0.1:8801", address),
            ("127.0.0.1:8001", usual.base_url.removeprefix("http://").removesuffix("/v1")),
            ("127.0.0.1:8002", small.base_url.removeprefix("http://").removesuffix("/v1")),
        ):
            assert config.count(there) == 1
            config = config.replace(there, here)
        with running_nginx(config, tmp_path, address):
            yield f"http://{address}", usual, small


@pytest.mark.slow
def test_a_real_nginx_sends_easy_requests_to_a_small_model_and_the_usual_one_writes_less(
    nginx: tuple[str, ServedModel, ServedModel], service: Service, tmp_path: Path
) -> None:
    upstream, usual, small = nginx
    asked = ["Easy?", "Hard?", "Easy?", "Easy?"]
    with serving_shim(upstream, service) as http:
        for text in asked:
            chat(http, text)
        streamed = chat(http, "Easy?", stream=True)
        http.post("/v1/chat/completions", json={"model": "m"}, headers={"x-evenodds-effort": "low"})  # claimed
        service.stop()
        chat(http, "Easy?")  # nobody judges it

    assert streamed.text.endswith("data: [DONE]\n\n")
    assert [body["messages"][0]["content"] for body in small.bodies] == ["Easy?"] * 4
    assert [body.get("messages", [{"content": None}])[0]["content"] for body in usual.bodies] == [
        "Hard?",
        None,
        "Easy?",
    ]
    spent = sum(tokens_of(body) for body in usual.bodies if "messages" in body)
    assert (spent, sum(tokens_of(body) for body in small.bodies)) == (200, 400)  # without the shim the usual one: 600
    log = (tmp_path / "access.log").read_text()
    assert log.count("effort=low model=small status=200") == 4
    assert "effort=high model=usual status=200" in log
