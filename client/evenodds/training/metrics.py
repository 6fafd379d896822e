"""Figures of a training for its own tracker: what was chosen, what came of it, and how well that was foretold."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

from evenodds.training.batch import Batch
from evenodds.training.inputs import EQUAL_WITHIN

_T = TypeVar("_T")

_STEPS = 8
"""So many steps are waited for."""


class Metrics:
    """Of one process. Threads may share it.

    Args:
        n_prompts: The trainer's prompts.
    """

    def __init__(self, n_prompts: int) -> None:
        self._n_prompts = n_prompts
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._forecasts: dict[int, float] = {}
        # Of each prompt of a step: least and largest reward so far.
        self._groups: dict[int, dict[str, tuple[float, float]]] = {}
        self._figures: dict[str, float] = {}

    def chosen(self, batch: Batch, seconds: float) -> None:
        """A batch was handed out, for which the trainer waited so long."""
        with self._lock:
            self._seen.update(batch.prompt_ids)
            self._figures["coverage"] = len(self._seen) / self._n_prompts
            self._figures["from_service"] = float(batch.source == "service")
            self._figures["select_seconds"] = seconds
            if batch.forecast is not None:
                _kept(self._forecasts)[batch.step] = batch.forecast.informative_share

    def observed(self, step: int, sound: Iterable[Mapping[str, object]]) -> None:
        """Outcomes were taken in, as `checked_observations` gives them."""
        with self._lock:
            groups = self._groups.get(step)
            if groups is None:
                groups = _kept(self._groups)[step] = {}
            for outcome in sound:
                low, high = _ends(outcome)
                key = str(outcome.get("prompt_id", outcome.get("text")))
                before = groups.get(key, (math.inf, -math.inf))
                groups[key] = (min(low, before[0]), max(high, before[1]))
            informative = sum(high - low > EQUAL_WITHIN for low, high in groups.values()) / len(groups)
            self._figures["informative_share"] = informative
            forecast = self._forecasts.get(step)
            if forecast is not None:
                self._figures["forecast_share"] = forecast
                self._figures["forecast_error"] = informative - forecast

    def figures(self) -> dict[str, float]:
        """By name."""
        with self._lock:
            return dict(self._figures)


def _kept(by_step: dict[int, _T]) -> dict[int, _T]:
    while len(by_step) >= _STEPS:
        del by_step[next(iter(by_step))]
    return by_step


def _ends(outcome: Mapping[str, object]) -> tuple[float, float]:
    """The least and the largest reward; of counts, 0 where an attempt failed and 1 where one succeeded."""
    rewards = outcome.get("rewards")
    if rewards is not None:
        given = cast("Sequence[float]", rewards)
        return min(given), max(given)
    successes, attempts = cast("float", outcome["successes"]), cast("int", outcome["attempts"])
    return float(successes >= attempts - EQUAL_WITHIN), float(successes > EQUAL_WITHIN)
