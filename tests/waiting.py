"""Waiting for what a test expects: for a condition, never for a time.

The limits are for a machine with far more to do than this test: on an idle one nothing comes near them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 120.0
"""After so long what is waited for counts as a failure; also for joins of threads and ends of processes."""

_PAUSE_SECONDS = 0.01


def until(condition: Callable[[], T], what: str, *, seconds: float = PATIENCE_SECONDS) -> T:
    """Ask again and again until the answer is true. Returns that answer.

    Args:
        what: What is waited for, for the message of the failure.

    Raises:
        AssertionError: It did not come about in time.
    """
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}; the last answer is {answer!r}"
        time.sleep(_PAUSE_SECONDS)
    return answer


async def until_awaited(condition: Callable[[], T], what: str, *, seconds: float = PATIENCE_SECONDS) -> T:
    """`until` beside a loop that runs on."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}; the last answer is {answer!r}"
        await asyncio.sleep(_PAUSE_SECONDS)
    return answer


@contextmanager
def in_background(work: Callable[[], object]) -> Iterator[None]:
    """The body runs while `work` does; leaving waits for its end and passes on what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=PATIENCE_SECONDS)
    assert not thread.is_alive()
    if raised:
        raise raised[0]
