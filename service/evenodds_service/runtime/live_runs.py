"""Live views of runs for readers that may be a stated time behind the log, so that a hot path needs no database."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from evenodds_service.errors import RunUnknown
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.store import Run, Store
from evenodds_service.timing import phase

_FORGET_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class View:
    """A run with everything folded in that was acknowledged before `read_at`, in seconds of the views' clock."""

    run: Run
    live: LiveRun
    read_at: float


class Views:
    """The newest view of each run that was asked for. Threads may share it.

    Args:
        clock: Monotonic, in seconds.
    """

    def __init__(self, store: Store, live_runs: LiveRuns, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._live_runs, self._clock = store, live_runs, clock
        self._views: dict[str, View] = {}

    def at_head(self, name: str) -> View:
        """A view with everything that was acknowledged before this call. Reads the database.

        Raises:
            RunUnknown: there is no such run.
        """
        read_at = self._clock()
        try:
            run = self._store.run(name)
        except RunUnknown:
            self.forget(name)
            raise
        view = View(run, self._live_runs.at_head(run), read_at)
        self._views[name] = view
        for other, kept in tuple(self._views.items()):  # so that runs which nobody asks for can be dropped
            if read_at - kept.read_at > _FORGET_SECONDS:
                self._views.pop(other, None)
        return view

    def recent(self, name: str, seconds: float) -> View:
        """A view that is at most so old; 0 is `at_head`. Raises as that does."""
        return self.peek(name, seconds) or self.at_head(name)

    def peek(self, name: str, seconds: float) -> View | None:
        """The view in memory, if it is at most so old and `seconds` is above 0."""
        view = self._views.get(name)
        return view if view is not None and seconds > 0 and self.age(view) <= seconds else None

    def age(self, view: View) -> float:
        """Seconds since the log was read."""
        return self._clock() - view.read_at

    def now(self) -> float:
        """What the clock says."""
        return self._clock()

    def forget(self, name: str) -> None:
        """Read the run anew next time: it was changed here."""
        self._views.pop(name, None)


_THREADS = 4


class LiveRuns:
    """The live views of a process, at most `capacity`; the least recently used one is dropped."""

    def __init__(self, store: Store, *, capacity: int) -> None:
        self._store = store
        self._capacity = capacity
        self._lock = threading.Lock()
        self._runs: OrderedDict[int, LiveRun] = OrderedDict()
        self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="blocks")

    def at_head(self, run: Run) -> LiveRun:
        """The live view of the run with everything folded in that `run` shows. Take its lock before reading."""
        live = self.view(run)
        with phase("catch-up"):
            live.catch_up(self._store, run)
        return live

    def view(self, run: Run) -> LiveRun:
        """The live view of the run as it is."""
        with self._lock:
            live = self._runs.get(run.id) or LiveRun(run.id, each_block=self._threads.map)
            self._runs[run.id] = live
            self._runs.move_to_end(run.id)
            while len(self._runs) > self._capacity:
                self._runs.popitem(last=False)
        return live

    def in_memory(self) -> tuple[LiveRun, ...]:
        """The views that are held at present. They may be behind the log."""
        with self._lock:
            return tuple(self._runs.values())

    def drop(self, run_id: int) -> None:
        """Forget the view of a deleted run."""
        with self._lock:
            self._runs.pop(run_id, None)
