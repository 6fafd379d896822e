"""What was forecast and what came of it: the sums from which a run's report is made.

Part of the fold: each sum grows with the entry that it counts, so that a report costs the same after a thousand
observations and after a million, and is exact under checkpoints and on every replica. Memory is bounded: steps are
counted in at most 32 windows, which double in width as the run grows. Knows no words of the report; see `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray, ScalarT
from evenodds_service.domain.distributions import informative_probability
from evenodds_service.domain.log_entries import EQUAL_WITHIN, SelectEntry

N_WINDOWS = 32
N_BINS = 10
N_FORECASTS, N_RATES = 50, 17
N_BELIEVED = 20
MAX_GROUPS = 500
"""Groups with sums of their own, by first appearance; all later ones share one more row."""
MAX_OPEN, MIN_OPEN, MAX_OPEN_ROWS = 64, 8, 65_536
JUDGED_OBSERVATIONS, JUDGED_OF_GROUP = 128, 32
"""Forecasts are judged once so many observations were known to whoever made them, and so many of the prompt's group."""

BIN_COLUMNS = ("count", "forecast", "outcome", "squared_error")
ARMS = ("policy", "control")
ARM_COLUMNS = ("selected", "fresh", "scored", "attempts", "forecast", "informative")
LIFT_COLUMNS = ("policy", "policy_informative", "policy_attempts", "control", "control_informative", "control_square")
GROUP_COLUMNS = (
    *("policy", "control", "observed", "attempts", "successes", "rate_forecast", "rate"),
    *("scored", "forecast", "informative"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Met:
    """How outcomes of n prompts met what was forecast of them.

    Attributes:
        informative_n: Which of the n are informative together with what was reported of the same selection before.
        found, foreseen: Informative groups of selections that they add, and how many were forecast.
        rate_n, rate_forecast_n: The success rate of what was reported now, and its forecast.
        informative_forecast_n: The forecast that so many attempts are informative.
        is_scored_n: Whether it is known how the group of attempts came out: it has two attempts or more.
        is_judged_n: Whether the forecast may be judged by the outcome: whoever made it had seen enough outcomes, also
            of the prompt's category, and this is the first report of the prompt under its selection.
    """

    informative_n: BoolArray
    found: float
    foreseen: float
    rate_n: FloatArray
    rate_forecast_n: FloatArray
    informative_forecast_n: FloatArray
    is_scored_n: BoolArray
    is_judged_n: BoolArray


@dataclass(slots=True)
class Tallies:
    """Sums over the log. Axis W: windows of `width` steps from `first_step` on (-1: no step yet).

    An *observation* here is one prompt's attempts under one selection, however many calls report them; outside of
    selections, one prompt in one call. It is *scored* when it has two attempts or more, so that it could be
    informative. Forecasts were made before the outcome was known: those of a selection when it chose, the others when
    the call came. Outcomes of a selection count at its step, the others at their own.

    Attributes:
        rate_bins: [W, 10, 4] of success rates, columns `BIN_COLUMNS`, by forecast in tenths.
        informative_bins: [W, 10, 4] the same of the scored ones: was the group of attempts informative?
        ranks: [W, 50, 17] how many had this forecast (in fiftieths) and this success rate (0, sixteenths, 1).
        arms: [W, 2, 6] of selections, axis `ARMS`, columns `ARM_COLUMNS`; `fresh` were never chosen or seen before.
        lift: [W, 6] of selections with a control share c > 0, columns `LIFT_COLUMNS`; those of the control arm are
            weighted with (1 - c) / c (sum, informative sum, sum of squares), so that they stand for the policy's
            observations at the same steps though the share was changed.
        skill: [W, 2] log likelihood of the mixture less MoPPS's in nats, and observations.
        believed: [W, 20] prompts by believed success rate, in equal bins, before the first outcome of the window; of a
            sample of the pool. 0 where none or only late ones came.
        groups: [G, 10] columns `GROUP_COLUMNS`, G grows up to 501.
        n_selections: Of any kind.
        open_*: The newest selections, whose outcomes may still come: ids, steps, control shares, first rows; and by
            row the prompt, its arm, its forecast Beta(a, b), whether that may be judged by the outcome, and what was
            observed: k of n, informative.
    """

    first_step: int = -1
    width: int = 1
    n_selections: int = 0
    rate_bins: FloatArray = field(default_factory=partial(np.zeros, (N_WINDOWS, N_BINS, len(BIN_COLUMNS))))
    informative_bins: FloatArray = field(default_factory=partial(np.zeros, (N_WINDOWS, N_BINS, len(BIN_COLUMNS))))
    ranks: FloatArray = field(default_factory=partial(np.zeros, (N_WINDOWS, N_FORECASTS, N_RATES)))
    arms: FloatArray = field(default_factory=partial(np.zeros, (N_WINDOWS, len(ARMS), len(ARM_COLUMNS))))
    lift: FloatArray = field(default_factory=partial(np.zeros, (N_WINDOWS, len(LIFT_COLUMNS))))
    skill: FloatArray = field(default_factory=partial(np.zeros, (N_WINDOWS, 2)))
    believed: FloatArray = field(default_factory=partial(np.zeros, (N_WINDOWS, N_BELIEVED)))
    groups: FloatArray = field(default_factory=partial(np.zeros, (0, len(GROUP_COLUMNS))))
    open_ids: tuple[str | None, ...] = ()
    open_steps: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    open_shares: FloatArray = field(default_factory=partial(np.zeros, (0,)))
    open_sizes: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    open_prompts: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    open_control: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    open_beta: FloatArray = field(default_factory=partial(np.zeros, (0, 2)))
    open_judged: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    open_seen: FloatArray = field(default_factory=partial(np.zeros, (0, 2)))
    open_informative: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))

    def window(self, step: int) -> int:
        """In which window the step counts; makes room for it. Steps before the first one count in the first window."""
        if self.first_step < 0:
            self.first_step = step
        while (step - self.first_step) // self.width >= N_WINDOWS:
            half = N_WINDOWS // 2
            for sums in (self.rate_bins, self.informative_bins, self.ranks, self.arms, self.lift, self.skill):
                sums[:half] = sums[0::2] + sums[1::2]
                sums[half:] = 0.0
            first, second = self.believed[0::2], self.believed[1::2]
            self.believed[:half] = np.where(first.any(axis=1, keepdims=True), first, second)
            self.believed[half:] = 0.0
            self.width *= 2
        return max(0, (step - self.first_step) // self.width)

    def select(self, entry: SelectEntry, fresh_B: BoolArray, groups_B: IntArray) -> None:
        """Count a selection and keep it open for its outcomes.

        Args:
            fresh_B: Prompts that were never chosen or seen before.
            groups_B: The prompts' group codes.
        """
        n = len(entry.prompts)
        control = np.zeros(n, np.bool_) if entry.control is None else entry.control
        w = self.window(entry.step)
        for arm, members in enumerate((~control, control)):
            self.arms[w, arm, :2] += (members.sum(), fresh_B[members].sum())
        rows = self._group_rows(groups_B)
        np.add.at(self.groups, (rows, control.astype(np.int64)), 1.0)
        self.n_selections += 1
        unknown = np.full(n, np.nan)
        beta = np.column_stack((unknown if entry.a is None else entry.a, unknown if entry.b is None else entry.b))
        drop = self._surplus(n)
        rows_dropped = int(self.open_sizes[:drop].sum())
        self.open_ids = (*self.open_ids[drop:], entry.selection_id)
        self.open_steps = np.append(self.open_steps[drop:], entry.step)
        self.open_shares = np.append(self.open_shares[drop:], entry.control_share)
        self.open_sizes = np.append(self.open_sizes[drop:], n)
        self.open_prompts = np.concatenate((self.open_prompts[rows_dropped:], entry.prompts))
        self.open_control = np.concatenate((self.open_control[rows_dropped:], control))
        self.open_beta = np.concatenate((self.open_beta[rows_dropped:], beta))
        self.open_judged = np.concatenate((self.open_judged[rows_dropped:], self._may_be_judged(rows)))
        self.open_seen = np.concatenate((self.open_seen[rows_dropped:], np.zeros((n, 2))))
        self.open_informative = np.concatenate((self.open_informative[rows_dropped:], np.zeros(n, np.bool_)))

    def observe(
        self,
        step: int,
        selection_id: str | None,
        prompts_n: IntArray,
        k_n: FloatArray,
        counts_n: FloatArray,
        informative_n: BoolArray,
        groups_n: IntArray,
        forecast_of: Callable[[IntArray], tuple[FloatArray, FloatArray]],
    ) -> Met:
        """Count outcomes; call before they are folded in.

        They belong to the selection that they name, else to the one of their step, as far as it chose their prompts.

        Args:
            prompts_n: Distinct prompts, with k successes of `counts` attempts each, and their group codes.
            forecast_of: Parameters (a, b) of the present belief about these of the n prompts; asked for those
                whose forecast no selection has recorded.
        """
        of_selection, rows = self._open_rows(step, selection_id, prompts_n)
        groups = self._group_rows(groups_n)
        informative_n = informative_n.copy()
        met, beta, is_judged = np.zeros(2), np.ones((len(prompts_n), 2)), self._may_be_judged(groups)
        free = np.flatnonzero(rows < 0)
        if len(free):
            a, b = forecast_of(free)
            beta[free] = np.column_stack((a, b))
            w = self.window(step)
            outcome = _Outcomes(a, b, k_n[free], counts_n[free], informative_n[free])
            self._score(w, outcome, groups[free], 1.0)
        held = np.flatnonzero(rows >= 0)
        if len(held):
            rows = rows[held]
            self._fill_in(rows, held, forecast_of)
            w = self.window(int(self.open_steps[of_selection]))
            share = float(self.open_shares[of_selection])
            beta[held] = self.open_beta[rows]
            is_judged[held] = self.open_judged[rows] & (self.open_seen[rows, 1] == 0.0)
            earlier = np.flatnonzero(self.open_seen[rows, 1] > 0)
            if len(earlier):  # the whole takes the part's place
                met += self._count(w, rows[earlier], groups[held[earlier]], share, -1.0)
                known, more = self.open_seen[rows[earlier]], held[earlier]
                differ = np.abs(known[:, 0] / known[:, 1] - k_n[more] / counts_n[more]) > EQUAL_WITHIN
                informative_n[more] |= differ | self.open_informative[rows[earlier]]
            self.open_seen[rows, 0] += k_n[held]
            self.open_seen[rows, 1] += counts_n[held]
            self.open_informative[rows] = informative_n[held]
            met += self._count(w, rows, groups[held], share, 1.0)
        a_n, b_n = beta.T
        return Met(
            informative_n,
            found=float(met[0]),
            foreseen=float(met[1]),
            rate_n=k_n / counts_n,
            rate_forecast_n=a_n / (a_n + b_n),
            informative_forecast_n=informative_probability(a_n, b_n, counts_n),
            is_scored_n=counts_n > 1,
            is_judged_n=is_judged,
        )

    def move(self, moved_N: IntArray) -> None:
        """Prompts stand elsewhere from here on; -1 stands for those that are gone, whose outcomes cannot come."""
        known = self.open_prompts >= 0
        self.open_prompts = np.where(known, moved_N[np.where(known, self.open_prompts, 0)], -1)

    def compare(self, step: int, nats: float, n: int) -> None:
        """Count by how much the mixture foresaw n observations better than MoPPS did."""
        self.skill[self.window(step)] += (nats, n)

    def look(self, step: int, rates_of: Callable[[], FloatArray]) -> None:
        """Keep how the beliefs are spread, once for each window; call before an outcome of a new step is folded in.

        Args:
            rates_of: The believed success rates of a sample of the pool.
        """
        w = self.window(step)
        if not self.believed[w].any():
            self.believed[w] = np.histogram(rates_of(), N_BELIEVED, (0.0, 1.0))[0]

    def _may_be_judged(self, rows: IntArray) -> BoolArray:
        """Whether forecasts that are made now of prompts of these groups may be judged by what comes of them."""
        observed = self.groups[:, GROUP_COLUMNS.index("observed")]
        return np.asarray((observed[rows] >= JUDGED_OF_GROUP) & (observed.sum() >= JUDGED_OBSERVATIONS))

    def _surplus(self, n: int) -> int:
        """How many of the oldest open selections go before one of n prompts comes."""
        sizes = np.append(self.open_sizes, n)
        drop = max(0, len(sizes) - MAX_OPEN)
        while len(sizes) - drop > MIN_OPEN and int(sizes[drop:].sum()) > MAX_OPEN_ROWS:
            drop += 1
        return drop

    def _open_rows(self, step: int, selection_id: str | None, prompts_n: IntArray) -> tuple[int, IntArray]:
        """The selection that the outcomes belong to, and each prompt's row there, -1 where it has none."""
        found = -1
        if selection_id is None:
            same_step = np.flatnonzero(self.open_steps == step)
            found = int(same_step[-1]) if len(same_step) else -1
        elif selection_id in self.open_ids:
            found = self.open_ids.index(selection_id)
        if found < 0 or self.open_sizes[found] == 0:
            return -1, np.full(len(prompts_n), -1)
        first = int(self.open_sizes[:found].sum())
        chosen = self.open_prompts[first : first + int(self.open_sizes[found])]
        order = np.argsort(chosen, kind="stable")
        place = np.minimum(np.searchsorted(chosen[order], prompts_n), len(chosen) - 1)
        return found, np.where(chosen[order][place] == prompts_n, first + order[place], -1)

    def _fill_in(
        self, rows: IntArray, held: IntArray, forecast_of: Callable[[IntArray], tuple[FloatArray, FloatArray]]
    ) -> None:
        """The present belief where a selection recorded no forecast."""
        missing = np.isnan(self.open_beta[rows, 0])
        if missing.any():
            self.open_beta[rows[missing]] = np.column_stack(forecast_of(held[missing]))

    def _count(self, w: int, rows: IntArray, groups: IntArray, share: float, sign: float) -> FloatArray:
        """Add (or take away, with sign -1) what the open rows hold: their scores, arms and lift.

        Returns:
            How many informative groups this adds, and how many forecast ones, [2].
        """
        a, b = self.open_beta[rows].T
        k, counts = self.open_seen[rows].T
        outcome = _Outcomes(a, b, k, counts, self.open_informative[rows])
        is_scored, forecast = self._score(w, outcome, groups, sign)
        control = self.open_control[rows]
        columns = np.column_stack((np.ones(len(rows)), counts, forecast, outcome.informative))
        for arm, members in enumerate((~control & is_scored, control & is_scored)):
            self.arms[w, arm, 2:] += sign * columns[members].sum(axis=0)
        if share > 0.0:
            policy, other = ~control & is_scored, control & is_scored
            y = outcome.informative
            self.lift[w, :3] += sign * np.array([policy.sum(), y[policy].sum(), counts[policy].sum()])
            weight = (1.0 - share) / share
            self.lift[w, 3:] += sign * weight * np.array([other.sum(), y[other].sum(), weight * other.sum()])
        return sign * np.array([outcome.informative[is_scored].sum(), forecast[is_scored].sum()])

    def _score(self, w: int, outcome: _Outcomes, groups: IntArray, sign: float) -> tuple[BoolArray, FloatArray]:
        """Count how forecasts met outcomes. Returns who is scored, and the informative probabilities."""
        rate_forecast, rate = outcome.a / (outcome.a + outcome.b), outcome.k / outcome.counts
        is_scored = outcome.counts > 1
        forecast = informative_probability(outcome.a, outcome.b, outcome.counts)
        y = outcome.informative.astype(np.float64)
        _add_to_bins(self.rate_bins[w], rate_forecast, rate, sign)
        _add_to_bins(self.informative_bins[w], forecast[is_scored], y[is_scored], sign)
        cells = np.minimum((rate_forecast * N_FORECASTS).astype(np.int64), N_FORECASTS - 1), _rate_cells(rate)
        np.add.at(self.ranks[w], cells, sign)
        columns = [np.ones(len(rate)), outcome.counts, outcome.k, rate_forecast, rate]
        columns += [is_scored.astype(np.float64), forecast * is_scored, y * is_scored]
        sums = np.zeros((len(self.groups), len(columns)))
        np.add.at(sums, groups, np.column_stack(columns))
        self.groups[:, 2:] += sign * sums
        return is_scored, forecast

    def _group_rows(self, groups_n: IntArray) -> IntArray:
        rows, self.groups = group_rows(groups_n, self.groups, fresh=(0.0,) * len(GROUP_COLUMNS))
        return rows


def group_rows(
    groups_n: IntArray, sums: NDArray[ScalarT], *, fresh: Sequence[float]
) -> tuple[IntArray, NDArray[ScalarT]]:
    """Rows of these group codes, [n], and the sums [G, ...] with room for them; later groups share the last row."""
    rows = np.minimum(groups_n, MAX_GROUPS)
    more = int(rows.max(initial=-1)) + 1 - len(sums)
    return rows, np.concatenate((sums, np.tile(np.asarray(fresh, sums.dtype), (more, 1)))) if more > 0 else sums


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """k successes of `counts` attempts each under forecasts Beta(a, b), all [n]."""

    a: FloatArray
    b: FloatArray
    k: FloatArray
    counts: FloatArray
    informative: BoolArray


def _add_to_bins(bins: FloatArray, forecast: FloatArray, outcome: FloatArray, sign: float) -> None:
    rows = np.minimum((forecast * N_BINS).astype(np.int64), N_BINS - 1)
    columns = np.column_stack((np.ones(len(rows)), forecast, outcome, (forecast - outcome) ** 2))
    sums = np.zeros_like(bins)
    np.add.at(sums, rows, columns)
    bins += sign * sums


def _rate_cells(rate: FloatArray) -> IntArray:
    """0 and 1 have cells of their own, what lies between the nearest sixteenth but these."""
    inner = np.clip(np.rint(rate * (N_RATES - 1)), 1, N_RATES - 2)
    return np.where(rate <= 0.0, 0, np.where(rate >= 1.0, N_RATES - 1, inner)).astype(np.int64)
