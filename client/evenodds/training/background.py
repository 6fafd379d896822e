"""Daemon threads: their work goes on without the caller, and they never keep a program from ending."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(name: str, work: Callable[[], T]) -> Future[T]:
    """Start `work` in a daemon thread of its own. Whoever waits for the result may give up on it."""
    future: Future[T] = Future()
    threading.Thread(target=_run, args=(future, work), name=name, daemon=True).start()
    return future


class SerialThread:
    """One daemon thread that does what it is given, in order."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work_on, name=name, daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Do this after everything that was submitted before."""
        future: Future[T] = Future()
        self._work.put((future, work))
        return future

    def end(self) -> None:
        """End after everything that was submitted before. What is submitted later is never done."""
        self._work.put(None)

    def _work_on(self) -> None:
        while (item := self._work.get()) is not None:
            _run(*item)


def _run(future: Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:  # it belongs to whoever reads the future
        future.set_exception(error)
    else:
        future.set_result(result)
