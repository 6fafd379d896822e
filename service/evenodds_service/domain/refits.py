"""When a run's shared model should be fitted anew.

Workers ask for the refits that are due. The metrics tell for how long a due one has waited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from evenodds_service.domain.settings import RunSettings

FIRST_FIT_OBSERVATIONS = 128
RETRY_SECONDS = 30
GROWN_SECONDS = 10
"""So long a run that learns from others waits with a few more prompts: they come in many calls."""


class ObservedRun(Protocol):
    """What the rule looks at of a run."""

    @property
    def settings(self) -> RunSettings: ...
    @property
    def n_prompts(self) -> int: ...
    @property
    def n_observations(self) -> int: ...
    @property
    def model_version(self) -> int: ...


class AskedRefit(Protocol):
    """What the rule looks at of a refit."""

    @property
    def status(self) -> str: ...
    @property
    def finished_at(self) -> datetime | None: ...
    @property
    def model_version(self) -> int | None: ...
    @property
    def report(self) -> Mapping[str, object] | None: ...


def is_open(refit: AskedRefit | None) -> bool:
    """Whether the refit waits for a worker, or one works on it."""
    return refit is not None and refit.status in ("pending", "running")


def is_due(run: ObservedRun, refits: Sequence[AskedRefit], *, now: datetime) -> bool:
    """Whether the run should be refitted: enough new observations, or enough time since the last fit.

    While there are few observations, their doubling is enough. After a failure it waits for half a minute at least.

    Args:
        refits: The run's newest ones, newest first. The newest of all and the newest whose snapshot stands are enough.
    """
    newest = refits[0] if refits else None
    if is_open(newest):
        return False
    retry = timedelta(seconds=max(RETRY_SECONDS, run.settings.refit_every_seconds / 10))
    if newest and newest.status == "failed" and newest.finished_at and not _has_passed(retry, newest.finished_at, now):
        return False
    standing = (refit for refit in refits if refit.model_version and refit.model_version <= run.model_version)
    done = next(standing, None)  # the newest whose snapshot was not voided since
    if run.settings.learn_from and _has_grown(run, done, now=now):
        return True
    fitted = _figure(done, "observations")
    new = run.n_observations - fitted
    if new >= min(run.settings.refit_every_observations, max(FIRST_FIT_OBSERVATIONS, fitted)):
        return True
    if done is None or done.finished_at is None or new <= 0:
        return False
    return _has_passed(timedelta(seconds=run.settings.refit_every_seconds), done.finished_at, now)


def _has_passed(duration: timedelta, since: datetime, now: datetime) -> bool:
    """Whether so much time has. A moment in the future is of a clock that was ahead, and nobody waits for it."""
    return now - since >= duration or now < since


def _has_grown(run: ObservedRun, done: AskedRefit | None, *, now: datetime) -> bool:
    """Whether a run that learns from others has prompts of which it was not told yet what they showed."""
    fitted = _figure(done, "prompts")
    if run.n_prompts >= 2 * fitted:
        return run.n_prompts > 0
    since = done.finished_at if done is not None else None
    return run.n_prompts > fitted and since is not None and _has_passed(timedelta(seconds=GROWN_SECONDS), since, now)


def _figure(refit: AskedRefit | None, name: str) -> int:
    """A count of the refit's report; 0 without one."""
    value = (refit.report or {}).get(name, 0) if refit is not None else 0
    return int(value) if isinstance(value, (int, float)) else 0
