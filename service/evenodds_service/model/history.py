"""The history of a run as the fits take it: flat columns, no log positions, no texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray


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

    def _columns(self) -> tuple[IntArray, IntArray, FloatArray, FloatArray, BoolArray]:
        return self.prompts, self.steps, self.successes, self.attempts, self.informative

    @staticmethod
    def empty() -> History:
        none = np.zeros(0, dtype=np.int64)
        return History(none, none, np.zeros(0), np.zeros(0), np.zeros(0, dtype=bool))
