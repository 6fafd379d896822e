"""A proxy on loopback between a trainer and the service, that misbehaves as it is told."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import httpx
from tests.waiting import PATIENCE_SECONDS

Mode = Literal["fine", "slow", "dead", "lost reply", "garbage", "html", "500", "proxy's 422", "another run's"]
MODES: tuple[Mode, ...] = (
    "fine",
    "slow",
    "dead",
    "lost reply",
    "garbage",
    "html",
    "500",
    "proxy's 422",
    "another run's",
)
SLOW_SECONDS = 600.0
"""Far longer than any deadline, and than a busy machine is late. Letting go ends it."""
_HTML = b"<html><body>Gateway login</body></html>"


class Proxy:
    """`mode` says how it treats the requests to come, `target` where it passes them on to."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.mode: Mode = "fine"
        self.met: Counter[tuple[str, str]] = Counter()
        self.base_url = ""
        self._released = threading.Event()

    def treat(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        mode = self.mode
        self.met[mode, handler.path.partition("?")[0].rsplit("/", 1)[-1]] += 1
        if mode == "slow":
            self._released.wait(SLOW_SECONDS)
        if mode in ("fine", "slow", "lost reply"):
            try:
                reply = httpx.request(
                    handler.command,
                    self.target + handler.path,
                    content=content,
                    headers={"Content-Type": "application/json"},
                    timeout=PATIENCE_SECONDS,
                )
            except httpx.HTTPError:
                handler.close_connection = True
                return
            if mode == "lost reply":
                handler.close_connection = True
            else:
                self._answer(handler, reply.status_code, reply.content)
        elif mode == "dead":
            handler.close_connection = True
        elif mode == "garbage":
            self._answer(handler, 200, b'{"run": \xff\x00')
        elif mode == "html":
            self._answer(handler, 200, _HTML)
        elif mode == "500":
            self._answer(handler, 500, b"")
        elif mode == "proxy's 422":
            self._answer(handler, 422, _HTML)
        else:
            self._answer(
                handler,
                200,
                b'{"run":"other","step":0,"selection_id":"s","log_position":1,"accepted":1,"model_version":0,'
                b'"replayed":false,"forecast":{"informative_share":0.5,"informative_groups":1,"pad_to":null},'
                b'"prompts":[]}',
            )

    def release(self) -> None:
        """Let go of what is held up."""
        self._released.set()

    def _answer(self, handler: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:  # whoever asked has given up
            handler.close_connection = True


@contextmanager
def proxy_before(target: str) -> Iterator[Proxy]:
    """A proxy that passes on to `target` until it is told otherwise."""
    proxy = Proxy(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _treat(self) -> None:
            proxy.treat(self)

        do_GET = do_POST = do_PUT = _treat

        def log_message(self, format: str, *args: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.base_url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.release()
            server.shutdown()
            thread.join()
