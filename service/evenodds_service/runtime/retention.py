"""How a run stays within bounds: it lets go of prompts, and its log is compacted behind them; and how one is erased.

Whoever serves or works on a run may do this at any time: the store fences those who do it at once. Nothing is computed
under a run's lock.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime

import numpy as np

from evenodds_service.domain.learning.state import State, rows_of_serials
from evenodds_service.domain.log_entries import ObserveEntry
from evenodds_service.domain.prompts import text_key
from evenodds_service.domain.retention import is_above, to_retire
from evenodds_service.errors import CheckpointUnusable, PromptUnknown, StoreError, StoreUnavailable
from evenodds_service.model.history import History
from evenodds_service.runtime.decisions import Decisions
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.storage.entries import seconds_of
from evenodds_service.storage.store import NewSnapshot, Run, Store

logger = logging.getLogger(__name__)

KEPT_OBSERVATIONS = 8
"""Of each prompt that a compacted history keeps one by one; older ones are added up."""

_LOOK_SECONDS = 3_600.0
"""How often a run is looked through for prompts that are too old."""

_TRIES = 5
_TURN_SECONDS = 0.2
"""So long others get their turn between two deletions. SQLite's lock has no queue: who waits for it looks every tenth
of a second, and would find it taken until all is deleted."""


class Tidying:
    """Lets go of what runs need not keep, behind the replies.

    Args:
        store: Of all runs.
        tidied: Is called with the name of each run that was tidied behind a reply.
    """

    def __init__(self, store: Store, *, tidied: Callable[[str], None] = lambda _: None) -> None:
        self._store, self._tidied = store, tidied
        self._lock = threading.Lock()
        self._busy: set[int] = set()
        self._looked: dict[int, float] = {}

    def is_due(self, run: Run, *, now: datetime) -> bool:
        """Whether there may be something to let go of. Costs nothing."""
        settings = run.settings
        if is_above(settings, run.pool_size) or run.retired_position > run.base_position:
            return True
        if run.base_position and run.id not in self._looked:  # whoever moved the base may have died behind that
            return True
        return settings.retain_days is not None and (
            now.timestamp() - self._looked.get(run.id, 0.0) > min(_LOOK_SECONDS, settings.retain_days * _LOOK_SECONDS)
        )

    def behind(self, live: LiveRun, run: Run, *, now: datetime) -> None:
        """Tidy in a thread of its own where that is due. Returns at once; what fails is logged and tried again."""
        if not self.is_due(run, now=now):
            return
        with self._lock:
            if run.id in self._busy:
                return
            self._busy.add(run.id)
        threading.Thread(target=self._tidy, args=(live, run, now), name="tidying", daemon=True).start()

    def now(self, live: LiveRun, run: Run, *, now: datetime) -> None:
        """Tidy, where that is due.

        Raises:
            StoreError: the database did not answer, or the run was deleted.
        """
        if self.is_due(run, now=now):
            self._looked[run.id] = now.timestamp()
            tidy(self._store, live, run, now=now)

    def is_busy(self, run_id: int) -> bool:
        """Whether a thread is at it."""
        return run_id in self._busy

    def _tidy(self, live: LiveRun, run: Run, now: datetime) -> None:
        try:
            while True:  # more may have come meanwhile
                self.now(live, run, now=now)
                retired, run = run.n_retired, self._store.run_with_id(run.id)
                if run.n_retired == retired:
                    break
        except (StoreError, CheckpointUnusable) as error:
            logger.warning(
                "run %r: retired prompts could not be deleted, and are tried again later: %s", run.name, error
            )
        finally:
            with self._lock:
                self._busy.discard(run.id)
            self._tidied(run.name)


def tidy(store: Store, live: LiveRun, run: Run, *, now: datetime) -> None:
    """Retire what the run's settings do not keep, and compact its log behind that.

    Raises:
        RunUnknown, StoreUnavailable
    """
    live.catch_up(store, run)
    with live.lock:
        indices = to_retire(live.state, run.settings, at=seconds_of(now))
    if len(indices):
        written = store.retire_prompts(run.id, indices, now=now)
        if written is not None:
            live.catch_up(store, written.run, written=written.entries)
            logger.info("run %r: %d prompts retired at position %d", run.name, len(indices), written.run.log_position)
    run = store.run_with_id(run.id)
    if run.retired_position > run.base_position:
        compact(store, live, run, now=now)
    elif run.base_position:
        _clear(store, run.id, now=now)


def compact(store: Store, live: LiveRun, run: Run, *, now: datetime) -> bool:
    """Save a checkpoint behind the newest retirement, make it the run's base, and delete what is below.

    Returns:
        Whether all of that was done; something may be voided meanwhile, or another process be at it.

    Raises:
        RunUnknown, StoreUnavailable
    """
    live.catch_up(store, run)
    saved = live.save(store, run, now=now)
    if saved is None:
        return False
    above, before = store.base_history(run.id)
    history = _history(store, run.id, saved, above, before)
    if history is None or not store.move_base(run.id, saved.position, above=above, history=history.to_bytes()):
        return False
    _clear(store, run.id, now=now)
    _give_memory_back()
    return True


def _clear(store: Store, run_id: int, *, now: datetime) -> None:
    """Delete all that is below the base, with a pause behind each part."""
    while store.clear_below_base(run_id, now=now):
        time.sleep(_TURN_SECONDS)


def _give_memory_back() -> None:
    """Let the system have what was copied for a moment: glibc keeps what a thread freed in an arena of its own."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def erase(store: Store, decisions: Decisions, live: LiveRun, run: Run, prompt_id: str, *, now: datetime) -> None:
    """Remove a prompt with its text and vectors from everything that is stored. What it taught of others stays.

    A text that was only asked about stands in decisions alone, and is removed there.

    Raises:
        PromptUnknown: there is no such prompt, nor a decision about it.
        StoreUnavailable: not all of it is done; the call may be repeated.
    """
    live.catch_up(store, run)
    try:
        prompt = store.prompt(run.id, prompt_id)
    except PromptUnknown:
        n_decisions = decisions.erase(run.id, prompt_id, None)
        if run.retired_position <= run.base_position:  # else an earlier call is to be finished
            if run.base_position:  # it may be retired, and whoever moved the base have died before all below was gone
                _clear(store, run.id, now=now)
            if run.base_position or n_decisions:
                store.forget_deleted()
            if n_decisions:
                return
            raise
    else:
        _forget_in_snapshot(store, live, run, prompt.index, now=now)
        store.retire_prompts(run.id, np.array([prompt.index]), now=now)
        # Behind the retirement: of those that are made later, each is of somebody who asks about the text anew.
        key = None if prompt.text is None else text_key(prompt.text)
        decisions.erase(run.id, prompt_id, key)
    for _ in range(_TRIES):
        run = store.run_with_id(run.id)
        if run.retired_position <= run.base_position or compact(store, live, run, now=now):
            store.forget_deleted()
            return
    raise StoreUnavailable(
        f"prompt {prompt_id!r} is no longer in any answer of run {run.name!r}, but its features are still in the "
        "database, because other calls changed the run meanwhile: repeat the call"
    )


