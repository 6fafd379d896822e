"""The live runs of a process: those that were asked for last, each folded to the log's head or to a stated time ago.

- Threads may share it. A `LiveRun` has a lock of its own: take it before reading the state.
- `at_head` reads the database and shows everything that was acknowledged before the call. `within` and `held` may show
  less, by the seconds that the caller states, and need no database for it.
- At most `capacity` runs are held; the one that was brought to the head the longest time ago goes first.
- Whoever changes a run in the database calls `forget`, so that nobody in this process is shown what was before.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from evenodds_service.domain.log_entries import Entry
from evenodds_service.errors import RunUnknown
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.store import Run, Store
from evenodds_service.timing import phase

_THREADS = 4
"""At most, that compute the blocks of a choice."""


class FoldedRun(NamedTuple):
    """A run with everything folded in that was acknowledged before `read_at`, in seconds of the clock of `LiveRuns`."""

    run: Run
    live: LiveRun
    read_at: float


class LiveRuns:
    """The runs that were asked for last.

    Args:
        capacity: How many it holds.
        clock: Monotonic, in seconds.
    """

    def __init__(self, store: Store, *, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._capacity, self._clock = store, capacity, clock
        self._lock = threading.Lock()
        self._runs: OrderedDict[int, LiveRun] = OrderedDict()
        self._folded: dict[str, FoldedRun] = {}
        self._n_forgotten = 0
        self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="blocks")

    def at_head(self, name: str) -> FoldedRun:
        """The run with everything that was acknowledged before this call.

        Raises:
            RunUnknown: there is no such run.
            StoreUnavailable: the database does not answer.
        """
        read_at, n_forgotten = self._clock(), self._n_forgotten
        try:
            run = self._store.run(name)
        except RunUnknown:
            self.forget(name)
            raise
        live = self.fold(run)
        folded = FoldedRun(run, live, read_at)
        with self._lock:
            # What was read before a change is not kept after it, nor what was dropped meanwhile.
            if self._n_forgotten == n_forgotten and self._runs.get(run.id) is live:
                kept = self._folded.get(name)
                self._folded[name] = folded if kept is None or kept.read_at <= read_at else kept
        return folded

    def within(self, name: str, seconds: float) -> FoldedRun:
        """The run as it was at most so long ago; 0 is `at_head`. Raises as that does."""
        return self.held(name, seconds) or self.at_head(name)

    def held(self, name: str, seconds: float) -> FoldedRun | None:
        """What is in memory, if it is at most so old and `seconds` is above 0. Never reads the database."""
        folded = self._folded.get(name)
        return folded if folded is not None and seconds > 0 and self.age(folded) <= seconds else None

    def age(self, folded: FoldedRun) -> float:
        """Seconds since its log was read."""
        return self._clock() - folded.read_at

    def now(self) -> float:
        """What the clock says."""
        return self._clock()

    def fold(self, run: Run, written: Sequence[Entry] = ()) -> LiveRun:
        """The run with everything that `run` shows. `written` holds what this process has just appended, if anything.

        Raises:
            RunUnknown: the run was deleted since `run` was read.
        """
        live = self.live(run.id)
        with phase("catch-up"):
            live.catch_up(self._store, run, written=written)
        return live

    def live(self, run_id: int) -> LiveRun:
        """The run as it is in memory, new if it is not there: it may be behind the log."""
        with self._lock:
            live = self._runs.get(run_id) or LiveRun(run_id, each_block=self._threads.map)
            self._runs[run_id] = live
            self._runs.move_to_end(run_id)
            while len(self._runs) > self._capacity:
                self._drop(next(iter(self._runs)))
        return live

    def in_memory(self) -> tuple[LiveRun, ...]:
        """All that are held at present. They may be behind the log."""
        with self._lock:
            return tuple(self._runs.values())

    def forget(self, name: str) -> None:
        """Read the run anew before the next answer: its settings or its log were changed other than by an append."""
        with self._lock:
            self._n_forgotten += 1
            self._folded.pop(name, None)

    def drop(self, run: Run) -> None:
        """Let go of a run that was deleted."""
        with self._lock:
            self._n_forgotten += 1
            self._drop(run.id)

    def _drop(self, run_id: int) -> None:
        self._runs.pop(run_id, None)
        for name in [name for name, folded in self._folded.items() if folded.run.id == run_id]:
            del self._folded[name]
