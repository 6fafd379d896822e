"""When something changed: what all who listen share, so that they cost one look at the database a second."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from zlib import crc32

from anyio import to_thread

from evenodds_service.storage.store import Store

LOOK_SECONDS = 1.0


class Changes:
    """What those who listen to one thing share: the newest event, looked for at most once a second.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.n_listeners = 0
        self._store = store
        self._clock = clock
        self._found: dict[str | None, tuple[float, tuple[str, str]]] = {}
        self._looking: dict[str | None, asyncio.Future[tuple[str, str]]] = {}

    async def newest(self, run: str | None) -> tuple[str, str]:
        """Id and data of the newest event of a run, or of all runs together.

        Raises:
            RunUnknown, StoreUnavailable
        """
        event = self._just_found(run)
        if event is not None:
            return event
        looking = self._looking.get(run)
        if looking is None:
            looking = asyncio.ensure_future(to_thread.run_sync(self._look, run))
            self._looking[run] = looking
            looking.add_done_callback(lambda _: self._looking.pop(run, None))
        event = await asyncio.shield(looking)
        self._found[run] = (self._clock(), event)
        return event

    def forget(self, run: str | None) -> None:
        """One who listened has left."""
        self.n_listeners -= 1
        self._found.pop(run, None)

    def shown(self, run: str | None) -> str:
        """Id of an event that whatever is read after this call shows: the newest one, or half a second older.

        Raises:
            RunUnknown, StoreUnavailable
        """
        event = self._just_found(run)
        if event is None:
            found_at, event = self._clock(), self._look(run)
            if run is None:  # the stream that follows a list need not look at all runs again
                self._found[run] = (found_at, event)
        return event[0]

    def _just_found(self, run: str | None) -> tuple[str, str] | None:
        """What was found less than half a second ago, if anything was."""
        found_at, event = self._found.get(run, (-math.inf, ("", "")))
        return event if self._clock() - found_at < LOOK_SECONDS / 2 else None

    def _look(self, name: str | None) -> tuple[str, str]:
        if name is None:
            n_runs, change = self._store.newest_change()
            return change, json.dumps({"runs": n_runs})
        run = self._store.run(name)
        refits = self._store.refits(run.id, limit=1)
        rest = (run.settings, refits and (refits[0].id, refits[0].status))
        data = {"run": name, "log_position": run.log_position, "observations": run.n_observations}
        return f"{run.id}.{run.log_position}.{crc32(repr(rest).encode()):x}", json.dumps(data)
