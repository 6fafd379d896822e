"""The clients: `Client` blocks, `AsyncClient` awaits. Both drive the calls of `calls.py` over httpx.

They raise on every fault, and only what `errors.py` lists. They hold connections, and nothing else.
"""

from __future__ import annotations

import asyncio
import functools
import gzip
import inspect
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import closing
from random import Random
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import httpx

from evenodds.calls import Calls
from evenodds.deadlines import bound_reads
from evenodds.errors import ConfigurationError, TimedOut, TransportError, Unreachable
from evenodds.protocol import MAX_REPLY_BYTES, Exchange, Failed, Received, Send, Wait
from evenodds.schemas import PromptInfo, RunSort, RunState, Verdict
from evenodds.version import __version__

API_KEY_VARIABLE = "EVENODDS_API_KEY"
"""Where no key is given, the environment's: also for what builds a client of its own, as `PromptSelector` does."""

RUN_HEADER = "X-EvenOdds-Run"
"""Names the run of a call, which stands in its body, to proxies that send each run to one replica. The service does not
read it."""

COMPRESSED_FROM_BYTES = 100_000
"""Smaller bodies are sent sooner than they are compressed."""

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def _blocking(
    call: Callable[Concatenate[Calls, P], Exchange[ResultT]],
) -> Callable[Concatenate[Client, P], ResultT]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        return self._drive(call(self._calls, *args, **kwargs))

    return _documented(method, call)


def _awaited(
    call: Callable[Concatenate[Calls, P], Exchange[ResultT]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, ResultT]]:
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        return await self._drive(call(self._calls, *args, **kwargs))

    return _documented(method, call)


MethodT = TypeVar("MethodT", bound=Callable[..., object])


def _documented(method: MethodT, call: Callable[..., object]) -> MethodT:
    """Give the method the name, text and signature of the call, save the generator around its reply."""
    functools.update_wrapper(method, call)
    signature = inspect.signature(call)
    returned = str(signature.return_annotation).removeprefix("Exchange[").removesuffix("]")
    cast("Any", method).__signature__ = signature.replace(return_annotation=returned)
    return method


class Client:
    """The service, call by call. Threads may share one.

    Repeating a call is safe, so calls are repeated after a broken connection, a timeout, or the statuses 429,
    502, 503 and 504. The wait is the seconds of Retry-After (at most 30), else a random while below 0.25 s,
    0.5 s, 1 s, ... (at most 8 s). All attempts of a call carry the same X-Request-ID.

    Args:
        base_url: Where the service is: http or https, a path prefix if it has one.
        timeout_seconds: Longest silence in one attempt: to connect, and to wait for the next bytes. Above 0. What
            a call waits for on purpose (`wait_seconds`) comes on top.
        total_seconds: Longest that one attempt may take in all, however steadily its bytes come. Above 0; what a call
            waits for on purpose comes on top here too.
        api_key: Sent with every request, where the service asks for one; the variable EVENODDS_API_KEY by default.
        retries: Repeats after the first attempt, at least 0.
        transport: Carries the requests; a connection pool by default.
        sleep: Waits for so many seconds.
        random: Source of the jitter.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        timeout_seconds: float = 10.0,
        total_seconds: float = 60.0,
        api_key: str | None = None,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        random: Random | None = None,
    ) -> None:
        self._calls = _checked_calls(retries, random)
        self._sleep = sleep
        self._total_seconds = _checked_seconds("total_seconds", total_seconds)
        self._http = httpx.Client(
            base_url=_checked_url(base_url),
            timeout=_checked_timeout(timeout_seconds),
            headers=_headers(api_key),
            transport=transport,
        )
        self._deadline = bound_reads(self._http)

    put_run = _blocking(Calls.put_run)
    run = _blocking(Calls.run)
    runs_page = _blocking(Calls.runs_page)
    delete_run = _blocking(Calls.delete_run)
    delete_prompt = _blocking(Calls.delete_prompt)
    refit = _blocking(Calls.refit)
    refits = _blocking(Calls.refits)
    report = _blocking(Calls.report)
    beliefs = _blocking(Calls.beliefs)
    rewind = _blocking(Calls.rewind)
    retract = _blocking(Calls.retract)
    add_prompts = _blocking(Calls.add_prompts)
    add_prompt_lines = _blocking(Calls.add_prompt_lines)
    prompts_page = _blocking(Calls.prompts_page)
    prompt = _blocking(Calls.prompt)
    observe = _blocking(Calls.observe)
    observe_decision = _blocking(Calls.observe_decision)
    predict = _blocking(Calls.predict)
    select_batch = _blocking(Calls.select_batch)
    allocate = _blocking(Calls.allocate)
    budget = _blocking(Calls.budget)
    put_budget_policy = _blocking(Calls.put_budget_policy)
    budget_policies = _blocking(Calls.budget_policies)
    healthz = _blocking(Calls.healthz)
    readyz = _blocking(Calls.readyz)

    def runs(
        self,
        *,
        state: Sequence[Verdict] = (),
        alarm: str | None = None,
        sort: RunSort = "name",
        search: str | None = None,
    ) -> Iterator[RunState]:
        """Runs, fetched page by page: all by default.

        Args:
            state, alarm, sort, search: As of `runs_page`. Sorted by anything but `name`, a run that changes while the
                pages are fetched may come twice, or not at all.
        """
        cursor: str | None = None
        while True:
            page = self.runs_page(state=state, alarm=alarm, sort=sort, search=search, cursor=cursor)
            yield from page.runs
            cursor = page.next_cursor
            if cursor is None:
                return

    def prompts(self, run: str) -> Iterator[PromptInfo]:
        """All prompts of the pool, fetched page by page.

        Raises:
            NotFound: There is no such run.
        """
        cursor: str | None = None
        while True:
            page = self.prompts_page(run, cursor=cursor)
            yield from page.prompts
            cursor = page.next_cursor
            if cursor is None:
                return

    def close(self) -> None:
        """Close the connections. Repeating it is safe."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drive(self, exchange: Exchange[ResultT]) -> ResultT:
        outcome: Received | Failed | None = None
        while True:
            try:
                wanted = exchange.send(outcome)
            except StopIteration as done:
                return cast("ResultT", done.value)
            if isinstance(wanted, Wait):
                self._sleep(wanted.seconds)
                outcome = None
            else:
                outcome = self._send(wanted)

    def _send(self, send: Send) -> Received | Failed:
        request = _request(self._http, send)
        total = self._total_seconds + send.silence_seconds
        self._deadline.begin(total)
        try:
            response = self._http.send(request, stream=True)
            with closing(response):
                pieces = _Pieces(response)
                for piece in response.iter_bytes():
                    if pieces.add(piece):
                        break
                    if self._deadline.has_passed():
                        return _too_slow(request, total)
                return pieces.received()
        except httpx.RequestError as error:
            if self._deadline.has_passed():
                return _too_slow(request, total)
            return _failed(error, request, self._http.timeout)


