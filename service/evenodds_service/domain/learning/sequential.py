"""Sequential tests of outcomes against their forecasts, for the run and for each category: has something broken?

Each test bets against the claim that outcomes are about as forecast. A prompt's attempts are one bet, whose factor is
1 on average, or less, as long as the claim holds, however the attempts of one prompt hang together. (Betting:
Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024.) The logarithms of the
factors add up to the evidence, which never falls below 0, as in a CUSUM: so the evidence counts from the step at which
the fault began. Such an e-detector exceeds log(h) once in h bets or less often (Shin, Ramdas and Rinaldo, "E-detectors:
a nonparametric framework for sequential change detection", 2024). What keeps ordinary runs far below that is the
benefit of the doubt: the claim is not that forecasts are right, but that they are off by no more than a whole unit of
log-odds. That leaves room for what the prompts of a batch share, because the policy has moved.

An alarm is raised where the evidence reaches `ALARM_NATS`, and ends where outcomes that are as forecast have brought it
back to 0. A model that has adapted to a fault forecasts it: outcomes that are not surprising any more neither add to
the evidence nor take from it. Part of the fold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning.tallies import MAX_GROUPS, Met

LOW, HIGH, DULL, FLIPPED = range(4)
"""Outcomes are lower or higher than forecast; fewer groups are informative; easy and hard are swapped."""

COUNT, FORECAST, OUTCOME = range(3)
ALARM_NATS = float(exact.log(1_000.0))
_MOST_NATS = 2.0 * ALARM_NATS
"""More evidence is not kept, so that the end of a fault is seen within a few steps."""

_LEAST_FORECAST = 1e-4
_TOLERATED, _ALTERNATIVE = float(exact.exp(-1.0)), float(exact.exp(-3.0))
"""Odds may be off by the first factor. The bets win the most where they are off by the second."""

_FLIP_BET, _FLIP_TOLERATED = 9.0, 0.1
_FLIP_FORECAST, _FLIP_OUTCOME = 0.15, 0.7
"""Stake on the product of forecast and outcome, both from the mean of their batch, and the slope below 0 that is
tolerated. What is further from the mean counts as so far, so that the factor stays positive:
9 (.15 .7 + .1 .15^2) < 1."""
_LEAST_FLIPPED = 8


@dataclass(slots=True)
class Watch:
    """The evidence so far. Axis R: the run, then each category by its code, up to 502 rows. Axis T: the four tests,
    `LOW`, `HIGH`, `DULL` and `FLIPPED`; the last is made for the run alone.

    Attributes:
        nats: [R, T] evidence against the claim, in [0, 2 `ALARM_NATS`].
        since, last: [R, T] the step of its first bet, and the newest step that spoke against the claim; -1: none.
        sums: [R, T, 3] until the alarm was raised: prompts, sum of what was forecast, and sum of what came.
        is_raised: [R, T] whether the alarm is on.
        met: [R] the newest step at which anything was compared; -1: none.
        ended: [T, 2] of the run: first and last step of the newest fault that has ended; -1: none.
    """

    nats: FloatArray = field(default_factory=partial(np.zeros, (1, 4)))
    since: IntArray = field(default_factory=lambda: np.full((1, 4), -1, np.int64))
    last: IntArray = field(default_factory=lambda: np.full((1, 4), -1, np.int64))
    sums: FloatArray = field(default_factory=partial(np.zeros, (1, 4, 3)))
    is_raised: BoolArray = field(default_factory=lambda: np.zeros((1, 4), np.bool_))
    met: IntArray = field(default_factory=lambda: np.full(1, -1, np.int64))
    ended: IntArray = field(default_factory=lambda: np.full((4, 2), -1, np.int64))

    def observe(self, step: int, met: Met, groups_n: IntArray) -> None:
        """Bet on outcomes. Only those count whose forecast was made by a model that knew something.

        Args:
            groups_n: The prompts' group codes.
        """
        used = np.flatnonzero(met.is_judged_n)
        if not len(used):
            return
        rate, forecast = met.rate_n[used], met.rate_forecast_n[used]
        factors_n_T, sums_n_T = np.ones((len(used), 4)), np.zeros((len(used), 4, 3))
        factors_n_T[:, LOW] = bets(forecast, rate)
        factors_n_T[:, HIGH] = bets(1.0 - forecast, 1.0 - rate)
        factors_n_T[:, FLIPPED] = flip_bets(forecast, rate)
        sums_n_T[:, (LOW, HIGH, FLIPPED)] = np.column_stack((np.ones(len(used)), forecast, rate))[:, None]
        scored = np.flatnonzero(met.is_scored_n[used])
        outcome, chance = met.informative_n[used][scored].astype(np.float64), met.informative_forecast_n[used][scored]
        factors_n_T[scored, DULL] = bets(chance, outcome)
        sums_n_T[scored, DULL] = np.column_stack((np.ones(len(scored)), chance, outcome))
        nats_n_T = exact.log(factors_n_T)

        rows = 1 + self._rows(groups_n[used])
        nats, sums = np.zeros(self.nats.shape), np.zeros(self.sums.shape)
        np.add.at(nats, rows, nats_n_T)
        np.add.at(sums, rows, sums_n_T)
        nats[1:, FLIPPED], sums[1:, FLIPPED] = 0.0, 0.0
        nats[0], sums[0] = nats_n_T.sum(axis=0), sums_n_T.sum(axis=0)
        self._take(step, nats, sums)

    def _take(self, step: int, nats: FloatArray, sums: FloatArray) -> None:
        is_met = sums[..., COUNT] > 0.0
        before = self.nats
        after = np.where(is_met, np.clip(before + nats, 0.0, _MOST_NATS), before)
        begins, stands = (before <= 0.0) & (after > 0.0), after > 0.0
        ends = self.is_raised & ~stands
        self._keep_ended(np.flatnonzero(ends[0]).tolist())
        self.since = np.where(begins, step, np.where(stands, self.since, -1))
        more = np.where(self.is_raised[..., None], 0.0, sums)  # of a fault that goes on, what showed it is told
        self.sums = np.where(stands[..., None], np.where(begins[..., None], 0.0, self.sums) + more, 0.0)
        speaks = begins | (stands & is_met & (nats > 0.0))
        last = np.where(begins, -1, self.last)
        self.last = np.where(stands, np.where(speaks, np.maximum(last, step), last), -1)
        self.is_raised = stands & (self.is_raised | (after >= ALARM_NATS))
        self.met = np.where(is_met.any(axis=1), np.maximum(self.met, step), self.met)
        self.nats = after

    def _keep_ended(self, tests: list[int]) -> None:
        """Remember of the run's own faults that end now when they were."""
        for test in tests:
            self.ended[test] = self.since[0, test], self.last[0, test]

    def _rows(self, groups_n: IntArray) -> IntArray:
        """Rows of these group codes below the first; makes room for them in every array."""
        rows = np.minimum(groups_n, MAX_GROUPS)
        more = int(rows.max()) + 2 - len(self.nats)
        if more > 0:
            self.nats = np.concatenate((self.nats, np.zeros((more, 4))))
            self.sums = np.concatenate((self.sums, np.zeros((more, 4, 3))))
            self.is_raised = np.concatenate((self.is_raised, np.zeros((more, 4), np.bool_)))
            self.since = np.concatenate((self.since, np.full((more, 4), -1, np.int64)))
            self.met = np.concatenate((self.met, np.full(more, -1, np.int64)))
            self.last = np.concatenate((self.last, np.full((more, 4), -1, np.int64)))
        return rows


