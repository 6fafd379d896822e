"""What a fitted latent-context prior says: features of a prompt times the inferred context, in numpy alone.

The decoder is bilinear in features of the prompt and the context: g(x, z) = phi(x)' z. phi holds the surface features
and radial kernels to landmark prompts, so that a million prompts are predicted by one matrix product. A Beta-binomial
calibration turns g into a success rate and the probability that a group is informative. How z and the calibration are
found is the business of `latent_fit`.

Axes: N prompts, d inputs, F features phi, O = 2 heads (rate, informative).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evenodds_service.domain import exact
from evenodds_service.domain.arrays import FloatArray
from evenodds_service.domain.distributions import informative_probability

UNIT = 0.1
"""The order of g."""
SLOPE = 4.0 * UNIT
"""Of the log-odds of the rate in units of g, at one half."""
RATES = (1e-3, 1.0 - 1e-3)
LOG_CONCENTRATIONS = (-3.0, 4.0)
ROWS_AT_ONCE = 16_384

_BANDWIDTH = 0.5
_DESIGNED_AT_ONCE = 2_048


class LatentPrior:
    """What a fit says of prompts outside the pool. What every prediction needs of its weights is computed once.

    Args:
        weights: Of a fit.
    """

    def __init__(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        self._scales = weights["scales"]
        self._landmarks = landmarks_of(weights)
        self._coefficients = exact.Factor.of(weights["coefficients"])
        self._calibration = weights["calibration"]

    def predict(self, x_N_d: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Success rate and informative probability, float32 [N] each, in (0, 1).

        Args:
            x_N_d: Inputs under the basis of the fit.

        Raises:
            ValueError: the inputs are not as wide as the fit's.
        """
        width = self._scales.shape[1]
        if x_N_d.shape[1] != width:
            raise ValueError(f"the model was fitted on {width} inputs, these have {x_N_d.shape[1]}: refit it")
        parts = [
            exact.product(
                design(self._scales, self._landmarks, x_N_d[first : first + _DESIGNED_AT_ONCE]), self._coefficients
            )
            for first in range(0, len(x_N_d), _DESIGNED_AT_ONCE)
        ]
        return outputs(self._calibration, np.concatenate([np.zeros((0, 2)), *parts]))


@dataclass(frozen=True, slots=True, eq=False)
class Landmarks:
    """M landmark prompts under the scale of one kernel, as products with other prompts need them, and their squares."""

    factor: exact.Factor
    squares_M: FloatArray

    @staticmethod
    def of(landmarks_M_d: FloatArray) -> Landmarks:
        """Of scaled inputs."""
        return Landmarks(exact.Factor.of(landmarks_M_d.T), _squares(landmarks_M_d))


def landmarks_of(weights: Mapping[str, NDArray[np.float32]]) -> tuple[Landmarks, ...]:
    """Of each kernel."""
    return tuple(Landmarks.of(weights["landmarks"] * scale) for scale in weights["scales"])


def design(scales: NDArray[np.float32], landmarks: Sequence[Landmarks], x_N_d: FloatArray) -> NDArray[np.float32]:
    """The scaled surface features and the kernels between prompts and landmarks, float32 [N, F]."""
    surface = np.flatnonzero(scales[0])
    blocks = [x_N_d[:, surface] * scales[0, surface]]
    blocks += [kernel(x_N_d * scale, of_kernel) for scale, of_kernel in zip(scales, landmarks, strict=True)]
    return np.concatenate(blocks, axis=1).astype(np.float32, copy=False)


def kernel(rows_N_d: FloatArray, landmarks: Landmarks) -> FloatArray:
    """exp(-|a - b|^2 / (2 bandwidth^2)), [N, M] in the precision of the rows; a row depends on its prompt alone."""
    squares = exact.product(rows_N_d, landmarks.factor)
    squares *= -2.0
    squares += _squares(rows_N_d)[:, None]
    squares += landmarks.squares_M
    np.maximum(squares, 0.0, out=squares)
    return exact.exp((squares * (-0.5 / _BANDWIDTH**2)).astype(rows_N_d.dtype))


def _squares(rows_N_d: FloatArray) -> FloatArray:
    """|a|^2 of each row, float64 [N]."""
    return np.asarray((rows_N_d * rows_N_d).sum(axis=1, dtype=np.float64))


def outputs(calibration: FloatArray, held_n_O: FloatArray) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean rate and informative probability from the two heads, float32 [n] each.

    mean = sigmoid(level + t0 g_rate + t1), log(a + b) = t2 + t3 g_shape, and the log-odds of V_G are shifted by
    t4 + t5 g_shape, with g in units of a tenth.

    Args:
        calibration: Group size, level, t0 .. t5.
        held_n_O: g of each prompt, [n, 2].
    """
    group_size, level, *t = (float(value) for value in calibration)
    g = held_n_O.astype(np.float64) / UNIT
    mean = np.clip(exact.sigmoid(level + t[0] * SLOPE * g[:, 0] + t[1]), *RATES)
    concentration = exact.exp(np.clip(t[2] + t[3] * g[:, 1], *LOG_CONCENTRATIONS))
    a, b = mean * concentration, (1.0 - mean) * concentration
    silent = np.clip(1.0 - informative_probability(a, b, max(round(group_size), 2)), *RATES)
    informative = exact.sigmoid(t[4] + t[5] * g[:, 1] - exact.log_odds(silent))
    return mean.astype(np.float32), informative.astype(np.float32)
