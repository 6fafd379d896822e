"""Our variant of the latent-context model: a Gaussian difficulty context, inferred exactly from all of the history.

The decoder is bilinear in features of the prompt and the context: g(x, z) = phi(x)' z. phi holds the features and
radial kernels to landmark prompts, so that the posterior of z given every observation replayed is one linear solve
instead of an encoder's guess, and a million prompts are predicted by one matrix product. A Beta-binomial calibration
turns g into a success rate and the probability that a group is informative. Every prompt is predicted by a fit that
left its own outcomes out. Knows nothing of runs or embedders.

Axes: N prompts, U prompts with observations, n observations, d inputs, F features phi, O = 2 heads (rate, informative).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenodds_service.domain.arrays import BoolArray, FloatArray, IntArray
from evenodds_service.model.history import History
from evenodds_service.model.latent import (
    LOG_CONCENTRATIONS,
    RATES,
    ROWS_AT_ONCE,
    SLOPE,
    UNIT,
    Landmarks,
    LatentPrior,
    design,
    kernel,
    landmarks_of,
    outputs,
)

FOLDS = 6
MAX_LANDMARKS, PROMPTS_PER_LANDMARK = 400, 4
PENALTIES = (1.0, 3.0, 8.0, 24.0, 64.0)
MEMORY_STEPS = 50.0
MAX_OBSERVATIONS = 100_000
LEVEL_WINDOW = 128
CALIBRATION_OBSERVATIONS = 250

_MIN_LANDMARKS = 150
_LINEAR_SHARE, _KERNEL_SHARE = 0.3, 0.3
_JITTER = 1e-4
_NOISE_RATIO = 0.8  # variance of one attempt over that between prompts which the features leave
_CALIBRATION_START = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
_CALIBRATION_PRECISION = (4.0, 1.0, 20.0, 20.0, 4.0, 20.0)

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class FittedLatent:
    """What a fit gives.

    Attributes:
        mean_N, informative_N: float32 [N] in (0, 1): success rate, and probability that a group of the fit's size is
            informative, of every prompt of the pool. An observed prompt's own outcomes did not take part in either.
        weights: For `LatentPrior`, which predicts new prompts.
        report: `observations`, `prompts`; and of the newest observations, predicted without their prompts' outcomes:
            `rate_correlation`, `log_loss` per attempt, `level_log_loss` of the policy's mean rate alone (what the text
            has to beat), and `informative_log_loss` per group.
    """

    mean_N: NDArray[np.float32]
    informative_N: NDArray[np.float32]
    weights: Weights
    report: dict[str, float]


def fit_latent(
    history: History, x_N_d: FloatArray, *, n_surface: int, group_size: int, seed: int, device: torch.device
) -> FittedLatent:
    """Infer the context from the history and predict the pool.

    Exact but for the calibration's few Newton-like iterations, so there is nothing to warm-start and nothing to stop
    early: the work is bounded by O(U F^2 + N F d). Deterministic in its arguments on a CPU. A prompt's own outcomes
    enter its prediction only through what all prompts share: the level, the penalties' shares and six parameters.

    Args:
        history: At least one observation, the newest `MAX_OBSERVATIONS` of which count; prompts index the rows of x.
        x_N_d: The pool's inputs, as `domain.pool.Basis` projects them; column 0 is the constant.
        n_surface: Columns in front of the embedding's components (`Basis.n_surface`).
        group_size: G, at least 1, of the groups whose informativeness is predicted. For 1: of a pair.
        seed: Of the choice of landmarks.

    Raises:
        ValueError: the history is empty or names a prompt that x does not have.
    """
    if not len(history):
        raise ValueError("history: no observations to fit the latent-context model on")
    if int(history.prompts.max()) >= len(x_N_d):
        raise ValueError(f"history names prompt {int(history.prompts.max())}, the pool has {len(x_N_d)}")
    history = history.rows(np.argsort(history.steps, kind="stable")[-MAX_OBSERVATIONS:])
    prompts_U, row_n = np.unique(history.prompts, return_inverse=True)
    weights = _choose_kernels(x_N_d, n_surface, n_observed=len(prompts_U), seed=seed)
    whitening_F_F = _whitening(weights)
    design_U_F = design(weights["scales"], landmarks_of(weights), x_N_d[prompts_U])
    context = _Context(design_U_F @ whitening_F_F, _worth(history, row_n), _folds(prompts_U), device)

    rates_n = history.successes / history.attempts
    levels_n = _level(rates_n)
    shares_n = history.attempts * _recency(history)
    rate_F, rate_U = context.infer(_mean_by(row_n, rates_n - levels_n, shares_n))
    shape_n = _unexpected(history, levels_n + rate_U[row_n])
    shape_F, shape_U = context.infer(_mean_by(row_n, shape_n, shares_n))
    held_U_O = np.stack([rate_U, shape_U], axis=1)

    newest = slice(max(0, len(history) - 6 * CALIBRATION_OBSERVATIONS), None)
    recent = history.rows(newest)
    level_logits_n, held_n_O = _logit(levels_n[newest]), held_U_O[row_n[newest]]
    calibration = _calibrate(recent, level_logits_n, held_n_O)
    weights["coefficients"] = (whitening_F_F @ np.stack([rate_F, shape_F], axis=1)).astype(np.float32)
    weights["calibration"] = np.array([group_size, level_logits_n[-1], *calibration], dtype=np.float32)
    mean_N, informative_N = LatentPrior(weights).predict(x_N_d)
    mean_N[prompts_U], informative_N[prompts_U] = outputs(weights["calibration"], held_U_O)
    report = {"observations": float(len(history)), "prompts": float(len(prompts_U))}
    report |= _held_out_report(recent, calibration, level_logits_n, held_n_O)
    return FittedLatent(mean_N, informative_N, weights, report)


class _Context:
    """The posterior mean of z, once from all prompts and once without each fold of them.

    z ~ N(0, I / penalty) and y = phi' z + noise: mean = (sum worth phi phi' + penalty I)^-1 sum worth phi y. The
    penalties are averaged with the weights that their held-out Gaussian likelihoods give them.
    """

    def __init__(self, phi_U_F: FloatArray, worth_U: FloatArray, fold_U: IntArray, device: torch.device) -> None:
        self._device = device
        self._rows = [np.flatnonzero(fold_U == fold) for fold in range(FOLDS)]
        self._phis = [self._tensor(phi_U_F[rows]) for rows in self._rows]
        self._worths = [self._tensor(worth_U[rows]) for rows in self._rows]
        grams = [(phi * worth[:, None]).T @ phi for phi, worth in zip(self._phis, self._worths, strict=True)]
        left_out = _left_out(torch.stack(grams))  # [FOLDS + 1, F, F]
        eye = torch.eye(left_out.shape[-1], dtype=torch.float64, device=device)
        self._factors = [torch.linalg.cholesky(left_out + penalty * eye) for penalty in PENALTIES]

    def infer(self, y_U: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The mean of z given all prompts, float64 [F], and phi' z of each prompt without its fold, float64 [U]."""
        ys = [self._tensor(y_U[rows]) for rows in self._rows]
        folds = list(zip(self._phis, self._worths, ys, strict=True))
        left_out = _left_out(torch.stack([phi.T @ (worth * y) for phi, worth, y in folds]))  # [FOLDS + 1, F]
        solved = [torch.cholesky_solve(left_out[..., None], factor)[..., 0] for factor in self._factors]
        z = torch.stack(solved, dim=-1)  # [FOLDS + 1, F, penalties]
        held = [phi @ z[fold].float() for fold, phi in enumerate(self._phis)]  # [., penalties] each
        errors = sum(
            ((y[:, None] - g) ** 2 * worth[:, None]).sum(dim=0) for g, (_, worth, y) in zip(held, folds, strict=True)
        )
        n_effective = sum(float(worth.sum()) for worth in self._worths)
        shares = torch.softmax(-0.5 * n_effective * torch.log(torch.as_tensor(errors).double() + 1e-9), dim=0)
        held_U = np.zeros(len(y_U))
        for rows, g in zip(self._rows, held, strict=True):
            held_U[rows] = (g.double() @ shares).cpu().numpy()
        return (z[-1] @ shares).cpu().numpy(), held_U

    def _tensor(self, values: FloatArray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32).to(self._device)