def tolerated(chance: FloatArray) -> FloatArray:
    """The least chance that a forecast of this one leaves room for: a unit of log-odds below."""
    return _with_odds(np.clip(chance, _LEAST_FORECAST, 1.0 - _LEAST_FORECAST), _TOLERATED)


def bets(forecast_n: FloatArray, outcome_n: FloatArray) -> FloatArray:
    """Factors of bets that outcomes in [0, 1] are lower than forecast, positive, [n].

    With q the tolerated forecast and r the alternative, the factor is 1 + (q - y) (q - r) / (q (1 - q)): the likelihood
    ratio of r against q for outcomes of 0 and 1, and linear between. Its mean is at most 1 where that of y is at least
    q.
    """
    forecast_n = np.clip(forecast_n, _LEAST_FORECAST, 1.0 - _LEAST_FORECAST)
    q, r = _with_odds(forecast_n, _TOLERATED), _with_odds(forecast_n, _ALTERNATIVE)
    return np.asarray(1.0 + (q - outcome_n) * (q - r) / (q * (1.0 - q)))


def flip_bets(forecast_n: FloatArray, outcome_n: FloatArray) -> FloatArray:
    """Factors of bets that outcomes fall where forecasts rise, within what was reported together, positive, [n].

    With x and y the forecast and the outcome, each less its mean, the factor is 1 - s (x y + t x^2): its mean is at
    most 1 where the slope of y on x is at least -t. All 1 where fewer than eight are compared.
    """
    if len(forecast_n) < _LEAST_FLIPPED:
        return np.ones(len(forecast_n))
    x = np.clip(forecast_n - forecast_n.sum() / len(forecast_n), -_FLIP_FORECAST, _FLIP_FORECAST)
    y = np.clip(outcome_n - outcome_n.sum() / len(outcome_n), -_FLIP_OUTCOME, _FLIP_OUTCOME)
    return np.asarray(1.0 - _FLIP_BET * (x * y + _FLIP_TOLERATED * x * x))


def _with_odds(chance: FloatArray, factor: float) -> FloatArray:
    """The chance whose odds are so many times as high."""
    return chance * factor / (1.0 - chance + chance * factor)
