"""Which prompts a pool lets go of, so that a run on endless traffic stays within bounds."""

from __future__ import annotations

import numpy as np

from evenodds_service.domain.arrays import IntArray
from evenodds_service.domain.learning.state import State
from evenodds_service.domain.settings import RunSettings

SERVED_PROMPTS = 200_000
"""What a run keeps that answers budgets and was told nothing else: some 250 MB of memory with built-in embeddings."""

SLACK = 20
"""A pool may grow by one part in so many before it is cut: one cut costs about the same for one prompt and for all."""

MOST_AT_ONCE = 20_000
"""Prompts that one log entry retires."""

_DAY_SECONDS = 86_400


def is_above(settings: RunSettings, n_prompts: int) -> bool:
    """Whether a pool of so many prompts has to be cut."""
    most = settings.retain_prompts
    return most is not None and most > 0 and n_prompts > most + max(most // SLACK, 1)


def to_retire(state: State, settings: RunSettings, *, at: int) -> IntArray:
    """Indices in the log of the prompts to let go of, those with the oldest last outcome first. May be empty.

    A prompt that was chosen for a batch whose outcomes are still waited for stays.

    Args:
        at: The present time in seconds since 1970.
    """
    n = state.n_prompts
    order = np.argsort(state.touched_N, kind="stable")
    waits_N = (state.outstanding_step_N >= 0) & (state.outstanding_step_N + settings.lease_steps > state.head_step)
    order = order[~waits_N[order]]
    surplus = n - settings.retain_prompts if settings.retain_prompts and is_above(settings, n) else 0
    if settings.retain_days is not None:
        before = at - settings.retain_days * _DAY_SECONDS
        surplus = max(surplus, int((state.touched_N[order] < before).sum()))
    return np.sort(state.serials_N[order[: min(surplus, MOST_AT_ONCE)]])
