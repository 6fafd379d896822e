"""What a selector says about itself: its counts, and its few lines in the log. Threads may share one."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace

logger = logging.getLogger("evenodds.training.selector")


@dataclass(frozen=True)
class Counts:
    """What a selector has done so far in this process.

    Attributes:
        service_batches: Batches that the service chose.
        uniform_batches: Batches that it did not choose: it failed, or was late, or there is none.
        observed: Observations that were taken in.
        delivered: Observations that the service has confirmed to this process. Where processes share an outbox one of
            them delivers for all: its count is above what it observed, those of the others below. `flush` tells
            whether all were delivered.
        left_out: Outcomes that are not valid, for example of an unknown prompt.
        without_reward: Attempts that were left out because their reward was None or NaN.
        refused: Observations that the service refuses for what they hold.
    """

    service_batches: int = 0
    uniform_batches: int = 0
    observed: int = 0
    delivered: int = 0
    left_out: int = 0
    without_reward: int = 0
    refused: int = 0


class Status:
    """Counts, and warnings of which each is given once: one when trouble begins, one when all of it is over."""

    def __init__(self, base_url: str | None, run: str) -> None:
        self.counts = Counts()
        self._base_url = base_url
        self._run = run
        self._lock = threading.Lock()
        self._troubles: set[str] = set()
        self._said: set[str] = set()
        self._uniform_before = 0

    def count(self, **more: int) -> None:
        """Add to these counts."""
        with self._lock:
            self.counts = replace(self.counts, **{name: getattr(self.counts, name) + n for name, n in more.items()})

    def failed(self, what: str, error: BaseException | str) -> None:
        """This part of the work fails now."""
        with self._lock:
            is_first = not self._troubles
            self._troubles.add(what)
            if is_first:
                self._uniform_before = self.counts.uniform_batches
        if is_first:
            logger.warning(
                "Even Odds at %s fails for run %r: %s. The training goes on: batches are drawn uniformly, and "
                "outcomes are "
                "kept until the service answers again. Another line will say so",
                self._base_url,
                self._run,
                str(error) or type(error).__name__,
            )

    def succeeded(self, what: str) -> None:
        """This part of the work succeeds now."""
        with self._lock:
            is_over = self._troubles == {what}
            self._troubles.discard(what)
            n_uniform = self.counts.uniform_batches - self._uniform_before
        if is_over:
            logger.warning(
                "Even Odds at %s answers again for run %r; %d batches were uniform meanwhile",
                self._base_url,
                self._run,
                n_uniform,
            )

    def say_once(self, what: str, message: str) -> None:
        """Warn of a lasting condition."""
        with self._lock:
            is_said = what in self._said
            self._said.add(what)
        if not is_said:
            logger.warning("run %r: %s", self._run, message)
