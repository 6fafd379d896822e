"""What other runs showed, as columns of log-odds on a run's own prompts: what a refit of `learn_from` fits.

Prompts are joined by a key of their texts, or by id where both runs say that they share a data set. A logistic model of
two parameters (2PL) for each column, with a prior from a text model of all columns' outcomes, says what each of them
would show where it has shown nothing. Knows keys, counts and n-grams: no texts, no store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.domain.learning.known_rates import FIRST_COMPARISON, MOST_COLUMNS
from evenodds_service.domain.prompts import MEAN, SourceColumns
from evenodds_service.model import ngrams
from evenodds_service.model.history import History

if TYPE_CHECKING:
    from scipy import sparse

LEAST_PROMPTS = 16
"""A column needs so many prompts."""
MOST_LABELS = 20_000
"""Prompts that the text model is fitted on."""

_MOVED_STEPS = 6
_PHASES = (("early", True), ("middle", False), ("late", True))
_SWEEPS = 12
_TEXT_SLOPE = 0.5
_REPEATS = 0.3  # of attempts on one prompt: n of them are worth n / (1 + .3 (n - 1))
_SLOPE_MEAN, _OFFSET_VARIANCE, _SLOPE_VARIANCE = 1.5, 4.0, 0.25
_SMOOTHING = 2.0
_NEARNESS_SLOPE = 0.9
_MEMORY_STEPS = 100.0
_RATE_RANGE = (1e-3, 1.0 - 1e-3)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A run that is learned from.

    Attributes:
        keys_n: Keys of its prompts, int64 [n]; `NO_KEY` for those without a text.
        history: Its outcomes; prompts are rows of `keys_n`.
        ids: Its prompts' ids, where it shares a data set with the run that learns; else empty.
    """

    name: str
    keys_n: IntArray
    history: History
    ids: Sequence[str] = ()


