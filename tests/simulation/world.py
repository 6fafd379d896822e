"""One simulated world: a clock, chance, processes that live and die, and tasks of which one runs at a time.

Every task is a thread, but only the one that holds the baton runs; it passes the baton on where it waits, and chance,
which comes from the seed, says to whom. So one seed is one order of events, and a run of it can be repeated. What the
product takes from `threading` and `time` is here under the same names (`Threading`, `Clock`), on simulated time.
"""

from __future__ import annotations

import math
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from random import Random
from typing import Any, Generic, TypeVar

from evenodds_service.errors import StoreUnavailable

T = TypeVar("T")
BEGINNING = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
KEPT_EVENTS = 60
_FAULTS = ("kill", "store", "refused", "lost", "broken", "twice", "late", "freeze", "skew", "disk")


class Killed(BaseException):
    """The process of this task is dead. What it does while it unwinds has no effect on anything that lasts."""


class Broken(Exception):
    """The process that should have answered died."""


@dataclass(eq=False)
class Process:
    """A process: its tasks die with it.

    Attributes:
        skew: Seconds that its clock is ahead.
        frozen_until: Nothing in it runs before, as where a machine is suspended.
        owed: Answers that others wait for.
    """

    name: str
    skew: float = 0.0
    is_alive: bool = True
    frozen_until: float = 0.0
    owed: set[Future[Any]] = field(default_factory=set)


