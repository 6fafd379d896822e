"""The folded view of one run: what a process knows of it, brought up to the log's head before each answer.

Any replica that folds the same log holds the same view. Built from the store's blocks and entries; knows no HTTP.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evenodds_service.api.features import Featurizer
from evenodds_service.domain import acquisition
from evenodds_service.domain.acquisition import Choice, NotEnoughPrompts
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.fold import State, beliefs_of, fold, mopps_beliefs, new_prompt_beliefs
from evenodds_service.domain.pool import Pool, directions
from evenodds_service.domain.types import (
    Acquisition,
    BoolArray,
    FloatArray,
    IntArray,
    PoolEntry,
    Predictor,
    RawBlock,
)
from evenodds_service.model.surface import SURFACE, SURFACE_NAMES
from evenodds_service.storage.errors import RunUnknown
from evenodds_service.storage.store import Run, Store

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
    cooldown_steps: int
    max_visits: int
    candidates: Sequence[str] | None
    exclude: Sequence[str]
    groups: Mapping[str, float]


class LiveRun:
    """State and pool of one run, and the lock that serialises access to both."""

    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        self.lock = threading.RLock()
        self.state = State()
        self.pool = Pool(surface_width=len(SURFACE_NAMES), embedding_width=0)

    def catch_up(self, store: Store, run: Run, embedder: str | None) -> None:
        """Fold the log's tail up to the position that `run` shows.

        Raises:
            RunUnknown: the run was deleted since `run` was read.
        """
        with self.lock:
            while self.state.position < run.log_position:
                tail = store.entries(self.run_id, after=self.state.position)
                if not tail:  # its log went with it
                    raise RunUnknown(f"run {run.name!r} was deleted meanwhile: create it first")
                for entry in tail:
                    if isinstance(entry, PoolEntry):
                        self._extend_pool(store, entry.n_prompts, embedder)
                    fold(self.state, entry, self.pool)

    def _extend_pool(self, store: Store, n_prompts: int, embedder: str | None) -> None:
        for first in range(self.pool.n, n_prompts, _BLOCK):
            last = min(first + _BLOCK, n_prompts)
            self.pool.append(store.pool_block(self.run_id, first=first, last=last, surface=SURFACE, embedder=embedder))

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
        if predictor == "uniform":
            n = self.state.n_prompts if indices is None else len(indices)
            return np.ones(n), np.ones(n)
        return beliefs_of(self.state, self.pool, indices)

    def new_beliefs(self, predictor: Predictor, block: RawBlock) -> tuple[FloatArray, FloatArray]:
        """Beta parameters of the belief about prompts outside the pool, [n]."""
        n = len(block.prompt_ids)
        if predictor != "gps":
            return np.ones(n), np.ones(n)
        outside = Pool(surface_width=block.surface_N_S.shape[1], embedding_width=block.embedding_N_D.shape[1])
        outside.append(block)
        return new_prompt_beliefs(self.state, outside, {})

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
                directions_of=self._directions if arguments.acquisition == "yield" else None,
                recent_batches=state.recent_batches,
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


class LiveRuns:
    """The live views of a process, at most `capacity`; the least recently used one is dropped."""

    def __init__(self, store: Store, featurizer: Featurizer, *, capacity: int) -> None:
        self._store = store
        self._featurizer = featurizer
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
        live.catch_up(self._store, run, self._featurizer.vector_name(run.settings))
        return live

    def drop(self, run_id: int) -> None:
        """Forget the view of a deleted run."""
        with self._lock:
            self._runs.pop(run_id, None)
