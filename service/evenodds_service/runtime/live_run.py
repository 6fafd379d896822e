"""One run as a process knows it: its log folded, up to the log's head before each answer.

Any replica that folds the same log holds the same. Built from the store's blocks and entries; knows no HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np

from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.learning.checkpoint import (
    BLOCK_FORMAT,
    block_from_bytes,
    block_to_bytes,
    from_bytes,
    pool_of_bytes,
    to_bytes,
)
from evenodds_service.domain.learning.features import Pool
from evenodds_service.domain.learning.fold import fold, learn_anew, use_snapshot
from evenodds_service.domain.learning.guardrails import Fallback
from evenodds_service.domain.learning.prediction import EachBlock
from evenodds_service.domain.learning.predictors import PREDICTORS, MixedBeliefs
from evenodds_service.domain.learning.state import State, copied
from evenodds_service.domain.log_entries import Entry, ObserveEntry, PoolEntry, RetireEntry, SnapshotEntry
from evenodds_service.domain.prompts import FittedPrior, RawBlock
from evenodds_service.domain.report.alarms import Alarm
from evenodds_service.domain.report.findings import alarms
from evenodds_service.domain.report.summary import Summary
from evenodds_service.domain.report.verdict import summarised
from evenodds_service.domain.selection.selection import Chosen, Forecasts, SelectionRequest, choose_batch
from evenodds_service.domain.settings import BUILTIN, CALLER, NO_EMBEDDER, PredictorName, RunSettings
from evenodds_service.errors import (
    CheckpointUnusable,
    LogCompacted,
    RunUnknown,
    SnapshotUnknown,
    SnapshotUnusable,
    StoreError,
    UnknownPrompts,
)
from evenodds_service.model.embedder import storage_name
from evenodds_service.model.history import History
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.model.surface import SURFACE, SURFACE_NAMES
from evenodds_service.storage.store import Run, Store
from evenodds_service.timing import phase

logger = logging.getLogger(__name__)

PACKED = 8_192
"""Prompts of a packed block of the pool's features."""

RAW_MOST = 262_144
"""Prompts whose raw features, .6 kB each, are in memory at most while a pool is loaded. More are projected on the way,
though the first answer waits for it."""

_TRIES = 5

CHECKPOINT_EVERY = 500
"""Log entries between two checkpoints that a process saves which only folds: about a second of folding at the next
start."""


