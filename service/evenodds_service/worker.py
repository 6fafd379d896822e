"""The worker: watches runs, claims refits, fits their shared model and publishes it as a snapshot.

Any number of workers may run: a lease and the number of the claim let one of them work on a refit and fence the others.
No transaction is open while a model fits. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from scipy import sparse

from evenodds_service.domain.arrays import IntArray
from evenodds_service.domain.learning.predictors import PREDICTORS
from evenodds_service.domain.learning.state import rows_of_serials
from evenodds_service.domain.log_entries import ObserveEntry
from evenodds_service.domain.prompts import Prompt, join_key, text_to_read
from evenodds_service.domain.refits import is_due
from evenodds_service.errors import LogCompacted, NothingToFit, RefitLost, RunUnknown, StoreError, StoreUnavailable
from evenodds_service.model.history import History
from evenodds_service.model.ngrams import ngram_matrix
from evenodds_service.model.refit import TrainingData
from evenodds_service.model.snapshot import SharedModel
from evenodds_service.model.sources import NO_KEY, Joined, Source, TextModel, joined
from evenodds_service.redaction import described
from evenodds_service.runtime.live_run import LiveRun, vector_name
from evenodds_service.runtime.retention import Tidying, history_of
from evenodds_service.storage.store import NewSnapshot, Refit, Run, Store

logger = logging.getLogger(__name__)

TIDY_SECONDS = 60.0

_PAGE = 1_000
_KEPT_RUNS = 4

Fit = Callable[[TrainingData], SharedModel]
"""What a worker does with the training data; the device is chosen by whoever builds the worker."""


class Worker:
    """Works off refits until it is told to stop.

    Args:
        name: Names the worker in refits; unique among those that run.
        clock: The present time, aware.
        fit: Fits one run's shared model.
        lease: How long a claim holds without a sign of life.
        poll_seconds: How long to wait where nothing is due.
    """

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        clock: Callable[[], datetime],
        fit: Fit,
        lease: timedelta = timedelta(seconds=60),
        poll_seconds: float = 1.0,
    ) -> None:
        self._store = store
        self._name = name
        self._clock = clock
        self._fit = fit
        self._lease = lease
        self._poll_seconds = poll_seconds
        self._kept: OrderedDict[int, _KeptRun] = OrderedDict()
        self._tidying = Tidying(store)
        self._tidied_at = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; a fit that has begun is finished and published first."""
        while not stop.is_set():
            try:
                worked = self.work_once()
            except StoreError as error:
                logger.warning("%s: %s", self._name, error)
                worked = False
            if not worked:
                stop.wait(self._poll_seconds)

    def run_until_idle(self, stop: threading.Event) -> None:
        """Work until nothing is due, or `stop` is set.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        while not stop.is_set() and self.work_once():
            pass

    def work_once(self) -> bool:
        """Ask for the refits that are due, and work on one. Returns whether there was one.

        Raises:
            StoreUnavailable: the database did not answer; nothing was published.
        """
        self._request_due()
        self._tidy()
        refit = self._store.claim_refit(worker=self._name, lease=self._lease, now=self._clock())
        if refit is None:
            return False
        with self._heartbeat(refit):
            try:
                self._work(refit)
            except (RefitLost, RunUnknown) as error:
                logger.warning("%s: %s", self._name, error)
            except (StoreUnavailable, LogCompacted):
                raise  # the lease runs out, and the refit is taken up again
            except Exception as error:  # one run's bad data must not keep the others from being fitted
                logger.exception("%s: refit %d failed", self._name, refit.id)
                self._store.fail_refit(refit, error=described(error), now=self._clock())
        return True

    def _request_due(self) -> None:
        for run in _all_runs(self._store):
            may_be = run.n_observations or (run.settings.learn_from and run.n_prompts)
            if may_be and (newest_seen := self._due_after(run)) is not None:
                self._store.request_refit(run.id, now=self._clock(), newest_seen=newest_seen)

    def _tidy(self) -> None:
        """Let go of what runs need not keep, now and then: whoever serves a run does it sooner."""
        if time.monotonic() - self._tidied_at < TIDY_SECONDS:
            return
        self._tidied_at = time.monotonic()
        runs = self._store.runs(limit=_PAGE)
        while runs:
            for run in runs:
                if self._tidying.is_due(run, now=self._clock()):
                    live = self._kept_run(run.id).live
                    self._tidying.now(live, run, now=self._clock())
                    self._save_state(live, run)
            runs = self._store.runs(after=runs[-1].name, limit=_PAGE)

    def _kept_run(self, run_id: int) -> _KeptRun:
        kept = self._kept.setdefault(run_id, _KeptRun(run_id))
        self._kept.move_to_end(run_id)
        while len(self._kept) > _KEPT_RUNS:
            self._kept.popitem(last=False)
        return kept

    def _due_after(self, run: Run) -> int | None:
        """After which refit another one is due, 0 where it is the first; None where none is due."""
        refits = self._store.refits(run.id, limit=10)
        if not is_due(run, refits, now=self._clock()):
            return None
        # A run that is older than its refits seems to have lost what was published meanwhile: look again.
        try:
            is_still_due = is_due(self._store.run_with_id(run.id), refits, now=self._clock())
        except RunUnknown:
            return None
        newest = refits[0].id if refits else 0
        return newest if is_still_due else None

    def _work(self, refit: Refit) -> None:
        started = time.monotonic()
        run = self._store.run_with_id(refit.run_id)
        kept = self._kept_run(run.id)
        data = kept.training_data(self._store, run)
        state = kept.live.state
        fitted = _Fitted(state.position, state.n_observations, state.n_prompts)
        loaded = time.monotonic()
        model = self._fit(data)
        serials_N = kept.live.state.serials_N
        if kept.live.state.n_retired:
            model = dataclasses.replace(model, serials_N=serials_N.copy())
        seconds = {"seconds_loading": loaded - started, "seconds_fitting": time.monotonic() - loaded}
        published = NewSnapshot(
            embedder=model.embedder,
            weights=model.to_bytes(),
            fitted_position=fitted.position,
            report={**model.report, **seconds, **fitted.figures(run)},
        )
        snapshot = self._store.publish_refit(refit, published, now=self._clock())
        logger.info("%s: run %r has the new snapshot %d after %s", self._name, run.name, snapshot.version, seconds)
        run = self._store.run_with_id(refit.run_id)
        kept.live.catch_up(self._store, run)
        kept.live.save(self._store, run, now=self._clock())
        self._save_state(kept.live, run)

    def _save_state(self, live: LiveRun, run: Run) -> None:
        self._store.save_run_states([(run.id, *live.summary(run.settings))], now=self._clock())

    @contextmanager
    def _heartbeat(self, refit: Refit) -> Iterator[None]:
        """Extend the lease from a thread of its own for as long as the body runs."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self._lease.total_seconds() / 3):
                self._extend(refit)

        thread = threading.Thread(target=beat, name=f"lease-{refit.id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _extend(self, refit: Refit) -> None:
        try:
            self._store.extend_lease(refit.id, worker=self._name, lease=self._lease, now=self._clock())
        except StoreError as error:
            logger.warning(
                "%s: the lease of refit %d could not be extended, so another worker may take it over: %s",
                self._name,
                refit.id,
                error,
            )


@dataclass(frozen=True, slots=True)
class _Fitted:
    """What a fit has seen: the log up to a position, with so many observations and prompts."""

    position: int
    n_observations: int
    n_prompts: int

    def figures(self, run: Run) -> dict[str, float]:
        """For the report, by which the next refit becomes due."""
        figures: dict[str, float] = {"observations": self.n_observations}
        return figures | {"prompts": self.n_prompts} if run.settings.learn_from else figures


class _KeptLog:
    """The outcomes of a run's log as far as it was read."""

    def __init__(self) -> None:
        self._pieces: list[History] = []
        self._read_to = 0
        self._void_position = 0

    def read(self, store: Store, run: Run, *, to: int, void_position: int) -> History:
        """Everything up to this log position, as the log stood there; what is below the run's base comes from there.

        Raises:
            RunUnknown: the run was deleted since `run` was read.
            LogCompacted: the run's base has passed this position.
        """
        if self._void_position != void_position:
            self._pieces, self._read_to = [], 0
            self._void_position = void_position
        while self._read_to < to:
            base, content = store.base_history(run.id)
            if base > to:
                raise LogCompacted(f"the log of run {run.name!r} was compacted up to position {base} meanwhile")
            if base > self._read_to:
                self._pieces = [History.from_bytes(content)] if content is not None else []
                self._read_to = base
                continue
            entries = store.entries(run.id, after=self._read_to, as_of=to)
            if not entries:
                raise RunUnknown(f"run {run.name!r} was deleted meanwhile")
            if entries[-1].position != self._read_to + len(entries):
                continue  # compacted since the look at its base
            self._pieces += [history_of(entry) for entry in entries if isinstance(entry, ObserveEntry)]
            self._read_to = entries[-1].position
        return History.gathered(self._pieces)

    def keep(self, history: History) -> None:
        """In place of all that was read."""
        self._pieces = [history]


class _KeptSource:
    """What a worker keeps of a run that another one learns from: its outcomes and the keys of its prompts."""

    def __init__(self) -> None:
        self._begin_anew(0)

    def _begin_anew(self, n_retired: int) -> None:
        self._n_retired = n_retired
        self._log = _KeptLog()
        self._serials: list[int] = []
        self._keys: list[int] = []
        self._ids: list[str] = []

    def read(self, store: Store, run: Run, *, texts: _KeptTexts, own: Container[int]) -> Source:
        """The run as it stands. Its texts are left with `texts`, save for those whose keys are among `own`.

        Raises:
            RunUnknown: the run was deleted since `run` was read.
        """
        try:
            return self._read(store, run, texts, own)
        except LogCompacted:  # meanwhile; it is seldom
            return self._read(store, store.run_with_id(run.id), texts, own)

    def _read(self, store: Store, run: Run, texts: _KeptTexts, own: Container[int]) -> Source:
        if self._n_retired != run.n_retired:
            self._begin_anew(run.n_retired)  # what was retired counts no more
        is_last = False
        while not is_last:
            prompts = store.prompts(run.id, first=self._serials[-1] + 1 if self._serials else 0, limit=_PAGE)
            keys = [_key_of(prompt) for prompt in prompts]
            texts.add(keys, [text_to_read(prompt.text, prompt.answer) for prompt in prompts], own)
            self._serials += [prompt.index for prompt in prompts]
            self._keys += keys
            self._ids += [prompt.prompt_id for prompt in prompts]
            is_last = len(prompts) < _PAGE
        history = self._log.read(store, run, to=run.log_position, void_position=run.void_position)
        row = {serial: row for row, serial in enumerate(self._serials)}
        rows = np.array([row.get(serial, -1) for serial in history.prompts.tolist()], dtype=np.int64)
        known = dataclasses.replace(history.rows(rows >= 0), prompts=rows[rows >= 0])
        return Source(run.name, np.array(self._keys, dtype=np.int64), known, self._ids)


class _KeptTexts:
    """n-grams of the prompts that a run does not have and its sources do, by their keys."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._blocks: list[sparse.csr_matrix] = []

    def add(self, keys: Sequence[int], texts: Sequence[str], own: Container[int]) -> None:
        """Those of them that are not there yet, and not among the run's own."""
        told = zip(keys, texts, strict=True)
        fresh = {key: text for key, text in told if text and key not in self._place and key not in own}
        if fresh:
            self._place |= {key: len(self._place) + i for i, key in enumerate(fresh)}
            self._blocks.append(ngram_matrix(list(fresh.values())))

    def below(self, own: sparse.csr_matrix, keys_F: IntArray) -> sparse.csr_matrix:
        """These n-grams, and below them those of the prompts of these keys: empty rows for those without a text."""
        rows = np.array([self._place.get(key, -1) for key in keys_F.tolist()], dtype=np.int64)
        if not (rows >= 0).any():
            return sparse.vstack([own, sparse.csr_matrix((len(rows), own.shape[1]), dtype=own.dtype)], format="csr")
        kept = sparse.vstack([*self._blocks, sparse.csr_matrix((1, own.shape[1]), dtype=own.dtype)], format="csr")
        self._blocks = [kept[:-1]]
        return sparse.vstack([own, kept[rows]], format="csr")


class _KeptRun:
    """What a worker keeps of a run between refits: its live run, the history, the texts' n-grams, and its sources."""

    def __init__(self, run_id: int) -> None:
        self.live = LiveRun(run_id, keeps_raw=True)
        self._log = _KeptLog()
        self._ngrams = sparse.csr_matrix((0, 0))
        self._serials_N = np.zeros(0, dtype=np.int64)  # whose n-grams these are
        self._keys_N = np.zeros(0, dtype=np.int64)
        self._sources: dict[int, _KeptSource] = {}
        self._texts = _KeptTexts()
        self._text_model = TextModel()

    def training_data(self, store: Store, run: Run) -> TrainingData:
        """Everything up to the log position of the live run, which is at least the one that `run` shows.

        Raises:
            NothingToFit: the run has no prompts.
            RunUnknown: the run was deleted since `run` was read.
        """
        self.live.catch_up(store, run)
        state, pool = self.live.state, self.live.pool
        if state.basis is None:
            raise NothingToFit(f"run {run.name!r} has no prompts to fit: load them with POST /runs/{{run}}/prompts")
        history = self._log.read(store, run, to=state.position, void_position=self.live.void_position)
        rows = rows_of_serials(state, history.prompts)
        if state.n_retired:
            history, rows = history.rows(rows >= 0), rows[rows >= 0]
            self._log.keep(history)  # what is retired is read no more
        self._read_texts(store, run)
        own = self._ngrams[: state.n_prompts]
        sources = self._joined(store, run, state.n_prompts)
        return TrainingData(
            embedder=vector_name(run.settings) or "",
            predictor=run.settings.predictor,
            group_size=run.settings.group_size,
            model_size=run.settings.model_size,
            basis=state.basis,
            x_N_d=pool.matrix(state.basis, state.n_prompts),
            embeddings_N_D=pool.raw(0, state.n_prompts).embedding_N_D,
            ngrams=own,
            history=dataclasses.replace(history, prompts=rows),
            warm_start=self.live.model,
            sources=sources,
            source_ngrams=None if sources is None else self._texts.below(own, sources.others_F),
            source_texts=self._text_model,
        )

    def _read_texts(self, store: Store, run: Run) -> None:
        """The n-grams of the pool's texts, row by row; a text that was erased meanwhile counts as empty."""
        serials_N = self.live.state.serials_N
        kept_N = np.isin(self._serials_N, serials_N)
        if not kept_N.all():
            self._ngrams, self._serials_N = self._ngrams[kept_N], self._serials_N[kept_N]
            self._keys_N = self._keys_N[kept_N]
        fresh = serials_N[len(self._serials_N) :]
        blocks = [self._ngrams] if len(self._serials_N) else []
        keys = [self._keys_N]
        for first in range(0, len(fresh), _PAGE):
            page = fresh[first : first + _PAGE]
            found = {prompt.index: prompt for prompt in store.prompts(run.id, first=int(page[0]), limit=_PAGE)}
            prompts = [found.get(serial) for serial in page.tolist()]
            blocks.append(
                ngram_matrix([text_to_read(prompt.text, prompt.answer) if prompt else "" for prompt in prompts])
            )
            keys.append(np.array([NO_KEY if prompt is None else _key_of(prompt) for prompt in prompts], dtype=np.int64))
        self._ngrams = sparse.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0]
        self._serials_N, self._keys_N = serials_N.copy(), np.concatenate(keys)

    def _joined(self, store: Store, run: Run, n_prompts: int) -> Joined | None:
        """What the runs showed that this one learns from, as they stand now; None where there is nothing."""
        settings = run.settings
        if not settings.learn_from or PREDICTORS[settings.predictor].is_published:
            self._sources, self._texts, self._text_model = {}, _KeptTexts(), TextModel()
            return None
        known, self._sources, found = self._sources, {}, []
        own = frozenset(self._keys_N.tolist())
        for other in _all_runs(store):
            if other.id == run.id or not other.n_observations or not settings.learns_from(other.name):
                continue
            kept = known.get(other.id, _KeptSource())
            try:
                shares_ids = settings.data_set is not None and other.settings.data_set == settings.data_set
                source = kept.read(store, other, texts=self._texts, own=own)
            except RunUnknown:
                continue  # deleted meanwhile: it counts no more
            found.append(source if shares_ids else dataclasses.replace(source, ids=()))
            self._sources[other.id] = kept
        if not found:
            return None
        ids = self.live.pool.prompt_ids[:n_prompts]
        return joined(self._keys_N[:n_prompts], ids, found)


def _all_runs(store: Store) -> Iterator[Run]:
    after, is_last = "", False
    while not is_last:
        runs = store.runs(after=after, limit=_PAGE)
        yield from runs
        is_last = len(runs) < _PAGE
        after = runs[-1].name if runs else after


def _key_of(prompt: Prompt) -> int:
    """By which prompts of runs are joined. Prompts that are older than their join key are joined by the whole text
    where the run keeps none.
    """
    key = prompt.join_key or (join_key(prompt.text) if prompt.text else prompt.text_key)
    return int(key[:15], 16) if key else NO_KEY