def _left_out(sums: Tensor) -> Tensor:
    """From sums per fold [FOLDS, ...] those over all other folds, and behind them that over all, float64."""
    total = sums.double().sum(dim=0, keepdim=True)
    return torch.cat([total - sums.double(), total])


def _choose_kernels(x_N_d: FloatArray, n_surface: int, *, n_observed: int, seed: int) -> Weights:
    """Landmark prompts [M, d], and the scale of each column in each kernel [kernels, d].

    One radial kernel sees the surface features, a second one all inputs, each block with equal weight.
    """
    n = len(x_N_d)
    n_landmarks = min(max(n_observed // PROMPTS_PER_LANDMARK, _MIN_LANDMARKS), MAX_LANDMARKS)
    rows = np.sort(np.random.default_rng(seed).permutation(n)[:n_landmarks])
    sample = x_N_d[:: max(1, n // ROWS_AT_ONCE)].astype(np.float64)
    squares_d = (sample * sample).mean(axis=0)
    squares_d[0] = 0.0
    surface, embedding = (np.zeros(len(squares_d)) for _ in range(2))
    surface[1:n_surface] = 1.0 / math.sqrt(max(squares_d[:n_surface].sum(), 1e-9))
    embedding[n_surface:] = 1.0 / math.sqrt(max(squares_d[n_surface:].sum(), 1e-9))
    both = np.sqrt(0.5) * (surface + embedding)
    scales = [surface, both] if embedding.any() else [surface]
    return {"landmarks": x_N_d[rows].astype(np.float32), "scales": np.stack(scales).astype(np.float32)}


def _whitening(weights: Mapping[str, NDArray[np.float32]]) -> FloatArray:
    """The matrix [F, F] that turns the design into phi, whose entries are independent a priori (Nystroem)."""
    n_linear = int(np.count_nonzero(weights["scales"][0]))
    n_landmarks = len(weights["landmarks"])
    whitening = np.zeros((n_linear + n_landmarks * len(weights["scales"]),) * 2)
    whitening[:n_linear, :n_linear] = math.sqrt(_LINEAR_SHARE) * np.eye(n_linear)
    for i, scale in enumerate(weights["scales"].astype(np.float64)):
        landmarks = weights["landmarks"] * scale
        gram = kernel(landmarks, Landmarks.of(landmarks)) + _JITTER * np.eye(n_landmarks)
        block = slice(n_linear + i * n_landmarks, n_linear + (i + 1) * n_landmarks)
        whitening[block, block] = math.sqrt(_KERNEL_SHARE) * np.linalg.inv(np.linalg.cholesky(gram)).T
    return whitening.astype(np.float32)


def _folds(prompts_U: IntArray) -> IntArray:
    """Fold of each prompt: a hash, so that it does not follow an order that the pool may have."""
    return np.asarray((prompts_U * 2_654_435_761 % 2**32) // 2**16 % FOLDS)


def _recency(history: History) -> FloatArray:
    return np.asarray(np.exp((history.steps - history.steps[-1]) / MEMORY_STEPS))


def _worth(history: History, row_n: IntArray) -> FloatArray:
    """Weight of each prompt's mean outcome: attempts on one prompt repeat one another, [U] in (0, 1)."""
    attempts_U = np.bincount(row_n, weights=history.attempts * np.maximum(_recency(history), 1e-3))
    return np.asarray(attempts_U / (attempts_U + _NOISE_RATIO))


def _mean_by(row_n: IntArray, values_n: FloatArray, shares_n: FloatArray) -> FloatArray:
    shares_n = np.maximum(shares_n, 1e-12)
    return np.asarray(np.bincount(row_n, weights=shares_n * values_n) / np.bincount(row_n, weights=shares_n))


def _level(rates_n: FloatArray) -> FloatArray:
    """Mean rate around each observation in order of steps: the difficulty of the moment for this policy, in (0, 1)."""
    n = len(rates_n)
    half = LEVEL_WINDOW // 2
    sums = np.concatenate([[0.0], np.cumsum(rates_n)])
    first, last = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half, n)
    return np.asarray((sums[last] - sums[first] + 0.5) / (last - first + 1.0))


def _unexpected(history: History, rates_n: FloatArray) -> FloatArray:
    """How much more often a group was informative than its rate alone suggests, [n]; 0 for a single attempt.

    What a rate suggests is c + d p (1 - p) by least squares.
    """
    decided = history.attempts > 1
    rates_n = np.clip(rates_n, *RATES)
    columns = np.stack([np.ones(len(rates_n)), rates_n * (1.0 - rates_n)], axis=1) * decided[:, None]
    gram = columns.T @ columns + 0.1 * np.eye(2)
    return np.asarray(decided * history.informative - columns @ np.linalg.solve(gram, columns.T @ history.informative))


def _calibrate(history: History, level_logits_n: FloatArray, held_n_O: FloatArray) -> FloatArray:
    """The six parameters of `_belief`, by their posterior mode under the Beta-binomial likelihood of held-out outcomes.

    Newer observations count more.
    """
    weight = torch.as_tensor(np.exp(np.arange(1 - len(history), 1) / CALIBRATION_OBSERVATIONS))
    k, counts = torch.as_tensor(history.successes).double(), torch.as_tensor(history.attempts).double()
    informative = torch.as_tensor(history.informative).double()
    decided = (counts > 1).double()  # one attempt cannot show whether a group is informative
    levels, held = torch.as_tensor(level_logits_n).double(), torch.as_tensor(held_n_O).double()
    start, precision = torch.tensor(_CALIBRATION_START).double(), torch.tensor(_CALIBRATION_PRECISION).double()
    parameters = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([parameters], max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        a, b, shift = _belief(parameters, levels, held)
        outcome = _log_rising(a, k) + _log_rising(b, counts - k) - _log_rising(a + b, counts)
        logits = _informative_logits(a, b, torch.clamp(counts, min=2.0)) + shift
        seen = -torch.nn.functional.binary_cross_entropy_with_logits(logits, informative, reduction="none")
        prior = 0.5 * (precision * (parameters - start) ** 2).sum()
        total = prior - (weight * (outcome + decided * seen)).sum()
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return np.asarray(parameters.detach().numpy())


def _belief(parameters: Tensor, level_logits: Tensor, held_n_O: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Beta parameters (a, b) of a prompt's rate, and the shift of its informative log-odds, [n] each.

    mean = sigmoid(level + t0 g_rate + t1), log(a + b) = t2 + t3 g_shape, shift = t4 + t5 g_shape, with g in units of
    a tenth.
    """
    g = held_n_O / UNIT
    mean = torch.sigmoid(level_logits + parameters[0] * SLOPE * g[:, 0] + parameters[1]).clamp(*RATES)
    concentration = torch.exp((parameters[2] + parameters[3] * g[:, 1]).clamp(*LOG_CONCENTRATIONS))
    return mean * concentration, (1.0 - mean) * concentration, parameters[4] + parameters[5] * g[:, 1]


def _informative_logits(a: Tensor, b: Tensor, group_size: Tensor) -> Tensor:
    """Log-odds of V_G = 1 - (a)_G / (a+b)_G - (b)_G / (a+b)_G."""
    total = _log_rising(a + b, group_size)
    silent = torch.exp(_log_rising(a, group_size) - total) + torch.exp(_log_rising(b, group_size) - total)
    silent = silent.clamp(*RATES)
    return torch.log1p(-silent) - torch.log(silent)


def _log_rising(x: Tensor, m: Tensor) -> Tensor:
    """log (x)_m, the rising factorial."""
    return torch.lgamma(x + m) - torch.lgamma(x)


def _held_out_report(
    history: History, calibration: FloatArray, level_logits_n: FloatArray, held_n_O: FloatArray
) -> dict[str, float]:
    levels, parameters = torch.as_tensor(level_logits_n), torch.as_tensor(calibration)
    a, b, shift = _belief(parameters, levels, torch.as_tensor(held_n_O))
    groups = torch.as_tensor(np.maximum(history.attempts, 2.0))
    informative = torch.sigmoid(_informative_logits(a, b, groups) + shift).numpy()
    rates, means = history.successes / history.attempts, (a / (a + b)).numpy()
    spread = float(rates.std() * means.std())
    covariance = float(((rates - rates.mean()) * (means - means.mean())).mean())
    attempts = history.attempts
    return {
        "rate_correlation": covariance / spread if spread > 0 else 0.0,
        "log_loss": float(np.average(_log_loss(rates, means), weights=attempts)),
        "level_log_loss": float(np.average(_log_loss(rates, torch.sigmoid(levels).numpy()), weights=attempts)),
        "informative_log_loss": float(_log_loss(history.informative, informative).mean()),
    }


def _log_loss(outcomes_n: FloatArray | BoolArray, predicted_n: FloatArray) -> FloatArray:
    return np.asarray(-(outcomes_n * np.log(predicted_n) + (1.0 - outcomes_n) * np.log1p(-predicted_n)))


def _logit(rates: FloatArray) -> FloatArray:
    return np.asarray(np.log(rates / (1.0 - rates)))
