"""Attempts, a row each, brought together to groups."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace

from evenodds_service.commands.formats.outcomes import Group, Tally

NO_REWARD = "attempts without a reward"


class Grouping:
    """Groups in the order in which their first attempts came. Holds rewards, and one text for each group."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._first: dict[Hashable, Group] = {}
        self._rewards: dict[Hashable, dict[Hashable, float]] = {}

    def add(self, key: Hashable, reward: float | None, about: Group, *, attempt: Hashable = None) -> None:
        """Add an attempt to the group of this key. A reward of None is absent: the attempt is counted and left out.

        Args:
            about: What the row says of the group; the first row's counts.
            attempt: A later row of the same attempt replaces the earlier; None: each row is one.
        """
        rewards = self._rewards.setdefault(key, {})
        self._first.setdefault(key, about)
        if reward is None:
            self._tally.leave_out(NO_REWARD, about.place)
        else:
            rewards[len(rewards) if attempt is None else attempt] = reward

    def groups(self) -> Iterator[Group]:
        """Those with a reward at least."""
        for key, rewards in self._rewards.items():
            if rewards:
                yield replace(self._first[key], rewards=tuple(rewards.values()))
