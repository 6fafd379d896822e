"""Decisions on budgets, kept for a day, so that a verdict needs only the decision's id.

A request for a budget never waits for the database: a thread writes what was decided a moment later. What is not yet
written when a process dies is lost, which costs the verdicts on the answers of its last moment.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from evenodds_service.errors import DecisionExpired, DecisionUnknown, StoreError
from evenodds_service.storage.store import Decision, Store

logger = logging.getLogger(__name__)

KEPT = timedelta(hours=24)
MOST_WAITING = 10_000
_PAUSE_SECONDS = 0.1
_FORGET_EVERY = timedelta(minutes=10)


class Decisions:
    """What was decided lately. Threads may share it.

    Args:
        now: The time, aware.
        most: So many are kept, the newest ones; 0 keeps none.
    """

    def __init__(self, store: Store, *, now: Callable[[], datetime], most: int = 500_000) -> None:
        self._store, self._now, self._most = store, now, most
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._waiting: OrderedDict[str, Decision] = OrderedDict()
        self._thread: threading.Thread | None = None
        self._n_written = 0  # since some were forgotten
        self._n_dropped = 0  # since that was logged
        self._forgot_at = datetime.min.replace(tzinfo=timezone.utc)

    def keep(
        self, run: str, run_id: int, *, step: int, prompt_id: str, prompt: str, text_key: str | None = None
    ) -> str | None:
        """Keep a decision, and return the id under which a verdict on it is reported; None where none are kept.

        Args:
            prompt_id: Of the prompt, also where the pool does not have it.
            prompt: JSON of what an observation needs besides its rewards.
            text_key: Of the text in that, if it has one.
        """
        if not self._most:
            return None
        now = self._now()
        decision_id = f"{run}.{int(now.timestamp()):x}.{uuid.uuid4().hex}"
        with self._lock:
            self._waiting[decision_id] = Decision(decision_id, run_id, step, prompt, now, prompt_id, text_key)
            if len(self._waiting) > MOST_WAITING:
                self._waiting.popitem(last=False)
                self._n_dropped += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="decisions", daemon=True)
                self._thread.start()
        return decision_id

    def find(self, decision_id: str) -> Decision:
        """The decision of this id.

        Raises:
            DecisionExpired: it was made more than a day ago.
            DecisionUnknown: nobody made it, or a process died before it was written, or its run was deleted.
        """
        made_at = _made_at(decision_id)
        if made_at is not None and self._now() - made_at > KEPT:
            raise DecisionExpired(
                f"decision {decision_id!r} was made at {made_at:%Y-%m-%d %H:%M} UTC, and is kept for 24 hours: report "
                "the outcome with its run, step and text instead"
            )
        with self._lock:
            waiting = self._waiting.get(decision_id)
        decision = waiting or self._store.decision(decision_id)
        if decision is None:
            raise DecisionUnknown(
                f"decision {decision_id!r} is not known: it is none that a budget answered, or not among the newest "
                f"{self._most:,} any more (EVENODDS_DECISIONS): report the outcome with its run, step and text"
            )
        return decision

    def erase(self, run_id: int, prompt_id: str, text_key: str | None) -> int:
        """Forget what was decided about this prompt or its text, written or not. Returns how many decisions that were.

        Raises:
            StoreUnavailable: those that are written are still there.
        """
        with self._flushing:  # or one that is just being written would come after the deletion
            with self._lock:
                of_run = [decision for decision in self._waiting.values() if decision.run_id == run_id]
                gone = [
                    decision.decision_id
                    for decision in of_run
                    if decision.prompt_id == prompt_id or (text_key is not None and decision.text_key == text_key)
                ]
                for decision_id in gone:
                    del self._waiting[decision_id]
            return len(gone) + self._store.erase_decisions(run_id, prompt_id, text_key)

    def close(self) -> None:
        """Write what waits, once."""
        try:
            self._flush()
        except StoreError as error:
            logger.warning(
                "%d decisions on budgets are lost, and verdicts on them will be refused: %s", len(self._waiting), error
            )

    def _write(self) -> None:
        while True:
            time.sleep(_PAUSE_SECONDS)
            try:
                self._flush()
            except StoreError as error:
                logger.warning("%d decisions on budgets wait to be written: %s", len(self._waiting), error)
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return

    def _flush(self) -> None:
        with self._flushing:  # each is written once
            self._write_waiting()

    def _write_waiting(self) -> None:
        with self._lock:
            made = tuple(self._waiting.values())
            n_dropped, self._n_dropped = self._n_dropped, 0
        if n_dropped:
            logger.warning(
                "%d decisions on budgets were dropped, because more than %d waited to be written: "
                "verdicts on them will be refused",
                n_dropped,
                MOST_WAITING,
            )
        if not made:
            return
        now = self._now()
        self._n_written += len(made)
        is_due = now - self._forgot_at > _FORGET_EVERY or self._n_written > self._most // 10
        self._store.save_decisions(made, forget_before=now - KEPT if is_due else None, most=self._most)
        if is_due:
            self._forgot_at, self._n_written = now, 0
        with self._lock:
            for decision in made:
                self._waiting.pop(decision.decision_id, None)


def run_of(decision_id: str) -> str:
    """Name of the run that a decision is about, by its id; the id itself where it is no such id."""
    return decision_id.rsplit(".", 2)[0]


def _made_at(decision_id: str) -> datetime | None:
    """When a decision was made, by its id; None where it is no such id."""
    parts = decision_id.rsplit(".", 2)
    try:
        return datetime.fromtimestamp(int(parts[1], 16), timezone.utc)
    except (IndexError, ValueError, OverflowError, OSError):
        return None
