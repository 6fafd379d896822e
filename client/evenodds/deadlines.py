"""A deadline for a whole exchange over httpx, where httpx itself knows the silence between two bytes only.

A server that sends a byte now and then, in the head of its reply or in the body, would never let a thread go: each
read is in time. So the connections of a client ask, before each read and write, how much time the exchange has left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

_PIECE_BYTES = 64 * 2**10


class Deadline:
    """Of the exchange that the calling thread is at; each thread has its own."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def begin(self, seconds: float) -> None:
        """An exchange begins, and may take so long."""
        self._of_thread.at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, below 0 once it has passed."""
        at: float | None = getattr(self._of_thread, "at", None)
        return float("inf") if at is None else at - time.monotonic()

    def has_passed(self) -> bool:
        return self.left() <= 0.0

    def within(self, timeout: float | None) -> float | None:
        """The shorter of the timeout and what is left. Raises httpcore.ReadTimeout where nothing is."""
        left = self.left()
        if left <= 0.0:
            raise httpcore.ReadTimeout("the exchange takes too long")
        if left == float("inf"):
            return timeout
        return left if timeout is None else min(timeout, left)


def bound_reads(http: httpx.Client) -> Deadline:
    """Let every connection that this client will open keep to a deadline, which is returned.

    httpx has no way to say this, so it is put into the connection pools that it has made, proxies' too. Other
    transports (for example of tests) stay as they are.
    """
    deadline = Deadline()
    for transport in (http._transport, *http._mounts.values()):
        pool = getattr(transport, "_pool", None)
        if isinstance(pool, httpcore.ConnectionPool):
            pool._network_backend = _Backend(pool._network_backend, deadline)
    return deadline


class _Backend(httpcore.NetworkBackend):
    def __init__(self, backend: httpcore.NetworkBackend, deadline: Deadline) -> None:
        self._backend, self._deadline = backend, deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        timeout = self._deadline.within(timeout)
        stream = self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        return _Stream(stream, self._deadline)

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        timeout = self._deadline.within(timeout)
        return _Stream(self._backend.connect_unix_socket(path, timeout, socket_options), self._deadline)

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.within(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for first in range(0, len(buffer), _PIECE_BYTES):  # a peer may take them one by one
            self._stream.write(buffer[first : first + _PIECE_BYTES], self._deadline.within(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.within(timeout))
        return _Stream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
