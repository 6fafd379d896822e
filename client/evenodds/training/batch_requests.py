"""Asks the service for batches in threads that may be abandoned, so that nobody waits longer than the deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from evenodds.client import Client
from evenodds.errors import EvenOddsError
from evenodds.schemas import SelectReply, SelectRequest
from evenodds.training.background import in_thread

MAX_UNDER_WAY = 4
"""Most requests under way at once. While so many hang, none is started."""
_KEPT = 8


class NotAnswered(EvenOddsError):
    """The service cannot be asked now, or what it answers is no answer to the question."""


class BatchRequests:
    """Requests for batches, each asked once, whether ahead of time or when the batch is needed.

    Args:
        seconds: How long one attempt of a request may be silent; what precedes it takes at most as long.
        wait_until_clear: Called before a request with the seconds that it may wait; raises if the service must not
            be asked yet.
        prepared: What becomes of a request then, before it is sent. What it raises is the answer.
    """

    def __init__(
        self,
        base_url: str,
        seconds: float,
        wait_until_clear: Callable[[float], None],
        prepared: Callable[[SelectRequest], SelectRequest],
    ) -> None:
        # Tried twice: a connection that was kept may have been broken by a restart of the service.
        self._client = Client(base_url, timeout_seconds=seconds, retries=1)
        self._seconds = seconds
        self._wait_until_clear = wait_until_clear
        self._prepared = prepared
        self._lock = threading.Lock()
        self._asked: dict[str, Future[SelectReply]] = {}
        self._n_under_way = 0

    def ask(self, request: SelectRequest) -> Future[SelectReply]:
        """The reply to come. Joins the same request where it is under way or answered; asks again where it failed.

        Raises:
            NotAnswered: Too many requests hang already.
        """
        key = request.model_dump_json()
        with self._lock:
            asked = self._asked.get(key)
            if asked is not None and not (asked.done() and asked.exception() is not None):
                return asked
            if self._n_under_way >= MAX_UNDER_WAY:
                raise NotAnswered(f"{MAX_UNDER_WAY} requests for a batch are waiting for an answer already")
            asked = self._asked[key] = in_thread("evenodds-ask", lambda: self._ask(request))
            self._n_under_way += 1
            while len(self._asked) > _KEPT:
                del self._asked[next(iter(self._asked))]
            return asked

    def forget(self) -> None:
        """Ask anew for everything."""
        with self._lock:
            self._asked.clear()

    def close(self) -> None:
        self._client.close()

    def _ask(self, request: SelectRequest) -> SelectReply:
        try:
            ends = time.monotonic() + self._seconds
            self._wait_until_clear(self._seconds)
            request = self._prepared(request)
            self._wait_until_clear(ends - time.monotonic())  # what was prepared may have been a rewind
            if time.monotonic() > ends:
                raise NotAnswered("there was no time left to ask")
            reply = self._client.select_batch(
                request.run,
                request.step,
                request.batch_size,
                informative_groups=request.informative_groups,
                fill_factor=request.fill_factor,
                max_prompts=request.max_prompts,
                update_cost=request.update_cost,
                seed=request.seed,
                candidates=request.candidates,
                exclude=request.exclude,
                categories=request.categories,
            )
        finally:
            with self._lock:
                self._n_under_way -= 1
        n = len({prompt.prompt_id for prompt in reply.prompts})
        is_of_size = request.least_prompts <= n <= request.most_prompts
        if (reply.run, reply.step) != (request.run, request.step) or not is_of_size:
            raise NotAnswered(f"it chose {n} prompts for step {reply.step} of run {reply.run!r} instead")
        return reply
