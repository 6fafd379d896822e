"""When a call is repeated, after how long, and when not."""

from __future__ import annotations

import pickle
from random import Random
from typing import TYPE_CHECKING

import httpx
import pytest

from evenodds import (
    Conflict,
    Invalid,
    NotFound,
    ProblemError,
    RateLimited,
    ServerError,
    TimedOut,
    TooLarge,
    TransportError,
    Unavailable,
    Unreachable,
)

if TYPE_CHECKING:
    from tests.client.conftest import Conversation

FAILURES = {
    "no connection": httpx.ConnectError("[Errno 111] Connection refused"),
    "no connection in time": httpx.ConnectTimeout("timed out"),
    "no reply in time": httpx.ReadTimeout("timed out"),
    "not sent in time": httpx.WriteTimeout("timed out"),
    "no free connection": httpx.PoolTimeout(""),
    "hung up": httpx.RemoteProtocolError("Server disconnected without sending a response."),
    "reset": httpx.ReadError("[Errno 104] Connection reset by peer"),
}

NAMED: dict[str, dict[str, object]] = {"retract": {"to_step": 1}}
"""Arguments that a call takes by name only."""
CALLS: dict[str, tuple[object, ...]] = {
    "put_run": ("r",),
    "run": ("r",),
    "runs_page": (),
    "delete_run": ("r",),
    "refit": ("r",),
    "refits": ("r",),
    "rewind": ("r", 1),
    "retract": ("r",),
    "add_prompts": ("r", [{"prompt_id": "a"}]),
    "prompts_page": ("r",),
    "prompt": ("r", "a"),
    "observe": ("r", 1, [{"prompt_id": "a", "rewards": [1]}]),
    "predict": ("r", ["a"]),
    "select_batch": ("r", 1, 1),
    "healthz": (),
    "readyz": (),
}


@pytest.mark.parametrize("failure", list(FAILURES))
def test_a_broken_connection_is_tried_again(talk: Conversation, failure: str) -> None:
    talk.fails(FAILURES[failure])
    talk.replies_with_run()

    assert talk.call("run", "math-7b").run == "math-7b"
    assert len(talk.requests) == 2


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_passing_trouble_is_tried_again(talk: Conversation, status: int) -> None:
    talk.refuses(status, "trouble", "later")
    talk.replies_with_run()

    assert talk.call("run", "math-7b").run == "math-7b"
    assert len(talk.waits) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ProblemError),
        (404, NotFound),
        (409, Conflict),
        (413, TooLarge),
        (422, Invalid),
        (500, ServerError),
    ],
)
def test_a_fact_is_not_asked_twice(talk: Conversation, status: int, kind: type[ProblemError]) -> None:
    talk.refuses(status, "fact", "so it is")

    with pytest.raises(kind) as caught:
        talk.call("run", "math-7b")

    assert type(caught.value) is kind
    assert (len(talk.requests), talk.waits) == (1, [])


@pytest.mark.parametrize("name", list(CALLS))
def test_every_call_repeats_itself_to_the_letter(talk: Conversation, name: str) -> None:
    """Body, target and X-Request-ID are the same each time, so that the service can tell a repeat."""
    for _ in range(4):
        talk.fails(httpx.ReadTimeout("timed out"))

    with pytest.raises(TimedOut):
        talk.call(name, *CALLS[name], **NAMED.get(name, {}))

    sent = {(r.method, r.url.raw_path, r.content, r.headers["x-request-id"]) for r in talk.requests}
    assert (len(talk.requests), len(sent)) == (4, 1)


@pytest.mark.parametrize("retries", [0, 1, 5])
def test_retries_is_the_number_of_repeats(talk: Conversation, retries: int) -> None:
    talk.options["retries"] = retries
    for _ in range(retries + 1):
        talk.refuses(503, "not_ready", "starting")

    with pytest.raises(Unavailable):
        talk.call("run", "math-7b")

    assert (len(talk.requests), len(talk.waits)) == (retries + 1, retries)


def test_waits_are_drawn_below_a_bound_that_doubles_up_to_eight_seconds(talk: Conversation) -> None:
    class AlwaysTheBound(Random):
        def uniform(self, a: float, b: float) -> float:
            assert a == 0
            return b

    talk.options |= {"retries": 8, "random": AlwaysTheBound()}
    for _ in range(9):
        talk.fails(httpx.ConnectError("refused"))

    with pytest.raises(Unreachable):
        talk.call("run", "math-7b")

    assert talk.waits == [0.25, 0.5, 1, 2, 4, 8, 8, 8]


