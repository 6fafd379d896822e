"""What keeps a run from going wrong unnoticed: counters that alarms are read from, and the fallback to uniform choice.

Part of the fold, so that every replica raises the same alarms and falls back at the same log position. `report/alarms`
reads the counters and puts alarms in words; the sequential tests of forecasts stand in `sequential`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning.sequential import tolerated
from evenodds_service.domain.learning.tallies import Met, group_rows
from evenodds_service.domain.log_entries import EQUAL_WITHIN

SKILL_BLOCKS, RECENT_BLOCKS = 8, 4
BLOCK_OBSERVATIONS, FULL_BLOCK_OBSERVATIONS = 64, 4_096
FALLBACK_ODDS = 20.0
FALLBACK_NATS = float(exact.log(FALLBACK_ODDS))
COVERAGE_SELECTIONS = 16
REPEATED_SHARE, LEAST_REPEATED = 0.9, 4
"""A report repeats earlier ones where this share of its prompts, at least so many, was reported at its step before."""

JUDGED, FORESEEN, NATS, ANSWERED, SELECTED, SELECTIONS, SINCE, OTHERS_FOUND, OTHERS_FORESEEN = range(9)
_NEVER = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Misled:
    """What others showed is of no use: believed with this weight since this step, where that begins at a limit."""

    since_step: int
    weight: float
    limit: float


@dataclass(frozen=True, slots=True)
class Fallback:
    """The choice is uniform since this step, and why."""

    reason: str
    since_step: int


@dataclass(slots=True)
class Constant:
    """Reports in a row of which every single reward is the same.

    Attributes:
        rate: The reward; -1 where the newest report has different ones.
        since: Step of the first of these reports.
        calls, prompts, attempts: How many of each.
        nats: How unlikely that was under the forecasts, with the benefit of the doubt: -log of the chance.
    """

    rate: float = -1.0
    since: int = -1
    calls: int = 0
    prompts: int = 0
    attempts: float = 0.0
    nats: float = 0.0

    def observe(self, step: int, counts_n: FloatArray, met: Met) -> None:
        rate = float(met.rate_n[0])
        is_constant = not met.informative_n.any() and bool((np.abs(met.rate_n - rate) <= EQUAL_WITHIN).all())
        if not is_constant:
            self.rate, self.since, self.calls, self.prompts, self.attempts, self.nats = -1.0, -1, 0, 0, 0.0, 0.0
            return
        if abs(rate - self.rate) > EQUAL_WITHIN:
            self.rate, self.since, self.calls, self.prompts, self.attempts, self.nats = rate, step, 0, 0, 0.0, 0.0
        self.calls += 1
        self.prompts += len(counts_n)
        self.attempts += float(counts_n.sum())
        alike = met.rate_forecast_n if rate < 0.5 else 1.0 - met.rate_forecast_n
        other = np.where(met.is_scored_n, met.informative_forecast_n, alike)  # the chance that one reward were another
        self.nats -= float(exact.log(1.0 - tolerated(other)).sum())


@dataclass(slots=True)
class Repeats:
    """Reports in a row of steps that were reported before, as a trainer makes them that restarted without a rewind.

    Attributes:
        first, last: The first and the newest of their steps; -1: the newest report repeats none.
        steps: How many steps.
    """

    first: int = -1
    last: int = -1
    steps: int = 0

    def observe(self, step: int, head_step: int, is_known_n: BoolArray) -> None:
        """Watch a report.

        Args:
            head_step: The highest step before it.
            is_known_n: Which of its prompts were observed at this step or later before.
        """
        n = len(is_known_n)
        is_repeat = step < head_step and n >= LEAST_REPEATED and int(is_known_n.sum()) >= REPEATED_SHARE * n
        if not is_repeat or step < self.last:
            self.first, self.last, self.steps = -1, -1, 0
        if is_repeat and step > self.last:
            self.first = step if self.steps == 0 else self.first
            self.last = step
            self.steps += 1


@dataclass(slots=True)
class Guardrails:
    """Counters over the log.

    Attributes:
        skill_nats, skill_counts: By how much the mixture foresaw outcomes better than MoPPS, in nats, and of how many
            observations; the newest 8 blocks, newest last. A block ends with its step once it has 64
            observations, and at 4,096 in any case.
        skill_step: Newest step of the newest block; -1 before the first.
        skill_since, fallback_since: Step since which the skill is not positive, and since which the choice is
            uniform; -1 where that is not so.
        quiet_selections, quiet_since: Selections since the newest observation, and the step of the first of them.
        choices: Of the newest 16 selections, newest last: prompts, those never chosen or seen before, step.
        unseen_share: Of the prompts that the newest selection was to choose among, the share that was never chosen or
            observed; -1: it was to choose among the whole pool.
        found, foreseen: Informative groups in all, and how many were forecast.
        silence: By group, up to 501 rows, since its last informative outcome: judged observations, informative ones
            that were forecast, and how unlikely it is that none came (nats, with the benefit of the doubt); all
            observations of two attempts or more, prompts selected, and selections; the step with which that silence
            began, -1: it has not; and what the other groups had found and let foresee by then.
    """

    skill_nats: FloatArray = field(default_factory=partial(np.zeros, SKILL_BLOCKS))
    skill_counts: IntArray = field(default_factory=lambda: np.zeros(SKILL_BLOCKS, np.int64))
    skill_step: int = -1
    skill_since: int = -1
    fallback_since: int = -1
    quiet_selections: int = 0
    quiet_since: int = -1
    choices: IntArray = field(default_factory=lambda: np.zeros((COVERAGE_SELECTIONS, 3), np.int64))
    unseen_share: float = -1.0
    found: float = 0.0
    foreseen: float = 0.0
    silence: FloatArray = field(default_factory=partial(np.zeros, (0, len(_NEVER))))

    def select(self, step: int, fresh_B: BoolArray, groups_B: IntArray, unseen_share: float | None = None) -> None:
        """Watch a selection. Arguments as in `Tallies.select` and `SelectEntry`."""
        self.quiet_since = step if self.quiet_selections == 0 else self.quiet_since
        self.quiet_selections += 1
        self.unseen_share = -1.0 if unseen_share is None else unseen_share
        self.choices = np.concatenate((self.choices[1:], [[len(fresh_B), int(fresh_B.sum()), step]]))
        rows, n = np.unique(self._rows(groups_B), return_counts=True)
        self._begin(rows, step)
        self.silence[rows, SELECTED] += n
        self.silence[rows, SELECTIONS] += 1.0

    def observe(self, step: int, met: Met, groups_n: IntArray) -> None:
        """Watch how outcomes met their forecasts."""
        self.quiet_selections, self.quiet_since = 0, -1
        rows, scored = self._rows(groups_n), met.is_scored_n
        chance = met.informative_forecast_n
        judged = scored & met.is_judged_n
        doubt = -exact.log(1.0 - tolerated(chance[judged]))
        more = np.zeros((len(self.silence), ANSWERED + 1))
        np.add.at(more[:, :ANSWERED], rows[judged], np.column_stack((np.ones(len(doubt)), chance[judged], doubt)))
        more[:, ANSWERED] = np.bincount(rows[scored], minlength=len(more))
        self.found += float(met.informative_n[judged].sum())
        self.foreseen += float(chance[judged].sum())
        fresh = self._begin(np.unique(rows[scored]), step)
        self.silence[:, : ANSWERED + 1] += more
        self.silence[fresh, OTHERS_FORESEEN] = self.foreseen - more[fresh, FORESEEN]
        self.silence[np.unique(rows[met.informative_n])] = _NEVER

    def compare(self, step: int, nats: float, n: int) -> None:
        """Watch by how much the mixture foresaw n observations of this step better than MoPPS did."""
        size = int(self.skill_counts[-1])
        if (size >= BLOCK_OBSERVATIONS and step > self.skill_step) or size >= FULL_BLOCK_OBSERVATIONS:
            self.skill_nats = np.append(self.skill_nats[1:], 0.0)
            self.skill_counts = np.append(self.skill_counts[1:], 0)
        self.skill_nats[-1] += nats
        self.skill_counts[-1] += n
        self.skill_step = max(step, self.skill_step)
        if self.skill_counts[0] == 0:
            return
        skill, recent = float(self.skill_nats.sum()), float(self.skill_nats[-RECENT_BLOCKS:].sum())
        if skill > 0.0:
            self.skill_since = -1
        elif self.skill_since < 0:
            self.skill_since = step
        if recent > 0.0:
            self.fallback_since = -1
        elif self.fallback_since < 0 and recent < 0.0 and skill < -FALLBACK_NATS:
            self.fallback_since = step

    def skill(self) -> tuple[float, int]:
        """Log odds of the mixture against MoPPS over the newest blocks, in nats, and of how many observations."""
        return float(self.skill_nats.sum()), int(self.skill_counts.sum())

    def fallback(self) -> Fallback | None:
        """Whether the shared model has misled for so long that chance is the better choice, and why."""
        if self.fallback_since < 0:
            return None
        nats, n = self.skill()
        recent = float(self.skill_nats[-RECENT_BLOCKS:].sum())
        reason = (
            f"over the newest {n:,} observations the model's skill against flat MoPPS is {nats:.1f} nats (limit "
            f"{-FALLBACK_NATS:.1f}), and {recent:.1f} over their newer half. Batches are drawn "
            f"uniformly since step {self.fallback_since}, until the skill of the newer half is positive"
        )
        return Fallback(reason, self.fallback_since)

    def _begin(self, rows: IntArray, step: int) -> IntArray:
        """A silence begins, where none has begun. Returns where."""
        fresh: IntArray = rows[self.silence[rows, SINCE] < 0]
        self.silence[fresh, SINCE] = step
        self.silence[fresh, OTHERS_FOUND] = self.found
        self.silence[fresh, OTHERS_FORESEEN] = self.foreseen
        return fresh

    def _rows(self, groups_n: IntArray) -> IntArray:
        rows, self.silence = group_rows(groups_n, self.silence, fresh=_NEVER)
        return rows
