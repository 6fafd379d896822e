"""The pool's features: raw blocks as they arrive, and the basis that turns them into the regressions' inputs.

A basis is a function of the first prompts of the pool only, so that every replica derives the same one. Knows nothing
of texts or embedders; rows without a text or a vector count as average.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray, ScalarT
from evenodds_service.domain.learning.known_rates import RateColumns
from evenodds_service.domain.learning.raw_rows import RawRows
from evenodds_service.domain.learning.tallies import MAX_GROUPS as SUMMED_GROUPS
from evenodds_service.domain.prompts import (
    NO_ANSWERS,
    NO_RATES,
    UNNAMED,
    FittedPrior,
    NamedRates,
    RawBlock,
    SourceColumns,
)

COMPONENTS = 32
ENOUGH_PROMPTS = 4_096
"""A basis that is derived from so many is final."""
MAX_GROUPS, MAX_NUMERIC = 64, 64
GROUP_SCALE = 2.0
COMPONENT_SCALE = 1.0
_SAMPLE = 20_000
_MAX_EIGEN_WIDTH = 512
_CLIP = 4.0
_MOST = 31.0  # of a component: whoever lies so far out is far enough
KEPT_STEP = 2.0**-10
"""Projected features are multiples of this, within 32, so that a pool keeps them in 16 bits without rounding anew."""
_EMBEDDING_BITS = 22
_BASIS_ARRAYS = ("means", "scales", "embedding_mean_D", "components_D_P")
_FINITE = 1e100
_CHUNK = 512
_TOGETHER = 16
_OVERSAMPLING, _ITERATIONS = 16, 16


class Pool:
    """Features of prompts 0 .. n-1, appended in blocks: raw ones, and these projected under a basis.

    Args:
        lets_go: Whether raw features are let go, some 600 bytes a prompt, once they are projected under a basis that is
            final. Whoever needs them again reads them anew: see `serves`.
    """

    def __init__(
        self,
        *,
        surface_width: int,
        embedding_width: int,
        group_names: Sequence[str | None] = (),
        tellers: Sequence[str] = (),
        lets_go: bool = False,
    ) -> None:
        """Without prompts. `group_names` and `tellers` are those that prompts before these brought, in their order."""
        self.n = 0
        self.n_retired = 0
        self.prompt_ids: list[str] = []
        self.index: dict[str, int] = {}
        self.groups: list[str | None] = []
        self._group_codes: dict[str | None, int] = {name: code for code, name in enumerate(group_names)}
        self._codes = np.empty(0, dtype=np.int32)
        self._numeric: list[Mapping[str, float] | None] = []
        self._lets_go = lets_go
        self._surface = RawRows(surface_width)
        self._embedding = RawRows(embedding_width)
        self._prior_rates = np.empty(0, dtype=np.float32)
        self._answers = RawRows(0)  # without columns until a prompt has one
        self._told = _with_rates(NO_RATES, 0, 0, tuple(tellers))
        self._first_told = _told_before(tellers)  # by who told it: the first prompt
        self._known: tuple[RateColumns, FloatArray] | None = None
        # In units of KEPT_STEP; with how many rows of each chunk are done.
        self._matrix: tuple[Basis, NDArray[np.int16], IntArray] | None = None
        self._fitted: tuple[int, Mapping[str, FittedPrior]] = (0, {})
        self._sources: Mapping[int, SourceColumns] = {}  # of the attached snapshot and the one before it

    def reserve(self, n: int) -> None:
        """Make room for n prompts in all, so that appending so many copies none of those before."""
        self._prior_rates = _with_rows(self._prior_rates, self.n, n)
        self._codes = _with_rows(self._codes, self.n, n)
        self._told = _with_rates(self._told, self.n, n, ())

    def append(self, block: RawBlock) -> None:
        """Append consecutive prompts. A block without vectors (width 0) counts as rows of NaN.

        Raises:
            ValueError: the block does not start where the pool ends, or its vectors have another width.
        """
        if block.first != self.n:
            raise ValueError(f"block starts at prompt {block.first}, the pool ends at {self.n}")
        n = len(block.prompt_ids)
        if self._embedding.width == 0 and block.embedding_N_D.shape[1] > 0:
            self._embedding = self._missing(block.embedding_N_D.shape[1])
        surface = _of_width(block.surface_N_S, self._surface.width, what="surface features")
        embedding = _of_width(block.embedding_N_D, self._embedding.width, what="embeddings")
        self._surface.append(surface)
        self._embedding.append(embedding)
        self._prior_rates = _append(self._prior_rates, self.n, block.prior_rates_N)
        self._append_answers(block.answers_N_A, n)
        self._append_told(block.told, n)
        self.index.update(zip(block.prompt_ids, range(self.n, self.n + n), strict=True))
        self.prompt_ids.extend(block.prompt_ids)
        codes = [self._group_codes.setdefault(group, len(self._group_codes)) for group in block.groups]
        self._codes = _append(self._codes, self.n, np.asarray(codes, dtype=np.int32))
        names = tuple(self._group_codes)
        self.groups.extend(names[code] for code in codes)  # one text for all prompts of a group
        self._numeric.extend(block.numeric)
        self.n += n

    def raw(self, first: int, last: int) -> RawBlock:
        """The prompts first <= index < last as one block, mostly views.

        Raises:
            ValueError: raw features of some were let go.
        """
        last = min(last, self.n)
        return RawBlock(
            first=first,
            prompt_ids=tuple(self.prompt_ids[first:last]),
            groups=tuple(self.groups[first:last]),
            numeric=tuple(self._numeric[first:last]),
            prior_rates_N=self._prior_rates[first:last],
            surface_N_S=self._surface.rows(first, last),
            embedding_N_D=self._embedding.rows(first, last),
            named_rates=self._named(first, last),
            answers_N_A=self._answers.rows(first, last) if self._answers.width else NO_ANSWERS,
        )

    @property
    def n_let_go(self) -> int:
        """The raw features of so many prompts, the first ones, were let go."""
        return self._surface.first

    def let_go(self, basis: Basis | None, *, above: int) -> None:
        """Project what has come, and let go of its raw features, where more than `above` prompts have them.

        Nothing is done while they may be asked for under another basis than this one.
        """
        if self._lets_go and basis is not None and basis.is_final and self.n - self.n_let_go > above:
            self._projected(basis, _chunks(self.n))

    def serves(self, basis: Basis | None) -> bool:
        """Whether all prompts have features under this basis, or can be given them; None: under whichever comes."""
        if not self.n_let_go:
            return True
        return basis is not None and self._matrix is not None and self._matrix[0].equals(basis)

    def _missing(self, width: int) -> RawRows:
        """Rows of NaN for the prompts so far."""
        return RawRows(width, n_missing=self.n - self.n_let_go, first=self.n_let_go)

    def _named(self, first: int, last: int) -> NamedRates:
        names = tuple(name for name in self._told.names if name != UNNAMED)
        if not names:
            return NO_RATES
        columns = [self._told.names.index(name) for name in names]
        told = self._told[first:last]
        return NamedRates(names, told.rates_N_R[:, columns], told.attempts_N_R[:, columns])

    def _append_answers(self, answers_n_A: FloatArray, n: int) -> None:
        """Write the features of the answers of the next n prompts. Costs nothing while no prompt has an answer."""
        if self._answers.width == 0 and answers_n_A.shape[1]:
            self._answers = self._missing(answers_n_A.shape[1])
        missing = np.full((n, self._answers.width), np.nan, dtype=np.float16)
        self._answers.append(answers_n_A if answers_n_A.shape[1] else missing)

    def _append_told(self, new: NamedRates, n: int) -> None:
        """Write what others showed on the next n prompts. Costs nothing while nobody has shown anything."""
        tells = np.isfinite(new.rates_N_R)
        tellers = [i for i in range(len(new.names)) if tells[:, i].any()]
        for i in tellers:
            self._first_told.setdefault(new.names[i], self.n + int(tells[:, i].argmax()))
        fresh = tuple(new.names[i] for i in tellers if new.names[i] not in self._told.names)
        if not (fresh or self._told.names):
            return
        needed, room = self.n + n, len(self._told.rates_N_R)
        self._told = _with_rates(self._told, self.n, max(needed, 2 * room) if needed > room else room, fresh)
        here = slice(self.n, needed)
        self._told.rates_N_R[here], self._told.attempts_N_R[here] = np.nan, 1.0
        for i in tellers:
            column = self._told.names.index(new.names[i])
            self._told.rates_N_R[here, column] = new.rates_N_R[:, i]
            self._told.attempts_N_R[here, column] = new.attempts_N_R[:, i]

    def retire(self, kept_N: BoolArray) -> None:
        """Let go of all prompts but these. The others move up; views that were given out stay as they are.

        What the sums of a run know groups by stays, though no prompt of theirs be left: the names of the first
        `SUMMED_GROUPS`, and who told something.

        Args:
            kept_N: One for each prompt.
        """
        n = len(kept_N)
        if n != self.n:
            raise ValueError(f"{n} prompts to keep or not, the pool has {self.n}")
        codes = self._codes[:n][kept_N]
        names, used = tuple(self._group_codes), set(np.unique(codes).tolist())
        left = [code for code in range(len(names)) if code < SUMMED_GROUPS or code in used]
        renamed = np.zeros(len(names), dtype=np.int32)
        renamed[left] = np.arange(len(left))
        self._group_codes = {names[code]: i for i, code in enumerate(left)}
        self._codes = renamed[codes]
        self.prompt_ids = list(compress(self.prompt_ids[:n], kept_N))
        self.index = {prompt_id: row for row, prompt_id in enumerate(self.prompt_ids)}
        self.groups = list(compress(self.groups[:n], kept_N))
        self._numeric = list(compress(self._numeric[:n], kept_N))
        self._surface, self._embedding = self._surface.kept(kept_N), self._embedding.kept(kept_N)
        self._prior_rates = self._prior_rates[:n][kept_N]
        self._answers = self._answers.kept(kept_N)
        self._first_told = _told_before(self.all_tellers)
        if self._told.names:
            told = self._told
            self._told = NamedRates(told.names, told.rates_N_R[:n][kept_N], told.attempts_N_R[:n][kept_N])
        if self._known is not None:
            columns, known = self._known
            self._known = (columns, known[kept_N[: len(known)]])
        if self._matrix is not None:
            self._matrix = _compressed(*self._matrix, kept_N)
        version, fitted = self._fitted
        self._fitted = (version, {name: prior.rows(kept_N[: len(prior.means_N)]) for name, prior in fitted.items()})
        self._sources = {
            version: shown.kept(kept_N[: len(shown.log_odds_N_C)]) for version, shown in self._sources.items()
        }
        self.n = len(self.prompt_ids)
        self.n_retired += n - self.n

    @property
    def all_tellers(self) -> tuple[str, ...]:
        """Who has told something of any prompt that is or was here, in the order of the first."""
        return tuple(name for _, name in sorted((first, name) for name, first in self._first_told.items()))

    def view(self, basis: Basis | None) -> Pool:
        """The pool as it stands, for whoever reads at length while it grows and takes other priors. Copies nothing."""
        if basis is not None:
            self._projected(basis, _chunks(self.n))  # once for all views
        return copy.copy(self)

    def attach(self, version: int, fitted: Mapping[str, FittedPrior], sources: SourceColumns | None = None) -> None:
        """Take the fitted priors of snapshot `version`, by name, and its columns of other runs, in place of the ones
        before. The columns before are kept for the fold, which carries over what was learned on them.
        """
        kept = {before: columns for before, columns in self._sources.items() if before == self._fitted[0]}
        self._sources = kept | ({} if sources is None else {version: sources})
        self._fitted = (version, fitted)

    def sources(self, version: int) -> SourceColumns | None:
        """The columns of other runs that this snapshot brought, if it brought any."""
        return self._sources.get(version)

    def fitted(self, version: int) -> Mapping[str, FittedPrior]:
        """The fitted priors of this snapshot; none for version 0.

        Raises:
            ValueError: another snapshot is attached.
        """
        if version == 0:
            return {}
        if self._fitted[0] != version:
            raise ValueError(
                f"the pool has the priors of snapshot {self._fitted[0]}, asked for were those of {version}"
            )
        return self._fitted[1]

    @property
    def group_names(self) -> tuple[str | None, ...]:
        """Groups by code: in the order in which they first appeared. None stands for prompts without one."""
        return tuple(self._group_codes)

    def group_codes(self, rows: IntArray | slice) -> IntArray:
        """Group codes of these prompts, int64 [n]."""
        return self._codes[rows].astype(np.int64)

    def members(self, group: str, n: int) -> BoolArray:
        """Which of the first n prompts are in this group, bool [n]."""
        return np.asarray(self._codes[:n] == self._group_codes.get(group, -1))

    def prior_rates(self, n: int) -> FloatArray:
        """The caller's rates of the first n prompts, NaN where there is none, float32 [n]."""
        return self._prior_rates[:n]

    def tellers(self, n: int, *, also_alone: bool = False) -> tuple[str, ...]:
        """Who has shown something on the first n prompts, in the order of the first that they did.

        Nobody where only `prior_rate` is known: it has a prior of its own, and is a feature of the online regressions.

        Args:
            also_alone: Tell of `prior_rate` alone too.
        """
        firsts = sorted((first, name) for name, first in self._first_told.items() if first < n)
        names = tuple(name for _, name in firsts)
        return () if names == (UNNAMED,) and not also_alone else names

    def told(self, names: tuple[str, ...], rows: IntArray | slice) -> NamedRates:
        """What these showed on these prompts."""
        if not names:
            nothing = np.empty((len(np.arange(self.n)[rows]), 0), dtype=np.float32)
            return NamedRates((), nothing, nothing)
        columns = [self._told.names.index(name) for name in names]
        rates_n_R, attempts_n_R = self._told.rates_N_R[: self.n][rows], self._told.attempts_N_R[: self.n][rows]
        return NamedRates(names, _rows_of(rates_n_R, columns), _rows_of(attempts_n_R, columns))

    def known(self, columns: RateColumns, rows: IntArray | slice) -> FloatArray:
        """What is known of these prompts as inputs of a regression, float32 [n, columns.width]; kept."""
        kept = self._known
        if kept is None or kept[0] is not columns:
            kept = (columns, np.empty((0, columns.width), dtype=np.float32))
        if len(kept[1]) < self.n:
            missing = self.inputs(columns, slice(len(kept[1]), self.n))
            kept = (columns, np.concatenate((kept[1], missing)))
        self._known = kept
        return kept[1][rows]

    def known_to(self, columns: RateColumns, n: int) -> BoolArray:
        """Of which of the first n prompts these know something, bool [n]."""
        knows = np.asarray(np.isfinite(self.told(columns.names, slice(0, n)).rates_N_R).any(axis=1))
        sources = self._sources.get(columns.version)
        if sources is not None:
            knows |= np.isfinite(sources.rows(slice(0, n), n)[:, 0])
        return knows

    def inputs(self, columns: RateColumns, rows: IntArray | slice) -> FloatArray:
        """What is known of these prompts, as `known`, anew."""
        sources = self._sources.get(columns.version)
        shown = None if sources is None else sources.rows(rows, self.n)
        return columns.project(self.told(columns.names, rows), shown)

    def rows(self, basis: Basis, rows: IntArray | slice) -> FloatArray:
        """Projected features of these prompts, float32 [n, d], from what is kept. Those of others need not be there."""
        if isinstance(rows, slice):
            first, last, _ = rows.indices(self.n)
            chunks = np.arange(first // _CHUNK, -(-last // _CHUNK))
        else:
            chunks = np.unique(rows // _CHUNK)
        return np.multiply(self._projected(basis, chunks)[rows], KEPT_STEP, dtype=np.float32)

    def matrix(self, basis: Basis, n: int) -> FloatArray:
        """Projected features of the first n prompts, float32 [n, d], twice as large as what is kept of them."""
        return np.multiply(self._projected(basis, _chunks(n))[:n], KEPT_STEP, dtype=np.float32)

    def _projected(self, basis: Basis, chunks: IntArray) -> NDArray[np.int16]:
        """Projected features of the pool in units of `KEPT_STEP`, [N, d], of which these chunks are there; kept, and
        extended as the pool grows.
        """
        kept = self._matrix
        if kept is None or not (kept[0] is basis or kept[0].equals(basis)):
            if self.n_let_go:
                raise ValueError(f"raw features of {self.n_let_go} prompts were let go, and another basis needs them")
            kept = (basis, np.empty((0, basis.width), dtype=np.int16), np.zeros(0, dtype=np.int64))
        _, x_N_d, done_K = kept
        if len(x_N_d) < self.n:
            x_N_d = _with_rows(x_N_d, len(x_N_d), len(self._prior_rates))  # as much room as is for the others
            done_K = np.append(done_K, np.zeros(-(-len(x_N_d) // _CHUNK) - len(done_K), dtype=np.int64))
        # Whole chunks anew: a row must not depend, not even in its last bit, on when it was projected.
        missing = chunks[done_K[chunks] < np.minimum(_CHUNK, self.n - _CHUNK * chunks)]
        gaps = (np.diff(missing) > 1) | (np.diff(missing // _TOGETHER) > 0)
        for together in np.split(missing, np.flatnonzero(gaps) + 1) if len(missing) else ():
            # Those that were let go are done. (Where others were retired, their chunk may not be.)
            first, last = max(int(together[0]) * _CHUNK, self.n_let_go), min((int(together[-1]) + 1) * _CHUNK, self.n)
            x_N_d[first:last] = basis.project(self.raw(first, last)) * np.float32(1.0 / KEPT_STEP)
            done_K[together] = np.minimum(_CHUNK, self.n - _CHUNK * together)
            if self._lets_go and basis.is_final:
                not_done = np.flatnonzero(done_K < _CHUNK)
                self._let_go(int(not_done[0]) * _CHUNK if len(not_done) else self.n)
        self._matrix = (basis, x_N_d, done_K)
        return x_N_d[: self.n]

    def _let_go(self, last: int) -> None:
        """Let go of the raw features of the prompts before this one, as far as they fill whole pieces."""
        before = self.n_let_go
        for rows in (self._surface, self._embedding, self._answers):
            rows.let_go(last)
        self._numeric[before : self.n_let_go] = [None] * (self.n_let_go - before)


def _told_before(tellers: Sequence[str]) -> dict[str, int]:
    """Each before any prompt that is here."""
    return {name: i - len(tellers) for i, name in enumerate(tellers)}


def _chunks(n: int) -> IntArray:
    """Of the first n prompts."""
    return np.arange(-(-n // _CHUNK))


def _compressed(
    basis: Basis, x_N_d: NDArray[np.int16], done_K: IntArray, kept_N: BoolArray
) -> tuple[Basis, NDArray[np.int16], IntArray]:
    """The projected features of those that are kept. A chunk is done as far as its first rows are."""
    n = min(len(x_N_d), len(kept_N))
    rows = np.arange(n)
    done_n = (rows % _CHUNK < done_K[rows // _CHUNK])[kept_N[:n]]
    x_n_d = x_N_d[:n][kept_N[:n]]
    chunks = np.zeros((-(-len(x_n_d) // _CHUNK), _CHUNK), dtype=np.int64)
    chunks.reshape(-1)[: len(done_n)] = done_n
    return basis, x_n_d, np.minimum.accumulate(chunks, axis=1).sum(axis=1)


def _of_width(values_n_D: FloatArray, width: int, *, what: str) -> FloatArray:
    n, given = values_n_D.shape
    if given == width:
        return values_n_D
    if given == 0:
        return np.full((n, width), np.nan, dtype=np.float16)
    raise ValueError(f"{what} of width {given}, the pool holds width {width}: send vectors of one model only")


def as_kept(block: RawBlock) -> RawBlock:
    """The block in the precision in which a pool would keep it, so that new prompts have the features of known ones."""
    return replace(
        block,
        surface_N_S=block.surface_N_S.astype(np.float16),
        embedding_N_D=block.embedding_N_D.astype(np.float16),
        answers_N_A=block.answers_N_A.astype(np.float16),
    )


def _append(array: NDArray[ScalarT], n: int, more: NDArray[ScalarT]) -> NDArray[ScalarT]:
    """Write `more` behind the first n rows, doubling the capacity where needed."""
    needed = n + len(more)
    if needed > len(array):
        array = _with_rows(array, n, max(needed, 2 * len(array)))
    array[n:needed] = more
    return array


def _with_rows(array: NDArray[ScalarT], n: int, rows: int) -> NDArray[ScalarT]:
    """The array with its first n rows, and room for `rows` at least."""
    if rows <= len(array):
        return array
    grown = np.empty((rows, *array.shape[1:]), dtype=array.dtype)
    grown[:n] = array[:n]
    return grown


def _with_rates(told: NamedRates, n: int, rows: int, fresh: tuple[str, ...]) -> NamedRates:
    """The first n rows, with columns for fresh names, and room for `rows` at least."""
    if not fresh and (rows <= len(told.rates_N_R) or not told.names):
        return told
    names = told.names + fresh
    shape = (max(rows, len(told.rates_N_R)), len(names))
    rates_N_R, attempts_N_R = np.full(shape, np.nan, dtype=np.float32), np.ones(shape, dtype=np.float32)
    if told.names:
        rates_N_R[:n, : len(told.names)] = told.rates_N_R[:n]
        attempts_N_R[:n, : len(told.names)] = told.attempts_N_R[:n]
    return NamedRates(names, rates_N_R, attempts_N_R)


def _rows_of(values_n_R: FloatArray, columns: list[int]) -> FloatArray:
    """These columns, row by row in memory: sums along a row are then the same for every number of rows."""
    return np.ascontiguousarray(values_n_R[:, columns])


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """How raw features become the inputs x of the regressions.

    Columns: 1, standardised surface features, standardised numeric features and log-odds of the caller's rates, those
    of the answers where a prompt had one, group indicators; behind `n_surface` of them, the leading principal
    components of the embeddings.

    Attributes:
        n_prompts: Size of the pool that it was derived from.
        numeric_names, group_names: Which numeric features and groups have columns, at most 64 each.
        means, scales: Of the standardised columns, [S + numeric + 1 + n_answer].
        components_D_P: Projection of the centred embedding, [D, P].
        n_answer: Columns of the answers; 0 where no prompt had one.
    """

    n_prompts: int
    numeric_names: tuple[str, ...]
    group_names: tuple[str, ...]
    means: FloatArray
    scales: FloatArray
    embedding_mean_D: FloatArray
    components_D_P: FloatArray
    n_answer: int = 0
    _components: exact.Columns = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_components", exact.Columns.of(self.components_D_P, x_bits=_EMBEDDING_BITS))

    @property
    def is_final(self) -> bool:
        """Whether it is derived from enough prompts: no other one follows it, however the pool grows."""
        return self.n_prompts >= ENOUGH_PROMPTS

    @property
    def n_surface(self) -> int:
        """Number of columns before the components."""
        return 1 + len(self.means) + len(self.group_names)

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.n_surface + self.components_D_P.shape[1])

    @staticmethod
    def of(block: RawBlock) -> Basis:
        """Derive the basis of these prompts, at least one. Deterministic."""
        names = Counter(name for features in block.numeric if features for name in features)
        numeric_names = tuple(sorted(name for name, _ in names.most_common(MAX_NUMERIC)))
        groups = Counter(group for group in block.groups if group is not None)
        group_names = tuple(sorted(group for group, _ in groups.most_common(MAX_GROUPS)))
        n_answer = block.answers_N_A.shape[1] if np.isfinite(block.answers_N_A).any() else 0
        columns = _columns(block, numeric_names, n_answer)
        means, scales = _standard(columns)
        mean_D, components_D_P = _principal_components(block.embedding_N_D)
        return Basis(
            n_prompts=len(block.prompt_ids),
            numeric_names=numeric_names,
            group_names=group_names,
            means=means,
            scales=scales,
            embedding_mean_D=mean_D,
            components_D_P=components_D_P,
            n_answer=n_answer,
        )

    def equals(self, other: Basis) -> bool:
        """Whether both project alike, to the last bit."""
        (header, arrays), (others, other_arrays) = self.to_arrays(), other.to_arrays()
        return header == others and all(np.array_equal(arrays[name], other_arrays[name]) for name in arrays)

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, FloatArray]]:
        """The basis as JSON-ready values and as arrays; `from_arrays` takes both back."""
        header = {
            "n_prompts": self.n_prompts,
            "numeric_names": self.numeric_names,
            "group_names": self.group_names,
        } | ({"n_answer": self.n_answer} if self.n_answer else {})
        return header, {name: getattr(self, name) for name in _BASIS_ARRAYS}

    @staticmethod
    def from_arrays(header: Mapping[str, Any], arrays: Mapping[str, FloatArray]) -> Basis:
        """The basis that `to_arrays` took apart."""
        return Basis(
            n_prompts=header["n_prompts"],
            numeric_names=tuple(header["numeric_names"]),
            group_names=tuple(header["group_names"]),
            n_answer=header.get("n_answer", 0),  # what was stored before there were answers does not say
            **{name: arrays[name] for name in _BASIS_ARRAYS},
        )

    def project(self, block: RawBlock) -> FloatArray:
        """Inputs of the regressions, float32 [n, width], within 32; what a prompt lacks is taken as average.

        A row is a function of its prompt alone, to the last bit. All are multiples of `KEPT_STEP`.
        """
        n = len(block.prompt_ids)
        x = np.zeros((n, self.width), dtype=np.float32)
        x[:, 0] = 1.0
        standardised = (_columns(block, self.numeric_names, self.n_answer) - self.means) / self.scales
        x[:, 1 : 1 + len(self.means)] = np.nan_to_num(np.clip(standardised, -_CLIP, _CLIP), nan=0.0)
        first = 1 + len(self.means)
        column = {group: first + i for i, group in enumerate(self.group_names)}
        for row, group in enumerate(block.groups):
            if group in column:
                x[row, column[group]] = GROUP_SCALE
        if self.components_D_P.shape[1]:
            for first in range(0, n, _CHUNK):
                centred = block.embedding_N_D[first : first + _CHUNK] - self.embedding_mean_D
                if not np.isfinite(centred).all():
                    np.nan_to_num(centred, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
                whole, unit = exact.whole_numbers(centred, _EMBEDDING_BITS, axis=1)
                projected = self._components.times(whole)
                projected *= unit * self._components.unit_m
                x[first : first + _CHUNK, self.n_surface :] = np.clip(projected, -_MOST, _MOST)
        return np.asarray(np.rint(x * np.float32(1.0 / KEPT_STEP)) * np.float32(KEPT_STEP))


def directions(x_N_d: FloatArray) -> FloatArray:
    """Features as unit vectors without the constant column, [N, d-1]: the geometry of diversity (cosine distance)."""
    rows = x_N_d[:, 1:]
    norms = np.sqrt((rows * rows).sum(axis=1))
    return np.asarray(rows / np.maximum(norms, 1e-9)[:, None])


def _columns(block: RawBlock, numeric_names: Sequence[str], n_answer: int) -> FloatArray:
    """Surface and numeric features, log-odds of the caller's rates and the answers' features side by side, float64, NaN
    where missing.
    """
    n, s = block.surface_N_S.shape
    rate = s + len(numeric_names)
    columns = np.full((n, rate + 1 + n_answer), np.nan)
    columns[:, :s] = block.surface_N_S
    if n_answer and block.answers_N_A.shape[1]:
        columns[:, rate + 1 :] = block.answers_N_A
    if numeric_names:
        for row, features in enumerate(block.numeric):
            if features:
                columns[row, s:rate] = [features.get(name, np.nan) for name in numeric_names]
        columns = np.clip(columns, -_FINITE, _FINITE)  # so that no square or sum overflows
    known = np.isfinite(block.prior_rates_N)
    if known.any():
        columns[known, rate] = exact.log_odds(np.clip(block.prior_rates_N[known].astype(np.float64), 0.01, 0.99))
    return columns


def _standard(columns: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and scale of each column over what is present; few rows are not trusted to show the spread."""
    present = np.isfinite(columns)
    counts = present.sum(axis=0)
    filled = np.where(present, columns, 0.0)
    means = filled.sum(axis=0) / np.maximum(counts, 1)
    squares = (np.where(present, columns - means, 0.0) ** 2).sum(axis=0)
    scales = np.sqrt((squares + 1.0) / (counts + 4.0))
    # A constant column says nothing; a scale of its own size keeps later, differing rows in range.
    return means, np.maximum(scales, 1e-3 * np.maximum(np.abs(means), 1.0))


def _principal_components(embedding_N_D: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean [D] and scaled leading principal directions [D, P]; P is 0 without vectors.

    Each component keeps its share of the variance: the block is scaled as a whole, so that its squared length is
    `COMPONENT_SCALE` times P on average.
    """
    n, d = embedding_N_D.shape
    stride = max(1, n // _SAMPLE)
    rows = embedding_N_D[::stride].astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)] if d else rows
    if d == 0 or len(rows) < 2:
        return np.zeros(d, dtype=np.float32), np.zeros((d, 0), dtype=np.float32)
    mean = rows.mean(axis=0)
    reduced = rows - mean
    if d > _MAX_EIGEN_WIDTH:
        reduced = exact.product(reduced, _random_directions(d))
    values, vectors = _leading(exact.gram(reduced) / len(rows), min(COMPONENTS, len(rows) - 1))
    keep = values > 1e-9 * max(values[0], 1e-12)
    values, vectors = values[keep], vectors[:, keep]
    if len(values):
        vectors = vectors * (np.sqrt(COMPONENT_SCALE) / np.sqrt(np.sqrt(values)) / np.sqrt(np.mean(np.sqrt(values))))
    components = vectors if d <= _MAX_EIGEN_WIDTH else exact.product(_random_directions(d), vectors)
    return mean.astype(np.float32), components.astype(np.float32)


def _leading(covariance_d_d: FloatArray, n: int) -> tuple[FloatArray, FloatArray]:
    """At most n leading eigenvalues [p], greatest first, and eigenvectors [d, p] of a positive semidefinite matrix.

    By subspace iteration with more directions than wanted: LAPACK would tell every processor something else. Where the
    spectrum falls slowly the last directions are mixtures of neighbours, which is as good for a basis.
    """
    d = len(covariance_d_d)
    width = min(n + _OVERSAMPLING, d)
    basis_d_w: FloatArray = np.eye(d)
    if width < d:
        basis_d_w = np.random.default_rng(d).choice([-1.0, 1.0], size=(d, width))
        for _ in range(_ITERATIONS):
            turned = exact.product(covariance_d_d, basis_d_w)
            # Orthonormal by the inverse of the Cholesky factor of the directions' products; dependent ones become 0.
            basis_d_w = exact.product(turned, exact.inverse_factor(exact.gram(turned), tolerance=1e-9).T)
    within = exact.product(basis_d_w.T, exact.product(covariance_d_d, basis_d_w))
    values, vectors = exact.eigen(0.5 * (within + within.T))
    return values[:n], exact.product(basis_d_w, vectors[:, :n])


def _random_directions(d: int) -> FloatArray:
    """A fixed random projection [d, 512] for vectors too long for an eigendecomposition."""
    signs = np.random.default_rng(d).choice([-1.0, 1.0], size=(d, _MAX_EIGEN_WIDTH))
    return np.asarray(signs / np.sqrt(d))
