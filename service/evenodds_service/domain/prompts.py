"""Prompts of a pool, their features, and what a fitted prior says about them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import TypeAlias

import numpy as np

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray

RATE_ATTEMPTS = 8.0
"""A known rate that comes without a number of attempts counts as one of so many."""

UNNAMED = ""
"""Who showed the `prior_rate`."""

MEAN = "mean of all"
"""Name of the column that is the mean of many."""

KnownRate: TypeAlias = "float | tuple[float, int]"
"""What another model showed on a prompt: its success rate, or successes of attempts."""


def text_key(text: str) -> str:
    """A hash of the text that does not change with Unicode form or white space: 32 hexadecimal digits."""
    normalised = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.sha256(normalised.encode()).hexdigest()[:32]


def join_key(text: str) -> str:
    """A hash by which runs know that a prompt is the same: of letters and digits alone, case folded, 16 hexadecimal
    digits. Of the whole text where it has neither. Two prompts that differ in signs alone count as one.
    """
    letters = "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))
    return hashlib.sha256((letters or text_key(text)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class NewPrompt:
    """A prompt on its way into a pool. `text_key` is None without a text; `vector_key` names the embedding."""

    prompt_id: str
    text: str | None = None
    text_key: str | None = None
    group: str | None = None
    features: Mapping[str, float] | None = None
    prior_rate: float | None = None
    prior_rates: Mapping[str, KnownRate] | None = None
    vector_key: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt(NewPrompt):
    """A prompt of a pool.

    Attributes:
        index: Counts from 0 in the order of arrival, and is never another prompt's.
        join_key: Of its text, by which runs know what they have in common; None without a text, and for prompts that
            are older than this key.
    """

    index: int = field(default=-1, kw_only=True)
    join_key: str | None = field(default=None, kw_only=True, compare=False)


@dataclass(frozen=True, slots=True)
class Vector:
    """A feature vector of one text: float array of shape [D], stored once per (embedder, key)."""

    embedder: str
    key: str
    values: FloatArray


@dataclass(frozen=True, slots=True)
class NewPrompts:
    """Prompts on their way into a pool, with their vectors as far as those are not stored yet.

    Attributes:
        embedder, embedding_width: Whose vectors these are and how long. The run keeps both where it has none yet.
        stored: Under which (embedder, key) the other vectors were stored when somebody looked.
        keeps_existing: A prompt that the pool has with another content keeps what it has, instead of an error.
    """

    prompts: Sequence[NewPrompt] = ()
    vectors: Sequence[Vector] = ()
    embedder: str | None = None
    embedding_width: int | None = None
    keeps_existing: bool = False
    stored: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True, eq=False)
class NamedRates:
    """What R others showed on n prompts, by name.

    Attributes:
        names: R names.
        rates_N_R: Success rates, float32; NaN where the other has not tried the prompt.
        attempts_N_R: Of how many attempts each is, float32, at least 1.
    """

    names: tuple[str, ...]
    rates_N_R: FloatArray
    attempts_N_R: FloatArray

    @staticmethod
    def of(known: Sequence[Mapping[str, KnownRate] | None]) -> NamedRates:
        """From the rates that each of n prompts came with. Names stand in the order of their first appearance."""
        names = tuple(dict.fromkeys(name for rates in known if rates for name in sorted(rates)))
        if not names:
            return NO_RATES
        column = {name: i for i, name in enumerate(names)}
        rates_N_R = np.full((len(known), len(names)), np.nan, dtype=np.float32)
        attempts_N_R = np.full((len(known), len(names)), RATE_ATTEMPTS, dtype=np.float32)
        for row, rates in enumerate(known):
            for name, told in (rates or {}).items():
                k, n = told if isinstance(told, tuple) else (told * RATE_ATTEMPTS, RATE_ATTEMPTS)
                rates_N_R[row, column[name]], attempts_N_R[row, column[name]] = k / n, n
        return NamedRates(names, rates_N_R, attempts_N_R)

    def __getitem__(self, rows: slice) -> NamedRates:
        return NamedRates(self.names, self.rates_N_R[rows], self.attempts_N_R[rows])


NO_RATES = NamedRates((), np.empty((0, 0), dtype=np.float32), np.empty((0, 0), dtype=np.float32))


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Raw features of n consecutive prompts of a pool, from `first` on.

    Attributes:
        first: Where the first prompt stands.
        prompt_ids: n ids.
        groups: n group names or None.
        numeric: n mappings of the caller's numeric features, or None.
        prior_rates_N: float32 [n]; NaN where the caller knew none.
        surface_N_S: float32 [n, S]; a row of NaN where the prompt has no text. S may be 0.
        embedding_N_D: float32 [n, D]; a row of NaN where the prompt has no vector. D may be 0.
        named_rates: What others showed, by their names; `NO_RATES` where nothing is known of any of these prompts.
        serials_N: Their indices in the log, int64 [n], where those are not `first .. first + n - 1`.
    """

    first: int
    prompt_ids: tuple[str, ...]
    groups: tuple[str | None, ...]
    numeric: tuple[Mapping[str, float] | None, ...]
    prior_rates_N: FloatArray
    surface_N_S: FloatArray
    embedding_N_D: FloatArray
    named_rates: NamedRates = NO_RATES
    serials_N: IntArray | None = None

    def rows(self, kept_N: BoolArray) -> RawBlock:
        """The block of some of its prompts alone; where they stand is another's business."""
        told = self.named_rates
        return replace(
            self,
            prompt_ids=tuple(compress(self.prompt_ids, kept_N)),
            groups=tuple(compress(self.groups, kept_N)),
            numeric=tuple(compress(self.numeric, kept_N)),
            prior_rates_N=self.prior_rates_N[kept_N],
            surface_N_S=self.surface_N_S[kept_N],
            embedding_N_D=self.embedding_N_D[kept_N],
            named_rates=NamedRates(told.names, told.rates_N_R[kept_N], told.attempts_N_R[kept_N])
            if told.names
            else NO_RATES,
            serials_N=None if self.serials_N is None else self.serials_N[kept_N],
        )

    @property
    def told(self) -> NamedRates:
        """What others showed, the one behind `prior_rate` first."""
        rates_N_1 = self.prior_rates_N[:, None]
        attempts_N_1 = np.full(rates_N_1.shape, RATE_ATTEMPTS, dtype=np.float32)
        if not self.named_rates.names:
            return NamedRates((UNNAMED,), rates_N_1, attempts_N_1)
        return NamedRates(
            (UNNAMED, *self.named_rates.names),
            np.concatenate((rates_N_1, self.named_rates.rates_N_R), axis=1),
            np.concatenate((attempts_N_1, self.named_rates.attempts_N_R), axis=1),
        )


