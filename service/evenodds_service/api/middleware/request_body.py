"""What comes over the wire before a route reads it: bodies are unpacked, and held to their limit as they come.

The limit counts what a route would have to hold, the bytes after decompression: a small body that unpacks to a large
one is refused as soon as it passes the limit, and is never held. A route that reads in pieces lifts the limit.
"""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_GZIP = ("gzip", "x-gzip")
_PIECE_BYTES = 256 * 1024


class RequestBodyLimit:
    """Middleware that passes request bodies on unpacked, of at most `max_bytes`.

    A fault is raised where the route reads: 413 for the limit, 415 for another encoding than gzip, 422 for bytes that
    are no gzip.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            body = _Body(scope, receive, self._max_bytes)
            scope.setdefault("state", {})["body"] = body
            receive = body.receive
        await self._app(scope, receive, send)


def lift_limit(request: Request) -> None:
    """Let the body of this request be of any length: its route reads it in pieces and keeps none."""
    request.state.body.max_bytes = None


class _Body:
    """The body of one request; `receive` reads it."""

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int) -> None:
        headers = MutableHeaders(scope=scope)
        self.max_bytes: int | None = max_bytes
        self._receive = receive
        self._stated_bytes = int(headers.get("content-length") or 0)
        self._encoding = headers.get("content-encoding", "").strip().lower()
        self._unpacking = _Unpacking() if self._encoding in _GZIP else None
        self._n_bytes = 0
        self._is_arriving = True
        if self._unpacking is not None:
            del headers["content-encoding"], headers["content-length"]

    async def receive(self) -> Message:
        if self._encoding not in ("", "identity", *_GZIP):
            detail = f"body: Content-Encoding {self._encoding!r} is unknown here: send it plain, or with gzip"
            raise HTTPException(415, detail, headers={"Accept-Encoding": "gzip"})
        if self.max_bytes is not None and self._stated_bytes > self.max_bytes:
            raise self._too_large(f"{self._stated_bytes:,} bytes", self.max_bytes)
        message = await (self._receive() if self._unpacking is None else self._unpacked(self._unpacking))
        self._n_bytes += len(message.get("body", b""))
        if self.max_bytes is not None and self._n_bytes > self.max_bytes:
            more = f"more than {self.max_bytes:,} bytes" + (" when unpacked" if self._unpacking is not None else "")
            raise self._too_large(more, self.max_bytes)
        return message

    async def _unpacked(self, unpacking: _Unpacking) -> Message:
        """The next piece. Other requests have their turn between pieces."""
        while self._is_arriving or unpacking.has_input:
            if not unpacking.has_input:
                message = await self._receive()
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
