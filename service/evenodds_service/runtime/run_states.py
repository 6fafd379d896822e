"""Saves how runs stand, behind the calls that change them.

Who changed a run names it and goes on. A thread looks at the named runs, each once however often it was named, and
saves the states of all of them in one transaction. It then rests for ten times as long as it took, half a minute at
most. So this costs a process a tenth of one core where looks are short, and alarms are never minutes late. No call
waits for it. What is named meanwhile is looked at next, so that the state after a run's last call is saved too. What
fails is logged, and tried again with the next call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime

from evenodds_service.domain.report.summary import Summary
from evenodds_service.errors import RunUnknown, StoreError
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.storage.store import Store

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.5
_REST, _LONGEST_REST_SECONDS = 10.0, 30.0
_MOST_AT_ONCE = 64


class RunStates:
    """The runs whose states are to be saved. Threads may share it. Nothing is saved before `start`.

    Args:
        now: The present time, aware.
    """

    def __init__(self, store: Store, live_runs: LiveRuns, *, now: Callable[[], datetime]) -> None:
        self._store, self._live_runs, self._now = store, live_runs, now
        self._lock = threading.Lock()
        self._named: dict[str, None] = {}
        self._is_due, self._is_stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.n_saved = 0
        """How often this process has saved states."""

    def start(self) -> None:
        """Begin to save what was named, and what will be."""
        self._thread = threading.Thread(target=self._work, name="run-states", daemon=True)
        self._thread.start()

    def look_at(self, run: str) -> None:
        """Save how the run of this name stands, in a moment. Returns at once."""
        with self._lock:
            self._named[run] = None
        self._is_due.set()

    def close(self) -> None:
        """Save what was named last, and end."""
        self._is_stopping.set()
        self._is_due.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while not self._is_stopping.is_set():
            self._is_due.wait()
            self._is_stopping.wait(_PAUSE_SECONDS)
            started = time.monotonic()
            self._save()
            self._is_stopping.wait(min(_REST * (time.monotonic() - started), _LONGEST_REST_SECONDS))
        self._save()

    def _save(self) -> None:
        with self._lock:
            names = list(self._named)[:_MOST_AT_ONCE]
            for name in names:
                del self._named[name]
            if not self._named and not self._is_stopping.is_set():
                self._is_due.clear()
        try:
            states = [state for name in names for state in self._stands(name)]
            if states:
                self._store.save_run_states(states, now=self._now())
                self.n_saved += 1
        except StoreError as error:
            logger.warning(
                "the states of %d runs were not saved, and their alarms in lists and metrics are old: %s",
                len(names),
                error,
            )
        except Exception:  # the thread goes on: without it, no alarm would be seen any more
            logger.exception("states of %d runs were not saved", len(names))

    def _stands(self, name: str) -> list[tuple[int, int, Summary]]:
        """How the run of this name stands; nothing, if it was deleted since."""
        try:
            run, live, _ = self._live_runs.at_head(name)
        except RunUnknown:
            return []
        return [(run.id, *live.summary(run.settings))]
