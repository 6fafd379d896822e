"""A real LiteLLM proxy on loopback, in an environment of its own: its pins do not fit into that of the tests."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.waiting import PATIENCE_SECONDS, until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "litellm"
STARTUP_SECONDS = 5 * PATIENCE_SECONDS
MASTER_KEY = "sk-not-secret-used-on-loopback-only-0123456789abcdef"


@pytest.fixture(scope="session")
def litellm_python(request: pytest.FixtureRequest) -> Path:
    """A Python that has what `examples/litellm/requirements.txt` pins."""
    if importlib.util.find_spec("litellm") and importlib.util.find_spec("openai"):
        return Path(sys.executable)
    return _installed(EXAMPLE / "requirements.txt", request) / "python"


@pytest.fixture(scope="session")
def proxy_programs(request: pytest.FixtureRequest) -> Path:
    """The folder of the programs that `examples/http_shim/proxies.txt` pins."""
    return _installed(ROOT / "examples" / "http_shim" / "proxies.txt", request)


def _installed(pinned: Path, request: pytest.FixtureRequest) -> Path:
    """The programs of an environment that has what a file pins; installed once, kept in pytest's cache."""
    key = hashlib.sha256(pinned.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = request.config.cache.mkdir(f"{pinned.parent.name}-{key}")
    programs, done = folder / "bin", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        subprocess.run([*install, str(pinned)], check=True, timeout=900)
        done.touch()
    return programs


@dataclass
class ServedModel:
    """An OpenAI-compatible server on loopback that keeps what it was asked."""

    base_url: str
    stop: Callable[[], None]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@pytest.fixture
def served_model() -> Iterator[ServedModel]:
    with serving_model() as model:
        yield model


@contextmanager
def serving_model() -> Iterator[ServedModel]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model.paths.append(self.path)
            model.bodies.append(body)
            model.headers.append({name.lower(): value for name, value in self.headers.items()})
            if body.get("model") == "broken":
                self.answer(b'{"error": {"message": "out of order"}}', "application/json", status=500)
            elif self.path.endswith("/messages"):
                if body.get("stream"):
                    self.answer(_messages_stream(), "text/event-stream")
                else:
                    self.answer(json.dumps(_message()).encode(), "application/json")
            elif self.path.endswith("/responses"):
                response = _response_to()
                done = json.dumps({"type": "response.completed", "sequence_number": 1, "response": response})
                if body.get("stream"):
                    self.answer(f"event: response.completed\ndata: {done}\n\n".encode(), "text/event-stream")
                else:
                    self.answer(json.dumps(response).encode(), "application/json")
            elif body.get("stream") and "endless" in json.dumps(body["messages"]):
                self.go_on_until_nobody_listens()
            elif body.get("stream"):
                self.answer(_stream_of(body), "text/event-stream")
            else:
                self.answer(json.dumps(_reply_to(body)).encode(), "application/json")

        def answer(self, content: bytes, kind: str, *, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def go_on_until_nobody_listens(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            word = json.dumps({**CHUNK, "choices": [{"index": 0, "delta": {"content": "4"}, "finish_reason": None}]})
            with suppress(OSError):
                while not has_ended.wait(0.01):
                    self.wfile.write(f"data: {word}\n\n".encode())

        def do_GET(self) -> None:
            model.paths.append(self.path)
            self.send_response(200)
            self.send_header("Set-Cookie", "a=1")
            self.send_header("Set-Cookie", "b=2")
            self.send_header("X-Evenodds-Effort", "from the model")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *args: object) -> None:
            return

    has_ended = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def stop() -> None:
            has_ended.set()
            server.shutdown()
            server.server_close()
            thread.join()

        model = ServedModel(f"http://127.0.0.1:{server.server_address[1]}/v1", stop)
        yield model
        stop()


CHUNK = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
NATURAL_TOKENS = 100
"""So long is an answer of the served model that no limit cuts off."""


def tokens_of(body: dict[str, Any]) -> int:
    """What the served model writes for a request."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or NATURAL_TOKENS
    return int((body.get("n") or 1) * min(limit, NATURAL_TOKENS))


def _choices(body: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Message and finish reason of each choice. The second one is right, "42"; the words of the prompt may forbid."""
    said = json.dumps(body["messages"][-1]["content"])
    if body.get("tools"):
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        made: tuple[dict[str, Any], str] = ({"content": None, "tool_calls": [call]}, "tool_calls")
    elif "forbidden" in said:
        made = ({"content": ""}, "content_filter")
    elif "empty" in said:
        made = ({"content": ""}, "stop")
    elif "broken off" in said:
        made = ({"content": "4"}, "")
    elif tokens_of({**body, "n": 1}) < NATURAL_TOKENS:
        made = ({"content": "4"}, "length")
    else:
        made = ({"content": "41"}, "stop")
    best = ({"content": "42"}, "stop") if made[1] == "stop" else made
    return [best if i == 1 else made for i in range(body.get("n") or 1)]


def _reply_to(body: dict[str, Any]) -> dict[str, Any]:
    choices = [
        {"index": i, "message": {"role": "assistant", **message}, "finish_reason": reason}
        for i, (message, reason) in enumerate(_choices(body))
    ]
    tokens = tokens_of(body)
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


def _response_to() -> dict[str, Any]:
    text = {"type": "output_text", "text": "41", "annotations": []}
    message = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [text]}
    usage = {"input_tokens": 1, "output_tokens": NATURAL_TOKENS, "total_tokens": 1 + NATURAL_TOKENS}
    shown = {"id": "r", "object": "response", "created_at": 0, "status": "completed", "model": "m", "error": None}
    options = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}}
    return {**shown, **options, "output": [message], "usage": usage}


