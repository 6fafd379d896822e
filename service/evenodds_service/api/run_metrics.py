"""Prometheus gauges of the runs that this process serves, read when they are scraped.

Only runs in memory are shown, so the labels are as few as `EVENODDS_LIVE_RUNS`; nothing is loaded for a scrape. Every
replica shows what it knows: `max by (run)` over the replicas is the newest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import datetime

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from evenodds_service.domain.report.report import Report, report
from evenodds_service.errors import RunUnknown, StoreError
from evenodds_service.runtime.live_run import LiveRun
from evenodds_service.runtime.live_runs import LiveRuns
from evenodds_service.storage.store import Refit, Run, Store

logger = logging.getLogger(__name__)

_RUN = ("run",)
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "evenodds_run_log_position": ("Entries in the run's log.", _RUN),
    "evenodds_run_head_lag": (
        "Entries of the log that this process has not folded yet; the next call folds them.",
        _RUN,
    ),
    "evenodds_run_head_step": ("The highest step seen.", _RUN),
    "evenodds_run_observations": ("Observations accepted.", _RUN),
    "evenodds_run_pool_prompts": ("Prompts that may be selected.", _RUN),
    "evenodds_run_model_version": ("The snapshot in use; 0 without one.", _RUN),
    "evenodds_run_refit_open": ("1 while a refit waits for a worker or is worked on.", _RUN),
    "evenodds_run_refit_age_seconds": ("Since the newest refit was published.", _RUN),
    "evenodds_run_refit_seconds": ("Loading and fitting of the newest refit.", _RUN),
    "evenodds_run_refit_failed": ("1 where the newest refit failed.", _RUN),
    "evenodds_run_informative_share": (
        "Share of informative groups in the newest window of steps, by arm.",
        ("run", "arm"),
    ),
    "evenodds_run_forecast_error": (
        "Mean informative forecast less the share that came, in the newest window of steps.",
        _RUN,
    ),
    "evenodds_run_rank_correlation": ("Of forecast and observed success rate, in the newest window of steps.", _RUN),
    "evenodds_run_skill": ("Nats per observation gained on flat MoPPS over the whole run.", _RUN),
    "evenodds_run_coverage": ("Share of the pool that was ever selected or observed.", _RUN),
    "evenodds_run_alarm": ("1 for an alarm that is on, by its code.", ("run", "code")),
}


class RunMetrics(Collector):
    """Collects on scrape.

    Args:
        now: The present time, aware.
    """

    def __init__(self, store: Store, live_runs: LiveRuns, now: Callable[[], datetime]) -> None:
        self._store = store
        self._live_runs = live_runs
        self._now = now

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Names only: registering must not ask the database."""
        return iter([GaugeMetricFamily(name, text, labels=labels) for name, (text, labels) in GAUGES.items()])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family per gauge, with a sample for each run that is in memory."""
        families = {name: GaugeMetricFamily(name, text, labels=labels) for name, (text, labels) in GAUGES.items()}
        try:
            for live in self._live_runs.in_memory():
                try:
                    run = self._store.run_with_id(live.run_id)
                except RunUnknown:
                    continue  # deleted since
                refits = self._store.refits(run.id, limit=2)
                for name, labels, value in self._samples(run, live, refits):
                    families[name].add_metric([run.name, *labels], value)
        except StoreError as error:
            logger.warning("metrics of runs are left out: %s", error)
        yield from families.values()

    def _samples(
        self, run: Run, live: LiveRun, refits: tuple[Refit, ...]
    ) -> Iterator[tuple[str, tuple[str, ...], float]]:
        with live.lock:
            position = live.state.position
            found = report(live.state, live.pool)
            alarms = live.alarms(run.settings.predictor, may_fall_back=run.settings.fallback)
        yield "evenodds_run_log_position", (), run.log_position
        yield "evenodds_run_head_lag", (), run.log_position - position
        yield "evenodds_run_head_step", (), run.head_step if run.head_step is not None else -1
        yield "evenodds_run_observations", (), run.n_observations
        yield "evenodds_run_pool_prompts", (), run.pool_size
        yield "evenodds_run_model_version", (), run.model_version
        yield "evenodds_run_refit_open", (), bool(refits) and refits[0].status in ("pending", "running")
        yield "evenodds_run_refit_failed", (), bool(refits) and refits[0].status == "failed"
        done = next((refit for refit in refits if refit.status == "done"), None)
        if done is not None and done.finished_at is not None:
            yield "evenodds_run_refit_age_seconds", (), max(0.0, (self._now() - done.finished_at).total_seconds())
            parts = [(done.report or {}).get(f"seconds_{part}") for part in ("loading", "fitting")]
            yield "evenodds_run_refit_seconds", (), sum(float(part) for part in parts if isinstance(part, (int, float)))
        yield "evenodds_run_coverage", (), found.coverage.tried_share
        if found.skill.per_observation is not None:
            yield "evenodds_run_skill", (), found.skill.per_observation
        yield from _newest_window(found)
        for alarm in alarms:
            yield "evenodds_run_alarm", (alarm.code,), 1.0


def _newest_window(found: Report) -> Iterator[tuple[str, tuple[str, ...], float]]:
    if not found.windows:
        return
    window = found.windows[-1]
    shares = {"policy": window.policy_informative_share, "control": window.control_informative_share}
    for arm, share in shares.items():
        if share is not None:
            yield "evenodds_run_informative_share", (arm,), share.value
    if window.informative_forecast is not None and window.informative_share is not None:
        yield "evenodds_run_forecast_error", (), window.informative_forecast - window.informative_share
    if window.rank_correlation is not None:
        yield "evenodds_run_rank_correlation", (), window.rank_correlation