@dataclass(eq=False)
class Task:
    process: Process
    work: Callable[[], None]
    due: float = 0.0
    gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class World:
    """What is true of all processes of one seed.

    Attributes:
        sometimes: How often each rail was exercised.
        violations: Sentences about what must not be.
        rates: By kind of fault, how likely it is where it can happen.
    """

    def __init__(self, seed: int, *, most_steps: int) -> None:
        self.chance = Random(seed)
        self.time = 0.0
        self.steps = 0
        self.most_steps = most_steps
        self.sometimes: Counter[str] = Counter()
        self.violations: list[str] = []
        self.events: deque[str] = deque(maxlen=KEPT_EVENTS)
        self.is_calm = True
        # Each seed has some kinds of fault and lacks others: where all are there, each hides what another would show.
        usual = {"kill": 0.006, "store": 0.02, "freeze": 0.3, "skew": 0.5, "disk": 0.02}
        self.rates = {kind: usual.get(kind, 0.05) * (self.chance.random() < 0.5) for kind in _FAULTS}
        self.nobody = Process("nobody")
        self.task = Task(self.nobody, lambda: None)
        self.tasks = [self.task]
        self._idle: list[_Runner] = []
        self._ids = 0

    # Time, chance and names.

    def now(self) -> datetime:
        """What the clock of the running task's process says."""
        return BEGINNING + timedelta(seconds=self.time + self.task.process.skew)

    def happens(self, kind: str) -> bool:
        """Whether this kind of fault happens here and now."""
        rate = self.rates[kind]
        return not self.is_calm and rate > 0 and self.chance.random() < rate

    def new_id(self) -> str:
        self._ids += 1
        return f"{self._ids:032x}"

    def say(self, event: str) -> None:
        self.events.append(f"{self.time:9.3f} {self.task.process.name}: {event}")

    def violated(self, what: str) -> None:
        """Something is so that must not be."""
        self.say(f"VIOLATION {what}")
        self.violations.append(what)

    # Tasks.

    def spawn(self, process: Process, work: Callable[[], None], *, after: float = 0.0) -> Task:
        """Start a task in this process. It begins when it is given the baton."""
        task = Task(process, work, due=self.time + after)
        self.tasks.append(task)
        runner = self._idle.pop() if self._idle else _Runner(self)
        runner.begin(task)
        return task

    def pause(self, seconds: float = 0.0) -> None:
        """Let others run, and go on so many seconds later. Raises Killed."""
        self.task.due = self.time + seconds
        self._pass_on()

    def wait(self, waiting: list[Task], is_so: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until something is so; whoever changes it calls `wake`. Whether it is, when the seconds are over."""
        ends = math.inf if seconds is None else self.time + max(0.0, seconds)
        while not is_so():
            if self.time >= ends:
                return False
            task = self.task
            waiting.append(task)
            task.due = ends
            self._pass_on()
        return True

    def wake(self, waiting: list[Task]) -> None:
        for task in waiting:
            task.due = min(task.due, self.time)
        waiting.clear()

    def kill(self, process: Process) -> None:
        """End it as `kill -9` does. Whoever waits for its answer hears that the connection broke."""
        if not process.is_alive:
            return
        process.is_alive = False
        process.frozen_until = 0.0
        self.say(f"{process.name} is killed")
        for task in self.tasks:
            if task.process is process and task is not self.task:
                task.due = self.time
        for answer in list(process.owed):
            answer.fail(Broken(process.name))

    def end(self) -> None:
        """Kill everybody, and wait until the last task has unwound."""
        mine = self.task
        for task in self.tasks:
            if task is not mine:
                task.process.is_alive = False
                task.process.frozen_until = 0.0
                task.due = self.time
        while len(self.tasks) > 1:
            self.pause()
        for runner in self._idle:
            runner.end()

    def _pass_on(self) -> None:
        task, following = self.task, self._next()
        if following is not task:
            self.task = following
            following.gate.release()
            task.gate.acquire()
        if not task.process.is_alive:
            raise Killed

    def _next(self) -> Task:
        while True:
            ready = [task for task in self.tasks if task.due <= self.time and task.process.frozen_until <= self.time]
            if ready:
                return ready[0] if len(ready) == 1 else self.chance.choice(ready)
            self.time = min(max(task.due, task.process.frozen_until) for task in self.tasks)
            if self.time == math.inf:  # nobody will ever wake anybody
                self.time = 0.0
                self.violated("deadlock: every task waits for another")
                return self.tasks[0]

    def done(self, task: Task, runner: _Runner) -> None:
        """The running task has ended."""
        self.tasks.remove(task)
        self._idle.append(runner)
        self.task = self._next()
        self.task.gate.release()

    # Where faults happen.

    def point(self, where: str) -> None:
        """A step: others may run here, the process may die, the database may fail."""
        self.steps += 1
        if not self.task.process.is_alive:
            raise Killed
        self.fail_here(where)
        self.pause(self.chance.choice((0.0, 0.0, 0.001, 0.01)))

    def fail_here(self, where: str) -> None:
        """The faults of a point, without the pause: inside of a transaction nobody else runs.

        Raises:
            Killed, StoreUnavailable
        """
        process = self.task.process
        if not process.is_alive:
            raise Killed
        if process is self.nobody:
            return
        if self.happens("kill"):
            self.sometimes[f"killed {where}"] += 1
            self.kill(process)
            raise Killed
        if self.happens("store"):
            self.sometimes[f"database failed {where}"] += 1
            self.say(f"the database fails {where}")
            raise StoreUnavailable(f"the simulated database failed {where}")


class _Runner:
    """A thread that runs one task after another: starting one takes as long as many steps."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._task: Task | None = None
        self._wanted = threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def begin(self, task: Task) -> None:
        self._task = task
        self._wanted.release()

    def end(self) -> None:
        self._task = None
        self._wanted.release()

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            task = self._task
            if task is None:
                return
            task.gate.acquire()
            try:
                if task.process.is_alive:
                    task.work()
            except Killed:
                pass
            except BaseException as error:
                if task.process.is_alive:
                    said = "".join(traceback.format_exception(error)[-6:])
                    self._world.violated(f"a task of {task.process.name} raised {error!r:.300}\n{said}")
            self._world.done(task, self)


_worlds: list[World] = []


def begin(world: World) -> None:
    """Make it the one that `Threading` and `Clock` belong to."""
    _worlds[:] = [world]


def world() -> World:
    """The present one."""
    return _worlds[0]


class Future(Generic[T]):
    """As `concurrent.futures.Future`."""

    def __init__(self) -> None:
        self._waiting: list[Task] = []
        self._is_done = False
        self._result: T | None = None
        self._error: BaseException | None = None

    def set(self, result: T) -> None:
        self._is_done, self._result = True, result
        world().wake(self._waiting)

    def fail(self, error: BaseException) -> None:
        if not self._is_done:
            self._is_done, self._error = True, error
            world().wake(self._waiting)

    def done(self) -> bool:
        return self._is_done

    def exception(self) -> BaseException | None:
        return self._error

    def result(self, timeout: float | None = None) -> T:
        if not world().wait(self._waiting, self.done, timeout):
            raise FutureTimeout
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


def in_thread(name: str, work: Callable[[], T]) -> Future[T]:
    """As `evenodds.training.background.in_thread`."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            future.fail(error)
        else:
            future.set(result)

    world().spawn(world().task.process, run)
    return future


class SerialThread:
    """As `evenodds.training.background.SerialThread`; the work is done at once, by whoever submits it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set(work())
        except Exception as error:
            future.fail(error)
        return future

    def end(self) -> None:
        pass


class Event:
    """As `threading.Event`."""

    def __init__(self) -> None:
        self._waiting: list[Task] = []
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        world().wake(self._waiting)

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        return world().wait(self._waiting, self.is_set, timeout)


class Lock:
    """As `threading.Lock`, or with `RLock` as that."""

    is_for_its_owner = False

    def __init__(self) -> None:
        self._waiting: list[Task] = []
        self._owner: Task | None = None
        self._depth = 0

    def acquire(self, blocking: bool = True) -> bool:
        task = world().task
        if not (self.is_for_its_owner and self._owner is task):
            if not blocking and self._owner is not None:
                return False
            world().wait(self._waiting, lambda: self._owner is None, None)
        self._owner, self._depth = task, self._depth + 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            world().wake(self._waiting)

    def locked(self) -> bool:
        return self._owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock(Lock):
    is_for_its_owner = True


class Thread:
    """As `threading.Thread`; it belongs to the process of whoever starts it."""

    def __init__(
        self,
        target: Callable[..., None],
        args: tuple[Any, ...] = (),
        name: str = "",
        daemon: bool = False,
    ) -> None:
        self._target, self._args = target, args
        self._ended = Event()

    def start(self) -> None:
        def run() -> None:
            try:
                self._target(*self._args)
            finally:
                self._ended.set()

        world().spawn(world().task.process, run)

    def join(self) -> None:
        self._ended.wait()


class Threading:
    """In place of the module `threading`."""

    Event, Lock, RLock, Thread = Event, Lock, RLock, Thread


class Clock:
    """In place of the module `time`."""

    @staticmethod
    def monotonic() -> float:
        return world().time

    @staticmethod
    def sleep(seconds: float) -> None:
        world().pause(seconds)


class Threads:
    """In place of `ThreadPoolExecutor`."""

    def __init__(self, *_: object, **__: object) -> None:
        self.map = map
