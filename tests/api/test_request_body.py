"""Compressed bodies and replies, and how much a request may carry."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.waiting import PATIENCE_SECONDS

from evenodds import Client, Problem, TooLarge

if TYPE_CHECKING:
    from tests.api.conftest import Caller
    from tests.conftest import Service

without_the_database = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
JSON = {"content-type": "application/json"}
NDJSON = {"content-type": "application/x-ndjson"}
PACKED = {"content-encoding": "gzip"}
LIMIT = 1_000_000


def packed(body: object) -> bytes:
    return gzip.compress(json.dumps(body).encode(), mtime=0)


def in_pieces(content: bytes, size: int) -> Iterator[bytes]:
    """Sent without a Content-Length."""
    return (content[i : i + size] for i in range(0, len(content), size))


@pytest.fixture
def small(tmp_path: Path, start_service: Callable[..., Service]) -> Service:
    """A service with a limit of 1 MB, and the run `math` with prompt `a`."""
    service = start_service(f"sqlite:///{tmp_path}/evenodds.db", max_body_mb=1)
    service.client.put_run("math", embedder="none")
    service.client.add_prompts("math", [{"prompt_id": "a"}])
    return service


def refused(reply: httpx.Response) -> tuple[int, str, str]:
    assert reply.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(reply.content)
    assert (problem.status, problem.request_id) == (reply.status_code, reply.headers["x-request-id"])
    return problem.status, problem.code, problem.detail


@without_the_database
@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
def test_packed_bodies_are_read_as_plain_ones(caller: Caller, encoding: str) -> None:
    headers = {**JSON, "content-encoding": encoding}

    def send(method: str, path: str, body: object) -> Any:
        return caller.ok(method, path, content=packed(body), headers=headers)

    send("PUT", f"/runs/{caller.run}", {"group_size": 4})
    send("POST", f"/runs/{caller.run}/prompts", {"prompts": [{"prompt_id": "a"}, {"prompt_id": "b"}]})
    chosen = send("POST", "/select_batch", {"run": caller.run, "step": 0, "batch_size": 2})
    send("POST", "/observe", caller.observed(0, {"prompt_id": "a", "successes": 1, "attempts": 4}))
    predicted = send("POST", "/predict", {"run": caller.run, "prompts": [{"prompt_id": "a"}]})

    assert {prompt["prompt_id"] for prompt in chosen["prompts"]} == {"a", "b"}
    assert predicted["predictions"] == caller.predict("a")
    assert predicted["predictions"][0]["attempts_seen"] == 4


@without_the_database
@pytest.mark.parametrize("n", [1, 7, 10**6])
def test_a_packed_body_may_come_in_pieces_and_members(caller: Caller, n: int) -> None:
    lines = [json.dumps({"prompt_id": f"p{i}"}).encode() + b"\n" for i in range(3_000)]
    content = (
        gzip.compress(b"".join(lines[:1_500]), mtime=0) + gzip.compress(b"") + gzip.compress(b"".join(lines[1_500:]))
    )

    added = caller.ok(
        "POST", f"/runs/{caller.run}/prompts", content=in_pieces(content, n), headers={**NDJSON, **PACKED}
    )

    assert added["added"] == 3_000
    assert caller.client.prompt(caller.run, "p2999").prompt_id == "p2999"


@without_the_database
@pytest.mark.parametrize("media_type", [JSON, NDJSON])
@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"{}", "body: Content-Encoding says gzip, but it cannot be unpacked: "),
        (packed({}) + b"rest", "body: Content-Encoding says gzip, but it cannot be unpacked: "),
        (packed({"prompts": [{"prompt_id": "a"}]})[:-5], "body: its gzip stream ends in the middle: send all of it"),
    ],
)
def test_what_is_no_gzip_is_malformed(caller: Caller, media_type: dict[str, str], content: bytes, detail: str) -> None:
    problem = caller.refused("POST", f"/runs/{caller.run}/prompts", content=content, headers={**media_type, **PACKED})

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail.startswith(detail)


@without_the_database
@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
def test_another_encoding_is_415_and_names_gzip(caller: Caller, encoding: str) -> None:
    request: dict[str, Any] = {"content": b"{}", "headers": {**JSON, "content-encoding": encoding}}

    problem = caller.refused("POST", "/observe", **request)

    assert (problem.status, problem.code) == (415, "media_type")
    assert (
        problem.detail
        == f"body: Content-Encoding '{encoding}' is not supported: send the body uncompressed, or with gzip"
    )
    assert caller.http.post("/observe", **request).headers["accept-encoding"] == "gzip"


def observation(n_bytes: int) -> bytes:
    """An observe call of so many bytes."""
    start = b'{"run": "math", "step": 0, "observations": [{"prompt_id": "a", "successes": 1, "attempts": 4}]'
    return start + b" " * (n_bytes - len(start) - 1) + b"}"


@pytest.mark.parametrize("way", ["whole", "in pieces", "packed"])
def test_a_body_is_taken_up_to_the_limit_and_refused_beyond(small: Service, way: str) -> None:
    def send(n_bytes: int) -> httpx.Response:
        content = observation(n_bytes)
        if way == "whole":
            return small.http.post("/observe", content=content, headers=JSON)
        if way == "in pieces":
            return small.http.post("/observe", content=in_pieces(content, 60_000), headers=JSON)
        return small.http.post("/observe", content=gzip.compress(content, mtime=0), headers={**JSON, **PACKED})

    taken, too_large = send(LIMIT), send(LIMIT + 1)

    assert taken.status_code == 200
    status, code, detail = refused(too_large)
    assert (status, code) == (413, "too_large")
    found = {"whole": "1,000,001 bytes", "in pieces": "more than 1,000,000 bytes"}
    assert detail == (
        f"body: it has {found.get(way, 'more than 1,000,000 bytes when unpacked')}, the limit is 1,000,000 "
        "(EVENODDS_MAX_BODY_MB of the service): send fewer items in a call, or prompts as NDJSON, which has no limit"
    )
    assert small.client.run("math").observations == 1


def test_the_limit_holds_for_a_pool_as_json(small: Service) -> None:
    prompts = [{"prompt_id": f"p{i}", "text": "x" * 1_000} for i in range(1_001)]

    reply = small.http.post("/runs/math/prompts", json={"prompts": prompts})

    assert refused(reply)[:2] == (413, "too_large")
    assert small.client.run("math").pool_size == 1


@pytest.mark.parametrize("media_type", [JSON, NDJSON])
def test_a_bomb_is_not_unpacked(small: Service, media_type: dict[str, str]) -> None:
    bomb = gzip.compress(b"x" * 150_000_000, compresslevel=1, mtime=0)
    assert len(bomb) < 2_000_000
    tracemalloc.start()

    try:
        with httpx.Client(base_url=small.base_url, timeout=PATIENCE_SECONDS) as http:
            reply = http.post("/runs/math/prompts", content=in_pieces(bomb, 50_000), headers={**media_type, **PACKED})
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    expected = (413, "too_large") if media_type is JSON else (422, "malformed")
    assert refused(reply)[:2] == expected
    assert most_bytes < 40_000_000
    assert small.client.run("math").pool_size == 1


def test_lines_have_no_limit_together(small: Service) -> None:
    lines = b"".join(json.dumps({"prompt_id": f"p{i}", "text": "x" * 500}).encode() + b"\n" for i in range(4_000))
    assert len(lines) > 2 * LIMIT

    plain = small.http.post("/runs/math/prompts", content=lines, headers=NDJSON)
    compressed = small.http.post(
        "/runs/math/prompts", content=gzip.compress(lines, mtime=0), headers={**NDJSON, **PACKED}
    )

    assert (plain.json()["added"], compressed.json()["existing"]) == (4_000, 4_000)


def test_lines_sent_to_a_route_that_takes_none_have_the_limit(small: Service) -> None:
    reply = small.http.post("/observe", content=in_pieces(b"{}\n" * 400_000, 60_000), headers=NDJSON)

    assert refused(reply)[:2] == (413, "too_large")


@without_the_database
def test_a_large_reply_is_packed_where_the_caller_can_read_it(caller: Caller) -> None:
    caller.load([{"prompt_id": f"prompt-{i}"} for i in range(1_000)])
    body = {"run": caller.run, "prompts": [{"prompt_id": f"prompt-{i}"} for i in range(1_000)]}

    asked, plain, few = (
        caller.http.post("/predict", json=body, headers={"accept-encoding": "gzip"}),
        caller.http.post("/predict", json=body, headers={"accept-encoding": "identity"}),
        caller.http.post(
            "/predict", json={**body, "prompts": body["prompts"][:9]}, headers={"accept-encoding": "gzip"}
        ),
    )

    assert asked.headers["content-encoding"] == "gzip"
    assert "accept-encoding" in asked.headers["vary"].lower()
    assert int(asked.headers["content-length"]) < int(plain.headers["content-length"]) / 5
    assert asked.json() == plain.json()
    assert {"content-encoding"}.isdisjoint({*plain.headers, *few.headers})


def test_the_client_packs_large_bodies_and_reads_packed_replies(small: Service) -> None:
    prompts = [{"prompt_id": f"p{i}", "text": f"What is {i}? " * 60} for i in range(1_200)]  # 900 kB

    added = small.client.add_prompts("math", prompts)
    predicted = small.client.predict("math", [f"p{i}" for i in range(1_200)])

    assert added.added == len(predicted.predictions) == 1_200


def test_the_client_says_that_a_call_is_too_large(small: Service) -> None:
    with Client(small.base_url) as client, pytest.raises(TooLarge, match=r"limit is 1,000,000 .*send fewer items"):
        client.add_prompts("math", [{"prompt_id": f"p{i}", "text": f"What is {i}? " * 60} for i in range(2_000)])
