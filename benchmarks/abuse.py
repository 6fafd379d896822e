"""Memory and time of the service and the client under callers and services that mean harm.

    python -m benchmarks.abuse

Starts `evenodds serve` on a SQLite file, and measures resident memory (MB) before, at the most and after: bodies whose
end never comes, a long line in small pieces, new texts asked about so that the cache of their features keeps one of
each request. Of the client: a reply without an end, and one that drips.
"""

from __future__ import annotations

import gzip
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from evenodds import Client, EvenOddsError

UNPACKED = 48_000_000
N_BODIES = 30
MOST_MB = 256
"""What all bodies together may take, unless the service is told otherwise."""

LINE_BYTES = 8_000_000
PIECE_BYTES = 256
N_TEXTS, N_REQUESTS = 1_000, 30
PATIENCE_SECONDS = 300.0
SETTLED_SECONDS = 10.0


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) * 1_024 / 1e6


@contextmanager
def watched(pid: int) -> Iterator[dict[str, float]]:
    """Resident memory `before` the body, at the `most`, and `after` it has settled."""
    found = {"before": memory_mb(pid), "most": memory_mb(pid)}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            found["most"] = max(found["most"], memory_mb(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        time.sleep(SETTLED_SECONDS)  # until memory is given back
        done.set()
        thread.join()
        found["after"] = memory_mb(pid)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, int]]:
    """Process id and port of a service."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    environment = {
        **os.environ,
        "EVENODDS_DATABASE_URL": f"sqlite:///{folder}/evenodds.db",
        "EVENODDS_PORT": str(port),
        "EVENODDS_LOG_LEVEL": "error",
    }
    process = subprocess.Popen([sys.executable, "-m", "evenodds_service", "serve"], env=environment)
    try:
        ends = time.monotonic() + PATIENCE_SECONDS
        while True:
            with suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5)
                break
            if time.monotonic() > ends or process.poll() is not None:
                raise SystemExit("the service does not start")
            time.sleep(0.1)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def connection_to(port: int, media_type: str, *more: str) -> socket.socket:
    """A connection that has sent the head of a request to load prompts."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
    head = ["POST /runs/abuse/prompts HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked"]
    head += [f"Content-Type: {media_type}", *more]
    connection.sendall(("\r\n".join(head) + "\r\n\r\n").encode())
    return connection


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def unfinished_bodies(port: int) -> int:
    """Send bodies without their ends, and wait for the answers that come. How many are refused."""
    content = chunk(gzip.compress(b"x" * UNPACKED)[:-12])
    held = [connection_to(port, "application/json", "Content-Encoding: gzip") for _ in range(N_BODIES)]
    for connection in held:
        connection.sendall(content)
    fit = MOST_MB * 1_000_000 // UNPACKED
    waiting, ends = list(held), time.monotonic() + PATIENCE_SECONDS
    while len(waiting) > fit and time.monotonic() < ends:
        answered, _, _ = select.select(waiting, [], [], 1.0)
        for connection in answered:
            assert b" 503 " in connection.recv(65_536)
            waiting.remove(connection)
    for connection in held:
        connection.close()
    return len(held) - len(waiting)


def line_in_pieces(port: int) -> float:
    """Send one line in small pieces. Seconds that it took."""
    began = time.monotonic()
    connection = connection_to(port, "application/x-ndjson")
    with suppress(ConnectionError):
        for _ in range(LINE_BYTES // PIECE_BYTES):
            connection.sendall(chunk(b"x" * PIECE_BYTES))
        connection.sendall(chunk(b"\n") + b"0\r\n\r\n")
        connection.recv(65_536)
    connection.close()
    return time.monotonic() - began


def kept_texts(client: Client) -> None:
    """Ask about new texts, and about one of each earlier request again, so that it stays in the cache."""
    for n in range(N_REQUESTS):
        texts = [f"What is {n} times {i}?" for i in range(N_TEXTS)] + [f"What is {m} times 0?" for m in range(n)]
        client.predict("abuse", [{"text": text} for text in texts])


@contextmanager
def answering(pieces: Callable[[], Iterator[bytes]]) -> Iterator[str]:
    """Address of a service that answers each request with these pieces."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with suppress(OSError):
                    connection.recv(65_536)
                    for piece in pieces():
                        connection.sendall(piece)
                connection.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 300000000\r\n\r\n"


def a_long_reply() -> Iterator[bytes]:
    yield HEAD
    for _ in range(300):
        yield b" " * 1_000_000


def a_dripping_reply() -> Iterator[bytes]:
    yield HEAD
    while True:
        time.sleep(0.3)
        yield b" "


def refused_in(base_url: str, total_seconds: float) -> tuple[float, str]:
    """Seconds until a call is given up, and why."""
    began = time.monotonic()
    with Client(base_url, retries=0, total_seconds=total_seconds) as client:
        try:
            client.run("abuse")
        except EvenOddsError as error:
            return time.monotonic() - began, type(error).__name__
    return time.monotonic() - began, "answered"


def main() -> None:
    def say(what: str, found: dict[str, float], more: str) -> None:
        print(f"{what}: {found['before']:.0f} MB, at the most {found['most']:.0f}, after {found['after']:.0f}; {more}")

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evenodds-abuse-")))
        pid, port = stack.enter_context(serving(folder))
        address = f"http://127.0.0.1:{port}"
        with Client(address, timeout_seconds=PATIENCE_SECONDS, total_seconds=2 * PATIENCE_SECONDS) as client:
            client.put_run("abuse", embedder="builtin")
            client.add_prompts("abuse", [{"prompt_id": "a", "text": "1 + 1 = ?"}])
            client.predict("abuse", [{"text": "What is new?"}])
            with watched(pid) as found:
                refused = unfinished_bodies(port)
            say(f"{N_BODIES} unfinished gzip bodies of {UNPACKED:,} bytes", found, f"{refused} were refused with 503")
            with watched(pid) as found:
                seconds = line_in_pieces(port)
            say(f"a line of {LINE_BYTES:,} bytes in pieces of {PIECE_BYTES}", found, f"{seconds:.1f} s")
            with watched(pid) as found:
                kept_texts(client)
            say(
                f"{N_REQUESTS} requests about {N_TEXTS:,} new texts",
                found,
                "one of each is asked about again and again",
            )
    with answering(a_long_reply) as base_url, watched(os.getpid()) as found:
        seconds, why = refused_in(base_url, 60)
    say("client: a reply of 300 MB", found, f"{why} after {seconds:.1f} s")
    with answering(a_dripping_reply) as base_url, watched(os.getpid()) as found:
        seconds, why = refused_in(base_url, 5)
    say("client: a reply of a byte every 0.3 s, total_seconds=5", found, f"{why} after {seconds:.1f} s")


if __name__ == "__main__":
    main()
