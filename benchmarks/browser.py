"""A real Chromium without a window, spoken to in its DevTools protocol through a pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_SECONDS = 60.0

_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_SECONDS_A_LOOK = 0.05


class Browser:
    """One tab. Faults of a page's scripts are collected in `faults`: what they throw, and what its policy refuses."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._received = b""
        self._number = 0
        self._session: str | None = None
        self.faults: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command. Raises RuntimeError where the browser refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            told = self._message()
            if told.get("id") == self._number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]

    def open(self, address: str) -> None:
        """Navigate. What comes of it is waited for by `until`."""
        self.faults.clear()
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited."""
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{script}: {told['exceptionDetails']}")
        return told["result"].get("value")

    def until(self, script: str, *, seconds: float = PATIENCE_SECONDS) -> None:
        """Ask again and again until the expression is true. Raises AssertionError."""
        deadline = time.monotonic() + seconds
        while not self.run(f"!!({script})"):
            if time.monotonic() > deadline:
                shown = self.run("document.body?.innerText")
                raise AssertionError(f"waited {seconds:g} s in vain for {script}; faults {self.faults}; page: {shown}")
            time.sleep(_SECONDS_A_LOOK)

    def text(self) -> str:
        """What the page shows."""
        return str(self.run("document.body.innerText"))

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a named key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 if shift else 0)

    def drag(self, *places: tuple[float, float]) -> None:
        """Move the mouse to the first place, press its button, move on from place to place, and release it."""
        mouse = {"button": "left", "clickCount": 1}
        for kind, (x, y) in (
            ("mouseMoved", places[0]),
            ("mousePressed", places[0]),
            *(("mouseMoved", place) for place in places[1:]),
            ("mouseReleased", places[-1]),
        ):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **({} if kind == "mouseMoved" else mouse))

    def size(self, width: int, height: int) -> None:
        """Of the view, in CSS pixels; below 600 as a phone has it."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def theme(self, name: str) -> None:
        """What the system prefers: `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def picture(self) -> bytes:
        """The whole page as PNG."""
        told = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(told["data"])

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"\0" not in self._received:
            if not select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {PATIENCE_SECONDS:g} s")
            self._received += os.read(self._reading, 1 << 20)
        first, _, self._received = self._received.partition(b"\0")
        told: dict[str, Any] = json.loads(first)
        if told.get("method") == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(told["params"]["exceptionDetails"]))
        elif told.get("method") == "Log.entryAdded" and told["params"]["entry"]["source"] in ("security", "javascript"):
            self.faults.append(told["params"]["entry"]["text"])
        return told


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh Chromium, which ends with the block. Raises SystemExit where there is none."""
    if CHROMIUM is None:
        raise SystemExit("no Chromium on this machine: install chromium")
    there, writing = os.pipe()
    reading, back = os.pipe()
    with tempfile.TemporaryDirectory(prefix="evenodds-browser-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            # It reads from descriptor 3 and writes to 4.
            [
                "/bin/bash",
                "-c",
                f'exec "$0" "$@" 3<&{there} 4>&{back}',
                CHROMIUM,
                *_OPTIONS,
                f"--user-data-dir={folder}",
            ],
            pass_fds=(there, back),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        try:
            yield Browser(reading, writing)
        finally:
            process.terminate()
            process.wait(30)
            _end_the_rest(process.pid)
            os.close(reading)
            os.close(writing)


def _end_the_rest(group: int) -> None:
    """Its helpers outlive the browser for a moment, and write into its folder."""
    deadline = time.monotonic() + 5.0  # an ended one that nobody waits for stays in the group
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.05)
