"""What readers of all formats give: groups of attempts and known rates; and the count of what they left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evenodds_service.domain.log_entries import EQUAL_WITHIN

Rate = float | dict[str, float]
"""A success rate, or `{"successes": k, "attempts": n}`."""


class LogRefused(Exception):
    """A file cannot be read, or not like this. The message names the place, the fault and the next step."""


@dataclass(frozen=True, slots=True)
class Group:
    """Attempts at one prompt that a log keeps together.

    Attributes:
        step: The policy version that made them.
        prompt_id: The log's own stable id; None where it has none.
        text: The prompt without its chat template; None where the log has none.
        templated: The prompt as the log has it, where that is another text.
        rewards: One for each attempt with a verdict, in [0, 1], at least one.
        category: Data set, task or environment.
        place: Where the first of them stands, for messages.
        answer: The reference answer, as the log has it; None where it has none.
    """

    step: int
    rewards: tuple[float, ...]
    prompt_id: str | None = None
    text: str | None = None
    templated: str | None = None
    category: str | None = None
    place: str = ""
    answer: object = None


@dataclass(frozen=True, slots=True)
class KnownRates:
    """What a table knows of one prompt: by the name of each column of it, a rate or counts."""

    rates: Mapping[str, Rate]
    prompt_id: str | None = None
    text: str | None = None
    category: str | None = None
    place: str = ""
    answer: object = None


Entry = Group | KnownRates


class RewardMissing(LogRefused):
    """A log, or an entry of it, has no reward by the name that was asked for."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller says about a log; None where the format decides.

    Attributes:
        reward: Name of the reward or metric to take.
        low, high: The rewards that become 0 and 1.
        filter: lm-eval: whose filter's rows count.
        step: At which step outcomes of a format without steps stand.
        id_column, text_column, rate_columns: Of a table.
        of: A table's numbers are counts out of so many.
        counts_failures: A table's counts and rates are of failures.

    Raises:
        LogRefused: they contradict themselves.
    """

    reward: str | None = None
    low: float = 0.0
    high: float = 1.0
    filter: str | None = None
    step: int = 0
    id_column: str | None = None
    text_column: str | None = None
    rate_columns: tuple[str, ...] = ()
    of: int | None = None
    counts_failures: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise LogRefused(f"--reward-range {self.low:g} {self.high:g}: the second must be above the first")
        if self.step < 0:
            raise LogRefused(f"--step {self.step}: must be at least 0")
        if self.of is not None and self.of < 1:
            raise LogRefused(f"--of {self.of}: must be at least 1")


@dataclass(slots=True)
class Tally:
    """What was left out, by reason, with the first place; and what a reader wants said about its log."""

    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_filtered: bool = False
    """Whether groups are missing from the log because of their outcomes."""

    def leave_out(self, reason: str, place: str, n: int = 1) -> None:
        before, first = self.left_out.get(reason, (0, place))
        self.left_out[reason] = (before + n, first)

    def absorb(self, other: Tally) -> None:
        """Count what another one counted."""
        for reason, (n, place) in other.left_out.items():
            self.leave_out(reason, place, n)

    def note(self, text: str) -> None:
        """Said once, however often it is noted."""
        if text not in self.notes:
            self.notes.append(text)

    def told(self) -> list[str]:
        """All of it in lines."""
        lines = [f"left out: {n:,} {reason} (first: {place})" for reason, (n, place) in self.left_out.items()]
        return [*lines, *(f"mind: {note}" for note in self.notes)]


def number_of(value: object) -> float | None:
    """The value as a number; None for what is none: absent, NaN, text. True is 1."""
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        number = float(value)  # type: ignore[arg-type]  # what it cannot take it refuses
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def scaled(number: float, wishes: Wishes, place: str, *, others: Sequence[str] = ()) -> float:
    """The reward in [0, 1].

    Args:
        others: Names of other rewards of the log, for the message.

    Raises:
        LogRefused: it lies outside of the range. Leaving it out would leave out one kind of outcome.
    """
    value = (number - wishes.low) / (wishes.high - wishes.low)
    if -EQUAL_WITHIN <= value <= 1 + EQUAL_WITHIN:
        return min(1.0, max(0.0, value))
    also = f", or choose another reward with --reward ({', '.join(others)})" if others else ""
    raise LogRefused(
        f"{place}: reward {number:g} lies outside of [{wishes.low:g}, {wishes.high:g}]: name the rewards that "
        f"mean failure and success, for example with --reward-range -1 1{also}"
    )


def chosen_reward(names: Sequence[str], wishes: Wishes, place: str) -> str:
    """Which of the log's rewards counts.

    Raises:
        LogRefused: there are several and none was named, or the named one is not there.
    """
    listed = ", ".join(names) or "none"
    if wishes.reward is not None:
        if wishes.reward not in names:
            raise RewardMissing(f"{place}: it has no reward {wishes.reward!r}; its rewards are: {listed}")
        return wishes.reward
    if len(names) != 1:
        what = "this log has several rewards" if names else "this log has no reward"
        raise LogRefused(f"{place}: {what}; name the verifier's with --reward; its rewards are: {listed}")
    return names[0]
