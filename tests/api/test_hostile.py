"""Bad input of every kind: bodies, names, headers and connections that nobody sends by mistake.

Whatever comes, the answer is a problem+json of the caller's fault, or a refusal of uvicorn's where it is no HTTP;
nothing is half written, and `/healthz` answers meanwhile.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import socket
import string
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from tests.waiting import PATIENCE_SECONDS

from evenodds import Problem

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)

TRIED: Counter[str] = Counter()
"""Inputs by kind; `pytest -s` shows them."""

JSON = "application/json"
NDJSON = "application/x-ndjson"
TRICKS = [
    "'; DROP TABLE runs; --",
    "' OR '1'='1",
    '" OR ""="',
    "1; DELETE FROM log",
    "x' UNION SELECT secret_hash FROM api_keys --",
    "%",
    "_",
    "\\",
    "%' ESCAPE '",
    "${jndi:ldap://localhost/a}",
    "{{7*7}}",
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "..\\..\\windows",
    "/etc/passwd",
    "a/b",
    "a//b",
    ".",
    "..",
    "%2e%2e%2f",
    "%00",
    "a\nb",
    "a\r\nX-Injected: 1",
    "\u202eabc",
    "\ufeff",
    "e\u0301",
    "\U0001f9ea" * 64,
    "A" * 256,
    " ",
    "null",
    "0",
]
"""Ids and words to look for: all of them are plain text to the service."""


@pytest.fixture(scope="module", autouse=True)
def counted(pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    kinds = ", ".join(f"{kind} {n}" for kind, n in TRIED.items())
    pytestconfig.get_terminal_writer().line(f"\nbad inputs tried: {sum(TRIED.values())} ({kinds})")


def is_alive(http: httpx.Client) -> None:
    assert http.get("/healthz").status_code == 200


def told(reply: httpx.Response, kind: str) -> Problem:
    """The problem that a bad input got."""
    TRIED[kind] += 1
    assert 400 <= reply.status_code < 500, (reply.request.url, reply.status_code, reply.text[:500])
    assert reply.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(reply.content)
    assert (problem.status, problem.request_id) == (reply.status_code, reply.headers["x-request-id"])
    return problem


@pytest.fixture
def target(caller: Caller) -> Iterator[Caller]:
    """A run with two prompts and an outcome, which stand as they were afterwards."""
    caller.load_texts("a", "b")
    caller.observe(0, {"prompt_id": "a", "rewards": [1, 0]}, request_id="first")
    before, beliefs = caller.state(), caller.predict("a", "b")
    yield caller
    assert caller.state() == before
    assert caller.predict("a", "b") == beliefs
    is_alive(caller.http)


def sound(run: str) -> list[tuple[str, str, dict[str, Any]]]:
    """A body for each operation that takes one."""
    return [
        ("POST", "/observe", {"run": run, "step": 1, "observations": [{"prompt_id": "a", "rewards": [0, 1, 0.5]}]}),
        ("POST", "/predict", {"run": run, "prompts": [{"prompt_id": "a"}, {"text": "What?"}], "group_size": 4}),
        ("POST", "/select_batch", {"run": run, "step": 1, "batch_size": 1, "categories": {"g": 0.5}, "seed": 3}),
        ("POST", "/allocate", {"run": run, "prompts": [{"prompt_id": "a", "cost": 2.5}], "budget": 9}),
        ("POST", "/budget", {"run": run, "prompt": {"text": "What?"}, "failures": 1}),
        ("POST", "/v1/chat/completions", {"model": run, "messages": [{"role": "user", "content": "What?"}]}),
        ("PUT", f"/runs/{run}", {"group_size": 8, "refit": {"every_seconds": 9}, "categories": {"g": 0.25}}),
        ("POST", f"/runs/{run}/prompts", {"prompts": [{"prompt_id": "c", "text": "What is c?", "prior_rate": 0.5}]}),
        ("POST", f"/runs/{run}/rewind", {"step": 0}),
        ("POST", f"/runs/{run}/retract", {"from_step": 5, "to_step": 9, "prompt_ids": ["a"]}),
        ("POST", f"/runs/{run}/refit", {"wait_seconds": 0}),
        ("PUT", f"/runs/{run}/budget_policies/p", {"target_attempts": 2, "tiers": [{"label": "x", "at_least": 0}]}),
    ]


@without_the_database
def test_no_bytes_are_taken_for_a_request(target: Caller) -> None:
    chance = random.Random(7)
    for method, path, body in sound(target.run):
        whole = json.dumps(body).encode()
        contents = [
            *(chance.randbytes(chance.randrange(1, 200)) for _ in range(10)),
            *(whole[: chance.randrange(len(whole))] for _ in range(10)),  # truncated
            *(whole + junk for junk in (b"x", b"}", b"{}", whole)),
            b"\xef\xbb\xbf\xef\xbb\xbf" + whole,
            b"\xff\xfe" + whole.decode().encode("utf-16-le")[:-1],
            b"[" * 50_000 + b"]" * 50_000,
            b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
            whole[:-1] + b', "step": ' + b"1" * 5_000 + b"}",
            whole.replace(b":", b"=", 1),
            whole.replace(b'"', b"'"),
            b"NaN",
            b"-Infinity",
            b'"' + b"\\ud800" + b'"',
            b"true",
            b"0",
        ]
        for content in contents:
            reply = target.http.request(method, path, content=content, headers={"content-type": JSON})
            assert told(reply, "bytes").status == 422


BAD_VALUES = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e400", "1" + "0" * 400, "-1", "true", "[]", "[[]]", "{}",
    '{"a":{"b":[]}}', '"\\u0000"', '"\\ud800"', '"a\\udc00"', '"1"', '""', '"\\u0000; DROP TABLE runs"', "[null]",
]  # fmt: skip
"""As JSON or nearly so. None of them is a value of a field that holds numbers or names."""


def fields_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from fields_of(inner, (*path, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield (*path, i)
            yield from fields_of(inner, (*path, i))


def with_raw(body: Any, path: tuple[str | int, ...], raw: str) -> bytes:
    """The body as JSON, with these characters in place of one field."""
    copy = json.loads(json.dumps(body))
    inner = copy
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = "@@HERE@@"
    return json.dumps(copy).replace('"@@HERE@@"', raw).encode()


@without_the_database
def test_no_value_in_any_field_makes_the_service_fail(caller: Caller) -> None:
    """A bad value is malformed wherever it stands; where it happens to be a good one, the call is answered."""
    caller.load_texts("a", "b")
    for method, path, body in sound(caller.run):
        for place in fields_of(body):
            for raw in BAD_VALUES:
                content = with_raw(body, place, raw)
                reply = caller.http.request(method, path, content=content, headers={"content-type": JSON})
                TRIED["values"] += 1
                assert reply.status_code < 500, (path, content, reply.text)
                if reply.status_code >= 400:
                    assert reply.headers["content-type"] == "application/problem+json"
                elif "ud800" in raw or "udc00" in raw or raw in ("NaN", "Infinity", "1e999"):
                    assert path == "/v1/chat/completions", (path, content)  # which looks at what it needs
        twice = json.dumps(body)[:-1] + ', "unknown": 1, "unknown": 2}'
        reply = caller.http.request(method, path, content=twice.encode(), headers={"content-type": JSON})
        assert reply.status_code == (200 if path == "/v1/chat/completions" else 422)
    is_alive(caller.http)


@without_the_database
def test_other_media_types_and_encodings_are_refused(target: Caller) -> None:
    for method, path, body in sound(target.run):
        content = json.dumps(body).encode()
        for media_type in ("text/plain", "application/xml", "multipart/form-data; boundary=x", "x", "a/b/c", "\xff/x"):
            headers = {b"content-type": media_type.encode("latin-1")}
            problem = told(target.http.request(method, path, content=content, headers=headers), "media types")
            assert problem.status == 415
        for encoding in ("br", "deflate", "gzip, gzip", "zstd", "x" * 500, "gzip", "gzip;q=1"):
            headers = {b"content-type": JSON.encode(), b"content-encoding": encoding.encode()}
            problem = told(target.http.request(method, path, content=content, headers=headers), "encodings")
            assert problem.status in (415, 422)
        packed = gzip.compress(content)
        for broken in (packed[:-9], packed[:12], packed[:-8] + bytes(8), packed + b"junk", b"\x1f\x8b"):
            headers = {b"content-type": JSON.encode(), b"content-encoding": b"gzip"}
            told(target.http.request(method, path, content=broken, headers=headers), "encodings")


@without_the_database
def test_lines_that_are_no_prompts_are_refused_with_their_number(target: Caller) -> None:
    for line in (
        b"{", b"[]", b"null", b"\xff", b'{"prompt_id": "\\u0000"}', b'{"prompt_id": "\\ud800"}', b'{"text": ""}',
        b'{"prompt_id": "c", "embedding": [NaN]}', b'{"prompt_id": "c", "x": 1}', b"{}{}", b"[" * 9_000,
        b"x" * 9_000_000,
        b'{"prompt_id": "c", "features": {"a": 1e999}}', b'{"prompt_id": "' + b"c" * 257 + b'"}',
    ):  # fmt: skip
        reply = target.http.post(f"/runs/{target.run}/prompts", content=line, headers={"content-type": NDJSON})
        assert told(reply, "lines").status == 422


def test_ids_and_searches_are_text_and_nothing_else(caller: Caller) -> None:
    caller.load([{"prompt_id": trick, "text": f"text of {trick}"} for trick in TRICKS])
    caller.observe(0, *({"prompt_id": trick, "rewards": [1, 0]} for trick in TRICKS), request_id=TRICKS[0])

    for trick in TRICKS:
        TRIED["ids"] += 3
        escaped = quote(trick, safe="")
        found = caller.http.get(f"/runs/{caller.run}/prompts/{escaped.replace('.', '%2E')}")
        assert (found.status_code, found.json()["prompt_id"]) == (200, trick)
        searched = caller.http.get(f"/runs/{caller.run}/prompts", params={"search": trick[:200]}).json()["prompts"]
        assert trick in {prompt["prompt_id"] for prompt in searched}
        needle = trick[:200].lower()
        assert all(needle in f"{p['prompt_id']} {p['text']}".lower() for p in searched)
        caller.ok(
            "POST", f"/runs/{caller.run}/retract", json={"request_id": (trick + "x")[-256:], "prompt_ids": [trick]}
        )
    assert caller.predict(TRICKS[0])[0]["attempts_seen"] == 2
    assert caller.state() is not None
    is_alive(caller.http)


@without_the_database
def test_no_path_leads_elsewhere(target: Caller) -> None:
    names = [name for name in TRICKS if not name[0].isalnum() or not name.isascii() or "\n" in name or len(name) > 128]
    for name in names:
        escaped = quote(name, safe="").replace(".", "%2E")
        for method, path in (
            ("GET", f"/runs/{escaped}"),
            ("DELETE", f"/runs/{escaped}"),
            ("PUT", f"/runs/{escaped}"),
            ("POST", f"/runs/{escaped}/rewind"),
            ("GET", f"/runs/{escaped}/prompts/a"),
        ):
            sent = {"step": 0} if "rewind" in path else {}
            reply = target.http.request(method, path, json=sent if method in ("PUT", "POST") else None)
            assert told(reply, "paths").status in (404, 405, 422)
    for path in (
        "//", "/../etc/passwd", "/page/../../settings.py", "/page/%2e%2e/__init__.py", "/page/..%2f__init__.py",
        "/docs-files/../../app.py", "/docs-files/%2e%2e/%2e%2e/app.py", "/docs-files/..%5c..", "/%00", "/runs/%00",
        "/runs/a%2fb", "/runs//", "//runs", "/RUNS", "/runs/;x=1", "/runs/" + "x" * 10_000, "/" + "a/" * 5_000,
        "/runs?limit=9999999999999999999999", "/runs?cursor=%00", "/runs?limit=" + "9" * 5_000, "/runs?limit=NaN",
        f"/runs/{target.run}/prompts?search=%00%ff" + "x" * 300, f"/runs/{target.run}/prompts?cursor=-1",
        f"/runs/{target.run}/prompts/%00", f"/runs/{target.run}/prompts/" + "x" * 257, "/runs?limit=%ff",
    ):  # fmt: skip
        status, body = raw_status(
            target.http, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        TRIED["paths"] += 1
        assert status in (404, 422), (path[:100], status, body[:200])
        assert b"application/problem+json" in body
    for search in ("%00", "%ff"):
        reply = target.http.get(f"/runs/{target.run}/prompts?search={search}")
        TRIED["paths"] += 1
        assert reply.status_code in (200, 422)


def raw_status(http: httpx.Client, request: bytes, *, seconds: float = PATIENCE_SECONDS) -> tuple[int | None, bytes]:
    """The status that raw bytes are answered with, None where the connection is closed without one."""
    address = urlsplit(str(http.base_url))
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65_536):
                answer += piece
    return (int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else None), answer


@without_the_database
def test_what_is_no_http_is_turned_away(target: Caller) -> None:
    chance = random.Random(11)
    body = json.dumps(sound(target.run)[0][2]).encode()
    post = b"POST /observe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    requests = [
        b"\r\n\r\n\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n: y\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
        post + b"Content-Length: -1\r\n\r\n" + body,
        post + b"Content-Length: x\r\n\r\n" + body,
        post + b"Content-Length: 1_0\r\n\r\n" + body,
        post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + body,
        post + b"Content-Length: %d\r\n\r\n" % (10**30) + body,
        post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
        post + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n" + body,
        post + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + body,
        *(chance.randbytes(300) + b"\r\n\r\n" for _ in range(40)),
    ]
    for request in requests:
        status, answer = raw_status(target.http, request)
        TRIED["no http"] += 1
        assert status is None or 400 <= status < 500 or status == 501, (request[:100], answer[:300])


@without_the_database
def test_floods_of_sound_headers_are_answered_or_refused(target: Caller) -> None:
    for n_headers, size in ((1_000, 20), (50, 1_000), (5_000, 500)):
        fields = b"".join(b"X-%d: %s\r\n" % (i, b"y" * size) for i in range(n_headers))
        request = b"GET /runs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + fields + b"\r\n"
        status, answer = raw_status(target.http, request)
        TRIED["headers"] += 1
        assert status is None or status == 200 or 400 <= status < 500, answer[:300]
    for name in (b"authorization", b"x-request-id", b"traceparent", b"content-length", b"accept-encoding", b"host"):
        for value in (b"\xff\xfe", b"'; DROP TABLE runs", b"a" * 5_000, b"0, 0", b"Bearer \xe9", b"${x}"):
            request = (
                b"GET /runs HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n" + name + b": " + value + b"\r\n\r\n"
            )
            status, answer = raw_status(target.http, request)
            TRIED["headers"] += 1
            assert status == 200 or (status is not None and 400 <= status < 500), answer[:300]


@without_the_database
def test_slow_and_half_open_connections_keep_nobody_waiting(target: Caller) -> None:
    address = urlsplit(str(target.http.base_url))
    body = json.dumps(sound(target.run)[0][2]).encode()
    head = b"POST /observe HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(
                socket.create_connection((address.hostname or "", address.port or 0), timeout=PATIENCE_SECONDS)
            )
            for _ in range(150)
        ]
        request = head % len(body) + body
        for number, connection in enumerate(held):
            connection.sendall(request[: 10 + number])  # in the head, or in the body
        TRIED["slow"] += len(held)
        for turn in range(3):
            for number, connection in enumerate(held):
                connection.sendall(request[10 + number + turn :][:1])
            is_alive(target.http)  # and not after those have gone, who never go
            target.predict("a")
    # Closed in the middle: none of them was an observation.


@without_the_database
def test_bytes_that_drip_are_one_request(caller: Caller) -> None:
    caller.load_texts("a")
    address = urlsplit(str(caller.http.base_url))
    body = json.dumps(sound(caller.run)[0][2]).encode()
    request = (
        b"POST /observe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=PATIENCE_SECONDS) as connection:
        for i in range(len(request)):
            connection.sendall(request[i : i + 1])
            time.sleep(0.001)
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    TRIED["slow"] += 1
    assert answer.startswith(b"HTTP/1.1 200")
    state = caller.state()
    assert state is not None
    assert state["observations"] == 1


@without_the_database
def test_requests_in_one_piece_are_answered_in_turn(target: Caller) -> None:
    bad = (
        b"POST /observe HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n{bad"
    )
    good = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    _, answer = raw_status(target.http, (bad + good) * 20 + last)

    TRIED["pipelined"] += 41
    found = [part.split(b" ", 1)[0] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert found == [b"422", b"200"] * 20 + [b"200"]


def test_a_smuggled_request_is_not_run(service: Service, caller: Caller) -> None:
    """Two lengths: what follows the chunked body is no request of its own."""
    inner = f"DELETE /runs/{caller.run} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    head = (
        b"POST /observe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(inner))
    )
    status, _ = raw_status(service.http, head + inner)

    TRIED["smuggled"] += 1
    assert status is not None
    assert 400 <= status < 500
    assert caller.state() is not None


@without_the_database
def test_random_text_in_every_name_is_answered(caller: Caller) -> None:
    chance = random.Random(3)
    letters = string.printable + "äß漢\U0001f9ea\u200b\u202e"
    for _ in range(150):
        name = "".join(chance.choices(letters, k=chance.randrange(1, 40)))
        body = {"run": caller.run, "step": 0, "request_id": name, "observations": [{"prompt_id": name, "rewards": [1]}]}
        assert told(caller.http.post("/observe", json=body), "names").code == "prompt_unknown"
        reply = caller.http.get(f"/runs/{caller.run}/prompts/{quote(name, safe='')}")
        assert told(reply, "names").status == 404
    is_alive(caller.http)
