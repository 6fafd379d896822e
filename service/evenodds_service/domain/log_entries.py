"""The entries of a run's log, validated where they are made (finite, in range), so that no later check is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray

MAX_CONTROL_SHARE = 0.5
EQUAL_WITHIN = 1e-6
"""Rewards, and sums of them, that differ by less are equal: .3 and .1 + .2 differ by rounding."""


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """Log entry: `n_prompts` prompts have come since the run began, those that were retired since among them.

    Attributes:
        at: When, in seconds since 1970.
    """

    position: int
    n_prompts: int
    at: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ObserveEntry:
    """Log entry: outcomes of attempts, made by the policy of `step`.

    Attributes:
        prompts: int64 [n] prompt indices; one prompt may stand in several rows.
        successes: float64 [n], 0 <= successes <= attempts; fractional rewards sum to fractional successes.
        attempts: float64 [n], at least 1.
        informative: bool [n]; whether the rewards of the group were not all equal.
        selection_id, selection_step: The selection whose outcomes these are, and the step that it was for.
        at: When they were reported, in seconds since 1970.
    """

    position: int
    step: int
    prompts: IntArray
    successes: FloatArray
    attempts: FloatArray
    informative: BoolArray
    selection_id: str | None = None
    selection_step: int | None = None
    at: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        sizes = {len(self.prompts), len(self.successes), len(self.attempts), len(self.informative)}
        if len(sizes) != 1:
            raise ValueError(f"log entry {self.position}: arrays of different lengths {sorted(sizes)}")
        if not (np.isfinite(self.successes).all() and np.isfinite(self.attempts).all()):
            raise ValueError(f"log entry {self.position}: successes and attempts must be finite")
        if ((self.successes < 0) | (self.successes > self.attempts) | (self.attempts < 1)).any():
            raise ValueError(f"log entry {self.position}: successes must lie in [0, attempts], attempts >= 1")


@dataclass(frozen=True, slots=True)
class SelectEntry:
    """Log entry: the batch chosen for `step`.

    Attributes:
        prompts: int64 [B] prompt indices.
        control_share: The share that was asked for; .1 of 5 prompts is one in every other batch.
        control: bool [B], which of them were chosen uniformly; None: none.
        a, b: Parameters of the belief about each when it was chosen, [B]; None where they were not recorded.
        unseen_share: Where the request named candidates or left prompts out: which share of those that remained was
            never chosen or observed before. None: it left the whole pool.
    """

    position: int
    step: int
    prompts: IntArray
    selection_id: str | None = None
    control_share: float = 0.0
    control: BoolArray | None = None
    a: FloatArray | None = None
    b: FloatArray | None = None
    unseen_share: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.control_share <= MAX_CONTROL_SHARE:
            raise ValueError(f"log entry {self.position}: control_share {self.control_share} is not in [0, 0.5]")
        for name in ("control", "a", "b"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(
                    f"log entry {self.position}: {len(self.prompts)} prompts, {len(values)} values of {name}"
                )
        for values in (self.a, self.b):
            if values is not None and not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(f"log entry {self.position}: a and b must be finite and above 0")


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """Log entry: from this position on, every replica uses snapshot `version`."""

    position: int
    version: int


@dataclass(frozen=True, slots=True)
class RetireEntry:
    """Log entry: these prompts, by index, leave the pool. What their outcomes taught of others stays.

    Attributes:
        prompts: int64 [n], distinct.
    """

    position: int
    prompts: IntArray


@dataclass(frozen=True, slots=True)
class VoidEntry:
    """Log entry that changes nothing: one that was voided since, or the rewind or retract that voids others."""

    position: int


WrittenEntry = PoolEntry | ObserveEntry | SelectEntry | SnapshotEntry | RetireEntry
"""What is appended to a log; a rewind or retract is recorded by whoever marks what it voids."""

Entry = WrittenEntry | VoidEntry


@dataclass(frozen=True, slots=True)
class NewObservation:
    """One observation on its way into the log.

    `prompt` is the index of a prompt in the pool, or the id of a prompt that the same call adds.
    """

    prompt: int | str
    successes: float
    attempts: int
    informative: bool

    @staticmethod
    def of_counts(prompt: int | str, successes: float, attempts: int) -> NewObservation:
        return NewObservation(
            prompt, successes, attempts, attempts > 1 and EQUAL_WITHIN < successes < attempts - EQUAL_WITHIN
        )

    @staticmethod
    def of_rewards(prompt: int | str, rewards: Sequence[float]) -> NewObservation:
        """Fractional rewards count as fractional successes; equal rewards carry no group-relative signal."""
        informative = max(rewards) - min(rewards) > EQUAL_WITHIN
        return NewObservation(prompt, math.fsum(rewards), len(rewards), informative)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What one call reports: observations of attempts by the policy of `step`.

    Attributes:
        request_id, request_hash: Names the call, and a hash of its content; both or neither.
        selection_id: The selection whose outcomes these are.
    """

    step: int
    observations: Sequence[NewObservation]
    request_id: str | None = None
    request_hash: str | None = None
    selection_id: str | None = None