NO_KEY = 0


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Outcomes of sources as columns over the run's own N prompts, and over others behind them.

    Attributes:
        names: Of R columns.
        is_read_R: Whether the run may read it: what a policy showed on its way is used, and read by nobody.
        rows_m, columns_m: Prompt and column of each count, int64 [m], column by column.
        successes_m, attempts_m: The counts.
        others_F: Keys of the other prompts, ascending; they are rows N .. N + F - 1.
        n_own: N.
        in_common: By the name of each source, how many of the run's prompts it has tried.
    """

    names: tuple[str, ...]
    is_read_R: BoolArray
    rows_m: IntArray
    columns_m: IntArray
    successes_m: FloatArray
    attempts_m: FloatArray
    others_F: IntArray
    n_own: int
    in_common: Mapping[str, int]

    @property
    def n_rows(self) -> int:
        return self.n_own + len(self.others_F)


@dataclass(frozen=True, slots=True, eq=False)
class FittedSources:
    """Columns for a snapshot, and what tells new texts.

    Attributes:
        weights: Of the text model, with `offsets_C`, `slopes_C` and `centre`; for `predict`.
        report: Figures of the fit.
    """

    columns: SourceColumns
    weights: dict[str, FloatArray]
    report: dict[str, float] = field(default_factory=dict)


def phases(history: History) -> list[tuple[str, bool, History]]:
    """A history by phases of its policy: name (empty: all), whether it is read, and its part.

    A policy that moved is first and last another one: the thirds of its steps. One that was evaluated is one.
    """
    if len(np.unique(history.steps)) < _MOVED_STEPS:
        return [("", True, history)]
    first, last = int(history.steps.min()), int(history.steps.max())
    third = np.minimum(3 * (history.steps - first) // (last - first + 1), 2)
    return [(name, is_read, history.rows(third == i)) for i, (name, is_read) in enumerate(_PHASES)]


def joined(keys_N: IntArray, ids: Sequence[str], sources: Sequence[Source]) -> Joined | None:
    """The sources' outcomes on the prompts of these keys and ids, and on others; None where nothing is left.

    Prompts of one key share what was shown on any of them. Of a source is used what has a key or an id in common.
    """
    order = np.argsort(keys_N, kind="stable")
    ordered = keys_N[order]
    place = {prompt_id: i for i, prompt_id in enumerate(ids)} if any(source.ids for source in sources) else {}
    counts: list[tuple[str, bool, IntArray, IntArray, FloatArray, FloatArray]] = []
    in_common: dict[str, int] = {}
    for source in sources:
        by_id = np.fromiter((place.get(i, -1) for i in source.ids), np.int64, len(source.ids))
        met = np.zeros(len(keys_N), dtype=np.bool_)
        for phase, is_read, history in phases(source.history):
            own, k_own, n_own, keys, k, n = _matched(history, source.keys_n, by_id, ordered, order)
            met[own] = True
            if len(np.unique(own)) + len(keys) >= LEAST_PROMPTS:
                name = f"{source.name} ({phase})" if phase else source.name
                counts.append((name, is_read, own, keys, np.append(k_own, k), np.append(n_own, n)))
        in_common[source.name] = int(met.sum())
    if not any(is_read for _, is_read, *_ in counts):
        return None
    others_F = np.unique(np.concatenate([keys for *_, keys, _, _ in counts]))
    rows = [np.append(own, len(keys_N) + np.searchsorted(others_F, keys)) for *_, own, keys, _, _ in counts]
    return Joined(
        names=tuple(name for name, *_ in counts),
        is_read_R=np.array([is_read for _, is_read, *_ in counts], dtype=np.bool_),
        rows_m=np.concatenate(rows),
        columns_m=np.repeat(np.arange(len(rows)), [len(some) for some in rows]),
        successes_m=np.concatenate([k for *_, k, _ in counts]),
        attempts_m=np.concatenate([n for *_, n in counts]),
        others_F=others_F,
        n_own=len(keys_N),
        in_common=in_common,
    )


def _matched(
    history: History, keys_n: IntArray, by_id_n: IntArray, ordered_N: IntArray, order_N: IntArray
) -> tuple[IntArray, FloatArray, FloatArray, IntArray, FloatArray, FloatArray]:
    """Own prompts with successes and attempts, and keys of others with theirs. Prompts of the source that the run has
    by id are those; others are all of its prompts of their key.
    """
    prompts, row = np.unique(history.prompts, return_inverse=True)
    k = _summed(row, history.successes, len(prompts))
    n = _summed(row, history.attempts, len(prompts))
    ids = by_id_n[prompts] if len(by_id_n) else np.full(len(prompts), -1)
    has_id, keys = ids >= 0, keys_n[prompts]
    first = np.searchsorted(ordered_N, keys, side="left")
    size = np.where(has_id | (keys == NO_KEY), 0, np.searchsorted(ordered_N, keys, side="right") - first)
    of = np.repeat(np.arange(len(prompts)), size)
    own = order_N[first[of] + np.arange(len(of)) - np.repeat(np.cumsum(size) - size, size)]
    own, of = np.append(ids[has_id], own), np.append(np.flatnonzero(has_id), of)
    distinct, row = np.unique(own, return_inverse=True)
    k_own, n_own = _summed(row, k[of], len(distinct)), _summed(row, n[of], len(distinct))
    other = (size == 0) & ~has_id & (keys != NO_KEY)
    others, row = np.unique(keys[other], return_inverse=True)
    k_other, n_other = _summed(row, k[other], len(others)), _summed(row, n[other], len(others))
    return distinct, k_own, n_own, others, k_other, n_other


class TextModel:
    """The text model of all columns' outcomes, which takes longest to fit: the newest fit is kept, and serves again as
    long as nothing that it reads has changed. What it tells is the same either way.
    """

    def __init__(self) -> None:
        self._of = b""
        self._fitted: tuple[FloatArray, Mapping[str, FloatArray]] = (np.zeros(0), {})

    def fit(
        self, data: Joined, texts: sparse.csr_matrix, *, group_size: int, seed: int
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        """Log-odds of every row by its text, [U], and the weights of the fit; 0 for all and none where there are too
        few outcomes.
        """
        k = _summed(data.rows_m, data.successes_m, data.n_rows)
        n = _summed(data.rows_m, data.attempts_m, data.n_rows)
        digest = hashlib.blake2b(f"{texts.shape} {group_size} {seed}".encode())
        for part in (k, n, texts.indptr, texts.indices):
            digest.update(np.ascontiguousarray(part).data)
        if digest.digest() != self._of:
            self._fitted = _text_log_odds(k, n, texts, group_size=group_size, seed=seed)
            self._of = digest.digest()
        return self._fitted


def fit_sources(
    data: Joined,
    texts: sparse.csr_matrix,
    history: History,
    *,
    group_size: int,
    seed: int,
    text_model: TextModel | None = None,
) -> FittedSources:
    """What the columns say of the run's own prompts.

    Args:
        texts: n-grams of the own prompts and of the others behind them.
        history: Of the run itself, by which the nearest of many columns are found.
        text_model: Of the fit before this one, if it is kept.
    """
    text_U, text_weights = (text_model or TextModel()).fit(data, texts, group_size=group_size, seed=seed)
    centre = float(text_U.mean())
    model = _two_parameters(data, _TEXT_SLOPE * (text_U - centre))
    read = np.flatnonzero(data.is_read_R)
    chosen, has_mean = read, len(read) > MOST_COLUMNS
    if has_mean:
        chosen = _nearest(data, model, read, history)
    columns = [_smoothed(data, model, int(column)) for column in chosen]
    names = [data.names[column] for column in chosen]
    offsets, slopes = list(model.offsets_R[chosen]), list(model.slopes_R[chosen])
    if has_mean:
        columns.insert(0, _mean(data, model, read))
        names.insert(0, MEAN)
        offsets.insert(0, float(model.offsets_R[read].mean()))
        slopes.insert(0, float(model.slopes_R[read].mean()))
    log_odds = np.stack(columns, axis=1).astype(np.float16)
    weights = {
        **text_weights,
        "offsets_C": np.asarray(offsets, dtype=np.float32),
        "slopes_C": np.asarray(slopes, dtype=np.float32),
        "centre": np.array([centre], dtype=np.float32),
    }
    shown = SourceColumns(tuple(names), log_odds, log_odds.astype(np.float64).mean(axis=0), has_mean)
    tried = np.zeros(data.n_own, dtype=np.bool_)
    tried[data.rows_m[data.rows_m < data.n_own]] = True
    report = {"columns": float(len(read)), "outcomes": float(data.attempts_m.sum()), "in_common": float(tried.sum())}
    return FittedSources(shown, weights, report)


def predict(weights: ngrams.Weights, texts: sparse.csr_matrix) -> FloatArray:
    """What the columns would show on texts outside the pool, log-odds float64 [n, C].

    Args:
        texts: Their n-grams.
    """
    n = texts.shape[0]
    ease_n: FloatArray = np.zeros(n)
    if "sparse_F_H" in weights:
        mean, _ = ngrams.NgramPrior(weights).predict(texts, np.zeros((n, 0), dtype=np.float32))
        ease_n = _TEXT_SLOPE * (_log_odds(mean) - float(weights["centre"][0]))
    offsets, slopes = weights["offsets_C"].astype(np.float64), weights["slopes_C"].astype(np.float64)
    return np.asarray(offsets + slopes * ease_n[:, None])


def _text_log_odds(
    k: FloatArray, n: FloatArray, texts: sparse.csr_matrix, *, group_size: int, seed: int
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Log-odds of every row by its text, from all columns' k successes of n attempts, [U].

    Those of rows with outcomes come from a fit that has not seen them.
    """
    has_text = np.diff(texts.indptr) > 0
    labelled = np.flatnonzero((n > 0) & has_text)
    if len(labelled) > MOST_LABELS:
        labelled = np.sort(np.random.default_rng(seed).choice(labelled, MOST_LABELS, replace=False))
    if len(labelled) < ngrams.MIN_LABELS:
        return np.zeros(len(n)), {}
    fitted = ngrams.fit(
        texts,
        np.zeros((len(n), 0), dtype=np.float32),
        labelled=labelled,
        successes=k[labelled],
        attempts=n[labelled],
        informative_share=np.full(len(labelled), np.nan),
        group_size=group_size,
        seed=seed,
    )
    log_odds = _log_odds(fitted.mean_N.astype(np.float64))
    log_odds[~has_text] = log_odds[has_text].mean()
    return log_odds, dict(fitted.weights)


