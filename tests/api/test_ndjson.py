"""Large pools, one prompt a line: what is read as a line, and what an error leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from evenodds import Problem

if TYPE_CHECKING:
    from tests.api.conftest import Caller

BLOCK = 2_000


def line(name: str, **more: Any) -> bytes:
    return json.dumps({"prompt_id": name, **more}).encode() + b"\n"


def send(caller: Caller, content: bytes | Iterator[bytes], media_type: str = "application/x-ndjson") -> httpx.Response:
    return caller.http.post(f"/runs/{caller.run}/prompts", content=content, headers={"content-type": media_type})


def problem_of(reply: httpx.Response) -> Problem:
    assert reply.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(reply.content)
    assert (problem.status, problem.request_id) == (reply.status_code, reply.headers["x-request-id"])
    return problem


def pool_size(caller: Caller) -> int:
    return caller.client.run(caller.run).pool_size


def test_each_line_is_a_prompt(caller: Caller) -> None:
    content = line("a", text="What is a?") + line("b", category="g") + line("a")

    reply = send(caller, content).json()

    assert reply == {"run": caller.run, "added": 2, "existing": 1, "pool_size": 2, "log_position": 1, "conflicts": {}}
    assert [prompt.prompt_id for prompt in caller.client.prompts(caller.run)] == ["a", "b"]


def test_empty_lines_carriage_returns_and_a_missing_last_newline_do_not_matter(caller: Caller) -> None:
    content = b"\n" + line("a") + b"  \r\n\n" + line("b").replace(b"\n", b"\r\n") + line("c").rstrip()

    assert send(caller, content).json()["added"] == 3


@pytest.mark.parametrize(
    "media_type", ["application/x-ndjson; charset=utf-8", "Application/X-NDJSON", "application/x-ndjson ;charset=utf-8"]
)
def test_the_media_type_may_carry_parameters(caller: Caller, media_type: str) -> None:
    assert send(caller, line("a") + line("b"), media_type).json()["added"] == 2


def test_lines_may_be_cut_anywhere_on_their_way(caller: Caller) -> None:
    content = line("ä", text="Wie groß ist ä?") + line("b", text="What is b?")

    reply = send(caller, (content[i : i + 3] for i in range(0, len(content), 3)))

    assert reply.json()["added"] == 2
    assert caller.client.prompt(caller.run, "ä").text == "Wie groß ist ä?"


def test_a_pool_larger_than_a_block_and_a_list_is_loaded_and_may_be_loaded_again(caller: Caller) -> None:
    n = 5 * BLOCK + 7
    content = b"".join(line(f"p{i}") for i in range(n))

    first, again = send(caller, content).json(), send(caller, content).json()

    assert (first["added"], first["existing"], first["pool_size"]) == (n, 0, n)
    assert (again["added"], again["existing"], again["log_position"]) == (0, n, first["log_position"])


def test_long_lines_are_stored_in_smaller_blocks(caller: Caller) -> None:
    text = "x" * 190_000
    lines = (line(f"p{i}", text=text) for i in range(300))  # 57 MB

    reply = send(caller, lines).json()

    assert reply["added"] == 300
    assert reply["log_position"] == 4  # one entry for each block of 16 MB


@pytest.mark.parametrize(
    ("bad", "status", "code", "detail"),
    [
        (b'{"prompt_id":\n', 422, "malformed", ": Invalid JSON: EOF while parsing a value at line 1 column 13"),
        (b'{"prompt_id": 2}\n', 422, "malformed", ".prompt_id: Input should be a valid string, got 2"),
        (b"{}\n", 422, "malformed", ": a prompt needs a prompt_id, a text, or both"),
        (b"[]\n", 422, "malformed", ": Input should be an object"),
        (
            b'{"prompt_id": "\xff"}\n',
            422,
            "malformed",
            ": it is not UTF-8 (byte 0xff at position 15): encode it as UTF-8",
        ),
        (b'{"prompt_id": "x", "prior_rate": NaN}\n', 422, "malformed", ".prior_rate: Input should be a finite number"),
        (
            line("p0", text="Another text?"),
            409,
            "prompt_conflict",
            ": prompt 3 of 4: id 'p0' is in the pool with another text: "
            "send it under another prompt_id, or leave the text out",
        ),
        (
            line("v", embedding=[1]),
            409,
            "embedding_refused",
            ".embedding (prompt_id 'v'): run {run!r} computes its vectors with embedder 'none'; "
            "leave the vector out, or create a run with embedder 'caller'",
        ),
    ],
)
def test_a_bad_line_is_named_with_what_was_stored(
    caller: Caller, bad: bytes, status: int, code: str, detail: str
) -> None:
    first_block = b"".join(line(f"p{i}") for i in range(BLOCK))
    content = first_block + line("q1") + b"\n" + line("q2") + bad + line("q3")

    problem = problem_of(send(caller, content))

    assert (problem.status, problem.code) == (status, code)
    assert problem.detail.startswith(f"line {BLOCK + 4}{detail.format(run=caller.run)}")
    assert problem.detail.endswith("; lines 1 to 2000 were stored")
    assert pool_size(caller) == BLOCK


def test_a_bad_line_in_the_first_block_leaves_the_pool_as_it_was(caller: Caller) -> None:
    problem = problem_of(send(caller, line("a") + b'{"prompt_id": ""}\n'))

    assert problem.detail == ("line 2.prompt_id: String should have at least 1 character, got ''; no line was stored")
    assert pool_size(caller) == 0


def test_lines_may_be_part_of_a_file_and_are_named_as_there(caller: Caller) -> None:
    content = line("a") + b"\n" + b'{"prompt_id": ""}\n'

    reply = caller.http.post(
        f"/runs/{caller.run}/prompts?first_line=4001", content=content, headers={"content-type": "application/x-ndjson"}
    )

    assert problem_of(reply).detail == (
        "line 4003.prompt_id: String should have at least 1 character, got ''; no line from 4001 on was stored"
    )


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_a_body_without_a_prompt_is_refused(caller: Caller, content: bytes) -> None:
    problem = problem_of(send(caller, content))

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail.startswith("send at least one prompt, one JSON object a line")
    assert pool_size(caller) == 0


def test_a_line_without_end_is_refused(caller: Caller) -> None:
    problem = problem_of(send(caller, line("a") + b"x" * (9 * 2**20)))

    assert (problem.status, problem.code) == (422, "malformed")
    assert problem.detail == (
        "a line is longer than 8,388,608 bytes: put each prompt on a line of its own; no line was stored"
    )
    assert pool_size(caller) == 0


def test_lines_for_an_unknown_run_are_404(caller: Caller) -> None:
    reply = caller.http.post(
        "/runs/nowhere/prompts", content=line("a"), headers={"content-type": "application/x-ndjson"}
    )

    assert (problem_of(reply).status, problem_of(reply).code) == (404, "run_unknown")


def test_a_client_that_hangs_up_in_the_middle_leaves_whole_blocks(caller: Caller) -> None:
    def lines() -> Iterator[bytes]:
        yield b"".join(line(f"p{i}") for i in range(BLOCK + 5))
        raise ConnectionAbortedError("the sender is gone")

    with pytest.raises(ConnectionAbortedError):
        send(caller, lines())

    assert pool_size(caller) in (0, BLOCK)
    assert send(caller, line("after")).status_code == 200
