"""What keeps a run from going wrong unnoticed: alarms, and the fallback to uniform choice.

Part of the fold, so that every replica raises the same alarms and falls back at the same log position. What is
watched is a handful of counters; the conditions are read from them, with constants as limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning.tallies import MAX_GROUPS, group_rows

SKILL_BLOCKS, RECENT_BLOCKS = 8, 4
BLOCK_OBSERVATIONS, FULL_BLOCK_OBSERVATIONS = 64, 4_096
FALLBACK_ODDS = 20.0
_FALLBACK_NATS = float(exact.log(FALLBACK_ODDS))
SILENT_OBSERVED, SILENT_SELECTED, SILENT_SELECTIONS = 64, 128, 8
QUIET_SELECTIONS = 8
COVERAGE_SELECTIONS, COVERAGE_LEAST, FRESH_SHARE, UNSEEN_SHARE = 16, 64, 0.01, 0.01
MAX_GROUP_ALARMS = 20

OBSERVED, SELECTED, SELECTIONS, SINCE, SINCE_CALL, INFORMATIVE_CALL = range(6)
_NEVER = (0, 0, 0, -1, -1, -1)


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that a person should look at.

    Attributes:
        code: Stable name of the kind.
        since_step: Since when.
        value, limit: What was measured, and where the alarm begins.
    """

    code: str
    message: str
    since_step: int
    value: float
    limit: float


@dataclass(frozen=True, slots=True)
class Misled:
    """What others showed is of no use: believed with this weight since this step, where that begins at a limit."""

    since_step: int
    weight: float
    limit: float

    def alarm(self) -> Alarm:
        message = (
            f"what other runs and prior_rates showed foretells nothing here: after hundreds of outcomes it is believed "
            f"with a weight of {self.weight:.2f} (1: as it stands, below 0: the contrary). It costs little; check "
            "whether learn_from and prior_rates name runs and models of these prompts, graded by the same verifier"
        )
        return Alarm("sources_mislead", message, self.since_step, self.weight, self.limit)


