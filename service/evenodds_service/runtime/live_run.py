"""The folded view of one run: what a process knows of it, brought up to the log's head before each answer.

Any replica that folds the same log holds the same view. Built from the store's blocks and entries; knows no HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.distributions import informative_moments
from evenodds_service.domain.learning.checkpoint import (
    BLOCK_FORMAT,
    block_from_bytes,
    block_to_bytes,
    from_bytes,
    to_bytes,
)
from evenodds_service.domain.learning.features import Pool, directions
from evenodds_service.domain.learning.fold import fold, unseen_share
from evenodds_service.domain.learning.guardrails import Alarm, Fallback
from evenodds_service.domain.learning.prediction import (
    EachBlock,
    _beliefs,
    in_blocks,
    new_paper_beliefs,
    new_prompt_beliefs,
)
from evenodds_service.domain.learning.state import State, copied
from evenodds_service.domain.log_entries import Entry, PoolEntry, SnapshotEntry
from evenodds_service.domain.prompts import RawBlock
from evenodds_service.domain.selection import batch, selection
from evenodds_service.domain.selection.batch import Choice
from evenodds_service.domain.selection.selection import Chosen, SelectArguments, _Allowed, _in_words, _members
from evenodds_service.domain.settings import (
    BUILTIN,
    CALLER,
    NO_EMBEDDER,
    Predictor,
    RunSettings,
    check_shares,
)
from evenodds_service.errors import CheckpointUnusable, NotEnoughPrompts, RunUnknown, SnapshotUnusable, UnknownPrompts
from evenodds_service.model.embedder import storage_name
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.model.surface import SURFACE, SURFACE_NAMES
from evenodds_service.storage.store import Run, Store
from evenodds_service.timing import phase

logger = logging.getLogger(__name__)

PACKED = 8_192
"""Prompts of a packed block of the pool's features."""

_BLOCK = 10_000