class AsyncClient:
    """The service, call by call, for asyncio. Tasks of one event loop may share one.

    What `Client` says holds here too; `sleep` is awaited.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        timeout_seconds: float = 10.0,
        total_seconds: float = 60.0,
        api_key: str | None = None,
        retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Random | None = None,
    ) -> None:
        self._calls = _checked_calls(retries, random)
        self._sleep = sleep
        self._total_seconds = _checked_seconds("total_seconds", total_seconds)
        self._http = httpx.AsyncClient(
            base_url=_checked_url(base_url),
            timeout=_checked_timeout(timeout_seconds),
            headers=_headers(api_key),
            transport=transport,
        )

    put_run = _awaited(Calls.put_run)
    run = _awaited(Calls.run)
    runs_page = _awaited(Calls.runs_page)
    delete_run = _awaited(Calls.delete_run)
    delete_prompt = _awaited(Calls.delete_prompt)
    refit = _awaited(Calls.refit)
    refits = _awaited(Calls.refits)
    report = _awaited(Calls.report)
    beliefs = _awaited(Calls.beliefs)
    rewind = _awaited(Calls.rewind)
    retract = _awaited(Calls.retract)
    add_prompts = _awaited(Calls.add_prompts)
    add_prompt_lines = _awaited(Calls.add_prompt_lines)
    prompts_page = _awaited(Calls.prompts_page)
    prompt = _awaited(Calls.prompt)
    observe = _awaited(Calls.observe)
    observe_decision = _awaited(Calls.observe_decision)
    predict = _awaited(Calls.predict)
    select_batch = _awaited(Calls.select_batch)
    allocate = _awaited(Calls.allocate)
    budget = _awaited(Calls.budget)
    put_budget_policy = _awaited(Calls.put_budget_policy)
    budget_policies = _awaited(Calls.budget_policies)
    healthz = _awaited(Calls.healthz)
    readyz = _awaited(Calls.readyz)

    async def runs(
        self,
        *,
        state: Sequence[Verdict] = (),
        alarm: str | None = None,
        sort: RunSort = "name",
        search: str | None = None,
    ) -> AsyncIterator[RunState]:
        """Runs, fetched page by page: all by default.

        Args:
            state, alarm, sort, search: As of `runs_page`. Sorted by anything but `name`, a run that changes while the
                pages are fetched may come twice, or not at all.
        """
        cursor: str | None = None
        while True:
            page = await self.runs_page(state=state, alarm=alarm, sort=sort, search=search, cursor=cursor)
            for run in page.runs:
                yield run
            cursor = page.next_cursor
            if cursor is None:
                return

    async def prompts(self, run: str) -> AsyncIterator[PromptInfo]:
        """All prompts of the pool, fetched page by page.

        Raises:
            NotFound: There is no such run.
        """
        cursor: str | None = None
        while True:
            page = await self.prompts_page(run, cursor=cursor)
            for prompt in page.prompts:
                yield prompt
            cursor = page.next_cursor
            if cursor is None:
                return

    async def close(self) -> None:
        """Close the connections. Repeating it is safe."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _drive(self, exchange: Exchange[ResultT]) -> ResultT:
        outcome: Received | Failed | None = None
        while True:
            try:
                wanted = exchange.send(outcome)
            except StopIteration as done:
                return cast("ResultT", done.value)
            if isinstance(wanted, Wait):
                await self._sleep(wanted.seconds)
                outcome = None
            else:
                outcome = await self._send(wanted)

    async def _send(self, send: Send) -> Received | Failed:
        request = _request(self._http, send)
        total = self._total_seconds + send.silence_seconds
        try:
            return await asyncio.wait_for(self._exchanged(request), total)
        except asyncio.TimeoutError:
            return _too_slow(request, total)
        except httpx.RequestError as error:
            return _failed(error, request, self._http.timeout)

    async def _exchanged(self, request: httpx.Request) -> Received:
        response = await self._http.send(request, stream=True)
        try:
            pieces = _Pieces(response)
            async for piece in response.aiter_bytes():
                if pieces.add(piece):
                    break
            return pieces.received()
        finally:
            await response.aclose()


