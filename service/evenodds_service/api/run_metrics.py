"""Prometheus gauges of all runs, read when they are scraped, from the states that the database keeps.

Every replica shows the same, also one that has just started. Only what a process holds in memory, and since when it saw
that a refit is due, are its own. Three statements answer for all runs, and what they said
serves for some seconds. Of more runs than `MOST_RUNS` those are shown that were active last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from evenodds_service.domain.refits import is_due, is_open
from evenodds_service.domain.report.summary import VERDICTS, Summary
from evenodds_service.errors import StoreError
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.runtime.run_states import RunStates
from evenodds_service.storage.store import Store, WatchedRun

logger = logging.getLogger(__name__)

MOST_RUNS = 5_000
_KEPT_SECONDS = 2.0
_NO_DATA = Summary("no_data")

_RUN = ("run",)
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "evenodds_run_state": (
        f"1 for the verdict that stands: {', '.join(sorted(VERDICTS))}; 0 for the others.",
        ("run", "state"),
    ),
    "evenodds_run_alarm": (
        "1 for each alarm that is on, by its code, and whether it speaks of the whole run or of a category.",
        ("run", "code", "scope"),
    ),
    "evenodds_run_state_lag": ("Entries of the log that came since the run's state was saved.", _RUN),
    "evenodds_run_idle_seconds": ("Time since the newest batch was chosen or outcomes were reported.", _RUN),
    "evenodds_run_log_position": ("Entries in the run's log.", _RUN),
    "evenodds_run_head_lag": (
        "Entries of the log that this process has not folded yet; the next call folds them. Of runs in memory.",
        _RUN,
    ),
    "evenodds_run_head_step": ("The highest step seen.", _RUN),
    "evenodds_run_observations": ("Observations accepted.", _RUN),
    "evenodds_run_pool_prompts": ("Prompts that may be selected.", _RUN),
    "evenodds_run_model_version": ("The snapshot in use; 0 without one.", _RUN),
    "evenodds_run_refit_open": ("1 while a refit waits for a worker or is worked on.", _RUN),
    "evenodds_run_refit_waiting_seconds": (
        "Time since the open refit was asked for. Where none is open, but one is due: since this process saw that it "
        "is. 0 where neither is so.",
        _RUN,
    ),
    "evenodds_run_refit_age_seconds": ("Time since the newest refit was published whose snapshot stands.", _RUN),
    "evenodds_run_refit_seconds": ("Time that the newest refit took to load and fit.", _RUN),
    "evenodds_run_refit_failed": ("1 where the newest refit failed.", _RUN),
    "evenodds_run_informative_share": (
        "Share of informative groups in the newest window of steps, by arm.",
        ("run", "arm"),
    ),
    "evenodds_run_lift": (
        "Informative share of the policy arm less that of the control arm, and its interval.",
        (*_RUN, "end"),
    ),
    "evenodds_run_rollouts_saved": ("Rollouts saved so far against uniform choice; only where measured.", _RUN),
    "evenodds_run_forecast_error": (
        "Mean informative forecast less the share that came, in the newest windows of steps.",
        _RUN,
    ),
    "evenodds_run_rank_correlation": ("Of forecast and observed success rate, in the newest windows of steps.", _RUN),
    "evenodds_run_skill": ("Nats per observation gained on flat MoPPS over the whole run.", _RUN),
    "evenodds_run_coverage": ("Share of the pool that was ever selected or observed.", _RUN),
}


class RunMetrics(Collector):
    """Collects on scrape.

    Args:
        run_states: What this process saves is shown at once.
        now: The present time, aware.
    """

    def __init__(self, store: Store, live_runs: LiveRuns, run_states: RunStates, now: Callable[[], datetime]) -> None:
        self._store, self._live_runs, self._run_states, self._now = store, live_runs, run_states, now
        self._lock = threading.Lock()
        self._kept: tuple[WatchedRun, ...] = ()
        self._kept_until = -1.0
        self._kept_at = -1
        self._due_since: dict[int, datetime] = {}

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Names only: registering must not ask the database."""
        return iter([GaugeMetricFamily(name, text, labels=labels) for name, (text, labels) in GAUGES.items()])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family per gauge, with a sample for each run."""
        families = {name: GaugeMetricFamily(name, text, labels=labels) for name, (text, labels) in GAUGES.items()}
        try:
            watched_runs = self._watched_runs()
        except StoreError as error:
            logger.warning("/metrics leaves out all runs, because the database did not answer: %s", error)
            watched_runs = ()
        present = self._now()
        self._due_since = {
            watched.run.id: self._due_since.get(watched.run.id, present)
            for watched in watched_runs
            if is_due(watched.run, [refit for refit in (watched.refit, watched.done_refit) if refit], now=present)
        }
        folded = {live.run_id: live.state.position for live in self._live_runs.in_memory()}
        for watched in watched_runs:
            for name, labels, value in self._samples(watched, folded.get(watched.run.id)):
                families[name].add_metric([watched.run.name, *labels], value)
        yield from families.values()

    def _watched_runs(self) -> tuple[WatchedRun, ...]:
        with self._lock:  # scrapes at the same time share one look
            n_saved = self._run_states.n_saved
            if time.monotonic() >= self._kept_until or self._kept_at != n_saved:
                self._kept = self._store.watched_runs(limit=MOST_RUNS)
                self._kept_until, self._kept_at = time.monotonic() + _KEPT_SECONDS, n_saved
            return self._kept

    def _samples(self, watched: WatchedRun, folded: int | None) -> Iterator[tuple[str, tuple[str, ...], float]]:
        run, state = watched.run, watched.state
        yield "evenodds_run_log_position", (), run.log_position
        if folded is not None:
            yield "evenodds_run_head_lag", (), max(0, run.log_position - folded)
        yield "evenodds_run_head_step", (), run.head_step if run.head_step is not None else -1
        yield "evenodds_run_observations", (), run.n_observations
        yield "evenodds_run_pool_prompts", (), run.pool_size
        yield "evenodds_run_model_version", (), run.model_version
        yield from self._of_refits(watched)
        yield "evenodds_run_state_lag", (), run.log_position - (state.log_position if state is not None else 0)
        if state is not None and state.active_at is not None:
            yield "evenodds_run_idle_seconds", (), self._seconds_since(state.active_at)
        yield from _of_summary(state.summary if state is not None else _NO_DATA)

    def _of_refits(self, watched: WatchedRun) -> Iterator[tuple[str, tuple[str, ...], float]]:
        newest, done = watched.refit, watched.done_refit
        yield "evenodds_run_refit_open", (), is_open(newest)
        since = newest.requested_at if newest is not None and is_open(newest) else self._due_since.get(watched.run.id)
        yield "evenodds_run_refit_waiting_seconds", (), self._seconds_since(since) if since is not None else 0.0
        yield "evenodds_run_refit_failed", (), newest is not None and newest.status == "failed"
        if done is not None and done.finished_at is not None:
            yield "evenodds_run_refit_age_seconds", (), self._seconds_since(done.finished_at)
            parts = [(done.report or {}).get(f"seconds_{part}") for part in ("loading", "fitting")]
            yield "evenodds_run_refit_seconds", (), sum(float(part) for part in parts if isinstance(part, (int, float)))

    def _seconds_since(self, moment: datetime) -> float:
        return max(0.0, (self._now() - moment).total_seconds())


def _of_summary(summary: Summary) -> Iterator[tuple[str, tuple[str, ...], float]]:
    for verdict in VERDICTS:
        yield "evenodds_run_state", (verdict,), verdict == summary.verdict
    for labels in dict.fromkeys((alarm.code, alarm.scope) for alarm in summary.alarms):
        yield "evenodds_run_alarm", labels, 1.0
    if summary.lift is not None:
        ends = {"low": summary.lift.low, "value": summary.lift.value, "high": summary.lift.high}
        for end, value in ends.items():
            if value is not None:
                yield "evenodds_run_lift", (end,), value
    if summary.rollouts_saved is not None:
        yield "evenodds_run_rollouts_saved", (), summary.rollouts_saved.value
    for arm in ("policy", "control"):
        share = summary.figures.get(f"informative_share_{arm}")
        if share is not None:
            yield "evenodds_run_informative_share", (arm,), share
    for name in ("forecast_error", "rank_correlation", "skill", "coverage"):
        if name in summary.figures:
            yield f"evenodds_run_{name}", (), summary.figures[name]
