"""Raw features of a pool, row by row, of which the first ones can be let go once nobody reads them any more."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain.arrays import BoolArray, FloatArray

PIECE = 65_536
"""Rows that are let go together. A smaller pool keeps all of its rows."""


class RawRows:
    """Rows of one width, appended, in half precision: the features are O(1) and standardised later.

    Kept in pieces: memory goes back piece by piece, and growing copies at most the last one.

    Args:
        width: Columns.
        n_missing: Rows of NaN to begin with.
        first: Rows before these that were let go.
    """

    def __init__(self, width: int, *, n_missing: int = 0, first: int = 0) -> None:
        self.width = width
        self.first = self.n = first
        self._pieces: list[NDArray[np.float16]] = []  # all but the last are full
        for start in range(0, n_missing, PIECE):
            self.append(np.full((min(PIECE, n_missing - start), width), np.nan, dtype=np.float16))

    def append(self, values_n_D: FloatArray) -> None:
        """Append rows of this width."""
        while len(values_n_D):
            filled = (self.n - self.first) % PIECE
            if filled == 0:
                self._pieces.append(np.empty((0, self.width), dtype=np.float16))
            fitting = values_n_D[: PIECE - filled]
            needed = filled + len(fitting)
            if needed > len(self._pieces[-1]):
                grown = np.empty((min(PIECE, max(needed, 2 * filled)), self.width), dtype=np.float16)
                grown[:filled] = self._pieces[-1][:filled]
                self._pieces[-1] = grown
            self._pieces[-1][filled:needed] = fitting
            self.n += len(fitting)
            values_n_D = values_n_D[len(fitting) :]

    def rows(self, first: int, last: int) -> NDArray[np.float16]:
        """The rows first <= row < last: a view where they stand in one piece.

        Raises:
            ValueError: some of them were let go.
        """
        if first < self.first and first < last:
            raise ValueError(f"raw features of prompt {first} were let go, as of all before {self.first}")
        last = min(last, self.n)
        parts = []
        while first < last:
            number, start = divmod(first - self.first, PIECE)
            parts.append(self._pieces[number][start : start + last - first])
            first += len(parts[-1])
        if not parts:
            return np.empty((0, self.width), dtype=np.float16)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def let_go(self, last: int) -> None:
        """Let go of the rows before `last`, as far as they fill whole pieces."""
        n = max(0, last - self.first) // PIECE
        del self._pieces[:n]
        self.first += n * PIECE

    def kept(self, kept_N: BoolArray) -> RawRows:
        """These rows alone, of all that there are or were."""
        kept = RawRows(self.width, first=int(kept_N[: self.first].sum()))
        for start in range(self.first, self.n, PIECE):
            piece = self.rows(start, min(start + PIECE, self.n))
            kept.append(piece[kept_N[start : start + len(piece)]])
        return kept