class _Pieces:
    """What has come of a reply, up to its limit."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._pieces: list[bytes] = []
        self._n_bytes = 0

    def add(self, piece: bytes) -> bool:
        """Keep it. Whether this is more than a reply may have."""
        self._pieces.append(piece)
        self._n_bytes += len(piece)
        return self._n_bytes > MAX_REPLY_BYTES

    def received(self) -> Received:
        is_cut = self._n_bytes > MAX_REPLY_BYTES
        return Received(self._response.status_code, self._response.headers, b"".join(self._pieces), is_cut)


def _checked_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"base_url {base_url!r} is not a URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigurationError(f"base_url {base_url!r} must start with http:// or https:// and name a host")
    if url.query or url.fragment:
        raise ConfigurationError(f"base_url {base_url!r} must end before '?' and '#'")
    return url


def _headers(api_key: str | None) -> dict[str, str]:
    """Of every request. A key that no header can hold is refused here, and not shown."""
    headers = {"User-Agent": f"evenodds/{__version__}", "Accept": "application/json"}
    if api_key is None:
        api_key = os.environ.get(API_KEY_VARIABLE) or None
    if api_key is not None:
        if not api_key or not all("!" <= character <= "~" for character in api_key):
            raise ConfigurationError(
                "api_key must be printable ASCII without blanks, as `evenodds keys create` prints it"
            )
        headers["Authorization"] = f"Bearer {api_key}"
    return headers


def _checked_timeout(timeout_seconds: float) -> httpx.Timeout:
    return httpx.Timeout(_checked_seconds("timeout_seconds", timeout_seconds))


def _checked_seconds(name: str, seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigurationError(f"{name} {seconds!r} must be finite and above 0")
    return seconds


def _checked_calls(retries: int, random: Random | None) -> Calls:
    if retries < 0:
        raise ConfigurationError(f"retries {retries!r} must be at least 0")
    return Calls(retries=retries, random=random or Random())


def _request(http: httpx.Client | httpx.AsyncClient, send: Send) -> httpx.Request:
    if http.is_closed:
        raise ConfigurationError(f"{send.method} {send.path}: this client is closed; make a new one")
    headers = {"X-Request-ID": send.request_id}
    if send.run is not None:
        headers[RUN_HEADER] = send.run
    content = send.content
    if content is not None:
        headers["Content-Type"] = send.media_type
        if len(content) >= COMPRESSED_FROM_BYTES:
            headers["Content-Encoding"] = "gzip"
            content = gzip.compress(content, compresslevel=1)
    usual = http.timeout.read or 0.0  # all four are `timeout_seconds`
    return http.build_request(
        send.method,
        send.path,
        params=send.query,
        content=content,
        headers=headers,
        timeout=httpx.Timeout(usual, read=usual + send.silence_seconds),
    )


def _too_slow(request: httpx.Request, total_seconds: float) -> Failed:
    where = f"{request.url.scheme}://{request.url.netloc.decode('ascii')}"
    reason = f"{where}: the whole reply did not come within total_seconds, {total_seconds:g}"
    return Failed(TimedOut, reason, may_have_arrived=True)


def _failed(error: httpx.RequestError, request: httpx.Request, timeout: httpx.Timeout) -> Failed:
    reason = f"{request.url.scheme}://{request.url.netloc.decode('ascii')}: {str(error) or type(error).__name__}"
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return Failed(Unreachable, f"{reason}; is the service running there?", may_have_arrived=False)
    if isinstance(error, httpx.TimeoutException):
        may_have_arrived = not isinstance(error, httpx.PoolTimeout)
        return Failed(TimedOut, f"{reason}; timeout_seconds is {timeout.read:g}", may_have_arrived)
    return Failed(TransportError, reason, may_have_arrived=True)
