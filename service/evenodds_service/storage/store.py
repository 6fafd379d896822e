"""What the service remembers: runs, pools, the log, selections, refits, snapshots, checkpoints and states of runs.

The methods stand where their subject is: runs.py, pool.py, log.py, selections.py, refits.py, checkpoints.py,
keys.py, rewind.py, forks.py, decisions.py, run_states.py,
listing.py.
"""

from __future__ import annotations

from sqlalchemy import Engine

from evenodds_service.storage.checkpoints import KEPT_SNAPSHOTS, CheckpointMethods
from evenodds_service.storage.decisions import DecisionMethods
from evenodds_service.storage.forks import ForkMethods
from evenodds_service.storage.keys import KeyMethods
from evenodds_service.storage.listing import ListingMethods
from evenodds_service.storage.log import LogMethods
from evenodds_service.storage.pool import PoolMethods
from evenodds_service.storage.refits import RefitMethods
from evenodds_service.storage.retention import RetentionMethods
from evenodds_service.storage.rewind import RewindMethods
from evenodds_service.storage.run_states import RunStateMethods
from evenodds_service.storage.runs import RunMethods
from evenodds_service.storage.selections import SelectionMethods
from evenodds_service.storage.values import (
    ApiKey,
    Appended,
    Decision,
    ListedRun,
    NewSelection,
    NewSnapshot,
    PromptsAdded,
    PromptVisit,
    Refit,
    Run,
    RunListing,
    RunSort,
    RunState,
    Scope,
    Selection,
    Snapshot,
    Voided,
    WatchedRun,
    Written,
)

__all__ = [
    "ApiKey",
    "Appended",
    "Decision",
    "ListedRun",
    "NewSelection",
    "NewSnapshot",
    "PromptVisit",
    "PromptsAdded",
    "Refit",
    "Run",
    "RunListing",
    "RunSort",
    "RunState",
    "Scope",
    "Selection",
    "Snapshot",
    "Store",
    "Voided",
    "WatchedRun",
    "Written",
]


class Store(
    RunMethods,
    PoolMethods,
    LogMethods,
    SelectionMethods,
    RefitMethods,
    CheckpointMethods,
    RewindMethods,
    ForkMethods,
    KeyMethods,
    DecisionMethods,
    RetentionMethods,
    RunStateMethods,
    ListingMethods,
):
    """The store of one database, safe to share between threads.

    One method, one transaction: Frozen values go in and come out, and no session leaves this room. Either all that a
    method writes is there afterwards, or nothing. `now` is an argument: the store has no clock.

    Who locks: A transaction that writes starts by writing or by taking the lock to write. On SQLite that is the
    database's only write lock, taken as the transaction begins, so that no read lock ever has to be upgraded. On
    PostgreSQL it is the row of the run; whoever needs more rows takes the run's first, so that nobody deadlocks.
    Features, models and choices are computed before: no transaction is open meanwhile.

    The log: Positions are given under that lock and have no gaps. Whoever has seen position p has seen everything up to
    p, on every replica. A run that lets go of prompts has a base: its log begins behind it, and processes start from
    the checkpoint there. An append is acknowledged after its commit, and what was acknowledged is in the next read of
    anybody. Entries never change; a rewind or retract marks what it voids with its own position, so that the log can be
    read as it stood at any position.

    Repetition: What names itself (a report by its request id, a batch by its step, a prompt by its id) is written once.
    The look for an earlier one and the write are under the same lock. A repetition writes nothing, takes no position,
    and is answered as the first time.

    What may be stale: A value that a method returned is true of its moment. A caller may act on an old one where that
    cannot mislead: a prompt never changes its index, a run its id, or a pool its embedder. Whatever else a decision
    rests on is looked at again under the lock (`chosen_at` of a batch, the claim of a refit), and refused if it is
    outdated.

    How long: A method waits for a slow database as its engine says (engine.py, `Patience`). What grows with the pool
    or the log (loads, forks, rewinds, retractions, deletions) may work for minutes, but waits for others no longer than
    any.

    Failures: Every method raises StoreUnavailable where the database cannot be reached or does not answer in time; the
    call may then be repeated. Errors that a caller can handle stand with each method, all of them in `errors.py`.

    Args:
        engine: Comes from `open_engine`; from here on the store closes it.
        keep_snapshots: How many of its newest snapshots a run keeps at most; see checkpoints.py, `needed`.
    """

    def __init__(self, engine: Engine, *, keep_snapshots: int = KEPT_SNAPSHOTS) -> None:
        super().__init__(engine)
        self._keep_snapshots = keep_snapshots