def test_the_same_seed_waits_the_same(talk: Conversation) -> None:
    for _ in range(2):
        talk.options["random"] = Random(7)
        for _ in range(4):
            talk.fails(httpx.ConnectError("refused"))
        with pytest.raises(Unreachable):
            talk.call("run", "math-7b")

    assert talk.waits[:3] == talk.waits[3:]
    assert len(set(talk.waits)) == 3


@pytest.mark.parametrize(
    ("retry_after", "seconds"), [("0", 0), ("7", 7), ("30", 30), ("31", 30), ("86400", 30), ("9" * 400, 30)]
)
def test_retry_after_is_honoured_up_to_thirty_seconds(talk: Conversation, retry_after: str, seconds: float) -> None:
    talk.refuses(503, "not_ready", "starting", headers={"Retry-After": retry_after})
    talk.replies_with_run()

    talk.call("run", "math-7b")

    assert talk.waits == [seconds]


@pytest.mark.parametrize("retry_after", ["", "-1", "soon", "1.5", "Wed, 21 Oct 2026 07:28:00 GMT", "²"])
def test_any_other_retry_after_leaves_the_usual_wait(talk: Conversation, retry_after: str) -> None:
    talk.replies.append(httpx.Response(503, headers={b"Retry-After": retry_after.encode()}))
    talk.replies_with_run()

    talk.call("run", "math-7b")

    assert talk.waits == [Random(0).uniform(0, 0.25)]


def test_a_rate_limit_tells_how_long_to_wait_once_repeats_are_used_up(talk: Conversation) -> None:
    talk.options["retries"] = 1
    for seconds in ("2", "3"):
        talk.refuses(429, "rate_limited", "key 'a' may make 20 requests a minute", headers={"Retry-After": seconds})

    with pytest.raises(RateLimited) as caught:
        talk.call("run", "math-7b")

    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "rate_limited", 3.0)
    assert pickle.loads(pickle.dumps(caught.value)).retry_after == 3.0
    assert talk.waits == [2]


def test_a_rate_limit_that_lasts_longer_than_a_call_waits_is_told_at_once(talk: Conversation) -> None:
    """A repeat after the longest wait would only be refused again."""
    talk.refuses(429, "rate_limited", "key 'a' may make 1 requests a minute", headers={"Retry-After": "60"})

    with pytest.raises(RateLimited) as caught:
        talk.call("run", "math-7b")

    assert (caught.value.retry_after, talk.waits, len(talk.requests)) == (60.0, [], 1)


def test_a_rate_limit_by_a_proxy_that_names_no_time_is_one_too(talk: Conversation) -> None:
    talk.options["retries"] = 0
    talk.replies.append(httpx.Response(429, text="slow down"))

    with pytest.raises(RateLimited) as caught:
        talk.call("run", "math-7b")

    assert (caught.value.code, caught.value.retry_after) == ("http_429", None)


@pytest.mark.parametrize(
    "lost", ["no reply in time", "hung up", "reset", "not sent in time", "status 502", "status 504"]
)
def test_a_repeated_delete_that_finds_nothing_is_done(talk: Conversation, lost: str) -> None:
    """The first attempt may have deleted the run, and only its reply was lost."""
    if lost in FAILURES:
        talk.fails(FAILURES[lost])
    else:
        talk.replies.append(httpx.Response(int(lost[-3:])))
    talk.refuses(404, "run_not_found", "there is no run 'math-7b'")

    assert talk.call("delete_run", "math-7b") is None


@pytest.mark.parametrize("unsent", ["no connection", "no connection in time", "no free connection"])
def test_a_repeated_delete_whose_first_attempt_never_arrived_tells_that_nothing_is_there(
    talk: Conversation, unsent: str
) -> None:
    talk.fails(FAILURES[unsent])
    talk.refuses(404, "run_not_found", "there is no run 'math-7b'")

    with pytest.raises(NotFound):
        talk.call("delete_run", "math-7b")


def test_a_lost_connection_ends_in_its_own_error(talk: Conversation) -> None:
    talk.options["retries"] = 0
    talk.fails(httpx.ReadError("[Errno 104] Connection reset by peer"))

    with pytest.raises(TransportError) as caught:
        talk.call("run", "math-7b")

    assert type(caught.value) is TransportError
