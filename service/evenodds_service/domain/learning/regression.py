"""Online Bayesian logistic regression: the shared prior that learns from every observe call.

A Gaussian over the weights, N(w, L^-1), updated by Laplace's approximation with forgetting (algorithm section 3).
Knows nothing of prompts; rows of x are features, targets are successes of attempts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray

PRIOR_VARIANCE = 0.03
INTERCEPT_VARIANCE = 1.0
SLOPE_VARIANCE = 0.05
"""Of the weight of a prior's log-odds around an equal share."""
OVERDISPERSION = 1.0
FEATURE_STEP = 2.0**-16
"""Features are taken as multiples of this, so that the sums in a prediction are exact (see `exact`)."""
FEATURE_BITS = 25
"""Of a feature in units of that step: it lies within 512."""

_NEWTON_STEPS = 6
_SMALL_STEP = 1e-6
_ROWS = 1_024


@dataclass
class OnlineLogistic:
    """Weights w [d] and precision L [d, d]; `prior_precision` [d] is the diagonal of L0. Column 0 is the constant."""

    weights: FloatArray
    precision: FloatArray
    prior_precision: FloatArray

    def __post_init__(self) -> None:
        # F' with F'F = L^-1, and w, side by side, kept between updates. No field: it is no part of what was learned.
        self._products: exact.Columns | None = None

    @staticmethod
    def new(width: int) -> OnlineLogistic:
        prior_precision = np.full(width, 1.0 / PRIOR_VARIANCE)
        prior_precision[0] = 1.0 / INTERCEPT_VARIANCE
        return OnlineLogistic(np.zeros(width), np.diag(prior_precision), prior_precision)

    @staticmethod
    def averaging(n_inputs: int) -> OnlineLogistic:
        """Starts as the mean of `n_inputs` log-odds, columns 1 .. n_inputs, with an offset of 0."""
        return OnlineLogistic.starting(np.full(n_inputs, 1.0 / n_inputs), np.full(n_inputs, SLOPE_VARIANCE))

    @staticmethod
    def starting(slopes: FloatArray, variances: FloatArray) -> OnlineLogistic:
        """Starts with these weights of columns 1 .. d-1, each with its prior variance, and an offset of 0."""
        prior_precision = np.concatenate(([1.0 / INTERCEPT_VARIANCE], 1.0 / variances))
        return OnlineLogistic(np.concatenate(([0.0], slopes)), np.diag(prior_precision), prior_precision)

    def widened(self) -> OnlineLogistic:
        """The same with one more column, whose weight starts at 0."""
        d = len(self.weights)
        prior_precision = np.append(self.prior_precision, 1.0 / SLOPE_VARIANCE)
        precision = np.diag(prior_precision)
        precision[:d, :d] = self.precision
        return OnlineLogistic(np.append(self.weights, 0.0), precision, prior_precision)

    def forget(self, keep: float) -> None:
        """L <- keep L + (1 - keep) L0: older evidence counts less, the prior stays."""
        self._products = None
        self.precision *= keep
        self.precision[np.diag_indices_from(self.precision)] += (1.0 - keep) * self.prior_precision

    def update(
        self, x_n_d: FloatArray, successes_n: FloatArray, counts_n: FloatArray, worth_n: FloatArray | None = None
    ) -> None:
        """Condition on n observations, in any order.

        w <- argmax of sum_i n_eff [y log s + (1-y) log(1-s)] - (w - w_old)' L (w - w_old) / 2 by Newton's method;
        L <- L + sum_i n_eff s(1-s) x x'.

        Args:
            x_n_d: Features, [n, d].
            successes_n: 0 <= successes <= counts, [n].
            counts_n: Attempts, at least 1, [n].
            worth_n: n_eff; that of the counts without it, [n].
        """
        x = np.asarray(x_n_d, dtype=np.float64)
        rates = successes_n / counts_n
        worth = effective_count(counts_n) if worth_n is None else worth_n
        start, prior = self.weights, self.precision
        w, log_odds = start, exact.weighted(x, start)
        for _ in range(_NEWTON_STEPS):
            s = exact.sigmoid(log_odds)
            gradient = (x * (worth * (rates - s))[:, None]).sum(axis=0) - exact.weighted(prior, w - start)
            curvature = prior + exact.gram(x * np.sqrt(worth * s * (1.0 - s))[:, None], is_rough=True)
            step = exact.solve(curvature, gradient)
            moved = exact.weighted(x, step)
            largest = float(np.abs(moved).max(initial=0.0))
            share = min(1.0, 4.0 / max(largest, 1e-12))
            w, log_odds = w + share * step, log_odds + share * moved
            if largest < _SMALL_STEP:  # the next step would be of the order of its square
                break
        s = exact.sigmoid(log_odds)
        self.weights = w
        self.precision = prior + exact.gram(x * np.sqrt(worth * s * (1.0 - s))[:, None])
        self._products = None

    def adopt(self, other: OnlineLogistic, old_x_n_d: FloatArray, new_x_n_d: FloatArray) -> None:
        """Take over what another regression learned on other features of the same prompts.

        With old_x ~ new_x M and new_x ~ old_x K by least squares: w <- M w_old, which keeps the function, and
        L <- K' (L_old - L0) K + L0, which keeps its evidence; what old_x does not show stays at the prior.

        Args:
            old_x_n_d: Features that `other` was trained on, [n, d_old].
            new_x_n_d: Features of the same n prompts for this regression, [n, d].
        """
        old_x, new_x = old_x_n_d.astype(np.float64), new_x_n_d.astype(np.float64)
        m = _least_squares(new_x, old_x)  # [d, d_old]
        k = _least_squares(old_x, new_x)  # [d_old, d]
        learned = other.precision - np.diag(other.prior_precision)
        self.weights = exact.weighted(m, other.weights)
        carried = exact.product(exact.product(k.T, learned), k)
        self.precision = 0.5 * (carried + carried.T) + np.diag(self.prior_precision)
        self._products = None

    def copy(self) -> OnlineLogistic:
        """One of its own, which the other's updates leave alone."""
        twin = OnlineLogistic(self.weights.copy(), self.precision.copy(), self.prior_precision)
        twin._products = self._products
        return twin

    def log_odds(self, x_N_d: FloatArray) -> FloatArray:
        """Log-odds of success at the most likely weights, [N]. In single precision; alike in any company."""
        weights = exact.Columns.of(self.weights[:, None], x_bits=FEATURE_BITS)
        log_odds = np.empty(len(x_N_d), dtype=np.float32)
        for rows in _blocks(len(x_N_d)):
            log_odds[rows] = weights.times(_in_steps(x_N_d[rows]))[:, 0] * (weights.unit_m[0] * FEATURE_STEP)
        return log_odds

    def mode(self, x_N_d: FloatArray) -> FloatArray:
        """Success rate at the most likely weights, float32 [N] in (0, 1), for few inputs of any size; NaN stays NaN."""
        x = np.asarray(x_N_d, dtype=np.float32)
        log_odds = np.zeros(len(x), dtype=np.float32)
        for column, weight in zip(x.T, self.weights.astype(np.float32), strict=True):
            log_odds += column * weight
        return exact.sigmoid(log_odds)

    def predict(self, x_N_d: FloatArray) -> FloatArray:
        """Mean success rate, [N] in (0, 1): sigmoid( w'x / sqrt(1 + pi v / 8) ), v = x' L^-1 x (MacKay's formula).

        In single precision. What is said of a prompt does not depend, not even in its last bit, on the others that are
        asked for, on the processor or on the number of threads.

        Args:
            x_N_d: Features within 512, taken as multiples of `FEATURE_STEP`.
        """
        products = self._products
        if products is None:
            factors = np.concatenate((exact.inverse_factor(self.precision).T, self.weights[:, None]), axis=1)
            products = self._products = exact.Columns.of(factors, x_bits=FEATURE_BITS)
        log_odds = np.empty(len(x_N_d), dtype=np.float32)
        units = products.unit_m * FEATURE_STEP
        for rows in _blocks(len(x_N_d)):
            product = products.times(_in_steps(x_N_d[rows]))
            product *= units
            logit, product = product[:, -1].copy(), product[:, :-1]
            product *= product
            log_odds[rows] = logit / np.sqrt(1.0 + np.pi / 8.0 * product.sum(axis=1))
        return exact.sigmoid(log_odds)


