"""Notices in what a trainer reports that it is not what the run was set up for. It warns and changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from evenodds.training.status import Status

STEPS = 3
"""So many steps in a row before a warning."""


class Watch:
    """Of one process."""

    def __init__(self, status: Status) -> None:
        self._status = status
        # The largest number of attempts at one prompt, by step, newest last.
        self._most_attempts: dict[int, int] = {}
        self._attempts: dict[tuple[int, object], int] = defaultdict(int)

    def not_chosen(self, step: int, sound: Sequence[Mapping[str, object]], chosen: Collection[str] | None) -> None:
        """Outcomes at a step whose batch is known, of prompts that are not in it: of an evaluation set, perhaps."""
        if chosen is None:
            return
        others = [outcome.get("prompt_id") for outcome in sound if outcome.get("prompt_id") not in chosen]
        if others:
            self._status.say_once(
                "not chosen",
                f"{len(others)} of {len(sound)} outcomes of step {step} are of prompts that were not chosen for it "
                f"({others[0]!r} ...) and count as outcomes of that step, and later ones may too (this is said "
                "once): do not report evaluation sets",
            )

    def attempts(self, step: int, sound: Sequence[Mapping[str, object]], group_size: int | None) -> None:
        """How many attempts a prompt gets, against the run's `group_size`. For trainers that report whole groups."""
        if step not in self._most_attempts:
            done = list(self._most_attempts.values())[-STEPS:]
            if group_size is not None and len(done) == STEPS and len(set(done)) == 1 and done[0] != group_size:
                self._status.say_once(
                    "group size",
                    f"prompts get {done[0]} attempts each, but the run's group_size is {group_size}, and choices and "
                    f"forecasts depend on it: set run_settings={{'group_size': {done[0]}}}",
                )
            self._attempts.clear()
            while len(self._most_attempts) > STEPS:
                del self._most_attempts[next(iter(self._most_attempts))]
            self._most_attempts[step] = 0
        for outcome in sound:
            rewards = outcome.get("rewards")
            n = len(rewards) if isinstance(rewards, (list, tuple)) else outcome.get("attempts")
            key = (step, outcome.get("prompt_id"))
            self._attempts[key] += n if isinstance(n, int) else 0
            self._most_attempts[step] = max(self._most_attempts[step], self._attempts[key])
