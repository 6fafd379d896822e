"""What a trainer has to tell the service, kept on disk until the service has confirmed it.

An outbox is a SQLite file in a folder, one for each run. Several processes may put into it; one of them at a time,
the sender, takes out of it, in order. Sending is somebody else's business: nothing here knows HTTP.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from evenodds.schemas import MAX_STEP

T = TypeVar("T")

BUSY_SECONDS = 5.0
"""How long a statement waits for other processes."""

HELD = "held: "
"""So begins why a delivery is held back: a next start does not try it again unless it is told to."""

_NO_STEP = -1
_COLUMNS = "position, kind, step, request_id, selection_id, body"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS deliveries (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL CHECK (kind IN ('observe', 'rewind')),
    step INTEGER NOT NULL,
    request_id TEXT NOT NULL UNIQUE,
    selection_id TEXT,
    body TEXT NOT NULL,
    refusal TEXT
)
"""


class OutboxBroken(Exception):
    """The file is no outbox, or no longer one."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One call that the service has not confirmed yet.

    Attributes:
        kind: `observe`, or `rewind` to `step`.
        request_id: Makes its repetition safe.
        body: JSON list of the observations; empty for a rewind.
        position: Place in the queue; 0 for one that is not in it yet.
    """

    kind: Literal["observe", "rewind"]
    step: int
    request_id: str
    selection_id: str | None = None
    body: str = "[]"
    position: int = 0


class Outbox:
    """A queue of deliveries. Threads may share one; so may processes, each with its own `Outbox` on the same folder.

    The file keeps SQLite's rollback journal, which works on network folders too, and every `put` is on the disk when
    it returns.

    Args:
        folder: Made if it does not exist. None keeps everything in memory, for this process alone.
        run: Names the file.
        releases_held: Deliver what an earlier selector held back.

    Raises:
        OSError: The folder cannot be made.
        sqlite3.OperationalError: The file cannot be opened.
        OutboxBroken: The file is no outbox.
    """

    def __init__(self, folder: Path | None, run: str, *, releases_held: bool = False) -> None:
        self.path = None if folder is None else folder / f"{run}.outbox"
        self._lock = threading.RLock()
        _OUTBOXES.add(self)
        self._leading: sqlite3.Connection | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._database = _connect(self.path, timeout=BUSY_SECONDS)
        self._do(lambda database: database.execute(_SCHEMA))
        # What was refused gets another chance at every start: the pool may hold its prompts by now.
        again = "UPDATE deliveries SET refusal = NULL WHERE refusal IS NOT NULL"
        if not releases_held:
            again += f" AND refusal NOT LIKE '{HELD}%'"
        self._do(lambda database: database.execute(again))

    def put(self, deliveries: Sequence[Delivery]) -> None:
        """Append all or none. One whose request id is in the queue already changes nothing."""
        rows = [(d.kind, d.step, d.request_id, d.selection_id, d.body) for d in deliveries]
        insert = "INSERT OR IGNORE INTO deliveries (kind, step, request_id, selection_id, body) VALUES (?, ?, ?, ?, ?)"
        self._do(lambda database: database.executemany(insert, rows))

    def first(self) -> Delivery | None:
        """The delivery whose turn it is; None if there is none, or if another process is the sender."""
        if not self._leads():
            return None
        where = "WHERE refusal IS NULL ORDER BY position LIMIT 1"
        return next(iter(self._deliveries(where)), None)

    def remove(self, delivery: Delivery) -> None:
        """The service has confirmed it."""
        self._do(lambda database: database.execute("DELETE FROM deliveries WHERE position = ?", (delivery.position,)))

    def split(self, delivery: Delivery, parts: Sequence[Delivery]) -> None:
        """Put its parts in its place, before all others; one that was removed meanwhile stays removed."""
        insert = (
            "INSERT OR IGNORE INTO deliveries (position, kind, step, request_id, selection_id, body) "
            "SELECT (SELECT min(position) FROM deliveries) - 1, kind, step, ?, selection_id, ? "
            "FROM deliveries WHERE position = ?"
        )
        rows = [(part.request_id, part.body, delivery.position) for part in reversed(parts)]

        def split(database: sqlite3.Connection) -> None:
            database.executemany(insert, rows)
            database.execute("DELETE FROM deliveries WHERE position = ?", (delivery.position,))

        self._do(split)

    def refuse(self, delivery: Delivery, reason: str) -> None:
        """Set it aside, so that what follows is not held up. It stays in the file, with the reason."""
        reason = reason.encode("utf-8", "backslashreplace").decode()  # it may quote what SQLite cannot store
        update = "UPDATE deliveries SET refusal = ? WHERE position = ?"
        self._do(lambda database: database.execute(update, (reason, delivery.position)))

    def forget_after(self, step: int) -> None:
        """Remove the observations of later steps, and the rewinds to them."""
        delete = "DELETE FROM deliveries WHERE step > ?"
        self._do(lambda database: database.execute(delete, (step,)))

    def waiting(self) -> tuple[Delivery, ...]:
        """All that the service has not confirmed, in order, without what was set aside."""
        return tuple(self._deliveries("WHERE refusal IS NULL ORDER BY position"))

    def refusals(self) -> tuple[tuple[Delivery, str], ...]:
        """What was set aside, and why."""
        rows = self._rows(f"SELECT {_COLUMNS}, refusal FROM deliveries WHERE refusal IS NOT NULL ORDER BY position")
        return tuple((_delivery(row), str(row[6])) for row in rows)

    def newest_step(self) -> int | None:
        """The highest step of an observation that the service has not confirmed; None if there is none."""
        select = "SELECT max(step) FROM deliveries WHERE kind = 'observe' AND step BETWEEN 0 AND ?"
        ((step,),) = self._do(lambda database: database.execute(select, (MAX_STEP,)).fetchall())
        return int(step) if isinstance(step, int) else None

    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._rows("SELECT 1 FROM deliveries WHERE refusal IS NULL LIMIT 1")

    def is_rewinding(self) -> bool:
        """Whether a rewind waits."""
        return bool(self._rows("SELECT 1 FROM deliveries WHERE kind = 'rewind' AND refusal IS NULL LIMIT 1"))

    def close(self) -> None:
        """Let another process be the sender. What waits stays in the file."""
        with self._lock:
            if self._leading is not None:
                self._leading.close()
                self._leading = None
            self._database.close()

    def _leads(self) -> bool:
        """Whether this is the sender: whoever holds a lock on a file beside, which the system lifts when it dies."""
        with self._lock:
            if self.path is None or self._leading is not None:
                return True
            lock = _connect(self.path.with_suffix(".sender"), timeout=0.0)
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                lock.close()
                return False
            self._leading = lock
            return True

    def _deliveries(self, where: str) -> Iterator[Delivery]:
        return map(_delivery, self._rows(f"SELECT {_COLUMNS} FROM deliveries {where}"))

    def _rows(self, statement: str) -> list[tuple[object, ...]]:
        return self._do(lambda database: database.execute(statement).fetchall())

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock, _broken_files_named(self.path), self._database:  # commits, or rolls back
            return work(self._database)


