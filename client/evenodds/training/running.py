"""What a selector holds in one process: its threads, its connections and its recent batches."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from evenodds.schemas import SelectRequest
from evenodds.training.batch import Batch
from evenodds.training.batch_requests import BatchRequests, NotAnswered
from evenodds.training.inputs import Setup
from evenodds.training.metrics import Metrics
from evenodds.training.sender import OutboxSender
from evenodds.training.status import Status
from evenodds.training.watch import Watch

KEPT_BATCHES = 8
KEPT_SELECTIONS = 1_000


class Running:
    """Of one process. A process that is forked from it starts its own.

    Args:
        loads_pool: Whether this process creates the run and loads its pool.
        prepared: What becomes of a request for a batch before it is sent.
        before_sending: Called before outcomes of this incarnation are sent, in the sending thread.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        prompt_ids: Sequence[str],
        loads_pool: bool,
        prepared: Callable[[SelectRequest], SelectRequest],
        before_sending: Callable[[OutboxSender, str | None], None],
    ) -> None:
        self.pid = os.getpid()
        self.status = Status(setup.base_url, setup.run)
        self.batches: dict[str, Batch] = {}
        self.selections: dict[int, str] = {}
        self.chosen: dict[int, frozenset[str]] = {}
        self.watch = Watch(self.status)
        self.metrics = Metrics(len(prompt_ids))
        self.last_request: SelectRequest | None = None
        self._prefetches = setup.prefetches
        self._lock = threading.Lock()
        self.sender = OutboxSender(
            setup,
            self.status,
            prompt_ids=prompt_ids,
            loads_pool=loads_pool,
            before_sending=before_sending,
            on_delivered=self._prefetch_after,
        )
        self.requests: BatchRequests | None = None
        if setup.base_url is not None:
            self.requests = BatchRequests(
                setup.base_url, setup.deadline_seconds, self.sender.wait_until_clear, prepared
            )

    def keep(self, key: str, batch: Batch) -> None:
        """For the case that the same is asked for again."""
        with self._lock:
            self.batches[key] = batch
            while len(self.batches) > KEPT_BATCHES:
                del self.batches[next(iter(self.batches))]

    def remember(self, batch: Batch) -> None:
        """What the outcomes of its step will belong to."""
        with self._lock:
            self.chosen[batch.step] = frozenset(batch.prompt_ids)
            while len(self.chosen) > KEPT_BATCHES:
                del self.chosen[next(iter(self.chosen))]
            if batch.selection_id is not None:
                self.selections[batch.step] = batch.selection_id
                while len(self.selections) > KEPT_SELECTIONS:
                    del self.selections[next(iter(self.selections))]

    def forget(self) -> None:
        """Choose anew for every step."""
        with self._lock:
            self.batches.clear()
            self.chosen.clear()
            self.selections.clear()
        self.last_request = None
        if self.requests is not None:
            self.requests.forget()

    def close(self, seconds: float) -> None:
        self.sender.flush(seconds)
        self.sender.stop(1.0)
        if self.requests is not None:
            self.requests.close()

    def _prefetch_after(self, step: int) -> None:
        last = self.last_request
        if self._prefetches and last is not None and last.step == step and self.requests is not None:
            try:
                self.requests.ask(last.model_copy(update={"step": step + 1}))
            except NotAnswered:
                return
