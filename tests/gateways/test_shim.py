"""The example for any gateway that forwards HTTP, between a caller and a model, both on loopback."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
import yaml
from benchmarks.nginx import NGINX, free_address, listening
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tests.gateways.conftest import ROOT, ServedModel, serving_model, tokens_of
from tests.waiting import PATIENCE_SECONDS, until, until_awaited

from evenodds import ConfigurationError

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


@pytest.fixture
def writing_shim(service: Service, served_model: ServedModel) -> Iterator[httpx.Client]:
    """One that writes metadata too."""
    with serving_shim(served_model.base_url.removesuffix("/v1"), service, writes_metadata=True) as http:
        yield http


def the_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shim", EXAMPLE / "shim.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving_shim(upstream: str, service: Service, **options: Any) -> Iterator[httpx.Client]:
    app = the_example().create_app(upstream, service.base_url, "served", deadline_ms=30_000, **options)
    with serving(app) as http:
        yield http


@contextmanager
def serving(app: Starlette) -> Iterator[httpx.Client]:
    listening = socket.create_server(("127.0.0.1", 0), backlog=500)
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


def test_a_chat_request_goes_on_with_its_judgement_in_headers_and_is_else_as_it_came(
    shim: httpx.Client, served_model: ServedModel
) -> None:
    reply = chat(shim, "Hard?", metadata={"cohort": "beta", "difficulty": "of the caller"}, temperature=0.5)
    chat(shim, "Easy?")

    assert reply.json()["choices"][0]["message"]["content"] == "41"
    hard, easy = served_model.bodies
    assert hard["metadata"] == {"cohort": "beta", "difficulty": "of the caller"}
    assert (hard["temperature"], hard["messages"]) == (0.5, [{"role": "user", "content": "Hard?"}])
    assert "metadata" not in easy
    hard_headers, easy_headers = served_model.headers
    assert (hard_headers["x-evenodds-effort"], easy_headers["x-evenodds-effort"]) == ("high", "low")
    assert easy_headers["x-evenodds-success-rate"] == "0.900"
    assert hard_headers["authorization"] == "Bearer x"


def test_the_difficulty_stands_in_the_body_where_the_operator_asks_for_it(
    service: Service, served_model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "UPSTREAM": served_model.base_url.removesuffix("/v1"),
        "EVENODDS_URL": service.base_url,
        "EVENODDS_GATEWAY_DEADLINE_MS": "30000",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    for value in ("off", "on"):
        monkeypatch.setenv("EVENODDS_SHIM_METADATA", value)
        with serving(the_example().app) as http:
            chat(http, "Hard?", metadata={"cohort": "beta"})

    assert [body["metadata"] for body in served_model.bodies] == [
        {"cohort": "beta"},
        {"cohort": "beta", "difficulty": "high"},
    ]
    monkeypatch.setenv("EVENODDS_SHIM_METADATA", "yes")
    with pytest.raises(ConfigurationError, match="EVENODDS_SHIM_METADATA is 'yes': set it to 'on' or 'off'"):
        the_example()


def test_a_follow_up_is_judged_with_what_it_follows(
    shim: httpx.Client, service: Service, served_model: ServedModel
) -> None:
    judged = "user: Easy?\n\nassistant: Yes.\n\nuser: go on"
    service.client.observe("served", 0, [{"text": judged, "successes": 0, "attempts": 8}])
    turns = [{"role": "user", "content": "Easy?<system-reminder>x</system-reminder>"}]

    shim.post("/v1/chat/completions", json={"messages": turns})
    turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "go on"}]
    shim.post("/v1/chat/completions", json={"messages": turns})

    assert [headers["x-evenodds-effort"] for headers in served_model.headers] == ["low", "high"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/chat/completions?x=1"])
def test_every_endpoint_of_a_conversation_is_judged(
    writing_shim: httpx.Client, served_model: ServedModel, path: str
) -> None:
    conversation = {"input": "Hard?"} if "responses" in path else {"messages": [{"role": "user", "content": "Hard?"}]}

    reply = writing_shim.post(path, json=conversation)

    assert served_model.bodies[0]["metadata"] == {"difficulty": "high"}
    assert reply.headers["x-evenodds-effort"] == "high"
    assert served_model.paths == [path]


def test_a_follow_up_of_what_only_the_model_has_is_not_judged(shim: httpx.Client, served_model: ServedModel) -> None:
    for kept in ({}, {"previous_response_id": "resp_1"}, {"conversation": "conv_1"}):
        shim.post("/v1/responses", json={"input": "Hard?", **kept})

    assert [headers.get("x-evenodds-effort") for headers in served_model.headers] == ["high", None, None]


def test_what_a_caller_claims_to_be_a_judgement_is_removed(
    writing_shim: httpx.Client, service: Service, served_model: ServedModel
) -> None:
    body = {"messages": [{"role": "user", "content": "Hard?"}], "metadata": {"difficulty": "low", "cohort": "beta"}}
    claimed = {"X-EvenOdds-Effort": "low", "x-evenodds-anything": "1"}

    writing_shim.post("/v1/chat/completions", json=body, headers=claimed)
    service.stop()
    writing_shim.post("/v1/chat/completions", json=body, headers=claimed)
    writing_shim.post("/v1/other", json=body, headers=claimed)

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

    assert all("x-evenodds-effort" not in headers for headers in served_model.headers)
    assert len(served_model.bodies) == 10


def test_headers_are_the_callers_and_no_others(shim: httpx.Client, served_model: ServedModel) -> None:
    shim.get("/v1/models")  # its reply sets cookies, for this caller alone
    connection = http.client.HTTPConnection(shim.base_url.host, shim.base_url.port, timeout=PATIENCE_SECONDS)
    connection.putrequest("POST", "/v1/other", skip_accept_encoding=True)
    connection.putheader("Content-Length", "2")
    connection.endheaders(b"{}")
    connection.getresponse().read()
    connection.close()

    assert set(served_model.headers[-1]) == {"host", "content-length"}


def test_as_many_requests_at_a_time_as_callers_send_reach_the_model(service: Service) -> None:
    """It answers when all of them are there, or one has been given up: a shim with a limit would wait for itself."""
    n_asked, arrived, statuses = 150, list[int](), list[int]()

    async def answer(request: Request) -> Response:
        arrived.append(1)
        await until_awaited(lambda: len(arrived) == n_asked or statuses, "all requests at the model")
        return Response("ok")

    async def ask(url: httpx.URL) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS) as http:
            statuses.append((await http.get("/v1/slow")).status_code)

    async def ask_all(url: httpx.URL) -> None:
        await asyncio.gather(*(ask(url) for _ in range(n_asked)))

    with (
        serving(Starlette(routes=[Route("/v1/slow", answer)])) as model,
        serving_shim(str(model.base_url), service) as shim,
    ):
        asyncio.run(ask_all(shim.base_url))

    assert statuses == [200] * n_asked


def test_a_body_that_is_nested_too_deeply_is_the_models_to_judge(service: Service) -> None:
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    body = b'{"messages": %s%s}' % (b"[" * 100_000, b"]" * 100_000)
    with (
        serving(Starlette(routes=[Route("/v1/messages", echo, methods=["POST"])])) as model,
        serving_shim(str(model.base_url), service) as shim,
    ):
        reply = shim.post("/v1/messages", content=body)

    assert (reply.status_code, reply.content) == (200, body)


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


def test_a_failure_without_words_is_told_by_its_name(service: Service) -> None:
    """A model that resets the connection: httpx raises an error without words."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65_536)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset

        thread = threading.Thread(target=refuse)
        thread.start()
        upstream = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with serving_shim(upstream, service) as shim:
            reply = shim.get("/v1/models")
        thread.join()

    assert (reply.status_code, reply.text) == (502, f"upstream {upstream}: ReadError")


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


