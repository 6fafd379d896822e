"""What comes over the wire before a route reads it: bodies are unpacked, and held to their limit as they come.

The limits count what a route would have to hold, the bytes after decompression: a small body that unpacks to a large
one is refused as soon as it passes the limit, and is never held. A route that reads in pieces lifts the service's
limit. All requests together hold no more than a budget, and a body that does not get on is given up: else unfinished
ones would fill the memory and keep it.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
import zlib

from anyio import move_on_after
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evenodds_service.storage.store import ApiKey

_GZIP = ("gzip", "x-gzip")
_PIECE_BYTES = 256 * 1024
_LARGE_BYTES = 16 * 2**20
_LEAST_PIECE_BYTES = 16 * 1024
"""What comes in smaller pieces is put together first: each piece that a route keeps costs more than its bytes."""

GRACE_SECONDS = 30.0
LEAST_BYTES_PER_SECOND = 16_000
LEAST_BYTES_PER_SECOND_OF_A_STREAM = 1_000
"""Of a body that its route does not hold."""


class RequestBodyLimit:
    """Middleware that passes request bodies on unpacked.

    A fault is raised where the route reads: 413 for a limit, 415 for another encoding than gzip, 422 for bytes that are
    no gzip, 408 for a body that does not get on, 503 where others have taken the budget.

    Args:
        max_bytes: Of one body, unless its route lifts the limit. A key may have a lower one, which stays.
        max_bytes_together: Of all bodies that are held at a time.
        grace_seconds: For how long a request may wait for its body, beside what its bytes take at the least rate.
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, max_bytes_together: int, grace_seconds: float = GRACE_SECONDS
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._budget = _Budget(max(max_bytes, max_bytes_together))
        self._grace_seconds = grace_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope, receive, self._max_bytes, self._budget, self._grace_seconds)
        scope.setdefault("state", {})["body"] = body
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.forget()


def lift_limit(request: Request) -> None:
    """Let the body of this request be of any length: its route reads it in pieces, and calls `forget` behind each."""
    request.state.body.max_bytes = None


def forget(request: Request) -> None:
    """What the route has read of the body so far is no longer held."""
    request.state.body.forget()