@dataclass(frozen=True, slots=True, eq=False)
class FittedPrior:
    """What a fitted shared prior says about the first n prompts of a pool, or about prompts outside it.

    Attributes:
        means_N: Success rates, float32 [n] in (0, 1). Those of observed prompts come from a fit that left their own
            outcomes out.
        concentrations_N: How sure the prior is of each, in pseudo-attempts, float32 [n], positive.
    """

    means_N: FloatArray
    concentrations_N: FloatArray

    def rows(self, kept_N: BoolArray) -> FittedPrior:
        """Of some of the prompts alone."""
        return FittedPrior(self.means_N[kept_N], self.concentrations_N[kept_N])


@dataclass(frozen=True, slots=True, eq=False)
class SourceColumns:
    """What the runs that a run learns from showed on the first N prompts of its pool, as a refit derived it.

    Attributes:
        names: Of C columns. A run is one, or two where its policy moved: early and late.
        log_odds_N_C: Smoothed log-odds, float16; NaN for prompts that the refit did not know.
        levels_C: Their means over the prompts.
        has_mean: Whether the first column is the mean of all, and the others those that have foreseen this run best.
    """

    names: tuple[str, ...]
    log_odds_N_C: FloatArray
    levels_C: FloatArray
    has_mean: bool = False

    def kept(self, kept_N: BoolArray) -> SourceColumns:
        """Of some of the prompts alone."""
        return replace(self, log_odds_N_C=self.log_odds_N_C[kept_N])

    def rows(self, rows: IntArray | slice, n: int) -> FloatArray:
        """Of these among n prompts, float64 [n, C]; rows of NaN for prompts that are newer than the columns."""
        indices = np.arange(*rows.indices(n)) if isinstance(rows, slice) else rows
        shown = np.full((len(indices), len(self.names)), np.nan)
        known = indices < len(self.log_odds_N_C)
        shown[known] = self.log_odds_N_C[indices[known]]
        return shown
