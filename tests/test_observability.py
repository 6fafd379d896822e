"""What an operator sees of a running service: log lines with request ids, and traces where they are asked for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.commands.test_command_line import main_with, serve, serving
from tests.waiting import PATIENCE_SECONDS

from evenodds_service.errors import RunUnknown
from evenodds_service.redaction import described

if TYPE_CHECKING:
    from tests.commands.test_command_line import Server

__all__ = ["main_with", "serve"]  # fixtures

ROOT = Path(__file__).parents[1]
SECRET = "a text that nobody else may read"


class Collector:
    """Receives traces as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    export = ExportTraceServiceRequest.FromString(body)
                    for resource in export.resource_spans:
                        for scope in resource.scope_spans:
                            collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


@dataclass(frozen=True)
class Told:
    """What a service with traces said of five requests, one of them refused, and what it sent of them."""

    refused: httpx.Response
    said: list[str]
    spans: list[Any]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    with collecting() as collector:
        settings = {
            "EVENODDS_TELEMETRY": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with (
            serving(tmp_path_factory.mktemp("told"), settings) as server,
            httpx.Client(base_url=server.base_url, timeout=PATIENCE_SECONDS) as http,
        ):
            http.put("/runs/math", json={"embedder": "none"}, headers={"X-Request-ID": "first"})
            http.post("/runs/math/prompts", json={"prompts": [{"prompt_id": "a", "text": SECRET}]})
            http.post("/predict", json={"run": "math", "prompts": [{"text": SECRET}]})
            refused = http.post("/predict", json={"run": "math", "prompts": [{"text": SECRET, "colour": "red"}]})
            http.get("/healthz")
            server.end(signal.SIGTERM)
    return Told(refused, server.said, collector.spans)


def test_every_request_is_one_line_with_its_id_and_without_its_body(told: Told) -> None:
    said = [json.loads(line) for line in told.said if line.startswith("{")]

    requests = [line for line in said if line["event"] == "request"]
    assert [(line["method"], line["route"], line["status"]) for line in requests] == [
        ("PUT", "/runs/{run}", 201),
        ("POST", "/runs/{run}/prompts", 200),
        ("POST", "/predict", 200),
        ("POST", "/predict", 422),
    ]
    assert requests[0]["request_id"] == "first"
    assert requests[0]["run"] == "math"
    assert requests[3]["request_id"] == told.refused.headers["x-request-id"]
    assert all(line["milliseconds"] > 0 and line["timestamp"] and line["level"] == "info" for line in requests)
    assert not [line for line in told.said if SECRET in line]


def test_traces_go_out_where_they_are_asked_for(told: Told) -> None:
    names = {span.name for span in told.spans}

    assert {"PUT /runs/{run}", "POST /predict"} <= names
    assert not [name for name in names if "healthz" in name]
    assert not [span for span in told.spans if SECRET in str(span)]


def test_text_is_for_people_and_the_level_is_a_setting(serve: Callable[..., Server]) -> None:
    server = serve(EVENODDS_LOG_FORMAT="text", EVENODDS_LOG_LEVEL="debug")
    httpx.get(f"{server.base_url}/healthz", timeout=PATIENCE_SECONDS)

    server.end(signal.SIGTERM)

    assert not [line for line in server.said if line.startswith("{")]
    assert [line for line in server.said if "request" in line and "route=/healthz" in line]


def test_what_breaks_in_any_room_puts_no_text_and_no_key_into_the_log(database_url: str) -> None:
    import rich  # noqa: F401  # with which structlog would show the values of variables

    command = [sys.executable, "-m", "tests.breaking", database_url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=PATIENCE_SECONDS)

    assert done.stdout.split() == ["domain", "api", "runtime", "worker", "storage"], done.stderr
    assert "canary" not in done.stderr
    assert "yellow" not in done.stderr
    for fault in ("no vector of", "refit 1 failed", "IntegrityError" if "sqlite" in database_url else "CheckViolation"):
        said = [line for line in done.stderr.splitlines() if fault in line]
        assert len([line for line in said if line.startswith("{")]) == 1, "in JSON"
        assert len([line for line in said if not line.startswith("{")]) >= 1, "for people"
    for line in done.stderr.splitlines():
        if line.startswith("{") and json.loads(line)["event"].startswith("failed to answer"):
            assert json.loads(line)["request_id"] == "eo_***"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            ValueError("invalid literal for int() with base 10: 'word'"),
            "ValueError: invalid literal for int() with base 10: '...'",
        ),
        (KeyError("a text"), "KeyError: '...'"),
        (KeyError('It\'s a "text"'), "KeyError: '...'"),
        (TypeError("'NoneType' object is not 'a text'"), "TypeError: 'NoneType' object is not '...'"),
        (
            FileNotFoundError(2, "No such file or directory", "/data/a b"),
            "FileNotFoundError: [Errno 2] No such file or directory: '/data/a b'",
        ),
        (RunUnknown("run 'a b' does not exist"), "RunUnknown: run 'a b' does not exist"),
        (RuntimeError("first\nDETAIL: Failing row contains (a text)"), "RuntimeError: first"),
        (
            RuntimeError(f"{'eo_' + 'x' * 43} of Bearer abc.def at postgresql://u:p@host"),
            "RuntimeError: eo_*** of Bearer *** at postgresql://u:***@host",
        ),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_of_an_errors_message_only_what_quotes_no_value_is_shown(error: Exception, shown: str) -> None:
    assert described(error) == shown


def test_a_bad_level_is_named(main_with: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    status = main_with("serve", EVENODDS_LOG_LEVEL="loud")

    said = capsys.readouterr().err
    assert status == 1
    assert "EVENODDS_LOG_LEVEL" in said
    assert "'loud'" in said
