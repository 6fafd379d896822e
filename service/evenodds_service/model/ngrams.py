"""A sparse linear prior from the text: hashed n-grams of words and characters, fitted on a run's outcomes.

Three ridge regressions (the success rate, the expected informativeness, the chance of an all-solved group)
over some hundred thousand columns are combined by two small logistic regressions, which make them calibrated
and bend them where one line cannot: success is bimodal, and a middling mean is not yet an informative group.
Everything that is fitted is a plain array. Keeps no history and knows no runs; a prompt's own evidence is the
business of `domain`.

The settings were chosen on `math_qwen_multisample`; `benchmarks/unseen.py` measures them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray, IntArray
from evenodds_service.domain.distributions import beta_from_moments, informative_moments
from evenodds_service.domain.ranks import spearman

if TYPE_CHECKING:
    from scipy import sparse

NGRAMS = "ngrams/1"
"""The name of these columns. A change of what a column means is a new name, and old weights do not fit it."""

MAX_CHARACTERS = 20_000
"""Only so many characters of a text are read."""

MIN_LABELS = 32
"""A fit needs so many labelled prompts."""

HEADS = ("rate", "expected informativeness", "all solved")
N_FOLDS = 4

_BITS = 18
_SIDE = 1 << _BITS  # columns of the words; as many follow for the characters
_WORD_LENGTHS = range(1, 4)
_CHARACTER_LENGTHS = range(2, 6)
_TEXTS_AT_ONCE = 256

_CHARACTERS_SCALE = 0.6
_DENSE_SCALE = 0.07
_PENALTY = 3.0
_ITERATIONS = 16
_TOLERANCE = 1e-3
_LABEL_CONCENTRATION = 1.5  # of what is left of a success rate when the text is known
_USUAL_ATTEMPTS = 8.0
_STACK_PENALTY = 3.0
_PAIRS = np.triu_indices(len(HEADS))
_NEWTON_STEPS = 12

# Commands, escaped marks, capitals, words (camelCase falls apart), other letters, numbers, single marks.
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+|[0-9]+(?:\.[0-9]+)?|[^\w\s]|_")
_SPACE = 32
_PRIME = np.uint32(0x9E3779B1)

Weights = Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True)
class FittedNgrams:
    """A fit, and what it says about the prompts that it was given.

    Attributes:
        mean_N: Predicted success rate, float32 [N] in (0, 1). For a labelled prompt it comes from a model that
            has not seen this text's label.
        informative_N: Predicted chance that a group of G attempts is informative, likewise.
        weights: For `predict`: under 5 MB, float16 and float32.
        report: `n_labels`, `spearman` (of the mean with the labels; 0 where either is constant), `log_loss` and
            `base_log_loss` (nats per attempt, of the rates), `informative_log_loss`: on labels that the model
            predicted without having seen them. `label_concentration` (a + b of the labels' Beta), `iterations`.
    """

    mean_N: FloatArray
    informative_N: FloatArray
    weights: dict[str, FloatArray]
    report: dict[str, float]


def ngram_matrix(texts: Sequence[str]) -> sparse.csr_matrix:
    """Which n-grams a text has: uint8 [n, 2^19] of ones, about 600 a text, sorted within a row.

    Words of length 1 to 3 over LaTeX- and code-aware tokens (long numbers by their number of digits), then
    characters of length 2 to 5 within words, each hashed to 2^18 columns. Row i depends on `texts[i]` alone; it is
    empty for a text of white space.
    """
    columns, counts = _columns_of_all(texts)
    ends = np.concatenate([[0], np.cumsum(counts)])
    matrix = _csr(np.ones(len(columns), np.uint8), columns, ends, 2 * _SIDE)
    matrix.has_sorted_indices = True
    return matrix


def fit(
    matrix: sparse.csr_matrix,
    dense_N_d: FloatArray,
    *,
    labelled: IntArray,
    successes: FloatArray,
    attempts: FloatArray,
    informative_share: FloatArray,
    group_size: int,
    seed: int,
) -> FittedNgrams:
    """Fit on the labelled prompts and predict all N. Longer than other functions: half of it says what goes in.

    Deterministic in its arguments. Prompts with the same n-grams share a fold, so that no label of a text enters
    its own prediction (unless fewer than `N_FOLDS` different texts are labelled).

    Args:
        matrix: Of `ngram_matrix`, for N prompts. How common an n-gram is, is counted over all of them.
        dense_N_d: Further inputs of the order of one, finite, such as `Basis.project` gives; d may be 0.
        labelled: Distinct rows with a label, int64 [n].
        successes, attempts: Sums over the visits of each, 0 <= successes <= attempts and attempts > 0, [n];
            fractions are welcome, so that old outcomes may count less.
        informative_share: Share of the labelled prompt's groups that were informative, in [0, 1]; NaN where no
            whole group was seen, [n].
        group_size: G, at least 1. (For 1, informative means that two attempts differ.)

    Raises:
        ValueError: fewer than `MIN_LABELS` labelled prompts.
    """
    if len(labelled) < MIN_LABELS:
        raise ValueError(f"a fit needs at least {MIN_LABELS} labelled prompts, there are {len(labelled)}")
    n_prompts = matrix.shape[0]
    rates = successes / attempts
    targets_n_H, prior = _targets(rates, attempts, group_size)
    weight_n = _worth(attempts)

    document_counts = np.bincount(matrix.indices, minlength=2 * _SIDE)
    rarity_F = (np.log((1 + n_prompts) / (1 + document_counts)) + 1.0).astype(np.float16)
    data, _ = _scaled(matrix.indices, np.diff(matrix.indptr), rarity_F)
    scaled = _csr(data, matrix.indices, matrix.indptr, matrix.shape[1])
    dense = np.asarray(dense_N_d, dtype=np.float32) * np.float32(_DENSE_SCALE)

    fold_n = _folds(matrix[labelled], seed)
    in_fit_n_M = np.concatenate([fold_n[:, None] != np.arange(N_FOLDS), np.ones((len(labelled), 1), bool)], axis=1)
    ridge = _ridge(scaled[labelled], dense[labelled], targets_n_H, (in_fit_n_M * weight_n[:, None]).astype(np.float32))

    full = slice(N_FOLDS * len(HEADS), None)
    heads_N_H = scaled @ ridge.sparse_F_R[:, full] + dense @ ridge.dense_d_R[:, full] + ridge.intercept_R[full]
    heads_N_H[labelled] = _crossed(ridge, scaled[labelled], dense[labelled], fold_n)

    shown = np.where(np.isfinite(informative_share), informative_share, targets_n_H[:, 1])
    known_n_H = heads_N_H[labelled]
    centre_H, spread_H = known_n_H.mean(axis=0), known_n_H.std(axis=0) + 1e-3
    inputs_N_K = _bend(heads_N_H, centre_H, spread_H)
    stack_K_2 = np.stack([_logistic(inputs_N_K[labelled], target, weight_n) for target in (rates, shown)], axis=1)
    predicted_N_2 = _rates(inputs_N_K @ stack_K_2)

    weights: dict[str, FloatArray] = {
        "rarity_F": rarity_F,
        "sparse_F_H": ridge.sparse_F_R[:, full].astype(np.float16, order="C"),
        "dense_d_H": ridge.dense_d_R[:, full].copy(),
        "intercept_H": ridge.intercept_R[full],
        "centre_H": centre_H.astype(np.float32),
        "spread_H": spread_H.astype(np.float32),
        "stack_K_2": stack_K_2.astype(np.float32),
    }
    report = _quality(predicted_N_2[labelled], rates, shown, weight_n)
    report |= {"label_concentration": float(prior.sum()), "iterations": float(ridge.iterations)}
    return FittedNgrams(predicted_N_2[:, 0].astype(np.float32), predicted_N_2[:, 1].astype(np.float32), weights, report)


def _worth(attempts: FloatArray) -> FloatArray:
    """An over-dispersed count of n attempts is worth n (s + 1) / (s + n); the usual one weighs 1."""
    s = _LABEL_CONCENTRATION
    return np.asarray(attempts * (s + _USUAL_ATTEMPTS) / (_USUAL_ATTEMPTS * (s + attempts)))


def _crossed(ridge: _Ridge, scaled_n: sparse.csr_matrix, dense_n_d: FloatArray, fold_n: IntArray) -> FloatArray:
    """The heads of the labelled prompts, each from the fit that has not seen its fold, [n, H]."""
    crossed = scaled_n @ ridge.sparse_F_R + dense_n_d @ ridge.dense_d_R + ridge.intercept_R
    crossed_n_M_H = crossed.reshape(len(fold_n), N_FOLDS + 1, len(HEADS))
    return np.asarray(crossed_n_M_H[np.arange(len(fold_n)), fold_n])


def _quality(predicted_n_2: FloatArray, rates: FloatArray, shown: FloatArray, weight_n: FloatArray) -> dict[str, float]:
    """How well the labels were predicted without having been seen."""
    mean_n, informative_n = predicted_n_2.T
    return {
        "n_labels": float(len(rates)),
        "spearman": spearman(mean_n, rates),
        "log_loss": _log_loss(mean_n, rates, weight_n),
        "base_log_loss": _log_loss(np.full_like(rates, np.average(rates, weights=weight_n)), rates, weight_n),
        "informative_log_loss": _log_loss(informative_n, shown, weight_n),
    }


class NgramPrior:
    """What a fit says of texts. What every prediction needs of its weights is computed once.

    Args:
        weights: Of a fit.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._dense = exact.Factor.of(weights["dense_d_H"] * _DENSE_SCALE)
        self._stack = exact.Factor.of(weights["stack_K_2"])

    def predict(self, texts: Sequence[str] | sparse.csr_matrix, dense_n_d: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Success rate and chance of an informative group for texts that the fit has not seen.

        Args:
            texts: The texts, or their `ngram_matrix`.
            dense_n_d: Their further inputs, as in the fit.

        Returns:
            mean and informative probability, float32 [n] each, in (0, 1).

        Raises:
            ValueError: the dense inputs do not have the width of the fit.
        """
        if isinstance(texts, Sequence):
            columns, counts = _columns_of_all(texts)
        else:
            columns, counts = texts.indices, np.diff(texts.indptr)
        weights, width = self._weights, len(self._weights["dense_d_H"])
        if dense_n_d.shape[1] != width:
            raise ValueError(f"dense inputs have {dense_n_d.shape[1]} columns, the fitted n-gram prior takes {width}")
        # One text is a few hundred columns: gather them, so that nothing of the model's size is touched.
        data, row = _scaled(columns, counts, weights["rarity_F"])
        terms_E_H = data[:, None] * weights["sparse_F_H"][columns]
        heads_n_H = exact.product(dense_n_d, self._dense) + weights["intercept_H"]
        heads_n_H += np.stack([np.bincount(row, terms_E_H[:, h], len(counts)) for h in range(len(HEADS))], axis=1)
        bent = _bend(heads_n_H, weights["centre_H"], weights["spread_H"])
        predicted = _rates(exact.product(bent, self._stack))
        return predicted[:, 0].astype(np.float32), predicted[:, 1].astype(np.float32)


def _csr(
    data: NDArray[Any], columns: NDArray[np.integer[Any]], ends: NDArray[np.integer[Any]], width: int
) -> sparse.csr_matrix:
    """The sparse matrix of these. A service that makes none does without the fifth of a second that scipy takes."""
    from scipy import sparse

    return sparse.csr_matrix((data, columns, ends), shape=(len(ends) - 1, width))


# The columns of a text.


def _columns_of_all(texts: Sequence[str]) -> tuple[NDArray[np.int32], IntArray]:
    """`_columns`, in blocks, so that the keys of a large pool never lie in memory at once."""
    blocks = [_columns(texts[i : i + _TEXTS_AT_ONCE]) for i in range(0, max(len(texts), 1), _TEXTS_AT_ONCE)]
    return np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks])


def _columns(texts: Sequence[str]) -> tuple[NDArray[np.int32], IntArray]:
    """Distinct columns of each text, ascending, and how many each text has."""
    read = [text[:MAX_CHARACTERS] for text in texts]
    tokens = [[_token_hash(token) for token in _TOKEN.findall(text)] for text in read]
    token_row = np.repeat(np.arange(len(read)), [len(of_text) for of_text in tokens])
    token_hash = np.array([h for of_text in tokens for h in of_text], dtype=np.uint32)

    spaced = [f" {' '.join(parts)} " if (parts := text.lower().split()) else "" for text in read]
    joined = "".join(spaced).encode("utf-32-le", "surrogatepass")
    characters = np.frombuffer(joined, dtype=np.uint32)
    character_row = np.repeat(np.arange(len(read)), [len(text) for text in spaced])

    words = _grams(token_hash, token_row, None, _WORD_LENGTHS, 0)
    keys = np.concatenate([words, _grams(characters, character_row, characters == _SPACE, _CHARACTER_LENGTHS, _SIDE)])
    keys.sort()
    distinct = keys[np.diff(keys, prepend=-1) > 0]
    counts = np.bincount(distinct >> (_BITS + 1), minlength=len(read))
    return (distinct & (2 * _SIDE - 1)).astype(np.int32), counts


def _grams(
    values: NDArray[np.uint32],
    row: IntArray,
    is_space: NDArray[np.bool_] | None,
    lengths: range,
    first_column: int,
) -> IntArray:
    """row * 2^19 + column of each run of neighbouring values in a row. A space may only begin or end a run."""
    hashes, rows = [values[:0]], [row[:0]]
    rolling = values
    broken = np.zeros(len(values), dtype=bool)  # has a space inside
    for length in range(1, min(lengths.stop, len(values) + 1)):
        if length > 1:
            rolling = rolling[:-1] * _PRIME + values[length - 1 :]
            broken = broken[:-1] if length == 2 or is_space is None else broken[:-1] | is_space[length - 2 : -1]
        if length in lengths:
            whole = (row[: len(rolling)] == row[length - 1 :]) & ~broken
            hashes.append(rolling[whole] + np.uint32(length))
            rows.append(row[: len(rolling)][whole])
    column = _mixed(np.concatenate(hashes)) >> np.uint32(32 - _BITS)
    return (np.concatenate(rows) << (_BITS + 1)) + column + first_column


@lru_cache(maxsize=200_000)
def _token_hash(token: str) -> int:
    """CRC of the token: words in lower case, numbers of up to three digits as they are, others by their kind."""
    if token[0] in "0123456789":
        if "." in token:
            token = "#decimal"
        elif len(token) > 3:
            token = f"#{min(len(token), 8)}"
    elif token[0] != "\\":
        token = token.lower()
    return zlib.crc32(token.encode("utf-8", "replace"))


def _mixed(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The finishing steps of a multiplicative hash: every bit of the input reaches every bit of the result."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


# The regressions.


@dataclass(frozen=True, slots=True)
class _Ridge:
    """R = (folds + 1) x heads regressions; the last block of heads is fitted on every label."""

    sparse_F_R: NDArray[np.float32]
    dense_d_R: NDArray[np.float32]
    intercept_R: NDArray[np.float32]
    iterations: int


def _targets(rates: FloatArray, attempts: FloatArray, group_size: int) -> tuple[FloatArray, FloatArray]:
    """What the heads regress on, [n, H], and the Beta (a, b) of the labelled prompts' rates.

    The bare facts, informative or not and all solved or not, say less than the counts: 4 of 8 is surely informative, 1
    of 8 only perhaps. So the heads take their expectations for a further group, given the counts and that Beta.
    """
    mean = float(np.clip(np.average(rates, weights=attempts), 0.01, 0.99))
    spread = mean * (1.0 - mean)
    noise = spread * float(np.mean(1.0 / np.maximum(attempts, 1.0)))
    # Var(k / n) = Var(p) (1 - 1/n) + mean (1 - mean) / n
    variance = (float(np.mean((rates - mean) ** 2)) - noise) / max(1.0 - noise / spread, 0.1)
    a, b = beta_from_moments(np.array([mean]), np.array([np.clip(variance, 0.05 * spread, 0.9 * spread)]))
    own_a, own_b = a + rates * attempts, b + (1.0 - rates) * attempts
    informative, _ = informative_moments(own_a, own_b, group_size)
    solved = np.exp(sum(np.log((own_a + j) / (own_a + own_b + j)) for j in range(min(group_size, 64))))
    return np.stack([rates, informative, solved], axis=1), np.concatenate([a, b])


def _scaled(columns: NDArray[np.int32], counts: IntArray, rarity_F: FloatArray) -> tuple[NDArray[np.float32], IntArray]:
    """Value and row of each entry: weighted by rarity, the words of a row to unit length, the characters to theirs."""
    data = rarity_F[columns].astype(np.float32)
    row = np.repeat(np.arange(len(counts)), counts)
    is_character = columns >= _SIDE
    side = 2 * row + is_character
    norms = np.sqrt(np.bincount(side, data * data, 2 * len(counts))).astype(np.float32)
    norms[1::2] /= _CHARACTERS_SCALE
    data /= norms[side]
    return data, row


def _folds(matrix: sparse.csr_matrix, seed: int) -> IntArray:
    """Fold of each labelled row, int64 [n]: equal rows, equal folds, which differ by one text at most.

    Rows without n-grams are texts of their own, as are all rows where there are fewer texts than folds.
    """
    generator = np.random.default_rng(seed)
    signature_n = matrix @ generator.random(matrix.shape[1])
    signature_n[np.diff(matrix.indptr) == 0] = -generator.random(int((np.diff(matrix.indptr) == 0).sum()))
    _, text_n = np.unique(signature_n, return_inverse=True)
    if text_n.max() + 1 < N_FOLDS:
        text_n = np.arange(len(text_n))
    return np.asarray(generator.permutation(int(text_n.max()) + 1) % N_FOLDS)[text_n]


def _ridge(
    scaled: sparse.csr_matrix, dense_n_d: NDArray[np.float32], targets_n_H: FloatArray, weight_n_M: NDArray[np.float32]
) -> _Ridge:
    """Weighted ridge regressions of every head under every weighting, by conjugate gradients side by side.

    The dense block is preconditioned by its own inverse, so that the few hundred sparse directions that matter set
    the number of iterations; stopping early is a little more penalty.
    """
    n_heads = targets_n_H.shape[1]
    weight_n_R = np.repeat(weight_n_M, n_heads, axis=1)
    target_n_R = np.tile(targets_n_H.astype(np.float32), (1, weight_n_M.shape[1]))
    intercept_R = (weight_n_R * target_n_R).sum(axis=0) / weight_n_R.sum(axis=0)

    # n-grams of one labelled prompt hardly generalise; common columns first keeps the hot ones in the cache.
    counts = np.bincount(scaled.indices, minlength=scaled.shape[1])
    order = np.argsort(-counts, kind="stable")[: int((counts > 1).sum())]
    position = np.full(scaled.shape[1], -1, dtype=np.int32)
    position[order] = np.arange(len(order), dtype=np.int32)
    kept = position[scaled.indices] >= 0
    ends = np.concatenate([[0], np.cumsum(kept)])[scaled.indptr]
    x = _csr(scaled.data[kept], position[scaled.indices][kept], ends, len(order))
    xt = x.T.tocsr()

    d, penalty = dense_n_d.shape[1], np.float32(_PENALTY)
    average = weight_n_M.mean(axis=1, keepdims=True)
    inverse_d_d = np.linalg.inv(dense_n_d.T @ (dense_n_d * average) + penalty * np.eye(d)).astype(np.float32)

    def conditioned(residual: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([residual[:-d] / penalty, inverse_d_d @ residual[-d:]]) if d else residual / penalty

    def back(values_n_R: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([xt @ values_n_R, dense_n_d.T @ values_n_R])

    residual = back((target_n_R - intercept_R) * weight_n_R)  # [F + d, R]
    solution = np.zeros_like(residual)
    step = conditioned(residual)
    direction = step.copy()
    energy = start = np.einsum("fr,fr->r", residual, step)
    iterations = 0
    while iterations < _ITERATIONS and (energy > _TOLERANCE**2 * start).any():
        iterations += 1
        fitted = x @ direction[: len(order)] + dense_n_d @ direction[len(order) :]
        curved = back(fitted * weight_n_R) + penalty * direction
        length = energy / np.maximum(np.einsum("fr,fr->r", direction, curved), 1e-30)
        solution += length * direction
        residual -= length * curved
        step = conditioned(residual)
        previous, energy = energy, np.einsum("fr,fr->r", residual, step)
        direction = step + (energy / np.maximum(previous, 1e-30)) * direction

    sparse_F_R = np.zeros((scaled.shape[1], solution.shape[1]), dtype=np.float32)
    sparse_F_R[order] = solution[: len(order)]
    return _Ridge(sparse_F_R, solution[len(order) :], intercept_R.astype(np.float32), iterations)


def _bend(heads_n_H: FloatArray, centre_H: FloatArray, spread_H: FloatArray) -> FloatArray:
    """1, the standardised heads and their products, [n, 1 + H + H (H + 1) / 2]."""
    z = np.clip((heads_n_H - centre_H) / spread_H, -4.0, 4.0)
    return np.concatenate([np.ones((len(z), 1)), z, z[:, _PAIRS[0]] * z[:, _PAIRS[1]]], axis=1)


def _logistic(inputs_n_K: FloatArray, target_n: FloatArray, weight_n: FloatArray) -> FloatArray:
    """Coefficients [K] of a logistic regression on targets in [0, 1]; all but the intercept are penalised."""
    penalty_K = np.full(inputs_n_K.shape[1], _STACK_PENALTY)
    penalty_K[0] = 1e-3
    coefficients_K = np.zeros(inputs_n_K.shape[1])
    for _ in range(_NEWTON_STEPS):
        predicted = _rates(inputs_n_K @ coefficients_K)
        gradient = inputs_n_K.T @ (weight_n * (target_n - predicted)) - penalty_K * coefficients_K
        curvature = (inputs_n_K * (weight_n * predicted * (1.0 - predicted))[:, None]).T @ inputs_n_K
        coefficients_K += np.linalg.solve(curvature + np.diag(penalty_K), gradient)
    return coefficients_K


def _rates(log_odds: FloatArray) -> FloatArray:
    """Of log-odds, which count as +-7 at most."""
    return exact.sigmoid(np.clip(log_odds, -7.0, 7.0))


def _log_loss(predicted: FloatArray, target: FloatArray, weight: FloatArray) -> float:
    predicted = np.clip(predicted, 1e-3, 1.0 - 1e-3)
    return float(-np.average(target * np.log(predicted) + (1.0 - target) * np.log1p(-predicted), weights=weight))
