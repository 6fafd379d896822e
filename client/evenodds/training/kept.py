"""Which groups of a batch a trainer updates on: those that carry a signal, by category where it wants so many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evenodds.training.inputs import EQUAL_WITHIN


@dataclass(frozen=True)
class Group:
    """The attempts at one prompt.

    Attributes:
        is_informative: Whether they were not all rewarded alike.
    """

    prompt_id: str
    category: str | None
    is_informative: bool


def informative_ids(observations: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The prompts whose attempts, in all their observations together, were not all rewarded alike."""
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    for each in observations:
        rewards = each.get("rewards")
        if rewards is None:  # a sum strictly between tells of unlike rewards, as on the service's side
            successes, attempts = each["successes"], each["attempts"]
            is_between = attempts > 1 and EQUAL_WITHIN < successes < attempts - EQUAL_WITHIN
            rewards = (0.0, 1.0) if is_between else (successes / attempts,)
        prompt_id = each.get("prompt_id", "")
        least[prompt_id] = min(least.get(prompt_id, 1.0), *rewards)
        most[prompt_id] = max(most.get(prompt_id, 0.0), *rewards)
    return frozenset(prompt_id for prompt_id in least if most[prompt_id] - least[prompt_id] > EQUAL_WITHIN)


def kept(groups: Sequence[Group], size: int | None) -> tuple[str, ...]:
    """The prompts to train on, in the order given.

    Without a size all informative ones. With one exactly so many, or all groups if they are fewer: informative ones
    first, of each category as many as is its part of the batch, as far as it has them. Only where all of them together
    are too few, silent groups fill up, of the categories that lack the most.
    """
    if size is None:
        return tuple(group.prompt_id for group in groups if group.is_informative)
    counts = Counter(group.category for group in groups)
    lacks = {category: size * n / len(groups) for category, n in counts.items()}
    taken: set[str] = set()
    for is_informative in (True, False):
        left: dict[str | None, list[str]] = {}
        for group in reversed(groups):
            if group.is_informative == is_informative:
                left.setdefault(group.category, []).append(group.prompt_id)
        while left and len(taken) < size:
            category = max(left, key=lambda name: lacks[name])
            taken.add(left[category].pop())
            lacks[category] -= 1.0
            if not left[category]:
                del left[category]
    return tuple(group.prompt_id for group in groups if group.prompt_id in taken)
