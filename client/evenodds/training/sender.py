"""Takes what a trainer tells the service: keeps it in the outbox, and delivers it in the background, in order.

Nothing here waits for longer than it was told to, and no fault of the disk or the service leaves this module.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from hashlib import sha256
from random import Random
from typing import Any, TypeVar

from evenodds.client import Client
from evenodds.errors import InvalidRequest, NotFound, ProblemError, TooLarge
from evenodds.training.background import SerialThread, in_thread
from evenodds.training.batch_requests import NotAnswered
from evenodds.training.inputs import Setup
from evenodds.training.outbox import HELD, Delivery, Outbox, OutboxBroken
from evenodds.training.pool import Pool, is_for_good, load_pool, look_at_pool, put_run
from evenodds.training.status import Status

T = TypeVar("T")

LONGEST_PAUSE_SECONDS = 5.0
"""Between two attempts to deliver."""
LOOK_SECONDS = 1.0
"""Between two looks at what other processes have put into the same outbox."""


class OutboxSender:
    """The way from a trainer to the service. Offline it keeps everything and delivers nothing.

    Args:
        prompt_ids: The trainer's prompts.
        loads_pool: Whether this process loads the pool at the start. Otherwise it only looks at it.
        before_sending: Called in the sending thread with the incarnation whose delivery is next: it may hold it.
        on_delivered: Called in the sending thread with the step of each observe call that the service has confirmed.
    """

    def __init__(
        self,
        setup: Setup,
        status: Status,
        *,
        prompt_ids: Sequence[str],
        loads_pool: bool,
        before_sending: Callable[[OutboxSender, str | None], None],
        on_delivered: Callable[[int], None],
    ) -> None:
        self._setup = setup
        self._status = status
        self._prompt_ids = prompt_ids
        self._loads_pool = loads_pool
        self._before_sending = before_sending
        self._on_delivered = on_delivered
        self.held: dict[str, str] = {}
        """Why no outcomes of a training are delivered, by its incarnation."""
        self.pool: Pool | None = None
        self.left_step: int | None = None
        """The highest step of what an earlier process had left in the outbox; None for nothing."""
        self._is_ready = threading.Event()
        self._is_outdated = False
        self._is_changed = False
        self._unknown: set[str] = set()
        self._error: str | None = None
        self._stopped = threading.Event()
        self._woken = threading.Event()
        self._memory: Outbox | None = None
        self._disk: Outbox | None = None
        self._opens_later = False
        self._keeping = SerialThread("evenodds-outbox")
        self._opened = self._keeping.submit(self._open)
        self._client: Client | None = None
        if setup.base_url is not None:
            self._client = Client(setup.base_url, retries=0)
            self._sending = in_thread("evenodds-sender", self._send_until_stopped)

    def put(self, deliveries: Sequence[Delivery]) -> None:
        """Keep them. They are on disk when this returns, unless the disk is slow."""
        self._waited(self._keeping.submit(lambda: self._put(deliveries)))

    def forget_after(self, step: int, then: Sequence[Delivery]) -> None:
        """Drop what is about later steps, and keep these instead."""

        def forget() -> None:
            for outbox in self._outboxes():
                self._tried(outbox, lambda outbox: outbox.forget_after(step))
            if then:
                self._put(then)

        self._waited(self._keeping.submit(forget))

    def waiting(self) -> tuple[Delivery, ...]:
        """What the service has not confirmed; as far as it can be read in time."""
        return self._read(lambda outbox: outbox.waiting())

    def refusals(self) -> tuple[tuple[Delivery, str], ...]:
        """What the service has refused for what it holds, and why; as far as it can be read in time."""
        return self._read(lambda outbox: outbox.refusals())

    def hold(self, incarnation: str, why: str) -> None:
        """Deliver no outcomes of this training from now on: they stay in the outbox, until a start says `resume`."""
        self.held[incarnation] = why
        self._status.say_once(
            f"held {incarnation}",
            f"{why}. The training goes on with uniform batches, and its outcomes stay in the outbox, where "
            "`refusals()` gives them: a start with existing='resume' delivers them",
        )

    def wait_until_clear(self, seconds: float) -> None:
        """Wait until the service may be asked: not at all while it fails.

        Raises:
            NotAnswered: The pool is not loaded, or a rewind not delivered.
        """
        ends = time.monotonic() + seconds

        def wait(what: str) -> None:
            if self._error is not None or time.monotonic() > ends or self._stopped.wait(0.01):
                raise NotAnswered(what if self._error is None else f"{what} ({self._error})")

        while not self._opened.done():
            wait(f"the outbox in {self._setup.folder} is not open yet")
        while not self._is_ready.is_set():
            wait("its pool is not loaded yet")
        while any(outbox.is_rewinding() for outbox in self._outboxes()):
            wait("it has not been told yet that the training went back to a checkpoint")

    def wait_until_ready(self, seconds: float) -> bool:
        """Wait for the run and its pool. Whether all of the trainer's prompts are there."""
        return self._is_ready.wait(seconds) and self.pool is not None and self.pool.n_missing == 0

    def change(self, setup: Setup) -> None:
        """The run's settings are others now."""
        self._setup = setup
        self._is_changed = True
        self._woken.set()

    def look_again(self) -> None:
        """The pool is not what it was: find out what it has now, in the background."""
        self._is_outdated = True
        self._woken.set()

    def flush(self, seconds: float) -> bool:
        """Wait until nothing waits. Whether all was sent, and nothing held back."""
        ends = time.monotonic() + seconds
        self._keeping.submit(self._open_disk)
        while True:
            empty = self._keeping.submit(lambda: all(outbox.is_empty() for outbox in self._outboxes()))
            try:
                if empty.result(max(0.01, ends - time.monotonic())):
                    return not self.held
            except (FutureTimeout, sqlite3.Error, OutboxBroken):
                pass
            if self._client is None or self._stopped.is_set() or time.monotonic() >= ends:
                return False
            self._woken.set()
            self._stopped.wait(0.02)

    def stop(self, seconds: float) -> None:
        """End the threads, and wait so long for it. What waits stays in the outbox."""
        self._stopped.set()
        self._woken.set()
        ended = self._closed() if self._client is None else self._sending
        try:
            ended.result(seconds)
        except FutureTimeout:
            return  # it hangs in a call or at the disk, and closes the outbox when that ends

    # The outbox. What the training loop calls goes through a thread, so that it may give up on a slow disk.

    def _open(self) -> None:
        self._memory = Outbox(None, self._setup.run)
        self._opens_later = self._setup.folder is not None
        self._open_disk()

    def _open_disk(self) -> None:
        """Open the file, if that is still to be done: a disk that was full or away at the start may be back by now."""
        if not self._opens_later:
            return
        try:
            disk = Outbox(self._setup.folder, self._setup.run, releases_held=self._setup.releases_held)
            self.left_step = disk.newest_step()
            self._disk = disk
            self._opens_later = False
        except (OSError, sqlite3.Error, OutboxBroken) as error:
            self._opens_later = isinstance(error, (OSError, sqlite3.OperationalError))
            self._disk_failed(error)

    def _outboxes(self) -> list[Outbox]:
        return [outbox for outbox in (self._disk, self._memory) if outbox is not None]

    def _put(self, deliveries: Sequence[Delivery]) -> None:
        self._open_disk()
        for outbox in self._outboxes():
            if self._tried(outbox, lambda outbox: outbox.put(deliveries)):
                break
        self._woken.set()

    def _tried(self, outbox: Outbox, work: Callable[[Outbox], None]) -> bool:
        try:
            work(outbox)
        except (sqlite3.Error, OutboxBroken, ValueError, OverflowError) as error:  # also what SQLite cannot store
            self._disk_failed(error)
            return False
        return True

    def _disk_failed(self, error: Exception) -> None:
        self._status.say_once(
            "disk",
            f"outbox in {self._setup.folder}: {error}; outcomes that cannot be kept there are kept in memory until "
            "they are delivered",
        )
        disk = self._disk
        if disk is not None and disk.path is not None and (isinstance(error, OutboxBroken) or not disk.path.exists()):
            self._disk = None  # what it still holds is delivered by the next start, if it can be read by then

    def _read(self, read: Callable[[Outbox], tuple[T, ...]]) -> tuple[T, ...]:
        found = self._keeping.submit(lambda: tuple(item for outbox in self._outboxes() for item in read(outbox)))
        return self._waited(found) or ()

    def _waited(self, work: Future[T]) -> T | None:
        try:
            return work.result(self._setup.deadline_seconds)
        except FutureTimeout:
            self._status.say_once(
                "late", f"the outbox in {self._setup.folder} takes more than {self._setup.deadline_seconds:g} s"
            )
        except Exception as error:  # nothing of this may end a training
            self._disk_failed(error)
        return None

    def _closed(self) -> Future[None]:
        def close() -> None:
            for outbox in self._outboxes():
                outbox.close()

        closed = self._keeping.submit(close)
        self._keeping.end()
        return closed

    # The sender.

    def _send_until_stopped(self) -> None:
        self._opened.result()
        pause = 0.0
        while not self._stopped.wait(pause):
            try:
                if not self._is_ready.is_set():
                    self._load_pool()
                elif self._is_changed:
                    self._change_run()
                elif self._is_outdated:
                    self._is_outdated = False
                    self._look_at_pool()
                has_sent = self._send_one()
            except Exception as error:  # whatever it is, the thread must live, and the next attempt may succeed
                self._error = str(error) or type(error).__name__
                if not self._stopped.is_set():
                    self._status.failed("delivering", error)
                pause = min(LONGEST_PAUSE_SECONDS, max(0.2, 2 * pause)) * Random().uniform(0.5, 1.0)
                continue
            self._error = None
            self._status.succeeded("delivering")
            pause = 0.0
            if not has_sent:
                self._woken.wait(LOOK_SECONDS)
                self._woken.clear()
        assert self._client is not None
        self._client.close()
        self._closed().result()

    def _load_pool(self) -> None:
        assert self._client is not None
        if not self._loads_pool:
            self._look_at_pool(is_loaded=self._setup.prompts is not None)
            self._is_ready.set()
            return
        try:
            self.pool = load_pool(self._client, self._setup, self._prompt_ids, self._status)
        except ProblemError as error:
            if not is_for_good(error):
                raise
            self._status.say_once(
                "pool", f"the service refused to change the run or its pool, and keeps them as they are: {error}"
            )
            self._look_at_pool()
            if self.pool is not None and self._setup.prompts is not None:
                self.pool = replace(self.pool, n_missing=len(self._prompt_ids))  # their texts may be others
        self._is_ready.set()

    def _change_run(self) -> None:
        assert self._client is not None
        self._is_changed = False
        try:
            run = put_run(self._client, self._setup, self._status)
        except ProblemError as error:
            if not is_for_good(error):
                self._is_changed = True
                raise
            self._status.say_once(
                "settings", f"the service refused to change the run's settings, and keeps them as they are: {error}"
            )
            return
        except Exception:
            self._is_changed = True
            raise
        if self.pool is not None:
            self.pool = replace(self.pool, group_size=run.group_size)

    def _look_at_pool(self, *, is_loaded: bool = False) -> None:
        assert self._client is not None
        self.pool = look_at_pool(self._client, self._setup, self._prompt_ids, self._status, is_loaded=is_loaded)

    def _send_one(self) -> bool:
        """Whether there was something to send."""
        for outbox in self._outboxes():
            try:
                delivery = outbox.first()
            except (sqlite3.Error, OutboxBroken) as error:
                self._disk_failed(error)
                continue
            if delivery is None:
                continue
            incarnation = _incarnation(delivery)
            self._before_sending(self, incarnation)
            held = self.held.get(incarnation or "")
            if held is not None and delivery.kind == "observe":
                outbox.refuse(delivery, HELD + held)
                return True
            try:
                observations = _observations(delivery)
                self._deliver(delivery, observations)
            except (ProblemError, *_NEVER_SENT) as error:
                if isinstance(error, ProblemError) and not is_for_good(error):
                    raise
                self._refused(outbox, delivery, error)
            else:
                self._status.count(delivered=len(observations))
                self._remove(outbox, delivery)
                if delivery.kind == "observe":
                    self._on_delivered(delivery.step)
            return True
        return False

    def _refused(self, outbox: Outbox, delivery: Delivery, error: Exception) -> None:
        """Set it aside, or put its halves in its place where a part of it can be delivered."""
        code = error.code if isinstance(error, ProblemError) else ""
        if code == "below_base" and isinstance(error, ProblemError):  # a rewind, which no later start may make either
            self.hold(
                _incarnation(delivery) or "",
                f"{error.detail}, for example as a fork of such a step (fork_of and at_step in its run_settings)",
            )
            self._remove(outbox, delivery)
            return
        if code == "prompt_unknown":
            self._status.say_once(
                "prompt unknown",
                f"the service refused the observe call of step {delivery.step}, and perhaps others (this is said "
                f"once): {error}; outcomes of such prompts alone are set aside, and `refusals()` gives them: they are "
                "tried again at the next start, when the pool may have their prompts",
            )
        if code == "prompt_unknown" or isinstance(error, TooLarge):
            observations = _observations(delivery)
            prompt_ids = {item.get("prompt_id", "") for item in observations}
            if code == "prompt_unknown" and len(observations) == 1:
                self._unknown |= prompt_ids
            if len(observations) > 1 and not (code == "prompt_unknown" and prompt_ids <= self._unknown):
                middle = len(observations) // 2
                halves = (observations[:middle], observations[middle:])
                outbox.split(delivery, [_part(delivery, number, half) for number, half in enumerate(halves)])
                return
        self._set_aside(outbox, delivery, error)

    def _set_aside(self, outbox: Outbox, delivery: Delivery, error: Exception) -> None:
        """What can never be delivered must not hold up what follows."""
        code = error.code if isinstance(error, ProblemError) else ""
        reason = str(error) or type(error).__name__
        who = "the service refused" if code else "no service can be sent"
        refused = (
            f"{who} the {delivery.kind} call of step {delivery.step}, and perhaps others (this is said once): {reason}"
        )
        try:
            n = len(_observations(delivery))
        except (ValueError, RecursionError):
            n = 1  # at least; it cannot be read
        self._status.count(refused=n)
        if code == "selection_voided":  # for good: the run has forgotten the policy that made them
            self._remove(outbox, delivery)
            self._status.say_once("voided", f"{refused}; they are dropped")
            return
        outbox.refuse(delivery, reason)
        if code != "prompt_unknown":
            self._status.say_once(
                f"refused {code}",
                f"{refused}; the outbox keeps them: `refusals()` gives them; the next start tries them again, and is "
                "refused again if nothing changes",
            )

    def _remove(self, outbox: Outbox, delivery: Delivery) -> None:
        """If the disk does not let it go, it is sent again, and the service counts it once."""
        self._tried(outbox, lambda outbox: outbox.remove(delivery))

    def _deliver(self, delivery: Delivery, observations: list[Any]) -> None:
        try:
            self._call(delivery, observations)
        except NotFound as error:
            # A pool that lacks prompts after it was loaded has refused them, and would refuse them again.
            has_lost = error.code == "prompt_unknown" and (self.pool is None or self.pool.n_missing == 0)
            if error.code == "selection_unknown":  # a rewind took it: the outcomes count all the same
                self._call(replace(delivery, selection_id=None), observations)
            elif error.code == "run_unknown" and delivery.kind == "rewind":
                return  # nothing to forget
            elif (error.code == "run_unknown" or has_lost) and self._setup.prompts is not None:
                self._load_pool()
                self._call(replace(delivery, selection_id=None), observations)
            else:
                raise

    def _call(self, delivery: Delivery, observations: list[Any]) -> None:
        assert self._client is not None
        if delivery.kind == "rewind":
            self._client.rewind(self._setup.run, delivery.step, incarnation=_incarnation(delivery))
            return
        reply = self._client.observe(
            self._setup.run,
            delivery.step,
            observations,
            request_id=delivery.request_id,
            selection_id=delivery.selection_id,
        )
        if reply.run != self._setup.run:
            raise NotAnswered(f"it confirmed observations of run {reply.run!r} instead")


_NEVER_SENT = (InvalidRequest, ValueError, TypeError, LookupError, RecursionError)
"""What a delivery that is none raises before it is sent: cut short by a broken disk, say, or of another release."""


def _observations(delivery: Delivery) -> list[Any]:
    """Raises ValueError where the body is no list of them."""
    observations = json.loads(delivery.body)
    if not isinstance(observations, list):
        raise ValueError(f"the body of request {delivery.request_id!r} is no list of observations")
    return observations


def _incarnation(delivery: Delivery) -> str | None:
    """Of the training that put it there; None where that had no name."""
    incarnation, _, rest = delivery.request_id.partition(".")
    return incarnation if rest else None


def _part(delivery: Delivery, number: int, observations: list[Any]) -> Delivery:
    """A half of a delivery, under an id that it alone has, always the same: what was counted counts no second time.

    What the id says of the training stays.
    """
    incarnation, dot, _ = delivery.request_id.rpartition(".")
    digest = sha256(f"{delivery.request_id}/{number}".encode("utf-8", "backslashreplace")).hexdigest()
    return replace(delivery, request_id=f"{incarnation}{dot}{digest}", body=json.dumps(observations))