def _forget_in_snapshot(store: Store, live: LiveRun, run: Run, index: int, *, now: datetime) -> None:
    """Put a snapshot into use that has nothing of the prompt's features in it, if the present one has."""
    with live.lock:
        model, version = live.model, live.state.model_version
    if model is None:
        return
    block = live.raw(store, run, index, index + 1)
    forgetful = None if block is None else model.forgetting(block)
    if forgetful is None:
        return
    fitted_position = store.snapshot(run.id, version).fitted_position
    new = NewSnapshot(forgetful.embedder, forgetful.to_bytes(), fitted_position, report=forgetful.report)
    store.replace_snapshot(run.id, version, new, now=now)


def _history(store: Store, run_id: int, state: State, above: int, before: bytes | None) -> History | None:
    """Observations up to the state's position, of the prompts in its pool; None where the log was compacted meanwhile.

    Args:
        above, before: Position of the base so far, and the history up to there.
    """
    pieces = [History.from_bytes(before)] if before is not None else []
    position = above
    while position < state.position:
        entries = store.entries(run_id, after=position, as_of=state.position)
        if not entries or entries[-1].position != position + len(entries):
            return None
        pieces += [history_of(entry) for entry in entries if isinstance(entry, ObserveEntry)]
        position = entries[-1].position
    gathered = History.gathered(pieces)
    return gathered.rows(rows_of_serials(state, gathered.prompts) >= 0).capped(KEPT_OBSERVATIONS)


def history_of(entry: ObserveEntry) -> History:
    """What a refit reads of the entry; prompts by their index in the log."""
    return History(
        prompts=entry.prompts,
        steps=np.full(len(entry.prompts), entry.step),
        successes=entry.successes,
        attempts=entry.attempts,
        informative=entry.informative,
    )
