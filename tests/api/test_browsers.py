"""What a page of another site can make a browser do here: nothing. Requests carry the headers that Chromium sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.api.test_hostile import raw_status, sound

from evenodds import Problem

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

pytestmark = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
"""Refused before the database is asked: one backend will do."""

PROMPTS = b'{"prompts": [{"prompt_id": "planted", "text": "x"}]}'
FOREIGN = {
    "fetch(url, {mode: 'no-cors', method: 'POST', body}) from another port": {
        "Content-Type": "text/plain;charset=UTF-8",
        "Origin": "http://localhost:9000",
        "Referer": "http://localhost:9000/",
        "Sec-Fetch-Site": "same-site",
        "Sec-Fetch-Mode": "no-cors",
        "Sec-Fetch-Dest": "empty",
    },
    "navigator.sendBeacon(url, new Blob([body])), which has no type": {
        "Origin": "https://attacker.example",
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "no-cors",
        "Sec-Fetch-Dest": "empty",
    },
    "a form with enctype=text/plain": {
        "Content-Type": "text/plain",
        "Origin": "https://attacker.example",
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
        "Sec-Fetch-User": "?1",
        "Upgrade-Insecure-Requests": "1",
    },
    "a form in a sandboxed frame, of a browser without Sec-Fetch": {
        "Content-Type": "text/plain",
        "Origin": "null",
    },
    "a browser without Sec-Fetch": {
        "Content-Type": "text/plain;charset=UTF-8",
        "Origin": "http://attacker.example",
    },
}


def post(caller: Caller, headers: dict[str, str], content: bytes = PROMPTS) -> httpx.Response:
    request = caller.http.build_request("POST", f"/runs/{caller.run}/prompts", content=content, headers=headers)
    return caller.http.send(request)


def problem_of(reply: httpx.Response) -> tuple[int, str]:
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    problem = Problem.model_validate_json(reply.content)
    assert problem.request_id == reply.headers["x-request-id"]
    return problem.status, problem.code


@pytest.mark.parametrize("way", FOREIGN)
def test_a_page_of_another_site_changes_nothing(caller: Caller, way: str) -> None:
    headers = FOREIGN[way]
    before = caller.state()

    refused = {
        problem_of(post(caller, headers)) for headers in (headers, {**headers, "Content-Type": "application/json"})
    }

    assert refused == {(403, "origin_refused")}
    assert caller.state() == before


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_no_operation_takes_a_body_of_a_type_that_needs_no_permission(caller: Caller, media_type: str) -> None:
    """Even where a browser said nothing of the page: other types make it ask first, and it is told no."""
    for method, path, body in sound(caller.run):
        reply = caller.http.request(method, path, content=str(body).encode(), headers={"Content-Type": media_type})
        assert problem_of(reply) == (415, "media_type")
    preflight = {"Origin": "https://attacker.example", "Access-Control-Request-Method": "POST"}
    assert not [name for name in caller.http.options("/observe", headers=preflight).headers if "allow-origin" in name]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_no_method_that_changes_something_is_open_to_other_sites(caller: Caller, method: str) -> None:
    reply = caller.http.request(method, f"/runs/{caller.run}", headers={"Origin": "https://attacker.example"})

    assert problem_of(reply) == (403, "origin_refused")


def test_the_services_own_page_and_programs_may_call(caller: Caller) -> None:
    own = f"http://{urlsplit(str(caller.http.base_url)).netloc}"
    json = {"Content-Type": "application/json"}

    replies = [
        post(caller, json),
        post(caller, {**json, "Origin": own}),
        post(caller, {**json, "Origin": own, "Sec-Fetch-Site": "same-origin"}),
        post(caller, {**json, "Sec-Fetch-Site": "none"}),
        caller.http.get("/runs", headers=FOREIGN["a browser without Sec-Fetch"]),  # its page cannot read the reply
    ]

    assert [reply.status_code for reply in replies] == [200] * 5


def test_an_origin_that_is_allowed_may_call(
    start_service: Callable[..., Service], tmp_path: Any, service: Service
) -> None:
    origin = "https://lab.example:8443"
    allowing = start_service(f"sqlite:///{tmp_path}/evenodds.db", allowed_origins=f"https://other.example, {origin}")
    headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}

    asked = allowing.http.options(
        "/runs/math",
        headers={**headers, "Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type"},
    )
    made = allowing.http.put("/runs/math", json={"embedder": "none"}, headers=headers)
    refused = allowing.http.put("/runs/math", json={}, headers={**headers, "Origin": "https://lab.example"})

    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, origin)
    assert (made.status_code, made.headers["access-control-allow-origin"]) == (201, origin)
    assert problem_of(refused) == (403, "origin_refused")


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:8000", "127.0.0.1.attacker.example", "[::2]", "", "0.0.0.0"]
)
@pytest.mark.parametrize("path", ["/", "/runs", "/healthz", "/docs", "/openapi.json"])
def test_on_loopback_no_foreign_name_is_answered(caller: Caller, host: str, path: str) -> None:
    reply = caller.http.get(path, headers={"Host": host, "Sec-Fetch-Site": "same-origin"})

    assert problem_of(reply) == (421, "host_refused")


def test_two_hosts_or_none_are_refused(caller: Caller) -> None:
    for hosts in (b"", b"Host: localhost\r\nHost: localhost\r\n"):
        status, _ = raw_status(caller.http, b"GET /runs HTTP/1.1\r\nConnection: close\r\n" + hosts + b"\r\n")
        assert status in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.1.2.3:80", "[::1]:8000"])
def test_every_name_of_loopback_is_answered(caller: Caller, host: str) -> None:
    assert caller.http.get("/runs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "answered"),
    [
        ({"allowed_hosts": "odds.example, other.example"}, {"odds.example", "ODDS.example:443", "localhost"}),
        ({"allowed_hosts": "*"}, {"odds.example", "ODDS.example:443", "localhost", "attacker.example"}),
        ({"host": "0.0.0.0"}, {"odds.example", "ODDS.example:443", "localhost", "attacker.example"}),
        ({"host": "0.0.0.0", "allowed_hosts": "odds.example"}, {"odds.example", "ODDS.example:443", "localhost"}),
    ],
)
def test_names_are_allowed_by_setting(
    start_service: Callable[..., Service], tmp_path: Any, settings: dict[str, str], answered: set[str], service: Service
) -> None:
    running = start_service(f"sqlite:///{tmp_path}/evenodds.db", **settings)
    hosts = ("odds.example", "ODDS.example:443", "localhost", "attacker.example")

    assert {h for h in hosts if running.http.get("/runs", headers={"Host": h}).status_code == 200} == answered


def test_forwarded_headers_are_not_believed(caller: Caller) -> None:
    forwarded = {"X-Forwarded-Host": "localhost", "X-Forwarded-For": "127.0.0.1", "Forwarded": "host=localhost"}

    reply = caller.http.get("/runs", headers={"Host": "attacker.example", **forwarded})

    assert problem_of(reply) == (421, "host_refused")


def test_replies_are_kept_nowhere_and_read_as_what_they_are(caller: Caller) -> None:
    for path in ("/runs", f"/runs/{caller.run}", "/nowhere", "/metrics", "/openapi.json", "/healthz"):
        headers = caller.http.get(path).headers
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    for path in ("/", "/docs"):
        policy = caller.http.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