class LiveRun:
    """State, pool and shared model of one run, and the lock that serialises access to them.

    `void_position` is that of the newest rewind or retract that the state knows of. Whoever chooses a batch and
    records it holds `selecting` meanwhile, so that the next one knows what is outstanding; and the arrays of many
    choices at once over a large pool would not fit.

    Args:
        each_block: Spreads the computation of a choice over threads, as an executor's map does.
    """

    def __init__(self, run_id: int, *, each_block: EachBlock = map) -> None:
        self.run_id = run_id
        self.lock = threading.RLock()
        self.selecting = threading.Lock()
        self._each_block = each_block
        self.state = State()
        self.pool = Pool(surface_width=len(SURFACE_NAMES), embedding_width=0)
        self.model: SharedModel | None = None
        self.void_position = 0
        self._is_started = False

    def catch_up(self, store: Store, run: Run, *, written: Sequence[Entry] = ()) -> None:
        """Fold the log's tail up to the position that `run` shows; the first time, from the newest checkpoint on.

        The state is that of the log as it stood at this position. Where something was voided since the last time, the
        state is folded again, from the newest checkpoint that is left.

        Args:
            written: The newest entries that `run` shows, where the caller has them: who wrote them need not read them.

        Raises:
            RunUnknown: the run was deleted since `run` was read.
        """
        embedder = vector_name(run.settings)
        with self.lock:
            if not self._is_started or run.void_position > self.state.position:
                self._start(store, run, embedder)
            while self.state.position < run.log_position:
                tail: Sequence[Entry] = written
                if not written or written[0].position != self.state.position + 1:
                    tail = store.entries(self.run_id, after=self.state.position, as_of=run.log_position)
                if not tail:  # its log went with it
                    raise RunUnknown(f"run {run.name!r} was deleted meanwhile: create it first")
                for entry in tail:
                    if isinstance(entry, PoolEntry):
                        self._extend_pool(store, entry.n_prompts, embedder)
                    elif isinstance(entry, SnapshotEntry):
                        self._attach(store, entry.version, embedder)
                    fold(self.state, entry, self.pool)

    def _start(self, store: Store, run: Run, embedder: str | None) -> None:
        self._is_started = False  # until the end: who fails on the way starts over
        self.state, self.model = State(), None
        self.pool.reserve(run.n_prompts)
        checkpoint = store.newest_checkpoint(self.run_id, at_most=run.log_position)
        if checkpoint is not None:
            try:
                self.state = from_bytes(checkpoint[1])
            except CheckpointUnusable as error:
                logger.warning("run %r: %s; folding its log from the beginning", run.name, error)
            self._extend_pool(store, self.state.n_prompts, embedder)
            if self.state.model_version:
                self._attach(store, self.state.model_version, embedder)
        self.void_position = run.void_position
        self._is_started = True

    def save(self, store: Store, run: Run, *, now: datetime) -> None:
        """Save what a process may start from: the state, and before it what is not yet saved of the pool's features.

        Raises:
            RunUnknown: the run was deleted since `run` was read.
        """
        features = _packing(vector_name(run.settings))
        with self.lock:
            position, state, n = self.state.position, to_bytes(self.state), self.state.n_prompts
        for first in range(store.packed_until(self.run_id, features=features), n - PACKED + 1, PACKED):
            last = first + PACKED
            with self.lock:
                content = block_to_bytes(self.pool.raw(first, last))
            store.save_packed_block(self.run_id, content, first=first, last=last, features=features)
        store.save_checkpoint(self.run_id, position=position, state=state, now=now)

    def _extend_pool(self, store: Store, n_prompts: int, embedder: str | None) -> None:
        while n_prompts - self.pool.n >= PACKED:
            content = store.packed_block(self.run_id, first=self.pool.n, features=_packing(embedder))
            if content is None:
                break
            try:
                block = block_from_bytes(content)
            except CheckpointUnusable as error:
                logger.warning("run with id %d: %s; reading its prompts one by one", self.run_id, error)
                break
            self.pool.append(block)
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

    def known(self, prompt_ids: Iterable[str]) -> dict[str, int]:
        """Pool indices of those of these ids that are in the pool. They never change."""
        with self.lock:
            index = self.pool.index
            return {i: index[i] for i in prompt_ids if i in index}

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
        return _beliefs(self.state, self.pool, predictor, indices)

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

    def fallback(self, predictor: Predictor) -> Fallback | None:
        """Whether choices of the run are uniform at present, and why. Only the mixture's skill is measured."""
        return self.state.rails.fallback() if predictor == "gps" else None

    def alarms(self, predictor: Predictor, *, may_fall_back: bool) -> tuple[Alarm, ...]:
        """What a person should look at in the present state."""
        return self.state.rails.alarms(
            self.pool.group_names,
            unseen_share=unseen_share(self.state),
            is_mixed=predictor == "gps",
            may_fall_back=may_fall_back,
        )

    def choose(self, run: str, arguments: SelectArguments) -> Chosen:
        """Choose a batch in the present state; observations are folded meanwhile. The caller holds `selecting`.

        Raises:
            UnknownPrompts: among the candidates or exclusions.
            NotEnoughPrompts: fewer may be selected than were asked for.
            SharesConflict: a group's least share is above its largest.
        """
        check_shares(arguments.groups, arguments.groups_at_most)
        with self.lock, phase("copy"):
            state, pool = copied(self.state), self.pool.view(self.state.basis)
            allowed = self._allowed(run, arguments)
            may_fall_back = arguments.may_fall_back and arguments.acquisition != "uniform"
            fallback = self.fallback(arguments.predictor) if may_fall_back else None
        return self._chosen(state, pool, allowed, fallback, arguments)

    def _allowed(self, run: str, arguments: SelectArguments) -> _Allowed:
        state = self.state
        waited_for, lost = selection.outstanding(
            state.outstanding_step_N, step=max(arguments.step, state.head_step), lease_steps=arguments.lease_steps
        )
        selected, last_selected = state.selected_N, state.last_selected_N
        if lost.any():  # whose outcome never came was not seen: it neither rests nor has spent a visit
            selected, last_selected = selected - lost, np.where(lost, -1, last_selected)
        eligible = selection.eligible(
            selected,
            last_selected,
            state.visits_N,
            state.last_step_N,
            step=arguments.step,
            cooldown_steps=arguments.cooldown_steps or 0,
            max_visits=arguments.max_visits,
        )
        last_seen = np.maximum(last_selected, state.last_step_N)
        rest = 0
        if arguments.cooldown_steps is None:
            rest = selection.rest_steps(state.n_prompts, arguments.batch_size)
        resting = selection.resting(last_seen, step=arguments.step, rest=rest)
        if arguments.candidates is not None:
            hint = "load it with POST /runs/{run}/prompts, or leave it out"
            among = np.zeros(state.n_prompts, dtype=bool)
            among[self.indices(run, arguments.candidates, path="candidates", hint=hint)] = True
            eligible &= among
        if arguments.exclude:
            eligible[self.indices(run, arguments.exclude, path="exclude", hint="leave it out")] = False
        return _Allowed(eligible, waited_for, resting, last_seen)

    def _chosen(
        self, state: State, pool: Pool, allowed: _Allowed, fallback: Fallback | None, arguments: SelectArguments
    ) -> Chosen:
        generator = np.random.default_rng([arguments.seed, arguments.step])
        acquired = arguments.acquisition if fallback is None else "uniform"
        with phase("beliefs"):
            a, b = _beliefs(state, pool, arguments.predictor, each_block=self._each_block)
        with phase("moments"):
            informative, informative_std = np.empty(len(a)), np.empty(len(a))

            def moments(block: slice) -> None:
                informative[block], informative_std[block] = informative_moments(
                    a[block], b[block], arguments.group_size
                )

            for _ in self._each_block(moments, in_blocks(len(a))):
                pass
        with phase("choice"):
            scores = batch.scores(
                a,
                b,
                informative,
                informative_std,
                acquisition=acquired,
                target_rate=arguments.target_rate,
                optimism=arguments.optimism,
                generator=generator,
            )
            least = _members(arguments.groups, pool, state.n_prompts)

            def directions_of(prompts: IntArray) -> FloatArray:
                assert state.basis is not None  # a pool with a prompt to choose has one
                return directions(pool.rows(state.basis, prompts))

            def chosen_among(eligible: BoolArray, control_eligible: BoolArray) -> Choice:
                return batch.choose(
                    scores,
                    informative,
                    eligible,
                    batch_size=arguments.batch_size,
                    last_seen_N=allowed.last_seen_N,
                    generator=generator,
                    directions_of=directions_of if acquired in ("yield", "paper") else None,
                    recent_batches=state.recent_batches,
                    diversity=arguments.diversity,
                    is_max_sum=acquired == "paper",
                    groups=least,
                    groups_at_most=_members(arguments.groups_at_most, pool, state.n_prompts),
                    are_groups_strict=arguments.are_groups_strict,
                    reprobe_share=arguments.reprobe_share if fallback is None else 0.0,
                    control_share=arguments.control_share,
                    control_eligible_N=control_eligible,
                )

            def without(held: BoolArray, since: IntArray, among: BoolArray) -> BoolArray:
                return selection.held_back(among, held, since, scores, batch_size=arguments.batch_size, groups=least)

            here = allowed.eligible
            if not arguments.allow_outstanding:
                here = without(allowed.waited_for, state.outstanding_step_N, here)
            # Published acquisitions stay as published: only the yield score needs the rest.
            rested = without(allowed.resting, allowed.last_seen_N, here) if acquired == "yield" else here
            try:
                try:
                    choice = chosen_among(rested, here)
                except NotEnoughPrompts:
                    if rested is allowed.eligible:
                        raise
                    # The groups' limits leave too few: do not stop a trainer.
                    choice = chosen_among(allowed.eligible, allowed.eligible)
            except NotEnoughPrompts as error:
                raise NotEnoughPrompts(
                    asked=error.asked,
                    eligible=error.eligible,
                    group=error.group,
                    advice=f" (pool {state.n_prompts}, cooldown_steps {arguments.cooldown_steps or 0}, max_visits "
                    f"{arguments.max_visits or 'none'}{_in_words(arguments.groups_at_most)}): ask for fewer, load more "
                    "prompts, or loosen what rules them out",
                ) from None
        return Chosen(
            choice=replace(choice, n_outstanding=int(allowed.waited_for[choice.prompts].sum())),
            a=a[choice.prompts],
            b=b[choice.prompts],
            prompt_ids=tuple(pool.prompt_ids[i] for i in choice.prompts),
            groups=tuple(pool.groups[i] for i in choice.prompts),
            fallback=fallback,
            position=state.position,
            model_version=state.model_version,
        )


def _packing(embedder: str | None) -> str:
    """The name under which blocks of these features are kept."""
    return f"{BLOCK_FORMAT} {SURFACE} {embedder or NO_EMBEDDER}"


def vector_name(settings: RunSettings) -> str | None:
    """Under which name the run's vectors are stored; None where there are none."""
    setting = settings.embedder or BUILTIN
    if setting == NO_EMBEDDER:
        return None
    return CALLER if setting == CALLER else storage_name(setting, settings.embedder_prompt)