def _stream_of(body: dict[str, Any]) -> bytes:
    lines = []
    for i, (message, reason) in enumerate(_choices(body)):
        lines += [
            {**CHUNK, "choices": [{"index": i, "delta": {"content": part}, "finish_reason": None}]}
            for part in message["content"] or ""
        ]
        if reason:
            lines.append({**CHUNK, "choices": [{"index": i, "delta": {}, "finish_reason": reason}]})
    events = [f"data: {json.dumps(line)}\n\n" for line in lines]
    if all(reason for _, reason in _choices(body)):
        events.append("data: [DONE]\n\n")
    return "".join(events).encode()


def _message() -> dict[str, Any]:
    usage = {"input_tokens": 1, "output_tokens": NATURAL_TOKENS}
    shown = {"id": "msg", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None, "usage": usage}
    return {**shown, "content": [{"type": "text", "text": "41"}], "stop_reason": "end_turn"}


def _messages_stream() -> bytes:
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**_message(), "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *[{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": part}} for part in "41"],
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": NATURAL_TOKENS}},
        {"type": "message_stop"},
    ]
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()


@contextmanager
def running_proxy(
    python: Path,
    folder: Path,
    *,
    service_url: str,
    models: dict[str, str],
    model_url: str,
    hook: str | None = None,
    settings: dict[str, Any] | None = None,
    tiers: dict[str, str] | None = None,
) -> Iterator[httpx.Client]:
    """The example's proxy with more models at `model_url`. All that it says goes to `proxy.log`.

    Args:
        models: The deployment of each model.
        hook: Source of the callback, instead of the example's.
        settings: `litellm_settings` besides the example's.
        tiers: Models of the tiers of the example's complexity router, instead of its own.
    """
    config = yaml.safe_load((EXAMPLE / "config.yaml").read_text())
    (router,) = [each["litellm_params"] for each in config["model_list"] if each["model_name"] == "routed"]
    router["complexity_router_config"]["classifier_llm_config"]["timeout_ms"] = 30_000  # of a busy machine
    router["complexity_router_config"]["tiers"] |= tiers or {}
    config["litellm_settings"] |= settings or {}
    config["model_list"] += [
        {
            "model_name": name,
            "litellm_params": {"model": model, "api_base": model_url, "max_retries": 0, "api_key": "none"},
        }
        for name, model in models.items()
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "evenodds_hook.py").write_text(hook or (EXAMPLE / "evenodds_hook.py").read_text())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")},
        "PYTHONPATH": str(ROOT / "client"),
        "EVENODDS_URL": service_url,
        "EVENODDS_CHAT_URL": f"{service_url}/v1",
        "EVENODDS_GATEWAY_DEADLINE_MS": "30000",  # of a busy machine
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no download
        "LITELLM_MASTER_KEY": MASTER_KEY,
    }
    command = [str(python.parent / "litellm"), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        headers = {"Authorization": f"Bearer {MASTER_KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS, headers=headers) as http:
            _wait_until_alive(http, process, folder / "proxy.log")
            yield http
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def _wait_until_alive(http: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    def is_alive() -> bool:
        assert process.poll() is None, f"the proxy did not start:\n{log.read_text(errors='replace')[-4_000:]}"
        try:
            return http.get("/health/liveliness").status_code == 200
        except httpx.TransportError:
            return False

    until(is_alive, "the proxy to be alive", seconds=STARTUP_SECONDS)
