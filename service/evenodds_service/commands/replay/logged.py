"""A trainer's log as something to replay: what was tried at each step, and what came of it.

Says what the log cannot tell. Knows nothing of predictors and of the service.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from evenodds import PromptIn
from evenodds.training.text import answer_of
from evenodds_service.commands.formats.outcomes import Group, LogRefused, Tally, Wishes
from evenodds_service.commands.formats.reading import OF_TRAININGS, open_log
from evenodds_service.domain.prompts import text_key

LEAST_GROUPS = 8
"""A step with fewer groups leaves too little to choose from, and is passed over."""
LEAST_STEPS = 16
"""Fewer steps show nothing of what is learned on the way, and give no interval."""
LEAST_ATTEMPTS = 2
FEW_VISITS = 1.5
_MANY_GROUPS = 200
"""Among so many a trainer without a filter has a silent one."""


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """The groups of a step, each of another prompt.

    Attributes:
        prompts: Indices of their prompts.
        rewards: Of each, at least two in [0, 1].
    """

    step: int
    prompts: tuple[int, ...]
    rewards: tuple[tuple[float, ...], ...]

    @property
    def informative(self) -> tuple[bool, ...]:
        """Whether the rewards of each group are not all equal."""
        return tuple(len(set(rewards)) > 1 for rewards in self.rewards)


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """All steps of a log with at least `LEAST_GROUPS` groups, in their order.

    Attributes:
        name, format: Of the log.
        tally: What its reader left out and wants said.
    """

    name: str
    format: str
    prompts: tuple[PromptIn, ...]
    steps: tuple[LoggedStep, ...]
    tally: Tally

    @property
    def n_groups(self) -> int:
        return sum(len(step.prompts) for step in self.steps)

    @property
    def n_attempts(self) -> int:
        return sum(len(rewards) for step in self.steps for rewards in step.rewards)

    @property
    def n_silent_groups(self) -> int:
        return sum(not each for step in self.steps for each in step.informative)

    @property
    def silent_share(self) -> float:
        """The share of the attempts that are in groups of equal rewards."""
        silent = sum(len(set(rewards)) == 1 and len(rewards) for step in self.steps for rewards in step.rewards)
        return silent / self.n_attempts if self.n_attempts else 0.0

    @property
    def group_size(self) -> int:
        """What most groups have."""
        sizes = Counter(len(rewards) for step in self.steps for rewards in step.rewards)
        return sizes.most_common(1)[0][0]

    @property
    def visits(self) -> float:
        """Groups a prompt that was tried, mean."""
        return self.n_groups / max(len({i for step in self.steps for i in step.prompts}), 1)

    def cannot_tell(self) -> list[str]:
        """Why this log cannot tell what choosing would have saved; empty where it can."""
        if self.format not in OF_TRAININGS:
            return [
                f"{self.format} is an evaluation or a table: it has one model at one time, and no steps at which to "
                "choose"
            ]
        reasons = []
        if self.tally.is_filtered:
            reasons.append("groups were left out of it because of their outcomes, so that silent groups are missing")
        elif self.n_groups >= _MANY_GROUPS and not self.n_silent_groups:
            reasons.append(
                f"none of its {self.n_groups:,} groups is silent: silent groups were filtered before it was "
                "written, as dynamic sampling does"
            )
        if len(self.steps) < LEAST_STEPS:
            reasons.append(
                f"{len(self.steps)} of its steps have {LEAST_GROUPS} groups of {LEAST_ATTEMPTS} attempts or more; at "
                f"least {LEAST_STEPS} are needed"
            )
        if self.visits == 1.0 and all(prompt.text is None for prompt in self.prompts):
            reasons.append("no prompt was tried twice and none has a text: nothing can predict an outcome")
        return reasons


def read_logged(path: Path, wishes: Wishes, *, format_: str | None = None, n_steps: int | None = None) -> LoggedRun:
    """Read a log whole: an index and rewards for each group, and each prompt's text once.

    Args:
        n_steps: The first so many steps only.

    Raises:
        LogRefused: it cannot be read, or not without further wishes.
    """
    log, tally = open_log(path, format_), Tally()
    prompts: dict[str, tuple[int, PromptIn]] = {}
    found: dict[int, dict[int, tuple[float, ...]]] = {}
    for _, entries in log.entries(wishes, tally):
        for entry in entries:
            if not isinstance(entry, Group):
                continue
            if len(entry.rewards) < LEAST_ATTEMPTS:
                tally.leave_out("groups of one attempt, which are neither silent nor informative", entry.place)
                continue
            index = _index(prompts, entry)
            groups = found.setdefault(entry.step, {})
            if index is None:
                tally.leave_out("groups without an id or a text", entry.place)
            elif index in groups:
                tally.leave_out("further groups of a prompt at the same step", entry.place)
            else:
                groups[index] = entry.rewards
    steps = [LoggedStep(step, tuple(groups), tuple(groups.values())) for step, groups in sorted(found.items())]
    kept = [step for step in steps if len(step.prompts) >= LEAST_GROUPS]
    if len(kept) < len(steps):
        tally.leave_out(f"steps of fewer than {LEAST_GROUPS} groups", log.files[0].name, len(steps) - len(kept))
    if not found and log.format in OF_TRAININGS:
        raise LogRefused(f"{path}: no group of {LEAST_ATTEMPTS} attempts or more is in it")
    described = tuple(prompt for _, prompt in prompts.values())
    return LoggedRun(path.resolve().name, log.format, described, tuple(kept[:n_steps]), tally)


def _index(prompts: dict[str, tuple[int, PromptIn]], group: Group) -> int | None:
    key = group.prompt_id or (f"text:{text_key(group.text)}" if group.text is not None else None)
    if key is None:
        return None
    if key not in prompts:
        prompt = PromptIn.model_validate(
            {"prompt_id": key, "text": group.text, "category": group.category, "answer": answer_of(group.answer)}
        )
        prompts[key] = (len(prompts), prompt)
    return prompts[key][0]