_OUTBOXES: weakref.WeakSet[Outbox] = weakref.WeakSet()
_held_at_fork: list[Outbox] = []


def _before_fork() -> None:
    """Let no thread be inside SQLite: the child would inherit its locks, and nobody there to open them."""
    _held_at_fork.extend(_OUTBOXES)
    for outbox in _held_at_fork:
        outbox._lock.acquire()


def _after_fork() -> None:
    while _held_at_fork:
        _held_at_fork.pop()._lock.release()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def _connect(path: Path | None, *, timeout: float) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:" if path is None else path, timeout=timeout, check_same_thread=False)
    # A row that holds no UTF-8 has to be read to be set aside: what is in it is refused then, as no valid Unicode.
    database.text_factory = lambda stored: stored.decode("utf-8", "surrogateescape")
    return database


@contextmanager
def _broken_files_named(path: Path | None) -> Iterator[None]:
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError):
        raise  # locked, full or unreachable: it may pass
    except sqlite3.DatabaseError as error:
        raise OutboxBroken(f"{path}: {error}") from error


def _delivery(row: tuple[object, ...]) -> Delivery:
    """A row as it is, whatever a broken disk or another release has made of it: sending finds what is wrong."""
    position, kind, step, request_id, selection_id, body = row[:6]
    assert isinstance(position, int)  # the primary key: SQLite holds nothing else there
    return Delivery(
        "rewind" if kind == "rewind" else "observe",
        step if isinstance(step, int) else _NO_STEP,
        str(request_id),
        None if selection_id is None else str(selection_id),
        str(body),
        position,
    )