class _Budget:
    """Bytes that the bodies of all requests may take together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self.trimming: asyncio.TimerHandle | None = None

    def trim(self) -> None:
        """Give memory back to the system, where the C library is one that does so on request."""
        self.trimming = None
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class _Body:
    """The body of one request; `receive` reads it."""

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, budget: _Budget, grace_seconds: float) -> None:
        headers = MutableHeaders(scope=scope)
        self.max_bytes: int | None = max_bytes
        self._key: ApiKey | None = scope.get("state", {}).get("api_key")
        self._budget = budget
        self._n_held = 0
        self._wait_seconds = grace_seconds  # how long it may still be waited for
        self._receive = receive
        self._stated_bytes = int(headers.get("content-length") or 0)
        self._encoding = headers.get("content-encoding", "").strip().lower()
        self._unpacking = _Unpacking() if self._encoding in _GZIP else None
        self._n_bytes = 0
        self._is_arriving = True
        self._is_whole = False
        if self._unpacking is not None:
            del headers["content-encoding"], headers["content-length"]

    async def receive(self) -> Message:
        if self._is_whole and self._unpacking is None:  # what comes now is the caller's leaving, however late
            return await self._receive()
        if self._encoding not in ("", "identity", *_GZIP):
            detail = (
                f"body: Content-Encoding {self._encoding!r} is not supported: send the body uncompressed, or with gzip"
            )
            raise HTTPException(415, detail, headers={"Accept-Encoding": "gzip"})
        if self.max_bytes is not None and self._stated_bytes > self.max_bytes:
            raise self._too_large(f"{self._stated_bytes:,} bytes", self.max_bytes)
        message = await (self._arrived() if self._unpacking is None else self._unpacked(self._unpacking))
        self._count(len(message.get("body", b"")))
        return message

    def forget(self) -> None:
        """Nothing of it is held any more."""
        self._budget.n_bytes -= self._n_held
        if self._n_held >= _LARGE_BYTES and self._budget.trimming is None:
            # When what held it is gone too. Else the C library would keep freed pieces for the next large body.
            self._budget.trimming = asyncio.get_running_loop().call_later(1.0, self._budget.trim)
        self._n_held = 0

    def _count(self, n_bytes: int) -> None:
        """Raises HTTPException: these bytes are too many."""
        self._n_bytes += n_bytes
        when = " when unpacked" if self._unpacking is not None else ""
        key_limit = self._key.max_body_bytes if self._key is not None else None
        if self._key is not None and key_limit is not None and self._n_bytes > key_limit:
            detail = f"key {self._key.name!r} may send bodies of up to {key_limit:,} bytes{when}: send less at a time"
            raise HTTPException(413, detail)
        if self.max_bytes is not None and self._n_bytes > self.max_bytes:
            raise self._too_large(f"more than {self.max_bytes:,} bytes{when}", self.max_bytes)
        if self._budget.n_bytes + n_bytes > self._budget.max_bytes:
            raise HTTPException(
                503,
                f"body: the bodies of all requests hold {self._budget.n_bytes:,} bytes at present, and their limit is "
                f"{self._budget.max_bytes:,} (EVENODDS_MAX_BODIES_MB of the service): repeat the call later",
                headers={"Retry-After": "1"},
            )
        self._budget.n_bytes += n_bytes
        self._n_held += n_bytes

    async def _arrived(self) -> Message:
        """The next bytes from the wire, not too few at a time. Raises HTTPException where they take too long."""
        pieces = bytearray()
        while True:
            started = time.monotonic()
            message: Message | None = None
            with move_on_after(self._wait_seconds):
                message = await self._receive()
            if message is None:
                raise HTTPException(408, "body: it arrived too slowly: send it again, without pauses")
            if message["type"] != "http.request":
                return message
            piece = message.get("body", b"")
            rate = LEAST_BYTES_PER_SECOND if self.max_bytes is not None else LEAST_BYTES_PER_SECOND_OF_A_STREAM
            self._wait_seconds += len(piece) / rate - (time.monotonic() - started)
            self._is_whole = is_last = not message.get("more_body", False)
            if not pieces and (is_last or len(piece) >= _LEAST_PIECE_BYTES):
                return message
            pieces += piece
            if is_last or len(pieces) >= _LEAST_PIECE_BYTES:
                return {"type": "http.request", "body": bytes(pieces), "more_body": not is_last}

    async def _unpacked(self, unpacking: _Unpacking) -> Message:
        """The next piece. Other requests have their turn between pieces."""
        while self._is_arriving or unpacking.has_input:
            if not unpacking.has_input:
                message = await self._arrived()
                if message["type"] != "http.request":
                    return message
                unpacking.feed(message.get("body", b""))
                self._is_arriving = message.get("more_body", False)
            try:
                piece = unpacking.piece()
            except zlib.error as error:
                raise HTTPException(
                    422, f"body: Content-Encoding says gzip, but it cannot be unpacked: {error}"
                ) from error
            is_last = not self._is_arriving and not unpacking.has_input
            if is_last and unpacking.is_cut:
                raise HTTPException(422, "body: its gzip stream ends in the middle: send all of it")
            await asyncio.sleep(0)
            if piece or is_last:
                return {"type": "http.request", "body": piece, "more_body": not is_last}
        return await self._receive()

    @staticmethod
    def _too_large(found: str, limit: int) -> HTTPException:
        return HTTPException(
            413,
            f"body: it has {found}, the limit is {limit:,} (EVENODDS_MAX_BODY_MB of the service): "
            "send fewer items in a call, or prompts as NDJSON, which has no limit",
        )


class _Unpacking:
    """gzip on its way, of one member or several."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)  # gzip
        self._input = b""
        self._has_begun = False

    def feed(self, packed: bytes) -> None:
        self._input += packed
        self._has_begun |= bool(packed)

    @property
    def has_input(self) -> bool:
        return bool(self._input)

    @property
    def is_cut(self) -> bool:
        """Whether more has to come."""
        return self._has_begun and not self._member.eof

    def piece(self) -> bytes:
        """What comes next of the fed bytes, at most 256 KiB, perhaps nothing yet. Raises zlib.error."""
        if self._member.eof and self._input:
            self._member = zlib.decompressobj(wbits=31)
        piece = self._member.decompress(self._input, _PIECE_BYTES)
        self._input = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        return piece
