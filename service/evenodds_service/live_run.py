"""The folded view of one run: what a process knows of it, brought up to the log's head before each answer.

Any replica that folds the same log holds the same view. Built from the store's blocks and entries; knows no HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evenodds_service.domain import acquisition
from evenodds_service.domain.acquisition import Choice, NotEnoughPrompts
from evenodds_service.domain.checkpoint import CheckpointUnusable, from_bytes
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.fold import (
    State,
    beliefs_of,
    fold,
    mopps_beliefs,
    new_paper_beliefs,
    new_prompt_beliefs,
    paper_beliefs,
)
from evenodds_service.domain.pool import Pool, directions
from evenodds_service.domain.types import (
    BUILTIN,
    CALLER,
    NO_EMBEDDER,
    Acquisition,
    BoolArray,
    FloatArray,
    IntArray,
    PoolEntry,
    Predictor,
    RawBlock,
    RunSettings,
    SnapshotEntry,
)
from evenodds_service.model.embedder import storage_name
from evenodds_service.model.shared_model import SharedModel, SnapshotUnusable
from evenodds_service.model.surface import SURFACE, SURFACE_NAMES
from evenodds_service.storage.errors import RunUnknown
from evenodds_service.storage.store import Run, Store

logger = logging.getLogger(__name__)

_BLOCK = 10_000


class UnknownPrompts(LookupError):
    """Prompt ids that the pool does not have."""

    def __init__(self, run: str, prompt_ids: Sequence[str], *, path: str, hint: str) -> None:
        shown = ", ".join(repr(i) for i in prompt_ids[:5]) + (", ..." if len(prompt_ids) > 5 else "")
        super().__init__(f"{path}: {len(prompt_ids)} not in the pool of run {run!r}: {shown}; {hint}")


@dataclass(frozen=True, slots=True)
class SelectArguments:
    """Everything that a choice depends on besides the state."""

    step: int
    batch_size: int
    seed: int
    predictor: Predictor
    acquisition: Acquisition
    group_size: int
    target_rate: float | None
    optimism: float
    diversity: float
    cooldown_steps: int
    max_visits: int
    candidates: Sequence[str] | None
    exclude: Sequence[str]
    groups: Mapping[str, float]


class LiveRun:
    """State, pool and shared model of one run, and the lock that serialises access to them."""

    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        self.lock = threading.RLock()
        self.state = State()
        self.pool = Pool(surface_width=len(SURFACE_NAMES), embedding_width=0)
        self.model: SharedModel | None = None
        self._is_started = False

    def catch_up(self, store: Store, run: Run) -> None:
        """Fold the log's tail up to the position that `run` shows; the first time, from the newest checkpoint on.

        Raises:
            RunUnknown: the run was deleted since `run` was read.
        """
        embedder = vector_name(run.settings)
        with self.lock:
            if not self._is_started:
                self._start(store, run, embedder)
            while self.state.position < run.log_position:
                tail = store.entries(self.run_id, after=self.state.position)
                if not tail:  # its log went with it
                    raise RunUnknown(f"run {run.name!r} was deleted meanwhile: create it first")
                for entry in tail:
                    if isinstance(entry, PoolEntry):
                        self._extend_pool(store, entry.n_prompts, embedder)
                    elif isinstance(entry, SnapshotEntry):
                        self._attach(store, entry.version, embedder)
                    fold(self.state, entry, self.pool)

    def _start(self, store: Store, run: Run, embedder: str | None) -> None:
        checkpoint = store.newest_checkpoint(self.run_id, at_most=run.log_position)
        if checkpoint is not None:
            try:
                self.state = from_bytes(checkpoint[1])
            except CheckpointUnusable as error:
                logger.warning("run %r: %s; folding its log from the beginning", run.name, error)
            self._extend_pool(store, self.state.n_prompts, embedder)
            if self.state.model_version:
                self._attach(store, self.state.model_version, embedder)
        self._is_started = True

    def _extend_pool(self, store: Store, n_prompts: int, embedder: str | None) -> None:
        for first in range(self.pool.n, n_prompts, _BLOCK):
            last = min(first + _BLOCK, n_prompts)
            self.pool.append(store.pool_block(self.run_id, first=first, last=last, surface=SURFACE, embedder=embedder))

    def _attach(self, store: Store, version: int, embedder: str | None) -> None:
        """Use this snapshot from here on; one that cannot be used is as good as none, on every replica alike."""
        try:
            content = store.snapshot(self.run_id, version).weights
            self.model = SharedModel.from_bytes(content, embedder=embedder or "")
        except SnapshotUnusable as error:
            logger.error("run with id %d: snapshot %d: %s", self.run_id, version, error)
            self.model = None
        self.pool.attach(version, self.model.priors if self.model is not None else {})

    def indices(self, run: str, prompt_ids: Sequence[str], *, path: str, hint: str) -> IntArray:
        """Pool indices of these ids.

        Raises:
            UnknownPrompts: some are not in the pool.
        """
        index = self.pool.index
        unknown = [i for i in prompt_ids if i not in index]
        if unknown:
            raise UnknownPrompts(run, unknown, path=path, hint=hint)
        return np.fromiter((index[i] for i in prompt_ids), dtype=np.int64, count=len(prompt_ids))

    def beliefs(self, predictor: Predictor, indices: IntArray | None = None) -> tuple[FloatArray, FloatArray]:
        """Beta parameters of the belief about these prompts, or about the whole pool, [n]."""
        if predictor == "mopps":
            return mopps_beliefs(self.state, indices)
        if predictor == "gps-paper":
            return paper_beliefs(self.state, self.pool, indices)
        if predictor == "uniform":
            n = self.state.n_prompts if indices is None else len(indices)
            return np.ones(n), np.ones(n)
        return beliefs_of(self.state, self.pool, indices)

    def new_beliefs(
        self, predictor: Predictor, texts: Sequence[str | None], block: RawBlock
    ) -> tuple[FloatArray, FloatArray]:
        """Beta parameters of the belief about prompts outside the pool, [n]."""
        n = len(block.prompt_ids)
        if predictor in ("mopps", "uniform"):
            return np.ones(n), np.ones(n)
        fitted = self.model.predict(texts, block) if self.model is not None else {}
        if predictor == "gps-paper":
            return new_paper_beliefs(n, fitted)
        outside = Pool(surface_width=block.surface_N_S.shape[1], embedding_width=block.embedding_N_D.shape[1])
        outside.append(block)
        return new_prompt_beliefs(self.state, outside, fitted)

    def choose(self, run: str, arguments: SelectArguments) -> tuple[Choice, FloatArray, FloatArray]:
        """Choose a batch in the present state. Returns it with the beliefs (a, b) about its prompts, [B].

        Raises:
            UnknownPrompts: among the candidates or exclusions.
            NotEnoughPrompts: fewer may be selected than were asked for.
        """
        state = self.state
        eligible = acquisition.eligible(
            state.selected_N,
            state.last_selected_N,
            state.visits_N,
            state.last_step_N,
            step=arguments.step,
            cooldown_steps=arguments.cooldown_steps,
            max_visits=arguments.max_visits,
        )
        if arguments.candidates is not None:
            hint = "load it with POST /runs/{run}/prompts, or leave it out"
            among = np.zeros(state.n_prompts, dtype=bool)
            among[self.indices(run, arguments.candidates, path="candidates", hint=hint)] = True
            eligible &= among
        if arguments.exclude:
            eligible[self.indices(run, arguments.exclude, path="exclude", hint="leave it out")] = False
        generator = np.random.default_rng([arguments.seed, arguments.step])
        a, b = self.beliefs(arguments.predictor)
        informative, informative_std = informative_moments(a, b, arguments.group_size)
        scores = acquisition.scores(
            a,
            b,
            informative,
            informative_std,
            acquisition=arguments.acquisition,
            target_rate=arguments.target_rate,
            optimism=arguments.optimism,
            generator=generator,
        )
        try:
            choice = acquisition.choose(
                scores,
                informative,
                eligible,
                batch_size=arguments.batch_size,
                last_seen_N=np.maximum(state.last_selected_N, state.last_step_N),
                generator=generator,
                directions_of=self._directions if arguments.acquisition in ("yield", "paper") else None,
                recent_batches=state.recent_batches,
                diversity=arguments.diversity,
                groups={group: (share, self._members(group)) for group, share in arguments.groups.items()},
            )
        except NotEnoughPrompts as error:
            raise NotEnoughPrompts(
                asked=error.asked,
                eligible=error.eligible,
                group=error.group,
                advice=f" (pool {state.n_prompts}, cooldown_steps {arguments.cooldown_steps}, max_visits "
                f"{arguments.max_visits or 'none'}): ask for fewer, load more prompts, or loosen what rules them out",
            ) from None
        return choice, a[choice.prompts], b[choice.prompts]

    def _directions(self, prompts: IntArray) -> FloatArray:
        assert self.state.basis is not None  # a pool with a prompt to choose has one
        return directions(self.pool.rows(self.state.basis, prompts))

    def _members(self, group: str) -> BoolArray:
        return np.fromiter((g == group for g in self.pool.groups), dtype=bool, count=self.state.n_prompts)


def vector_name(settings: RunSettings) -> str | None:
    """Under which name the run's vectors are stored; None where there are none."""
    setting = settings.embedder or BUILTIN
    if setting == NO_EMBEDDER:
        return None
    return CALLER if setting == CALLER else storage_name(setting, settings.embedder_prompt)


class LiveRuns:
    """The live views of a process, at most `capacity`; the least recently used one is dropped."""

    def __init__(self, store: Store, *, capacity: int) -> None:
        self._store = store
        self._capacity = capacity
        self._lock = threading.Lock()
        self._runs: OrderedDict[int, LiveRun] = OrderedDict()

    def at_head(self, run: Run) -> LiveRun:
        """The live view of the run with everything folded in that `run` shows. Take its lock before reading."""
        with self._lock:
            live = self._runs.setdefault(run.id, LiveRun(run.id))
            self._runs.move_to_end(run.id)
            while len(self._runs) > self._capacity:
                self._runs.popitem(last=False)
        live.catch_up(self._store, run)
        return live

    def drop(self, run_id: int) -> None:
        """Forget the view of a deleted run."""
        with self._lock:
            self._runs.pop(run_id, None)