@dataclass(frozen=True, slots=True)
class Fallback:
    """The choice is uniform since this step, and why."""

    reason: str
    since_step: int


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
        n_calls: Observe entries.
        silence: By group, up to 501 rows: scored observations, prompts selected and selections since its last
            informative outcome; step and number of the observe entry with which that silence began; number of the
            one with its last informative outcome. -1 stands for never.
    """

    skill_nats: FloatArray = field(default_factory=partial(np.zeros, SKILL_BLOCKS))
    skill_counts: IntArray = field(default_factory=lambda: np.zeros(SKILL_BLOCKS, np.int64))
    skill_step: int = -1
    skill_since: int = -1
    fallback_since: int = -1
    quiet_selections: int = 0
    quiet_since: int = -1
    choices: IntArray = field(default_factory=lambda: np.zeros((COVERAGE_SELECTIONS, 3), np.int64))
    n_calls: int = 0
    silence: IntArray = field(default_factory=lambda: np.zeros((0, len(_NEVER)), np.int64))

    def select(self, step: int, fresh_B: BoolArray, groups_B: IntArray) -> None:
        """Watch a selection. Arguments as in `Tallies.select`."""
        self.quiet_since = step if self.quiet_selections == 0 else self.quiet_since
        self.quiet_selections += 1
        self.choices = np.concatenate((self.choices[1:], [[len(fresh_B), int(fresh_B.sum()), step]]))
        rows, n = np.unique(self._rows(groups_B), return_counts=True)
        self._begin(rows, step, self.n_calls + 1)
        self.silence[rows, SELECTED] += n
        self.silence[rows, SELECTIONS] += 1

    def observe(self, step: int, counts_n: FloatArray, informative_n: BoolArray, groups_n: IntArray) -> None:
        """Watch outcomes: of prompts with `counts` attempts each."""
        self.quiet_selections, self.quiet_since = 0, -1
        self.n_calls += 1
        rows = self._rows(groups_n)
        scored, n = np.unique(rows[counts_n > 1], return_counts=True)
        self._begin(scored, step, self.n_calls)
        self.silence[scored, OBSERVED] += n
        self.silence[np.unique(rows[informative_n])] = (*_NEVER[:INFORMATIVE_CALL], self.n_calls)

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
        elif self.fallback_since < 0 and recent < 0.0 and skill < -_FALLBACK_NATS:
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
            f"{-_FALLBACK_NATS:.1f}), over the newer half of these {recent:.1f}: the choice is uniform since "
            f"step {self.fallback_since}, until the newer half is positive"
        )
        return Fallback(reason, self.fallback_since)

    def alarms(
        self,
        names: Sequence[str | None],
        *,
        unseen_share: float,
        is_mixed: bool,
        may_fall_back: bool,
        misled: Misled | None = None,
    ) -> tuple[Alarm, ...]:
        """What a person should look at now.

        Args:
            names: The groups by code.
            unseen_share: Share of the pool that was never chosen or observed.
            is_mixed: Whether the run's predictor is the mixture, whose skill is measured.
            may_fall_back: Whether the run is set to fall back.
            misled: That what others showed is of no use, if it is.
        """
        found = [*self._silent(names)]
        if self.quiet_selections >= QUIET_SELECTIONS:
            message = (
                f"{self.quiet_selections} batches were selected since step {self.quiet_since} and no outcome was "
                "observed: check that the trainer reports to POST /observe of this run"
            )
            found.append(Alarm("outcomes_stopped", message, self.quiet_since, self.quiet_selections, QUIET_SELECTIONS))
        if is_mixed and self.skill_since >= 0:
            found += self._unskilled(may_fall_back=may_fall_back)
        if is_mixed and misled is not None:
            found.append(misled.alarm())
        stalled = self._stalled(unseen_share)
        return (*found, stalled) if stalled is not None else tuple(found)

    def _silent(self, names: Sequence[str | None]) -> list[Alarm]:
        watched = self.silence
        # A silent group's last informative outcome came before its silence began: the latest is another's.
        latest = int(watched[:, INFORMATIVE_CALL].max(initial=-1))
        mute = (watched[:, OBSERVED] >= SILENT_OBSERVED) | (
            (watched[:, SELECTED] >= SILENT_SELECTED) & (watched[:, SELECTIONS] >= SILENT_SELECTIONS)
        )
        found = []
        mute &= (watched[:, SINCE_CALL] >= 0) & (latest >= watched[:, SINCE_CALL])
        for row in np.flatnonzero(mute)[:MAX_GROUP_ALARMS]:
            observed, selected, _, since, *_ = watched[row].tolist()
            name = "categories that came later" if row == MAX_GROUPS else f"category {names[row]!r}"
            if names[row] is None and row < MAX_GROUPS:
                name = "prompts without a category"
            by_outcomes = observed >= SILENT_OBSERVED
            what = f"its last {observed:,} outcomes" if by_outcomes else f"its last {selected:,} selected prompts"
            message = (
                f"{name}: none of {what} was informative since step {since}, while others' were: check its verifier "
                "and its difficulty, or lower its share with categories_at_most"
            )
            value, limit = (observed, SILENT_OBSERVED) if by_outcomes else (selected, SILENT_SELECTED)
            found.append(Alarm("group_silent", message, since, value, limit))
        return found

    def _unskilled(self, *, may_fall_back: bool) -> list[Alarm]:
        nats, n = self.skill()
        message = (
            f"over the newest {n:,} observations the model foresaw outcomes no better than flat MoPPS does "
            f"({nats:.1f} nats): texts, categories or rates sent beforehand may mislead; compare "
            "GET /runs/{run}/report"
        )
        found = [Alarm("skill_not_positive", message, self.skill_since, nats, 0.0)]
        fallback = self.fallback() if may_fall_back else None
        if fallback is not None:
            limit = -_FALLBACK_NATS
            found.append(Alarm("fallback", fallback.reason, fallback.since_step, nats, limit))
        return found

    def _stalled(self, unseen_share: float) -> Alarm | None:
        chosen, fresh, _ = self.choices.sum(axis=0).tolist()
        if self.choices[0, 0] == 0 or chosen < COVERAGE_LEAST or unseen_share < UNSEEN_SHARE:
            return None
        if fresh >= FRESH_SHARE * chosen:
            return None
        message = (
            f"of the {chosen:,} prompts in the last {COVERAGE_SELECTIONS} selections {fresh:,} were new, though "
            f"{unseen_share:.0%} of the pool was never tried: raise reprobe_share or optimism, or set max_visits"
        )
        return Alarm("coverage_stalls", message, int(self.choices[0, 2]), fresh / chosen, FRESH_SHARE)

    def _begin(self, rows: IntArray, step: int, call: int) -> None:
        """A silence begins, where none has begun."""
        fresh = rows[self.silence[rows, SINCE_CALL] < 0]
        self.silence[fresh, SINCE], self.silence[fresh, SINCE_CALL] = step, call

    def _rows(self, groups_n: IntArray) -> IntArray:
        rows, self.silence = group_rows(groups_n, self.silence, fresh=_NEVER)
        return rows