def _blocks(n: int) -> list[slice]:
    """The rows in blocks that stay in the processor's cache."""
    return [slice(first, first + _ROWS) for first in range(0, n, _ROWS)]


def _in_steps(x_n_d: FloatArray) -> FloatArray:
    """The features as whole numbers of steps, float64."""
    steps = np.multiply(x_n_d, 1.0 / FEATURE_STEP, dtype=np.float64)
    return np.rint(steps, out=steps)


def effective_count(counts: FloatArray) -> FloatArray:
    """n_eff = n / [2 (1 + (n-1) / (s+1))]: attempts on one prompt repeat one another; 8 are worth about one."""
    return np.asarray(counts / (2.0 * (1.0 + (counts - 1.0) / (OVERDISPERSION + 1.0))))


def further_count(counts: FloatArray, before: FloatArray) -> FloatArray:
    """n_eff of these attempts behind `before` earlier ones on the same prompt: what they add to its n_eff."""
    return effective_count(before + counts) - np.where(before > 0.0, effective_count(before), 0.0)


def _least_squares(x_n_d: FloatArray, y_n_e: FloatArray) -> FloatArray:
    """M [d, e] with y ~ x M, with a ridge small against features of size one."""
    ridge = 1e-3 * len(x_n_d) * np.eye(x_n_d.shape[1])
    return exact.solve(exact.gram(x_n_d) + ridge, exact.product(x_n_d.T, y_n_e))
