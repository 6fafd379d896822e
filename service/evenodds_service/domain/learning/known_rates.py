"""What others showed on a run's prompts, as inputs of a regression that learns how far this policy is like them.

Each other (a model, an earlier run) is a column of smoothed log-odds. A strong model's optimism and an easy verifier
are an offset and a slope, which the regression learns from the first groups. Few others are read one by one; of many
the mean is read, and those that have foreseen this run best. Rates that came with the prompts become columns here;
those of runs that are learned from come as columns with a snapshot. Knows no texts; all sums are as `exact` wants them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.learning.regression import FEATURE_STEP, SLOPE_VARIANCE, OnlineLogistic
from evenodds_service.domain.prompts import MEAN, NamedRates, SourceColumns

MOST_COLUMNS = 8
"""That are read one by one; of more the mean is read, and so many of those nearest. Alike for rates that came with the
prompts and for runs that are learned from."""
FIRST_COMPARISON = 64
"""Prompts that are observed before the nearest of many others are read one by one."""

_SMOOTHING = 2.0
_SWEEPS = 5
_SLOPE = 0.9  # of another's log-odds, when it is asked how well they foresee this run's outcomes
_MEAN_SLOPE, _MEAN_VARIANCE = 0.5, 0.25
_RATE_RANGE = (0.02, 0.98)
_VALUES = ("names", "n_prompts", "nearest", "n_compared", "version", "sources", "has_mean")
_ARRAYS = ("means_R", "centres_R", "levels_R", "levels_S")


@dataclass(frozen=True, slots=True, eq=False)
class RateColumns:
    """How known rates become inputs.

    Attributes:
        names: R others, in the order in which the pool first told of them.
        n_prompts: Size of the pool that the columns were derived from.
        means_R: Mean success rates, toward which few attempts are smoothed.
        centres_R: What of its log-odds is the other's own: where it has not tried a prompt, this plus what those show
            who have tried it.
        levels_R: Mean log-odds, over all prompts of which something is known.
        nearest: Which of more than `MOST_COLUMNS` others are read one by one, beside the mean of all.
        n_compared: After how many comparisons these were chosen.
        version: Of the snapshot that brought the columns of other runs; 0 without any.
        sources: Their names.
        levels_S: Their mean log-odds.
        has_mean: Whether the first of them is the mean of all.
    """

    names: tuple[str, ...]
    n_prompts: int
    means_R: FloatArray
    centres_R: FloatArray
    levels_R: FloatArray
    nearest: tuple[int, ...] = ()
    n_compared: int = 0
    version: int = 0
    sources: tuple[str, ...] = ()
    levels_S: FloatArray = field(default_factory=lambda: np.zeros(0))
    has_mean: bool = False

    @staticmethod
    def of(told: NamedRates) -> RateColumns:
        """Derive the columns from what is told of a pool's prompts, by each of them of one at least. Deterministic."""
        tells = np.isfinite(told.rates_N_R)
        rows = np.flatnonzero(tells.any(axis=1))
        rates_N_R, attempts_N_R, tells = told.rates_N_R[rows], told.attempts_N_R[rows], tells[rows]
        counts_R = tells.sum(axis=0)
        means_R = np.clip(np.where(tells, rates_N_R, 0.0).sum(axis=0, dtype=np.float64) / counts_R, *_RATE_RANGE)
        log_odds = np.where(tells, _smoothed(rates_N_R, attempts_N_R, means_R), 0.0)
        centres_R = np.zeros(len(told.names))
        for _ in range(_SWEEPS):
            eases_N = np.where(tells, log_odds - centres_R, 0.0).sum(axis=1) / tells.sum(axis=1)
            centres_R = np.where(tells, log_odds - eases_N[:, None], 0.0).sum(axis=0) / counts_R
        levels_R = np.where(tells, log_odds, centres_R + eases_N[:, None]).sum(axis=0) / len(rows)
        return RateColumns(told.names, len(told.rates_N_R), means_R, centres_R, levels_R)

    def beside(self, version: int, sources: SourceColumns | None) -> RateColumns:
        """The same beside the columns of other runs that this snapshot brings, if it brings any."""
        if sources is None:
            return replace(self, version=0, sources=(), levels_S=np.zeros(0), has_mean=False)
        return replace(
            self, version=version, sources=sources.names, levels_S=sources.levels_C, has_mean=sources.has_mean
        )

    @property
    def width(self) -> int:
        """Number of inputs: 1 and the columns that are read."""
        return 1 + self._n_named + len(self.sources)

    @property
    def read(self) -> tuple[str, ...]:
        """Names of the columns that are read."""
        few = len(self.names) <= MOST_COLUMNS
        named = self.names if few else (MEAN, *(self.names[i] for i in self.nearest))
        return (*named, *self.sources)

    @property
    def _n_named(self) -> int:
        n = len(self.names)
        return n if n <= MOST_COLUMNS else 1 + len(self.nearest)

    def project(self, told: NamedRates, shown_n_S: FloatArray | None = None) -> FloatArray:
        """Inputs float32 [n, width], 1 first; rows of NaN for prompts of which nothing is known.

        A row is a function of its prompt alone, to the last bit. All are multiples of `FEATURE_STEP`.

        Args:
            shown_n_S: What the sources showed, rows of NaN where nothing; None only where there are no sources.
        """
        log_odds = self.log_odds(told)
        shown: FloatArray = np.empty((len(log_odds), 0))
        if self.sources and shown_n_S is not None:
            log_odds, shown = self._completed(log_odds, shown_n_S)
        x = np.ones((len(log_odds), self.width), dtype=np.float32)
        x[np.isnan(log_odds).any(axis=1) | np.isnan(shown).any(axis=1), 0] = np.nan
        n = self._n_named
        if len(self.names) <= MOST_COLUMNS:
            x[:, 1 : 1 + n] = log_odds
        else:
            x[:, 1] = log_odds.sum(axis=1) / len(self.names)
            x[:, 2 : 1 + n] = log_odds[:, list(self.nearest)]
        x[:, 1 + n :] = shown
        return np.asarray(np.rint(x * np.float32(1.0 / FEATURE_STEP)) * np.float32(FEATURE_STEP))

    def _completed(self, log_odds_n_R: FloatArray, shown_n_S: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Both parts, where one of them knows nothing of a prompt by what the other shows, at its own level."""
        both = np.concatenate((log_odds_n_R, shown_n_S), axis=1)
        levels = np.concatenate((self.levels_R, self.levels_S))
        tells = np.isfinite(both)
        n_told = tells.sum(axis=1)
        eases_n = np.where(tells, both - levels, 0.0).sum(axis=1) / np.where(n_told, n_told, np.nan)
        both = np.where(tells, both, levels + eases_n[:, None])
        return both[:, : len(self.names)], both[:, len(self.names) :]

    def log_odds(self, told: NamedRates) -> FloatArray:
        """Smoothed log-odds of every other, float64 [n, R]; rows of NaN for prompts of which nothing is known."""
        place = {name: i for i, name in enumerate(told.names)}
        rates_N_R = np.full((len(told.rates_N_R), len(self.names)), np.nan)
        attempts_N_R = np.ones(rates_N_R.shape)
        for i, name in enumerate(self.names):
            if name in place:
                rates_N_R[:, i], attempts_N_R[:, i] = told.rates_N_R[:, place[name]], told.attempts_N_R[:, place[name]]
        tells = np.isfinite(rates_N_R)
        log_odds = np.where(tells, _smoothed(rates_N_R, attempts_N_R, self.means_R), 0.0)
        n_told = tells.sum(axis=1)
        eases_N = np.where(tells, log_odds - self.centres_R, 0.0).sum(axis=1) / np.where(n_told, n_told, np.nan)
        filled = np.where(tells, log_odds, self.centres_R + eases_N[:, None])
        return np.asarray(np.where(np.isnan(eases_N)[:, None], np.nan, filled))

    def foreseen(self, log_odds_n_R: FloatArray, k_n: FloatArray, counts_n: FloatArray, mean: float) -> FloatArray:
        """How well each other foresees these outcomes, log likelihood per attempt summed over the prompts, [R].

        As if this policy's log-odds were .9 of the other's, shifted to the run's mean rate.
        """
        shifted = _SLOPE * (log_odds_n_R - self.levels_R) + float(exact.log_odds(np.array([mean]))[0])
        rates_n_R = exact.sigmoid(shifted)
        y = (k_n / counts_n)[:, None]
        return exact.in_order(y * exact.log(rates_n_R) + (1.0 - y) * exact.log(1.0 - rates_n_R))

    def reading(self, closeness_R: FloatArray, n_compared: int) -> RateColumns:
        """The same, reading those one by one that have foreseen this run best."""
        best = np.argsort(-closeness_R, kind="stable")[:MOST_COLUMNS]
        return replace(self, nearest=tuple(sorted(best.tolist())), n_compared=n_compared)

    def keeping(self, before: RateColumns) -> RateColumns:
        """The same, reading those one by one that were read before."""
        place = {name: i for i, name in enumerate(self.names)}
        kept = tuple(sorted(place[before.names[i]] for i in before.nearest if before.names[i] in place))
        return replace(self, nearest=kept, n_compared=before.n_compared)

    def regression(self) -> OnlineLogistic:
        """Starts as the mean of the others' log-odds, with an offset of 0."""
        n_named, n_sources = self._n_named, len(self.sources)
        slopes, variances = _starting(n_named, has_mean=len(self.names) > MOST_COLUMNS)
        if n_sources:
            share = n_named / (n_named + n_sources)
            more, their_variances = _starting(n_sources, has_mean=self.has_mean)
            slopes = np.concatenate((slopes * share, more * (1.0 - share)))
            variances = np.concatenate((variances, their_variances))
        return OnlineLogistic.starting(slopes, variances)

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, FloatArray]]:
        """The columns as JSON-ready values and as arrays; `from_arrays` takes both back."""
        return {name: getattr(self, name) for name in _VALUES}, {name: getattr(self, name) for name in _ARRAYS}

    @staticmethod
    def from_arrays(header: Mapping[str, Any], arrays: Mapping[str, FloatArray]) -> RateColumns:
        """The columns that `to_arrays` took apart."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in header.items()}
        return RateColumns(**values | {name: arrays[name] for name in _ARRAYS})


def _starting(n: int, *, has_mean: bool) -> tuple[FloatArray, FloatArray]:
    """Slopes of n columns that a regression starts with, and their variances. A mean comes first."""
    if not has_mean:
        return np.full(n, 1.0 / max(n, 1)), np.full(n, SLOPE_VARIANCE)
    slopes = np.array([_MEAN_SLOPE if n > 1 else 1.0] + [(1.0 - _MEAN_SLOPE) / max(n - 1, 1)] * (n - 1))
    return slopes, np.array([_MEAN_VARIANCE] + [SLOPE_VARIANCE] * (n - 1))


def _smoothed(rates_N_R: FloatArray, attempts_N_R: FloatArray, means_R: FloatArray) -> FloatArray:
    """log-odds of (k + 2 m) / (n + 2), m the other's mean rate; what is NaN gives 0."""
    rates = np.nan_to_num(rates_N_R.astype(np.float64), nan=0.5)
    attempts = attempts_N_R.astype(np.float64)
    return exact.log_odds((rates * attempts + _SMOOTHING * means_R) / (attempts + _SMOOTHING))