@dataclass(frozen=True, slots=True, eq=False)
class _TwoParameters:
    """log-odds of column r on row i: offset_r + slope_r ease_i."""

    offsets_R: FloatArray
    slopes_R: FloatArray
    ease_U: FloatArray


def _two_parameters(data: Joined, ease_U: FloatArray) -> _TwoParameters:
    """Fit by variational sweeps with Polya-Gamma weights (Jaakkola's bound): linear in the number of counts.

    Args:
        ease_U: Prior means of the rows' ease, which has variance 1 around them.
    """
    rows, columns, n_rows, n_columns = data.rows_m, data.columns_m, data.n_rows, len(data.names)
    worth = data.attempts_m / (1.0 + _REPEATS * np.maximum(data.attempts_m - 1.0, 0.0))
    kappa = worth * (data.successes_m / data.attempts_m - 0.5)
    mean_U: FloatArray = ease_U
    variance_U: FloatArray = np.ones(n_rows)
    offsets = _log_odds(_summed(columns, data.successes_m, n_columns) / _summed(columns, data.attempts_m, n_columns))
    slopes = np.full(n_columns, _SLOPE_MEAN)
    spread_R = np.tile(np.diag([0.1, 0.1]), (n_columns, 1, 1))
    prior = np.diag([1.0 / _OFFSET_VARIANCE, 1.0 / _SLOPE_VARIANCE])
    for _ in range(_SWEEPS):
        ease, square = mean_U[rows], mean_U[rows] ** 2 + variance_U[rows]
        offset_2, both, slope_2 = (
            offsets**2 + spread_R[:, 0, 0],
            offsets * slopes + spread_R[:, 0, 1],
            slopes**2 + spread_R[:, 1, 1],
        )
        c = np.sqrt(offset_2[columns] + 2.0 * both[columns] * ease + slope_2[columns] * square)
        omega = worth * np.tanh(0.5 * c) / (2.0 * np.maximum(c, 1e-6))
        variance_U = 1.0 / (1.0 + _summed(rows, omega * slope_2[columns], n_rows))
        pull = kappa * slopes[columns] - omega * both[columns]
        mean_U = variance_U * (ease_U + _summed(rows, pull, n_rows))
        ease, square = mean_U[rows], mean_U[rows] ** 2 + variance_U[rows]
        precision_R = np.empty((n_columns, 2, 2))
        precision_R[:, 0, 0] = _summed(columns, omega, n_columns)
        precision_R[:, 0, 1] = precision_R[:, 1, 0] = _summed(columns, omega * ease, n_columns)
        precision_R[:, 1, 1] = _summed(columns, omega * square, n_columns)
        spread_R = np.linalg.inv(precision_R + prior)
        target = np.stack([_summed(columns, kappa, n_columns), _summed(columns, kappa * ease, n_columns)], axis=1)
        target[:, 1] += _SLOPE_MEAN / _SLOPE_VARIANCE
        offsets, slopes = np.einsum("rij,rj->ri", spread_R, target).T
    return _TwoParameters(offsets, slopes, mean_U)


