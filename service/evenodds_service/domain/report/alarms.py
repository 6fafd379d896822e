"""What a person is told about a run: alarms, which ask for an action, and notes, which ask for none.

`KINDS` is the one list of alarms. The documentation, the verdict of a run and the alert rules for Prometheus are held
to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Scope = Literal["run", "category"]


@dataclass(frozen=True, slots=True)
class Remedy:
    """A call that takes back what a run learned while something was wrong: POST /runs/{run}/{operation}."""

    operation: Literal["retract", "rewind"]
    body: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that a person should know of.

    Attributes:
        code: Stable name of the kind.
        message: What was seen, against what, since which step, and the next step to take. Whole sentences.
        since_step: The first step at which it was seen.
        value, limit: What was measured, and where the alarm begins.
        next_step: The end of the message: what to do.
        category: Of which category it speaks; None for the run, and for prompts without a category.
        remedy: What takes back the harm that was done meanwhile, if a call can.
        scope: Whether it speaks of the whole run, or of one category, which may have no name.
    """

    code: str
    message: str
    since_step: int
    value: float
    limit: float
    next_step: str = ""
    category: str | None = None
    remedy: Remedy | None = None
    scope: Scope = "run"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of alarm.

    Attributes:
        title: What it says, in a few words.
        is_broken: Whether the run does not do its work while the alarm is on for the whole of it: then the verdict is
            `broken`.
    """

    title: str
    is_broken: bool


KINDS: Mapping[str, Kind] = {
    "forecast_off": Kind("outcomes are far from their forecasts", is_broken=True),
    "rewards_constant": Kind("all rewards are equal", is_broken=True),
    "outcomes_stopped": Kind("batches are chosen and no outcome comes", is_broken=True),
    "group_size_mismatch": Kind("prompts get another number of attempts than group_size", is_broken=True),
    "run_restarted": Kind("steps that were reported before are reported again", is_broken=True),
    "category_silent": Kind("a category has stopped giving informative groups", is_broken=False),
    "lift_not_positive": Kind("chosen batches are no better than uniform ones", is_broken=False),
    "fallback": Kind("batches are drawn uniformly because the model misleads", is_broken=False),
    "sources_mislead": Kind("what other runs and models showed does not hold here", is_broken=False),
    "coverage_stalls": Kind("almost no new prompts are chosen", is_broken=False),
}
"""By code, the most urgent first."""
