"""What holds for every request: bodies that cannot be read, unknown routes, request ids, health and metrics."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from evenodds import Problem

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""

ROOT = Path(__file__).parents[2]
JSON = {"content-type": "application/json"}
WITH_BODY = [("POST", "/observe"), ("POST", "/predict"), ("POST", "/select_batch"), ("PUT", "/runs/{run}")]


@without_the_database
@pytest.mark.parametrize(("method", "path"), WITH_BODY)
@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "body: Field required"),
        (b"{bad", "body: invalid JSON at character 1: Expecting property name enclosed in double quotes"),
        (b'{"run": ', "body: invalid JSON at character 8: Expecting value"),
        (
            b"[" * 100_000,
            "body: this JSON is nested too deeply, or has a number with too many digits: send simpler JSON",
        ),
        (
            b'{"step": ' + b"9" * 5_000 + b"}",
            "body: this JSON is nested too deeply, or has a number with too many digits: send simpler JSON",
        ),
        (b"[]", "body: Input should be a valid dictionary or object to extract fields from"),
        (b'"run"', "body: Input should be a valid dictionary or object to extract fields from, got 'run'"),
        (b"null", "body: Input should be a valid dictionary or object to extract fields from"),
    ],
)
def test_a_body_that_cannot_be_read_is_malformed(
    caller: Caller, method: str, path: str, content: bytes, detail: str
) -> None:
    problem = caller.refused(method, path.format(run=caller.run), content=content, headers=JSON)

    assert (problem.status, problem.code, problem.detail) == (422, "malformed", detail)


@without_the_database
@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b'{"run": "\xff"}',
        b'{"run": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"categories": {"\\ud800": 1}}',
        b'{"run": {"run": 1}}',
        b'{"step": 1e999}',
        b'{"observations": {"0": 1}}',
        b'{"prompts": [null]}',
        b'{"candidates": [[]]}',
    ],
)
@pytest.mark.parametrize(("method", "path"), [*WITH_BODY, ("POST", "/runs/{run}/prompts")])
def test_no_body_makes_the_service_fail(caller: Caller, method: str, path: str, content: bytes) -> None:
    problem = caller.refused(method, path.format(run=caller.run), content=content, headers=JSON)

    assert (problem.status, problem.code) == (422, "malformed")


@without_the_database
@pytest.mark.parametrize(("method", "path"), [*WITH_BODY, ("POST", "/runs/{run}/prompts")])
@pytest.mark.parametrize(("media_type", "shown"), [("text/plain", "text/plain"), (None, "none")])
def test_json_under_another_name_is_refused(
    caller: Caller, method: str, path: str, media_type: str | None, shown: str
) -> None:
    headers = {"content-type": media_type} if media_type else {}

    problem = caller.refused(method, path.format(run=caller.run), content=b"{}", headers=headers)

    assert (problem.status, problem.code) == (415, "media_type")
    assert problem.detail == f"body: send it with Content-Type: application/json, got {shown}"


@without_the_database
@pytest.mark.parametrize("path", ["/nowhere", "/runs/a/b/c", "/observe/", "/v1/observe"])
def test_an_unknown_route_is_404(caller: Caller, path: str) -> None:
    problem = caller.refused("GET", path)

    assert (problem.status, problem.code) == (404, "route_unknown")
    assert problem.detail == f"there is no operation GET {path}: /docs lists all operations"


@without_the_database
@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/observe", {"POST"}),
        ("DELETE", "/select_batch", {"POST"}),
        ("POST", "/healthz", {"GET"}),
        ("BREW", "/predict", {"POST"}),
    ],
)
def test_a_wrong_method_is_405_and_names_the_right_one(
    caller: Caller, method: str, path: str, allowed: set[str]
) -> None:
    problem = caller.refused(method, path)

    assert (problem.status, problem.code) == (405, "method_not_allowed")
    assert problem.detail == f"{method} is not allowed on {path}: /docs lists all operations"
    assert set(caller.http.request(method, path).headers["allow"].split(", ")) == allowed


@without_the_database
@pytest.mark.parametrize("given", ["abc", "A.b_c:d-1", "x" * 128])
def test_a_well_formed_request_id_is_echoed(caller: Caller, given: str) -> None:
    reply = caller.http.get("/healthz", headers={"X-Request-ID": given})
    refusal = caller.http.get("/nowhere", headers={"X-Request-ID": given})

    assert reply.headers["x-request-id"] == refusal.headers["x-request-id"] == given
    assert Problem.model_validate_json(refusal.content).request_id == given


@without_the_database
@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "ü"])
def test_another_request_id_is_replaced(caller: Caller, given: str) -> None:
    reply = caller.http.get("/healthz", headers={b"X-Request-ID": given.encode()})

    assert reply.headers["x-request-id"] != given
    assert len(reply.headers["x-request-id"]) == 32


def test_each_request_without_an_id_gets_its_own(caller: Caller) -> None:
    assert len({caller.http.get("/healthz").headers["x-request-id"] for _ in range(5)}) == 5


def test_every_reply_tells_where_its_time_went(caller: Caller) -> None:
    caller.create(embedder="none")
    caller.load([{"prompt_id": "a"}, {"prompt_id": "b"}])

    selected = caller.http.post("/select_batch", json={"run": caller.run, "step": 1, "batch_size": 1})
    refused = caller.http.get("/nowhere")

    phases = dict(part.split(";dur=") for part in selected.headers["server-timing"].split(", "))
    assert set(phases) == {"database", "catch-up", "copy", "beliefs", "moments", "choice", "reply", "total"}
    total = float(phases.pop("total"))
    assert 0 < float(phases["beliefs"]) < sum(map(float, phases.values())) <= total + 0.1  # each is rounded
    assert refused.headers["server-timing"].startswith("total;dur=")


def test_a_running_service_is_healthy_and_ready(service: Service) -> None:
    for path in ("/healthz", "/readyz"):
        reply = service.http.get(path)

        assert (reply.status_code, reply.json()) == (200, {"status": "ok", "reasons": []})


def test_a_service_whose_database_is_gone_is_alive_but_not_ready(
    postgresql_server: str, start_service: Callable[[str], Service]
) -> None:
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE lost")
        service = start_service(postgresql_server.replace("/postgres?", "/lost?"))
        service.client.put_run("math", embedder="none")
        connection.execute("DROP DATABASE lost WITH (FORCE)")

    alive, ready, call = (service.http.get(path) for path in ("/healthz", "/readyz", "/runs/math"))

    assert alive.status_code == 200
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    (reason,) = ready.json()["reasons"]
    assert reason.startswith("the database is unavailable (")
    assert 'database "lost" does not exist' in reason
    assert reason.endswith("): repeat the call later")
    problem = Problem.model_validate_json(call.content)
    assert (problem.status, problem.code, problem.detail) == (503, "store_unavailable", reason)
    assert call.headers["content-type"] == "application/problem+json"
    assert call.headers["retry-after"] == "1"


def test_a_fault_of_the_service_tells_the_caller_its_id_and_no_more(
    tmp_path: Path, start_service: Callable[[str], Service]
) -> None:
    """Somebody has written to the database by hand."""
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db")
    service.client.put_run("math", embedder="none")
    with sqlite3.connect(tmp_path / "evenodds.db") as connection:
        connection.execute("UPDATE runs SET settings = '{\"secret\": 1}'")
    connection.close()

    reply = service.http.get("/runs/math", headers={"X-Request-ID": "fault-1"})

    assert (reply.status_code, reply.headers["content-type"]) == (500, "application/problem+json")
    assert reply.headers["x-request-id"] == "fault-1"
    assert reply.json() == {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "detail": "the service failed to answer: its log names the cause under this request id",
        "code": "internal_error",
        "request_id": "fault-1",
        "errors": [],
    }


def counts(service: Service) -> dict[tuple[str, str, str], float]:
    reply = service.http.get("/metrics")
    assert reply.status_code == 200
    return {
        (sample.labels["method"], sample.labels["route"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
        if sample.name == "evenodds_requests_total"
    }


def test_metrics_count_requests_by_the_route_and_never_by_the_path(
    tmp_path: Path, start_service: Callable[[str], Service]
) -> None:
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db")
    service.client.put_run("secret-run", embedder="none")
    service.client.add_prompts("secret-run", [{"prompt_id": "secret-prompt"}])
    service.client.prompt("secret-run", "secret-prompt")
    for path in ("/nowhere/1", "/nowhere/2", "/runs/secret-run/prompts/secret-too"):
        service.http.get(path)
    service.http.request("BREW", "/observe")

    assert counts(service) == {
        ("PUT", "/runs/{run}", "201"): 1,
        ("POST", "/runs/{run}/prompts", "200"): 1,
        ("GET", "/runs/{run}/prompts/{prompt_id}", "200"): 1,
        ("GET", "/runs/{run}/prompts/{prompt_id}", "404"): 1,
        ("GET", "unknown", "404"): 2,
        ("other", "/observe", "405"): 1,
    }
    assert "secret-prompt" not in service.http.get("/metrics").text


def test_the_documentation_answers(service: Service) -> None:
    docs = service.http.get("/docs")

    assert docs.status_code == 200
    assert "url: 'openapi.json'" in docs.text
    assert service.http.get("/openapi.json").json()["info"]["title"] == "Even Odds"


UNSTORABLE = ["%00", "a%00b", "%ED%A0%80", "%ff", "%5Cu0000"]
"""NUL, half of a surrogate pair in UTF-8, what is no UTF-8, and what only looks like NUL."""


def test_no_parameter_of_any_operation_makes_the_service_fail(caller: Caller) -> None:
    caller.load_texts("a")
    n_parameters = 0
    for path, methods in json.loads((ROOT / "openapi.json").read_text())["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                n_parameters += 1
                for value in UNSTORABLE:
                    in_path = {"run": caller.run, "prompt_id": "a", "policy": "p"}
                    query = f"?{parameter['name']}={value}" if parameter["in"] == "query" else ""
                    if parameter["in"] == "path":
                        in_path[parameter["name"]] = value
                    if path.endswith("/events"):  # which else go on for an hour
                        query += f"{'&' if query else '?'}wait_seconds=0"
                    reply = caller.http.request(method, path.format(**in_path) + query, json={})
                    assert reply.status_code < 500, (method, path, parameter["name"], value, reply.text)
    assert n_parameters > 20


def test_no_header_makes_the_service_fail(caller: Caller) -> None:
    for name in ("Authorization", "X-Request-ID", "User-Agent", "Origin", "Cookie", "traceparent", "If-None-Match"):
        for value in (b"\xff", b"\xed\xa0\x80", b"%00", b"a" * 5_000):
            reply = caller.http.get(f"/runs/{caller.run}", headers={name.encode(): value})
            assert reply.status_code == 200


@pytest.mark.parametrize(("query", "fault"), [("search=%00", "search"), ("search=a&x%00=b", "x\x00")])
def test_what_no_database_can_store_is_refused_as_in_bodies(caller: Caller, query: str, fault: str) -> None:
    problem = caller.refused("GET", f"/runs/{caller.run}/prompts?{query}")

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail == f"{fault}: a NUL character (\\u0000) cannot be stored: remove it"


@without_the_database
@pytest.mark.parametrize(("path", "place"), [("/observe", "body"), ("/runs/{run}/prompts", "body")])
def test_what_is_no_utf_8_is_called_so(caller: Caller, path: str, place: str) -> None:
    problem = caller.refused("POST", path.format(run=caller.run), content=b'{"run": "\xff"}', headers=JSON)

    assert problem.detail == f"{place}: it is not UTF-8 (byte 0xff at position 9): encode it as UTF-8"


@without_the_database
def test_a_line_that_is_no_utf_8_is_called_so(caller: Caller) -> None:
    lines = b'{"prompt_id": "a"}\n{"prompt_id": "\xc3"}\n'
    headers = {"content-type": "application/x-ndjson"}

    problem = caller.refused("POST", f"/runs/{caller.run}/prompts", content=lines, headers=headers)

    assert problem.detail.startswith("line 2: it is not UTF-8 (byte 0xc3 at position 15): encode it as UTF-8")
