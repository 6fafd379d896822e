"""What a caller reads when something goes wrong, on scripted replies and on real sockets."""

from __future__ import annotations

import pickle
import re
import socket
from typing import TYPE_CHECKING

import httpx
import pytest
from tests.waiting import until

import evenodds.errors
from evenodds import (
    AsyncClient,
    Client,
    ConfigurationError,
    Conflict,
    EvenOddsError,
    Invalid,
    InvalidRequest,
    NotFound,
    ProblemError,
    ReplyInvalid,
    ServerError,
    TimedOut,
    TransportError,
    Unavailable,
    Unreachable,
)

if TYPE_CHECKING:
    from tests.client.conftest import Conversation, LoopbackServer


def test_a_problem_names_call_status_code_detail_and_request_id(talk: Conversation) -> None:
    talk.refuses(404, "run_not_found", "there is no run 'math-7b'", request_id="4f2a")

    with pytest.raises(NotFound) as caught:
        talk.call("run", "math-7b")

    error = caught.value
    assert str(error) == "GET /runs/math-7b: 404 run_not_found: there is no run 'math-7b' (request 4f2a)"
    assert (error.status, error.code, error.request_id) == (404, "run_not_found", "4f2a")


def test_a_problem_lists_its_faults(talk: Conversation) -> None:
    faults = ["observation 0: successes 9 exceeds attempts 8", "observation 1: no such prompt 'b'"]
    talk.refuses(422, "malformed", "2 of 2 observations are refused", errors=faults, request_id="4f2a")

    with pytest.raises(Invalid) as caught:
        talk.call("observe", "r", 1, [{"prompt_id": "a", "rewards": [1]}])

    assert str(caught.value) == (
        "POST /observe: 422 malformed: 2 of 2 observations are refused [observation 0: successes 9 exceeds "
        "attempts 8; observation 1: no such prompt 'b'] (request 4f2a)"
    )
    assert caught.value.errors == tuple(faults)


def test_the_id_in_the_header_stands_in_for_the_one_in_the_body(talk: Conversation) -> None:
    talk.refuses(409, "taken", "step 3 has a batch", headers={"X-Request-ID": "from-header"})

    with pytest.raises(Conflict) as caught:
        talk.call("select_batch", "r", 3, 8)

    assert caught.value.request_id == "from-header"


def test_without_an_id_in_the_reply_the_error_carries_the_one_that_was_sent(talk: Conversation) -> None:
    talk.refuses(500, "internal", "the service failed")

    with pytest.raises(ServerError) as caught:
        talk.call("run", "r")

    assert caught.value.request_id == talk.requests[0].headers["x-request-id"]


def test_a_proxy_s_page_is_quoted(talk: Conversation) -> None:
    talk.options["retries"] = 0
    talk.replies.append(httpx.Response(502, text="<html>\n  Bad   Gateway" + "!" * 1_000))

    with pytest.raises(ServerError) as caught:
        talk.call("run", "r")

    assert type(caught.value) is ServerError
    assert caught.value.code == "http_502"
    assert caught.value.detail == f"the reply is not problem+json, but {'<html> Bad Gateway' + '!' * 182!r}"


def test_an_error_without_a_body_still_says_what_it_is(talk: Conversation) -> None:
    talk.replies.append(httpx.Response(401))

    with pytest.raises(ProblemError, match=r"^GET /runs/r: 401 http_401: .* but an empty body"):
        talk.call("run", "r")


@pytest.mark.parametrize(
    ("status", "content", "text"),
    [
        (200, "hello", "reply 200 not understood: no RunState: Invalid JSON: "),
        (200, '{"run":"r"}', "reply 200 not understood: no RunState: predictor: Field required"),
        (204, "", "reply 204 not understood: no RunState: Invalid JSON: "),
        (307, "", "reply 307 not understood: redirected to https://elsewhere/runs/r (request "),
    ],
)
def test_a_reply_of_another_kind_is_not_taken_for_one(talk: Conversation, status: int, content: str, text: str) -> None:
    headers = {"Location": "https://elsewhere/runs/r"} if status == 307 else None
    talk.replies.append(httpx.Response(status, text=content, headers=headers))

    with pytest.raises(ReplyInvalid) as caught:
        talk.call("run", "r")

    assert text in str(caught.value)
    assert str(caught.value).endswith("check the base URL and the versions of client and service")