@dataclass(frozen=True)
class Proxy:
    """A proxy of the example between the shim and two models."""

    url: str
    usual: ServedModel
    small: ServedModel
    log: Path


@pytest.fixture(params=["nginx", "envoy"])
def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Proxy]:
    """A real one, with the example's configuration but for the ports, and in Envoy a log that does not wait."""
    if request.param == "nginx":
        assert NGINX is not None, "the example for nginx was not tried: install nginx"
        name, port_form = "nginx.conf", "1:{}"
        command = [NGINX, "-p", str(tmp_path), "-c", name, "-e", "stderr"]
    else:
        envoy, name, port_form = request.getfixturevalue("proxy_programs") / "envoy", "envoy.yaml", "port_value: {}"
        command = [str(envoy), "-c", name, "--disable-hot-restart", "--file-flush-interval-msec", "10"]
    with serving_model() as usual, serving_model() as small:
        address, config = free_address(), (EXAMPLE / name).read_text()
        for there, here in (
            (8801, httpx.URL(f"http://{address}").port),
            (8001, httpx.URL(usual.base_url).port),
            (8002, httpx.URL(small.base_url).port),
        ):
            assert config.count(port_form.format(there)) == 1
            config = config.replace(port_form.format(there), port_form.format(here))
        (tmp_path / name).write_text(config)
        with listening(command, tmp_path, address):
            yield Proxy(f"http://{address}", usual, small, tmp_path / "access.log")


