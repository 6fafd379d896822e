"""How one call crosses HTTP: repeated when that helps, and its reply read. Does no I/O itself.

A call is a generator. It yields what to do (`Send` a request, `Wait` a while), is sent what came of it
(`Received` or `Failed`; None after a wait), and returns the reply. `client.py` drives the same generators
with blocking and with asynchronous I/O.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from random import Random
from typing import TypeVar
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from evenodds.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    ProblemError,
    RateLimited,
    ReplyInvalid,
    ServerError,
    TooLarge,
    TransportError,
    Unauthorized,
    Unavailable,
)
from evenodds.schemas import Problem
from evenodds.validation import fault_lines

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
FIRST_WAIT_SECONDS = 0.25
MAX_WAIT_SECONDS = 8.0
MAX_RETRY_AFTER_SECONDS = 30.0
"""A longer Retry-After is cut to this, but that of a 429, which a repeat before its time would only meet again: such a
call is given up at once."""

MAX_REPLY_BYTES = 64 * 2**20
"""Of one reply, unpacked. What the service answers is far smaller, but for pages of many long texts."""

_PROBLEMS: dict[int, type[ProblemError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: Invalid,
    429: RateLimited,
    503: Unavailable,
}


@dataclass(frozen=True, slots=True)
class Send:
    """Send this request.

    Attributes:
        path: Percent-encoded.
        query: Not encoded yet; a list gives its name several times.
        content: JSON, unless `media_type` says otherwise.
        run: Name of the run that the call is about, if it is about one: proxies may choose a replica by it.
        silence_seconds: How much longer than usual the reply may take, at least 0.
    """

    method: str
    path: str
    request_id: str
    query: Mapping[str, str | list[str]]
    content: bytes | None
    run: str | None = None
    silence_seconds: float = 0.0
    media_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing for `seconds`, at least 0."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Received:
    """A reply, whole unless it `is_cut` at `MAX_REPLY_BYTES`. The names of `headers` compare without case."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """No reply. `may_have_arrived` is False where the request cannot have reached the service."""

    kind: type[TransportError]
    reason: str
    may_have_arrived: bool


ReplyT = TypeVar("ReplyT", bound=BaseModel)
ResultT = TypeVar("ResultT")
Exchange = Generator[Send | Wait, Received | Failed | None, ResultT]


class Protocol:
    """The rules of one client: how often to repeat a call, and by which chance to space the repeats.

    Args:
        retries: Repeats after the first attempt, at least 0.
        random: Source of the jitter.
    """

    def __init__(self, *, retries: int, random: Random) -> None:
        self._retries = retries
        self._random = random

    def call(
        self,
        method: str,
        path: str,
        reply: type[ReplyT],
        *,
        query: Mapping[str, str | list[str]] | None = None,
        content: bytes | None = None,
        run: str | None = None,
        replying: Collection[int] = (),
        silence_seconds: float = 0.0,
        media_type: str = "application/json",
    ) -> Exchange[ReplyT]:
        """Make a call whose repetition is safe, and read its reply.

        It has an argument for each part of a request and of its reply.

        Args:
            reply: What the reply holds.
            run: Name of the run that the call is about, where `path` does not name it.
            replying: Statuses of 400 and above that hold `reply` too; they are not retried.
            silence_seconds: How much longer than usual the reply may take, at least 0.
            media_type: Of the content.

        Raises:
            TransportError: No attempt brought a reply.
            ProblemError: The service replied with an error.
            ReplyInvalid: The reply was not understood.
        """
        run = run or _run_in(path)
        send = Send(method, path, uuid4().hex, query or {}, content, run, silence_seconds, media_type)
        received, _ = yield from self._attempts(send, replying)
        if received.status >= 400 and received.status not in replying:
            raise problem(send, received)
        try:
            return reply.model_validate_json(received.content)
        except ValidationError as error:
            if received.status in replying:  # for example a proxy's reply, and not the service's
                raise problem(send, received) from error
            reason = "; ".join(fault_lines(error.errors(include_url=False, include_context=False))[:3])
            raise _not_understood(send, received, f"no {reply.__name__}: {reason}") from error

    def delete(self, path: str, *, query: Mapping[str, str | list[str]] | None = None) -> Exchange[None]:
        """Delete what stands at `path`. After a lost reply, a repeat that finds nothing there counts as done.

        Raises:
            TransportError: No attempt brought a reply.
            ProblemError: The service replied with an error, 404 if there was nothing to delete.
            ReplyInvalid: The reply was not understood.
        """
        send = Send("DELETE", path, uuid4().hex, query or {}, None, _run_in(path))
        received, reply_was_lost = yield from self._attempts(send, ())
        if received.status >= 400 and not (received.status == 404 and reply_was_lost):
            raise problem(send, received)

    def _attempts(self, send: Send, final: Collection[int]) -> Exchange[tuple[Received, bool]]:
        """The last reply, and whether an earlier attempt may have done the work unseen."""
        reply_was_lost = False
        attempt = 0
        while True:
            attempt += 1
            outcome = yield send
            assert outcome is not None, "a request ends in a reply or a failure"
            retry_after = None
            if isinstance(outcome, Failed):
                if attempt > self._retries:
                    raise outcome.kind(send.method, send.path, outcome.reason, send.request_id, attempt)
                reply_was_lost |= outcome.may_have_arrived
            else:
                if outcome.is_cut:
                    limit = f"it has more than {MAX_REPLY_BYTES:,} bytes; ask for less at a time (`limit` of a page)"
                    raise _not_understood(send, outcome, limit)
                if outcome.status not in RETRIED_STATUSES or outcome.status in final or attempt > self._retries:
                    if not (200 <= outcome.status < 300 or outcome.status >= 400):
                        reason = f"redirected to {outcome.headers.get('location', 'nowhere')}"
                        raise _not_understood(send, outcome, reason)
                    return outcome, reply_was_lost
                retry_after = _retry_after(outcome)
                if outcome.status == 429 and retry_after is not None and retry_after > MAX_RETRY_AFTER_SECONDS:
                    return outcome, reply_was_lost
                reply_was_lost |= outcome.status != 429
            yield Wait(self._wait_seconds(attempt, retry_after))

    def _wait_seconds(self, attempt: int, retry_after: float | None) -> float:
        """The seconds that the service asks for, else chance below a doubling bound ("full jitter")."""
        if retry_after is not None:
            return min(retry_after, MAX_RETRY_AFTER_SECONDS)
        bound = min(MAX_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(attempt - 1, 10))
        return self._random.uniform(0.0, bound)


def _run_in(path: str) -> str | None:
    """The run that a path is about: /runs/{run} and what is below it."""
    top, _, below = path.removeprefix("/").partition("/")
    return (below.partition("/")[0] or None) if top == "runs" else None


def problem(send: Send, received: Received) -> ProblemError:
    """The error that a reply of status 400 or above stands for, problem+json or not."""
    error = _problem(send, received)
    if isinstance(error, RateLimited):
        error.retry_after = _retry_after(received)
    return error


def _problem(send: Send, received: Received) -> ProblemError:
    status = received.status
    kind = _PROBLEMS.get(status, ServerError if status >= 500 else ProblemError)
    try:
        body = Problem.model_validate_json(received.content)
    except ValidationError:
        text = " ".join(received.content[:400].decode("utf-8", "replace").split())
        detail = (
            f"the reply is not problem+json, but {text[:200]!r}"
            if text
            else "the reply is not problem+json, but an empty body"
        )
        return kind(send.method, send.path, status, f"http_{status}", detail, _id_of(send, received))
    request_id = body.request_id or _id_of(send, received)
    return kind(send.method, send.path, status, body.code, body.detail, request_id, body.errors)


def _retry_after(received: Received) -> float | None:
    """The whole seconds that the service asks for; None where it does not, or names a date."""
    given = received.headers.get("retry-after", "")
    return float(given) if given.isascii() and given.isdigit() else None


def _id_of(send: Send, received: Received) -> str:
    return received.headers.get("x-request-id") or send.request_id


def _not_understood(send: Send, received: Received, reason: str) -> ReplyInvalid:
    return ReplyInvalid(send.method, send.path, received.status, reason, _id_of(send, received))
