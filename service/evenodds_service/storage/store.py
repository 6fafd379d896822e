"""What it remembers: runs, pools, the log, selections, refits, snapshots and checkpoints.

Every method is one transaction: frozen values in, frozen values out; no session leaves this room. A method
that writes takes the write lock first: SQLite's as the transaction begins, so that a read lock never has to
be upgraded; on PostgreSQL the row of the run, so that log positions are gapless and a reader which has seen
position p has seen everything up to p. `now` is an argument: the store has no clock.

How long a method waits for a slow database is its engine's matter (engine.py, `Patience`). What grows with the pool or
the log (loads, forks, rewinds, retractions, deletions) may work for minutes, but waits for others no longer than any.

The methods stand where their subject is: runs.py, pool.py, log.py, selections.py, refits.py, checkpoints.py,
keys.py, voids.py, forks.py.
"""

from __future__ import annotations

from evenodds_service.storage.checkpoints import CheckpointMethods
from evenodds_service.storage.forks import ForkMethods
from evenodds_service.storage.keys import KeyMethods
from evenodds_service.storage.log import LogMethods
from evenodds_service.storage.pool import PoolMethods
from evenodds_service.storage.refits import RefitMethods
from evenodds_service.storage.rewind import VoidMethods
from evenodds_service.storage.runs import RunMethods
from evenodds_service.storage.selections import SelectionMethods
from evenodds_service.storage.values import (
    ApiKey,
    Appended,
    NewSelection,
    NewSnapshot,
    PromptsAdded,
    PromptVisit,
    Refit,
    Run,
    Scope,
    Selection,
    Snapshot,
    Voided,
    Written,
)

__all__ = [
    "ApiKey",
    "Appended",
    "NewSelection",
    "NewSnapshot",
    "PromptVisit",
    "PromptsAdded",
    "Refit",
    "Run",
    "Scope",
    "Selection",
    "Snapshot",
    "Store",
    "Voided",
    "Written",
]


class Store(
    RunMethods,
    PoolMethods,
    LogMethods,
    SelectionMethods,
    RefitMethods,
    CheckpointMethods,
    VoidMethods,
    ForkMethods,
    KeyMethods,
):
    """The store of one database, safe to share between threads.

    Every method raises StoreUnavailable where the database cannot be reached or does not answer in time; the
    call may then be repeated. Errors that a caller can handle stand with each method, all of them in
    `errors.py`.
    """
