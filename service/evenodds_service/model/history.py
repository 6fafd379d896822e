"""The history of a run as the fits take it: flat columns, no log positions, no texts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.errors import CheckpointUnusable

_COLUMNS = ("prompts", "steps", "successes", "attempts", "informative")


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """Observations of a run as columns, in any order.

    Attributes:
        prompts, steps: int64 [n].
        successes, attempts: float64 [n], 0 <= successes <= attempts, attempts >= 1.
        informative: bool [n], whether the rewards of the group were not all equal.
    """

    prompts: IntArray
    steps: IntArray
    successes: FloatArray
    attempts: FloatArray
    informative: BoolArray

    def __post_init__(self) -> None:
        sizes = {len(column) for column in self._columns()}
        if len(sizes) != 1:
            raise ValueError(f"history: columns of different lengths {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: IntArray | BoolArray | slice) -> History:
        """The history of these rows."""
        prompts, steps, successes, attempts, informative = self._columns()
        return History(prompts[rows], steps[rows], successes[rows], attempts[rows], informative[rows])

    def batches(self) -> list[History]:
        """One history per step, in the order of the steps."""
        order = np.argsort(self.steps, kind="stable")
        starts = np.flatnonzero(np.diff(self.steps[order], prepend=-1))
        return [self.rows(rows) for rows in np.split(order, starts[1:])] if len(self) else []

    def capped(self, most: int) -> History:
        """The newest `most` observations of each prompt, the older ones of each added up to one more.

        The rows are taken to stand in the order in which they came.
        """
        order = np.lexsort((-np.arange(len(self)), self.prompts))
        starts = np.flatnonzero(np.diff(self.prompts[order], prepend=-1))
        sizes = np.diff(starts, append=len(self))
        rank = np.empty(len(self), dtype=np.int64)
        rank[order] = np.arange(len(self)) - np.repeat(starts, sizes)  # 0 is the newest of its prompt
        old = self.rows(rank >= most)
        if not len(old):
            return self
        prompts, row = np.unique(old.prompts, return_inverse=True)
        sums = [np.zeros(len(prompts)) for _ in range(3)]
        for total, column in zip(sums, (old.successes, old.attempts, old.informative), strict=True):
            np.add.at(total, row, column)
        steps = np.zeros(len(prompts), dtype=np.int64)
        np.maximum.at(steps, row, old.steps)
        new = self.rows(rank < most)
        older = History(prompts, steps, sums[0], sums[1], sums[2] > 0)
        return History(*(np.concatenate(pair) for pair in zip(older._columns(), new._columns(), strict=True)))

    def to_bytes(self) -> bytes:
        """The history as bytes."""
        buffer = io.BytesIO()
        prompts, steps, successes, attempts, informative = self._columns()
        np.savez_compressed(
            buffer, prompts=prompts, steps=steps, successes=successes, attempts=attempts, informative=informative
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> History:
        """The history that `to_bytes` took.

        Raises:
            CheckpointUnusable: the bytes are no history.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                return History(*(stored[name] for name in _COLUMNS))
        except Exception as error:  # bytes that were damaged may hold anything
            raise CheckpointUnusable(f"{len(content)} bytes are no history: {error!r:.200}") from error

    @staticmethod
    def gathered(pieces: Sequence[History]) -> History:
        """Several pieces as one."""
        if not pieces:
            return History.empty()
        return History(*map(np.concatenate, zip(*(piece._columns() for piece in pieces), strict=True)))

    def _columns(self) -> tuple[IntArray, IntArray, FloatArray, FloatArray, BoolArray]:
        return self.prompts, self.steps, self.successes, self.attempts, self.informative

    @staticmethod
    def empty() -> History:
        none = np.zeros(0, dtype=np.int64)
        return History(none, none, np.zeros(0), np.zeros(0), np.zeros(0, dtype=bool))