class LiveRun:
    """State, pool and shared model of one run.

    Who locks: Whoever reads or folds holds `lock`; nobody holds it while a batch is chosen or a checkpoint is packed,
    since a copy of the state serves as well. Whoever chooses a batch and records it holds `selecting` meanwhile, so
    that the next one knows what is outstanding, and because the arrays of many choices at once over a large pool would
    not fit. `selecting` is taken before `lock`, and the database's locks are taken after both.

    What may be stale: The state is that of the log at `state.position` and says nothing of what came later: an answer
    that has to be exact begins with `catch_up` to a run that was read after the question. What never changes serves at
    any age: a prompt's index while it is in the pool, and its features. `void_position` is that of the newest rewind or
    retract that the state knows of: a run that shows a newer one makes it fold again.

    What it costs: Nothing here writes to the log. Whoever appended hands the entries over instead of reading them back.
    A checkpoint is only a way to start sooner: it may be missing, old or refused, and the answers stay the same. If
    none is left from which the snapshots that are kept suffice, an entry of the log tells all processes to do without
    those that were dropped.

    Args:
        each_block: Spreads the computation of a choice over threads, as an executor's map does.
        keeps_raw: Whether the pool's raw features stay in memory, for whoever fits on them.
    """

    def __init__(self, run_id: int, *, each_block: EachBlock = map, keeps_raw: bool = False) -> None:
        self.run_id = run_id
        self.lock = threading.RLock()
        self.selecting = threading.Lock()
        self._each_block = each_block
        self._lets_go = not keeps_raw
        self.state = State()
        self.pool = self._new_pool()
        self.model: SharedModel | None = None
        self.void_position = 0
        self._is_started = False
        self._saved_position = 0  # of the newest checkpoint that this process knows of
        self._began_at = 0  # position from which the state was folded
        self._refused = 0  # position of the newest checkpoint there was, where it could not be used
        self._is_saving = threading.Lock()

    def catch_up(self, store: Store, run: Run, *, written: Sequence[Entry] = ()) -> None:
        """Fold the log's tail up to the position that `run` shows; the first time, from the newest checkpoint on.

        The state is that of the log as it stood at this position. Where something was voided since the last time, the
        state is folded again, from the newest checkpoint that is left.

        Args:
            written: The newest entries that `run` shows, where the caller has them: who wrote them need not read them.

        Raises:
            RunUnknown: the run was deleted since `run` was read.
        """
        with self.lock:
            tries = 1
            while (
                error := self._missed(store, run, written)
            ) is not None:  # what it would need is gone, and in the base
                if tries == _TRIES:
                    raise error
                tries += 1
                self._is_started, written = False, ()
                run = store.run_with_id(self.run_id)

    def _missed(self, store: Store, run: Run, written: Sequence[Entry]) -> LogCompacted | None:
        """What kept it from catching up, if something was compacted or dropped while it was read."""
        try:
            self._catch_up(store, run, written)
        except LogCompacted as error:
            logger.info("run %r: %s", run.name, error)
            return error
        return None

    def _catch_up(self, store: Store, run: Run, written: Sequence[Entry]) -> None:
        embedder = vector_name(run.settings)
        if not self._is_started or max(run.void_position, run.base_position) > self.state.position:
            self._start(store, run, embedder)
        while self.state.position < run.log_position:
            position, tail = self.state.position, written
            if not written or written[0].position != position + 1:
                tail = store.entries(self.run_id, after=position, as_of=run.log_position)
            if not tail and store.run_with_id(self.run_id).base_position <= position:  # its log went with it
                raise RunUnknown(f"run {run.name!r} was deleted meanwhile: create it first")
            if not tail or tail[-1].position != position + len(tail):
                raise LogCompacted(f"its log is compacted beyond position {position}")
            for entry in tail:
                if isinstance(entry, PoolEntry):
                    self._extend_pool(store, entry.n_prompts, embedder, as_of=entry.position)
                elif isinstance(entry, RetireEntry) and self.pool.n > self.state.n_prompts:
                    self._load_pool(store, embedder)  # it is ahead, after something was voided
                elif isinstance(entry, SnapshotEntry):
                    self._attach(store, entry.version, embedder)
                fold(self.state, entry, self.pool)

    def _start(self, store: Store, run: Run, embedder: str | None) -> None:
        self._is_started = False  # until the end: who fails on the way starts over
        self.state, self._refused, has_learned = _newest_state(store, run)
        self.model = None
        self._saved_position = self._began_at = self.state.position
        is_there = self.pool.n_retired == self.state.n_retired and self.pool.n >= self.state.n_prompts
        if not (is_there and self.pool.serves(self.state.basis)):
            self._load_pool(store, embedder, room=run.pool_size)
        if not has_learned:
            self._learn_anew(store, run, embedder)
        elif self.state.model_version:
            self._attach(store, self.state.model_version, embedder)
        self.void_position = run.void_position
        self._is_started = True

    def _learn_anew(self, store: Store, run: Run, embedder: str | None) -> None:
        """Learn from the outcomes that are kept beside the base, and then use the snapshot of that time.

        Raises:
            LogCompacted: the base was moved meanwhile.
        """
        position, kept = store.base_history(self.run_id)
        if position != self.state.position or kept is None:
            raise LogCompacted(f"its base at position {self.state.position} was moved")
        logger.warning(
            "run %r: its base at log position %d was written by another release: what was learned up to there is "
            "learned anew from the newest outcomes of each prompt, and its report begins there",
            run.name,
            position,
        )
        version, self.state.model_version = self.state.model_version, 0
        learn_anew(self.state, (_entry_of(batch) for batch in History.from_bytes(kept).batches()), self.pool)
        if version:
            self._attach(store, version, embedder)
            use_snapshot(self.state, version, self.pool)

    def _load_pool(self, store: Store, embedder: str | None, *, room: int = 0) -> None:
        """The pool as it was at the state's position."""
        state, pool = self.state, self.pool
        if state.n_retired or pool.n_retired or pool.n > state.n_prompts or not pool.serves(state.basis):
            self.pool = self._new_pool()
        self.pool.reserve(room)
        self._extend_pool(
            store, state.n_prompts + state.n_retired, embedder, as_of=state.position, serials_N=state.serials_N
        )
        self.pool.n_retired = state.n_retired
        self._give_priors(state.model_version)

    def _new_pool(self) -> Pool:
        """Without prompts yet; it knows what those that are retired have left in the state."""
        return Pool(
            surface_width=len(SURFACE_NAMES),
            embedding_width=0,
            group_names=self.state.group_names,
            tellers=self.state.tellers,
            lets_go=self._lets_go,
        )

    def save(self, store: Store, run: Run, *, now: datetime) -> State | None:
        """Save what a process may start from: the state, and before it what is not yet saved of the pool's features.

        Returns:
            What was saved; None where something was voided meanwhile, and nothing was.

        Raises:
            RunUnknown: the run was deleted since `run` was read.
        """
        features = _packing(vector_name(run.settings))
        with self.lock:
            state = copied(self.state)
        position, n_come = state.position, state.n_prompts + state.n_retired
        there = store.packed_blocks(self.run_id, features=features)
        for first in range(0, n_come - PACKED + 1, PACKED):
            if first in there:
                continue
            last = first + PACKED
            block = self.raw(store, run, first, last)
            if block is not None:
                store.save_packed_block(self.run_id, block_to_bytes(block), first=first, last=last, features=features)
        is_saved = store.save_checkpoint(self.run_id, position=position, state=to_bytes(state), now=now)
        self._saved_position = position
        return state if is_saved else None

    def raw(self, store: Store, run: Run, first: int, last: int) -> RawBlock | None:
        """Raw features of those of the prompts first <= index < last of the log that are in the pool.

        None where none is, or where some were deleted while they were read.
        """
        with self.lock:
            serials_N, position = self.state.serials_N, self.state.position
            start, stop = np.searchsorted(serials_N, (first, last)).tolist()
            if start == stop:
                return None
            own = serials_N[start:stop].copy() if stop - start < last - first else None
            if start >= self.pool.n_let_go:
                return replace(self.pool.raw(start, stop), first=first, serials_N=own)
        where = {"first": first, "last": last, "as_of": position}
        block = store.pool_block(self.run_id, **where, surface=SURFACE, embedder=vector_name(run.settings))
        if len(block.prompt_ids) != stop - start:
            return None
        pool = self._new_pool()  # which gives every block the same form
        pool.append(replace(block, first=0))
        return replace(pool.raw(0, pool.n), first=first, serials_N=own)

    def save_behind(self, store: Store, run: Run, *, now: datetime) -> None:
        """Save in a thread of its own where much was folded since the newest checkpoint. Returns at once.

        Best effort: what fails is logged and tried again with the entries that follow.
        """
        if self.state.position - self._saved_position < CHECKPOINT_EVERY or not self._is_saving.acquire(blocking=False):
            return
        threading.Thread(target=self._save_if_due, args=(store, run, now), name="checkpoint", daemon=True).start()

    @property
    def is_saving(self) -> bool:
        """Whether a thread is at it."""
        return self._is_saving.locked()

    def _save_if_due(self, store: Store, run: Run, now: datetime) -> None:
        try:
            # A worker or another service may have saved one meanwhile.
            self._saved_position = max(self._saved_position, store.newest_checkpoint_position(self.run_id))
            if self.state.position - self._saved_position >= CHECKPOINT_EVERY:
                self.save(store, run, now=now)
        except StoreError as error:
            logger.warning("run %r: a checkpoint could not be saved, and is tried again later: %s", run.name, error)
        finally:
            self._is_saving.release()

    def _extend_pool(
        self, store: Store, n_come: int, embedder: str | None, *, as_of: int, serials_N: IntArray | None = None
    ) -> None:
        """Read the prompts that come next, up to the first `n_come` that ever came.

        Args:
            as_of: The log position as of which those that are retired are left out.
            serials_N: Of all that are in the pool then; None: nobody was retired of those that come next.

        Raises:
            LogCompacted: some of them are deleted by now.
        """
        first = self.pool.n + self.pool.n_retired
        while first < n_come:
            last = min((first // PACKED + 1) * PACKED, n_come)
            wanted = np.arange(first, last)
            if serials_N is not None:
                wanted = serials_N[slice(*np.searchsorted(serials_N, (first, last)))]
            if len(wanted):
                block = self._packed(store, wanted, embedder) if last - first == PACKED else None
                if block is None:
                    where = {"first": first, "last": last, "as_of": as_of}
                    block = store.pool_block(self.run_id, **where, surface=SURFACE, embedder=embedder)
                if len(block.prompt_ids) != len(wanted):
                    raise LogCompacted(f"of prompts {first} to {last - 1} some are deleted")
                self.pool.append(replace(block, first=self.pool.n))
                self.pool.let_go(self.state.basis, above=RAW_MOST)
            first = last

    def _packed(self, store: Store, wanted: IntArray, embedder: str | None) -> RawBlock | None:
        """These prompts from the packed block that holds them all, if there is one."""
        first = int(wanted[0]) // PACKED * PACKED
        content = store.packed_block(self.run_id, first=first, features=_packing(embedder))
        if content is None:
            return None
        try:
            block = block_from_bytes(content)
        except CheckpointUnusable as error:
            logger.warning("run with id %d: %s; reading its prompts one by one", self.run_id, error)
            return None
        serials_N = block.serials_N
        if serials_N is None:
            serials_N = np.arange(block.first, block.first + len(block.prompt_ids))
        kept_N = np.isin(serials_N, wanted)
        if block.first != first or kept_N.sum() != len(wanted):
            logger.warning("run with id %d: the packed block of prompt %d holds others", self.run_id, first)
            return None
        return block if kept_N.all() else block.rows(kept_N)

    def _attach(self, store: Store, version: int, embedder: str | None) -> None:
        """Use this snapshot from here on; one that cannot be used is as good as none, on every replica alike.

        Raises:
            LogCompacted: it was dropped, and whoever starts from the newest checkpoint does without it.
        """
        try:
            content = store.snapshot(self.run_id, version).weights
            if not content:
                self._without_dropped(store)
                raise LogCompacted(f"its snapshot {version} is dropped")
            self.model = SharedModel.from_bytes(content, embedder=embedder or "").on(self.state.basis)
        except (SnapshotUnusable, SnapshotUnknown) as error:
            if store.run_with_id(self.run_id).base_position > self.state.position:
                raise LogCompacted(f"its snapshot {version} is compacted") from error
            logger.error("run with id %d: snapshot %d: %s", self.run_id, version, error)
            self.model = None
        self._give_priors(version)

    def _without_dropped(self, store: Store) -> None:
        """Where the newest checkpoint cannot be used, here nor by others, let all fold without what is dropped behind
        the one before it.
        """
        now = datetime.now(timezone.utc)
        if store.give_up_checkpoints(self.run_id, refused=self._refused, left=self._began_at, now=now):
            logger.warning(
                "run with id %d: its checkpoints above log position %d cannot be used, and snapshots behind it are "
                "dropped: beliefs are folded again from there without these, by all processes, until the next refit",
                self.run_id,
                self._began_at,
            )

    def _give_priors(self, version: int) -> None:
        """Let the pool have what the model says of its prompts."""
        if self.model is None:
            self.pool.attach(version, {})
        else:
            serials_N = self.state.serials_N
            self.pool.attach(version, self.model.priors_of(serials_N), self.model.sources_of(serials_N))

    def known(self, prompt_ids: Iterable[str]) -> tuple[dict[str, int], int]:
        """Indices in the log of those of these ids that are in the pool, and the position as of which that holds.

        A prompt keeps its index for as long as it is in the pool.
        """
        with self.lock:
            index, state = self.pool.index, self.state
            rows = {i: index[i] for i in prompt_ids if i in index}
            # The pool may be ahead of the state, after something was voided.
            serials = {
                i: int(state.serials_N[row]) if row < state.n_prompts else row + state.n_retired
                for i, row in rows.items()
            }
            return serials, state.position

    def indices(self, run: str, prompt_ids: Sequence[str], *, path: str, hint: str) -> IntArray:
        """Where the prompts of these ids stand in the pool. Whoever uses that holds `lock` since before.

        Raises:
            UnknownPrompts: some are not in the pool.
        """
        with self.lock:
            index = self.pool.index
            unknown = [i for i in prompt_ids if i not in index]
            if unknown:
                raise UnknownPrompts(run, unknown, path=path, hint=hint)
            return np.fromiter((index[i] for i in prompt_ids), dtype=np.int64, count=len(prompt_ids))

    def beliefs(
        self, predictor: PredictorName, indices: IntArray | None = None, *, steps_n: IntArray | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Beta parameters of the belief about these prompts, or about the whole pool, [n].

        Args:
            steps_n: The policy's step that each belief is for, as in `beliefs_of`; the head step without it.
        """
        return PREDICTORS[predictor].beliefs(self.state, self.pool, indices, steps_n=steps_n)

    def mixed_beliefs(
        self, predictor: PredictorName, indices: IntArray, *, steps_n: IntArray | None = None
    ) -> MixedBeliefs:
        """As `beliefs`, with the experts whose mixture they sum up."""
        return PREDICTORS[predictor].mixed_beliefs(self.state, self.pool, indices, steps_n=steps_n)

    def new_beliefs(self, predictor: PredictorName, texts: Sequence[str | None], block: RawBlock) -> MixedBeliefs:
        """The same about prompts outside the pool, [n]."""

        model, asked = self.model, PREDICTORS[predictor]
        if model is None:
            return asked.new_beliefs(self.state, block, lambda _: {})
        read = model.read(texts)

        def fitted(x_n_d: FloatArray | None) -> Mapping[str, FittedPrior]:
            return model.predict(read, block, x_n_d if model.basis is self.state.basis else None)

        return asked.new_beliefs(self.state, block, fitted, model.shown(read) if asked.is_mixed else None)

    def fallback(self, predictor: PredictorName) -> Fallback | None:
        """Whether choices of the run are uniform at present, and why. Only the mixture's skill is measured."""
        return self.state.guardrails.fallback() if PREDICTORS[predictor].is_mixed else None

    def alarms(self, settings: RunSettings) -> tuple[Alarm, ...]:
        """What a person should do something about in the present state."""
        return alarms(self.state, self.pool, settings)

    def summary(self, settings: RunSettings) -> tuple[int, Summary]:
        """How the run stands, and the log position that this speaks of."""
        with self.lock:
            return self.state.position, summarised(self.state, self.pool, settings)

    def choose(self, settings: RunSettings, ask: Callable[[], SelectionRequest]) -> Chosen:
        """Choose a batch in the present state; observations are folded meanwhile. The caller holds `selecting`.

        Args:
            ask: Tells what is asked for, in places of the pool as it is when the choice begins.

        Raises:
            NotEnoughPrompts: fewer may be selected than were asked for.
        """
        with self.lock, phase("copy"):
            request = ask()
            state, pool = copied(self.state), self.pool.view(self.state.basis)
        predictor = PREDICTORS[settings.predictor]

        def forecasts_of(rows: IntArray | None) -> Forecasts:
            with phase("beliefs"):
                a_n, b_n = predictor.beliefs(state, pool, rows, each_block=self._each_block)
            with phase("moments"):
                return Forecasts.of(a_n, b_n, settings.group_size, each_block=self._each_block)

        with phase("choice"):
            return choose_batch(state, pool, settings, request, forecasts_of)


def _newest_state(store: Store, run: Run) -> tuple[State, int, bool]:
    """The newest state to fold the run on from; the position of the newest checkpoint if that was refused, else 0; and
    whether the state has learned what came before it.

    Raises:
        LogCompacted: the base was moved meanwhile.
        CheckpointUnusable: nothing can be folded from the base.
    """
    refused, told = 0, ""
    found = store.newest_checkpoint(run.id, at_most=run.log_position)
    while found is not None and found[0] >= run.base_position:
        position, content = found
        try:
            state = _state_at(position, from_bytes(content))
        except CheckpointUnusable as error:
            refused, told = refused or position, told or str(error)
            found = store.newest_checkpoint(run.id, at_most=position - 1)
            continue
        if refused:
            logger.warning("run %r: %s; folding its log from position %d", run.name, told, position)
        return state, refused, True
    if refused:
        where = "its base" if run.base_position else "the beginning"
        logger.warning("run %r: %s; folding its log from %s", run.name, told, where)
    if not run.base_position:
        return State(), refused, True
    state, has_learned = _base_of(store, run)
    return state, refused, has_learned


def _state_at(position: int, state: State) -> State:
    """Raises CheckpointUnusable."""
    if state.position != position:
        raise CheckpointUnusable(f"the checkpoint at {position} holds the state at {state.position}")
    return state


def _base_of(store: Store, run: Run) -> tuple[State, bool]:
    """The state that the run's log begins from, and whether it has learned what came before: not where another release
    wrote it.

    Raises:
        LogCompacted: the base was moved meanwhile.
        CheckpointUnusable: nothing can be folded from it.
    """
    position = run.base_position
    content = store.checkpoint(run.id, position)
    if content is None:
        raise LogCompacted(f"its base at position {position} was moved")
    try:
        return _state_at(position, from_bytes(content)), True
    except CheckpointUnusable as error:
        logger.info("run %r: its base: %s", run.name, error)
    try:
        return _state_at(position, pool_of_bytes(content)), False
    except CheckpointUnusable as error:
        raise CheckpointUnusable(
            f"run {run.name!r}: {error}, and the log before it was compacted: restore a backup, or begin a new run"
        ) from error


def _entry_of(batch: History) -> ObserveEntry:
    """What is kept of the outcomes of one step."""
    return ObserveEntry(0, int(batch.steps[0]), batch.prompts, batch.successes, batch.attempts, batch.informative)


def _packing(embedder: str | None) -> str:
    """The name under which blocks of these features are kept."""
    return f"{BLOCK_FORMAT} {SURFACE} {embedder or NO_EMBEDDER}"


def vector_name(settings: RunSettings) -> str | None:
    """Under which name the run's vectors are stored; None where there are none."""
    setting = settings.embedder or BUILTIN
    if setting == NO_EMBEDDER:
        return None
    return CALLER if setting == CALLER else storage_name(setting, settings.embedder_prompt)