def requests_by_model(log: Path) -> dict[str, int]:
    """What the command of the README shows of a log, over all hours."""
    (command,) = re.findall(r"^  \$ (awk .*?\| sort)$", (EXAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    shown = subprocess.run(command, shell=True, cwd=log.parent, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in shown.splitlines()]
    assert all(int(size) > 0 for _, _, _, size in lines)
    return {model: sum(int(n) for _, of, n, _ in lines if of == model) for _, model, _, _ in lines}


@pytest.mark.slow
def test_a_real_proxy_sends_easy_requests_to_a_small_model_and_the_usual_one_writes_less(
    proxy: Proxy, service: Service
) -> None:
    asked = ["Easy?", "Hard?", "Easy?", "Easy?"]
    path = "/v1/models/org%2Fmodel?q=a%2Fb"
    with serving_shim(proxy.url, service) as http:
        for text in asked:
            chat(http, text)
        streamed = chat(http, "Easy?", stream=True)
        http.post("/v1/chat/completions", json={"model": "m"}, headers={"x-evenodds-effort": "low"})  # claimed
        http.get(path)
        service.stop()
        chat(http, "Easy?")  # nobody judges it

    usual, small = proxy.usual, proxy.small
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert [body["messages"][0]["content"] for body in small.bodies] == ["Easy?"] * 4
    assert [body.get("messages", [{"content": None}])[0]["content"] for body in usual.bodies] == [
        "Hard?",
        None,
        "Easy?",
    ]
    assert path in usual.paths
    spent = sum(tokens_of(body) for body in usual.bodies if "messages" in body)
    assert (spent, sum(tokens_of(body) for body in small.bodies)) == (200, 400)  # without the shim the usual one: 600
    until(lambda: proxy.log.read_text().count("\n") == 8, "all requests in the proxy's log")
    log = proxy.log.read_text()
    assert log.count("effort=low model=small status=200") == 4
    assert "effort=high model=usual status=200" in log
    assert requests_by_model(proxy.log) == {"small": 4, "usual": 4}


@pytest.mark.slow
def test_the_router_itself_finds_no_fault_in_the_example(proxy_programs: Path, tmp_path: Path) -> None:
    """The router needs containers; its own check of a configuration does not."""
    router, config = str(proxy_programs / "vllm-sr"), tmp_path / "config.yaml"
    subprocess.run([router, "config", "init", "--output", str(config)], check=True, capture_output=True)
    merged = yaml.safe_load(config.read_text().replace("replace-with-your-model", "served-model"))
    example = yaml.safe_load((EXAMPLE / "semantic_router.yaml").read_text())["routing"]
    merged["routing"]["signals"] = example["signals"]
    merged["routing"]["decisions"] += example["decisions"]

    def checked() -> subprocess.CompletedProcess[str]:
        config.write_text(yaml.safe_dump(merged))
        command = [router, "config", "validate", "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = checked()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Decisions: 4 total" in done.stdout
    example["signals"]["metadata"][0]["name"] = "of another name"
    assert checked().returncode != 0  # it looks at what the decisions name