def test_a_redirected_delete_is_not_taken_as_done(talk: Conversation) -> None:
    talk.replies.append(httpx.Response(301, headers={"Location": "/elsewhere"}))

    with pytest.raises(ReplyInvalid, match="redirected to /elsewhere"):
        talk.call("delete_run", "r")


def test_a_service_that_is_silent_times_out(talk: Conversation, server: LoopbackServer) -> None:
    server.behave = server.hang
    talk.base_url, talk.over_the_wire = server.base_url, True
    talk.options |= {"retries": 1, "timeout_seconds": 0.1}

    with pytest.raises(TimedOut) as caught:
        talk.call("run", "r")

    until(lambda: len(server.targets) == 2, "the second attempt at the server")
    assert re.fullmatch(
        rf"GET /runs/r: timed out after 2 attempts: http://127\.0\.0\.1:{server.port}: .+; "
        r"timeout_seconds is 0\.1 \(request [0-9a-f]{32}\)",
        str(caught.value),
    )


def test_a_service_that_hangs_up_is_tried_again_and_named(talk: Conversation, server: LoopbackServer) -> None:
    server.behave = server.hang_up
    talk.base_url, talk.over_the_wire = server.base_url, True

    with pytest.raises(TransportError, match=r"connection broken after 4 attempts: .*disconnected") as caught:
        talk.call("run", "r")

    assert type(caught.value) is TransportError
    assert caught.value.attempts == len(server.targets) == 4


def test_a_port_that_nobody_serves_is_unreachable(talk: Conversation) -> None:
    with socket.socket() as unheard:  # bound, but not listening: the port stays ours and refuses
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        talk.base_url, talk.over_the_wire = f"http://user:secret@127.0.0.1:{port}", True
        talk.options["retries"] = 0

        with pytest.raises(Unreachable) as caught:
            talk.call("run", "r")

    message = str(caught.value)
    assert message.startswith(f"GET /runs/r: service unreachable after 1 attempt: http://127.0.0.1:{port}: ")
    assert "; is the service running there? (request " in message
    assert "secret" not in message


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"base_url": "127.0.0.1:8000"}, "must start with http:// or https:// and name a host"),
        (
            {"base_url": "localhost"},
            "base_url 'localhost' must start with http:// or https://",
        ),
        ({"base_url": "http://"}, "base_url 'http://' must start with http:// or https:// and name a host"),
        ({"base_url": "http://a:port"}, "base_url 'http://a:port' is not a URL: Invalid port: 'port'"),
        ({"base_url": "http://a/?b=c"}, "base_url 'http://a/?b=c' must end before '?' and '#'"),
        ({"timeout_seconds": 0}, "timeout_seconds 0 must be finite and above 0"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds inf must be finite and above 0"),
        ({"retries": -1}, "retries -1 must be at least 0"),
    ],
)
def test_a_client_that_cannot_work_is_not_built(
    client: type[Client] | type[AsyncClient], arguments: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        client(**arguments)  # type: ignore[arg-type]  # the faulty argument is the point


def test_a_closed_client_says_so() -> None:
    client = Client()
    client.close()
    client.close()

    with pytest.raises(ConfigurationError, match="GET /runs/r: this client is closed; make a new one"):
        client.run("r")


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


ERRORS = [
    ConfigurationError("retries -1 must be at least 0"),
    InvalidRequest("observe", ["step: too low"]),
    Unreachable("GET", "/runs", "refused", "4f2a", 4),
    Unavailable("GET", "/runs", 503, "not_ready", "starting", "4f2a", ["one"]),
    ReplyInvalid("GET", "/runs", 200, "no RunPage", "4f2a"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_cross_process_boundaries(error: EvenOddsError) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_error_is_in_the_printed_tree() -> None:
    kinds = {name: kind for name, kind in vars(evenodds.errors).items() if is_error(kind)}
    printed = re.findall(r"([A-Z]\w+Error|[A-Z]\w+)(?: {2,}|\n\s+├)", evenodds.errors.__doc__ or "")

    assert set(printed) == set(kinds)
    assert all(issubclass(kind, EvenOddsError) for kind in kinds.values())
    assert set(kinds) <= set(evenodds.__all__)