def _smoothed(data: Joined, model: _TwoParameters, column: int) -> FloatArray:
    """Log-odds of this column on the own prompts, [N]: what it showed, toward what the model says of it."""
    rate_N = exact.sigmoid(model.offsets_R[column] + model.slopes_R[column] * model.ease_U[: data.n_own])
    here = slice(*np.searchsorted(data.columns_m, [column, column + 1]))  # counts stand column by column
    k, n = np.zeros(data.n_rows), np.zeros(data.n_rows)
    k[data.rows_m[here]], n[data.rows_m[here]] = data.successes_m[here], data.attempts_m[here]
    return _log_odds((k[: data.n_own] + _SMOOTHING * rate_N) / (n[: data.n_own] + _SMOOTHING))


def _mean(data: Joined, model: _TwoParameters, read: IntArray) -> FloatArray:
    """Mean log-odds of these columns on the own prompts, [N]."""
    total: FloatArray = np.zeros(data.n_own)
    for column in read:
        total = total + _smoothed(data, model, int(column))
    return total / len(read)


def _nearest(data: Joined, model: _TwoParameters, read: IntArray, history: History) -> IntArray:
    """Of many columns those that have foreseen the run's own outcomes best; none before it has shown enough."""
    prompts, row = np.unique(history.prompts, return_inverse=True)
    if len(prompts) < FIRST_COMPARISON:
        return np.zeros(0, dtype=np.int64)
    worth = np.exp(-(history.steps.max() - history.steps) / _MEMORY_STEPS)
    k = _summed(row, worth * history.successes, len(prompts))
    n = _summed(row, worth * history.attempts, len(prompts))
    rate, level = k / n, float(_log_odds(np.array([k.sum() / n.sum()]))[0])
    closeness = np.empty(len(read))
    for i, column in enumerate(read):
        z = _smoothed(data, model, int(column))
        forecast = exact.sigmoid(_NEARNESS_SLOPE * (z[prompts] - z.mean()) + level)
        closeness[i] = (rate * np.log(forecast) + (1.0 - rate) * np.log1p(-forecast)).sum()
    return np.sort(read[np.argsort(-closeness, kind="stable")[:MOST_COLUMNS]])


def _summed(places_m: IntArray, values_m: FloatArray, n: int) -> FloatArray:
    return np.asarray(np.bincount(places_m, values_m, n), dtype=np.float64)


def _log_odds(rates: FloatArray) -> FloatArray:
    return exact.log_odds(np.clip(rates, *_RATE_RANGE))
