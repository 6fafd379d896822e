"""No reply keeps a caller for longer than `total_seconds`, however steadily its bytes come, or fills its memory."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.waiting import PATIENCE_SECONDS

from evenodds import AsyncClient, Client, EvenOddsError, ReplyInvalid, TimedOut
from evenodds.protocol import MAX_REPLY_BYTES

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PAUSE = 0.02
BOMB = gzip.compress(b" " * 100_000_000, compresslevel=1)


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that answers every connection so, until it breaks."""
    listening = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(65_536)
                while not stopped.is_set():
                    answer(connection)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    stopped.set()
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def drip(content: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        for i in range(len(content)):
            connection.sendall(content[i : i + 1])
            time.sleep(PAUSE)

    return answer


def drip_a_body(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
    drip(b" " * 1_000_000)(connection)


def endless(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Content-Length: 300000000\r\n\r\n")
    for _ in range(300):
        connection.sendall(b" " * 1_000_000)


def bomb(connection: socket.socket) -> None:
    content = BOMB
    connection.sendall(HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(content) + content)


def call(base_url: str, *, asynchronous: bool, total_seconds: float) -> EvenOddsError:
    """What `healthz` raises."""
    if not asynchronous:
        with (
            Client(base_url, retries=0, total_seconds=total_seconds) as client,
            pytest.raises(EvenOddsError) as caught,
        ):
            client.healthz()
        return caught.value

    async def ask() -> None:
        async with AsyncClient(base_url, retries=0, total_seconds=total_seconds) as client:
            await client.healthz()

    with pytest.raises(EvenOddsError) as caught:
        asyncio.run(ask())
    return caught.value


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("answer", [drip(HEAD + b"X: " + b"y" * 9_000_000), drip_a_body], ids=["head", "body"])
def test_a_reply_that_drips_ends_in_time(answer: Callable[[socket.socket], None], asynchronous: bool) -> None:
    started = time.monotonic()
    with answering(answer) as base_url:
        error = call(base_url, asynchronous=asynchronous, total_seconds=0.5)

    assert isinstance(error, TimedOut)
    assert "the whole reply did not come within total_seconds, 0.5" in str(error)
    assert time.monotonic() - started < PATIENCE_SECONDS


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("answer", [endless, bomb])
def test_a_reply_that_is_too_long_is_not_read_whole(
    answer: Callable[[socket.socket], None], asynchronous: bool
) -> None:
    with answering(answer) as base_url:
        tracemalloc.start()
        error = call(base_url, asynchronous=asynchronous, total_seconds=PATIENCE_SECONDS)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert isinstance(error, ReplyInvalid)
    assert f"it has more than {MAX_REPLY_BYTES:,} bytes" in str(error)
    assert most < 3 * MAX_REPLY_BYTES
